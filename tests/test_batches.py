"""Batches of stored trajectories: orders, epochs, mixtures, saved places, and the rows of each process."""

import dataclasses
import json

import pytest
from test_store import METADATA, make_record, write_missing

from cdlm_jax.config import InputError
from cdlm_jax.training import batches as batching
from cdlm_jax.training.batches import FIELDS, trajectory_batches
from cdlm_jax.trajectories.store import Store, read


@pytest.fixture(scope="module")
def random_store(tmp_path_factory):
    """22 records without meaning."""
    store = Store.create_or_resume(tmp_path_factory.mktemp("random"), METADATA)
    write_missing(store)
    return read(store.folder)


def take(iterator, count):
    """The next batches, as the records' indices."""
    names = {make_record(METADATA, i)["tokens"].tobytes(): i for i in range(METADATA.num_records)}
    batches = [next(iterator) for _ in range(count)]
    return [[names[tokens.tobytes()] for tokens in batch["tokens"]] for batch in batches]


def test_batches_are_the_records_without_what_the_loss_does_not_read(random_store):
    batch = next(iter(trajectory_batches([random_store], 4, seed=1)))
    assert batch.keys() == set(FIELDS)
    for row, index in enumerate(take(iter(trajectory_batches([random_store], 4, seed=1)), 1)[0]):
        record = make_record(METADATA, index)
        for name in FIELDS:
            assert batch[name].dtype == record[name].dtype
            assert batch[name][row].tobytes() == record[name].tobytes()


def test_every_epoch_is_another_permutation(random_store):
    batches = take(iter(trajectory_batches([random_store], 11, seed=1)), 6)
    epochs = [sum(batches[i : i + 2], []) for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert take(iter(trajectory_batches([random_store], 11, seed=1)), 6) == batches
    assert take(iter(trajectory_batches([random_store], 11, seed=2)), 2) != batches[:2]


def test_batches_continue_from_a_saved_place(random_store):
    batches = take(iter(trajectory_batches([random_store], 4, seed=1)), 14)  # over two ends of epochs, inside batches
    for place in (0, 3, 6):
        iterator = iter(trajectory_batches([random_store], 4, seed=1))
        take(iterator, place)
        saved = json.loads(json.dumps(iterator.get_state()))
        continued = iter(trajectory_batches([random_store], 4, seed=1))
        continued.set_state(saved)
        assert take(continued, 14 - place) == batches[place:]


def test_a_store_smaller_than_a_batch_is_refused(random_store):
    with pytest.raises(InputError, match="batch_size 23 exceeds the 22 records of "):
        trajectory_batches([random_store], 23, seed=1)


# ---- several stores ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_stores(random_store, tmp_path_factory):
    """The 22 records, and 10 others."""
    other = dataclasses.replace(METADATA, seed=4, num_records=10)
    store = Store.create_or_resume(tmp_path_factory.mktemp("other"), other)
    write_missing(store)
    return [random_store, read(store.folder)]


def drawn(stores, count, size=10, **options):
    """(store, record) of the next batches."""
    names = {store[i]["tokens"].tobytes(): (s, i) for s, store in enumerate(stores) for i in range(len(store))}
    iterator = iter(trajectory_batches(stores, size, seed=1, **options))
    return [[names[tokens.tobytes()] for tokens in next(iterator)["tokens"]] for _ in range(count)]


def test_stores_are_mixed_by_weight(two_stores):
    for weights, share in (((), 0.5), ((3.0, 1.0), 0.25), ((1.0, 4.0), 0.8)):
        records = sum(drawn(two_stores, 20, weights=weights), [])
        of_second = [record for store, record in records if store == 1]
        assert len(of_second) == pytest.approx(share * 200, abs=2)
        assert sorted(of_second[:10]) == list(range(10))  # each store has epochs of its own
        first = [record for store, record in records if store == 0]
        assert sorted(first[:22]) == list(range(22))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (-1.0, 1.0), (float("inf"), 1.0), (float("nan"), 1.0)])
def test_weights_that_cannot_be(two_stores, weights):
    with pytest.raises(InputError, match="store_weights must be positive and finite, got "):
        trajectory_batches(two_stores, 4, seed=1, weights=weights)


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_batches_of_one(two_stores, processes, monkeypatch):
    whole = drawn(two_stores, 7)
    size = 10 // processes
    parts = []
    for process in range(processes):
        own = range(process * size, (process + 1) * size)
        monkeypatch.setattr(batching, "own_rows", lambda rows, own=own: list(own))
        parts.append(drawn(two_stores, 7))
    assert [sum((part[batch] for part in parts), []) for batch in range(7)] == whole
