"""The trajectory store: round trip, continuation after kills, refusals, full disks."""

import dataclasses
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from cdlm_jax.config import InputError
from cdlm_jax.trajectories import store as store_module
from cdlm_jax.trajectories.store import Metadata, Store, bytes_per_shard, load_metadata, read

METADATA = Metadata(
    model_fingerprint="teacher-1",
    tokenizer_fingerprint="characters-1",
    prompt_length=6,
    gen_length=8,
    block_size=4,
    hidden_size=16,
    logit_alignment="shifted",
    mask_token_id=1,
    eos_token_id=0,
    temperatures=(0.0, 0.5),
    tasks=("sort", "sudoku"),
    source="tests",
    seed=3,
    num_records=22,
    shard_size=4,
)


def make_record(metadata, index):
    """A record that depends on its index only; the hidden bits are arbitrary, NaN and infinities included."""
    rng = np.random.default_rng([metadata.seed, index])
    bits = rng.integers(0, 2**16, (metadata.gen_length, metadata.hidden_size), dtype=np.uint16)
    return {
        "prompt": rng.integers(0, 150_000, metadata.prompt_length, dtype=np.int32),
        "prompt_length": np.int32(rng.integers(1, metadata.prompt_length)),
        "tokens": rng.integers(0, 150_000, metadata.gen_length, dtype=np.int32),
        "order": rng.permutation(metadata.gen_length).astype(np.int32),
        "hidden": bits.view(ml_dtypes.bfloat16),
        "answer": rng.integers(0, 150_000, metadata.gen_length, dtype=np.int32),
        "temperature": np.float32(metadata.temperatures[index % 2]),
        "prompt_id": np.int64(2**40 + index),
        "task": np.int32(index % 2),
    }


def write_missing(store):
    for shard in store.missing_shards():
        store.write_shard(shard, [make_record(store.metadata, i) for i in store.metadata.records(shard)])
    store.finish()


def assert_holds_all(source, metadata):
    """Every record once, in its place, bit for bit."""
    assert len(source) == metadata.num_records
    for index in range(metadata.num_records):
        got, expected = source[index], make_record(metadata, index)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype, name
            assert got[name].shape == value.shape, name
            assert got[name].tobytes() == value.tobytes(), name


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def finished_store(tmp_path_factory):
    """A finished store; tests that change it work on a copy."""
    store = Store.create_or_resume(tmp_path_factory.mktemp("store"), METADATA)
    write_missing(store)
    return store.folder


@pytest.fixture
def store_copy(finished_store, tmp_path):
    return shutil.copytree(finished_store, tmp_path / "copy")


def shard_files(folder):
    return sorted(Path(folder).glob("trajectories-train.array_record-*"))


# Round trip


def test_round_trip_is_bit_exact(finished_store):
    trajectories = read(finished_store, **dataclasses.asdict(METADATA))
    assert trajectories.metadata == METADATA
    assert_holds_all(trajectories, METADATA)
    assert [int(record["prompt_id"]) - 2**40 for record in trajectories] == list(range(METADATA.num_records))


def test_tfds_opens_the_folder_without_tensorflow(finished_store):
    assert_holds_all(tfds.builder_from_directory(finished_store).as_data_source(split="train"), METADATA)
    assert "tensorflow" not in sys.modules


def test_grain_shuffles_and_batches(finished_store):
    # A pickled source is what Grain's worker processes get.
    source = pickle.loads(pickle.dumps(read(finished_store)))
    batches = list(grain.MapDataset.source(source).shuffle(seed=7).batch(4).to_iter_dataset())
    ids = np.concatenate([batch["prompt_id"] for batch in batches]) - 2**40
    assert sorted(ids) == list(range(METADATA.num_records))
    assert list(ids) != sorted(ids)
    for name, (shape, dtype) in METADATA.schema().items():
        assert batches[0][name].shape == (4, *shape)
        assert batches[0][name].dtype == dtype


@settings(max_examples=50, deadline=None)
@given(num_records=st.integers(1, 10_000), shard_size=st.integers(1, 700))
def test_shards_partition_the_records(num_records, shard_size):
    metadata = dataclasses.replace(METADATA, num_records=num_records, shard_size=shard_size)
    shards = [metadata.records(shard) for shard in range(metadata.num_shards)]
    assert [index for shard in shards for index in shard] == list(range(num_records))
    assert all(shards)


@pytest.mark.parametrize("shape", [(1, 8, 16), (50, 8, 16), (50, 64, 32), (3, 256, 512)])
def test_size_bound_holds(tmp_path, shape):
    size, gen_length, hidden_size = shape
    metadata = dataclasses.replace(
        METADATA, num_records=size, shard_size=size, gen_length=gen_length, hidden_size=hidden_size
    )
    write_missing(Store.create_or_resume(tmp_path, metadata))
    (path,) = shard_files(tmp_path)
    assert path.stat().st_size <= bytes_per_shard(metadata, 0) <= 1.5 * path.stat().st_size + 2 * 64 * 1024


# Writing


def test_wrong_records_are_refused(tmp_path):
    store = Store.create_or_resume(tmp_path, METADATA)
    records = [make_record(METADATA, i) for i in range(4)]
    with pytest.raises(ValueError, match="shard 5 of 6 takes 2 records, got 4"):
        store.write_shard(5, records)
    with pytest.raises(ValueError, match=r"hidden must be bfloat16\[8, 16\], got float32\[8, 16\]"):
        store.write_shard(0, [record | {"hidden": record["hidden"].astype(np.float32)} for record in records])
    with pytest.raises(ValueError, match=r"tokens must be int32\[8\], got int32\[7\]"):
        store.write_shard(0, [record | {"tokens": record["tokens"][1:]} for record in records])
    with pytest.raises(ValueError, match="'answer'.* got .'extra', 'hidden'"):
        store.write_shard(0, [{"hidden": records[0]["hidden"], "extra": 1}])
    assert list(contents(tmp_path)) == ["store.json"]


def test_an_error_while_collecting_leaves_nothing(tmp_path):
    def failing():
        yield make_record(METADATA, 0)
        raise RuntimeError("the teacher failed")

    store = Store.create_or_resume(tmp_path, METADATA)
    with pytest.raises(RuntimeError, match="the teacher failed"):
        store.write_shard(0, failing())
    assert list(contents(tmp_path)) == ["store.json"]


# Continuation


def test_resume_writes_only_what_is_missing(finished_store, store_copy):
    expected = contents(finished_store)
    for path in [*shard_files(store_copy)[1:4:2], store_copy / "dataset_info.json"]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in shard_files(store_copy)}
    (store_copy / ("trajectories-train.array_record-00001-of-00006.dead" + store_module.PARTIAL)).write_bytes(b"half")
    with pytest.raises(InputError, match="unfinished: 2 of 6 shards are missing; run the same `cdlm collect` again"):
        read(store_copy)
    store = Store.create_or_resume(store_copy, METADATA)
    assert store.missing_shards() == [1, 3]
    with pytest.raises(InputError, match="2 of 6 shards are missing"):
        store.finish()
    write_missing(store)
    store.finish()
    assert contents(store_copy) == expected
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in kept.items())


def test_resume_leaves_a_living_writer_alone(tmp_path):
    store = Store.create_or_resume(tmp_path, METADATA)
    with store_module._replacing(tmp_path / "being-written") as path:
        Store.create_or_resume(tmp_path, METADATA)
        assert path.exists()
    write_missing(store)
    assert_holds_all(read(tmp_path), METADATA)


CHILD = textwrap.dedent("""
    import os, pickle, signal, sys
    import array_record.python.array_record_module, tensorflow_datasets  # slow to import: before "ready"
    from cdlm_jax.trajectories.store import Metadata, Store
    folder, replaces = sys.argv[1], int(sys.argv[2])
    values, records = pickle.load(sys.stdin.buffer)
    rename = os.replace
    def replace(source, target):
        global replaces
        if replaces == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replaces -= 1
        rename(source, target)
    os.replace = replace
    print("ready", flush=True)
    store = Store.create_or_resume(folder, Metadata(**values))
    for shard in store.missing_shards():
        store.write_shard(shard, [records[i] for i in store.metadata.records(shard)])
    store.finish()
""")


def start_writer(folder, metadata, replaces=-1):
    """A process that writes the store and kills itself instead of giving a file its final name for the n-th time."""
    command = [sys.executable, "-c", CHILD, str(folder), str(replaces)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    records = [make_record(metadata, index) for index in range(metadata.num_records)]
    process.stdin.write(pickle.dumps((dataclasses.asdict(metadata), records)))
    process.stdin.flush()
    return process


def assert_only_whole_files(folder, expected):
    for name, data in contents(folder).items():
        assert name.endswith(store_module.PARTIAL) or data == expected[name], name


def test_kills_before_every_rename(finished_store, tmp_path):
    """Each process gets files further: kills fall before store.json, before shards, and inside `finish`."""
    expected = contents(finished_store)
    for replaces in (0, 3, 5):  # of 9 files
        process = start_writer(tmp_path / "store", METADATA, replaces)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors.decode()
        assert_only_whole_files(tmp_path / "store", expected)
        with pytest.raises(InputError, match=r"unfinished|store\.json"):
            read(tmp_path / "store")
    write_missing(Store.create_or_resume(tmp_path / "store", METADATA))
    assert contents(tmp_path / "store") == expected


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    metadata = dataclasses.replace(METADATA, num_records=120, shard_size=2)
    write_missing(Store.create_or_resume(tmp_path / "uninterrupted", metadata))
    expected = contents(tmp_path / "uninterrupted")
    folder = tmp_path / "killed"
    moments = random.Random(0)
    exits = []
    for _ in range(5):
        process = start_writer(folder, metadata)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.12))
        process.kill()
        process.communicate(timeout=60)
        exits.append(process.returncode)
        if folder.exists():
            assert_only_whole_files(folder, expected)
    assert -signal.SIGKILL in exits
    write_missing(Store.create_or_resume(folder, metadata))
    assert contents(folder) == expected
    assert_holds_all(read(folder), metadata)


# Refusals

OTHER = {"model_fingerprint": "teacher-2", "block_size": 8, "temperatures": (0.0,)}
DIFFERENCE = (
    r"made with other settings: model_fingerprint: got 'teacher-1', expected 'teacher-2'; "
    r"block_size: got 4, expected 8; temperatures: got \(0\.0, 0\.5\), expected \(0\.0,\)$"
)


def test_other_settings_are_refused_by_name(store_copy):
    before = contents(store_copy)
    with pytest.raises(InputError, match=DIFFERENCE):
        Store.create_or_resume(store_copy, dataclasses.replace(METADATA, **OTHER))
    with pytest.raises(InputError, match=DIFFERENCE):
        read(store_copy, **OTHER)
    with pytest.raises(TypeError, match=r"unknown trajectory store settings \['model'\]"):
        read(store_copy, model="teacher-1")
    assert contents(store_copy) == before


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a trajectory store: cannot read .*store\.json: No such file"):
        read(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds 'notes.txt' but no trajectory store; give a new or an empty folder"):
        Store.create_or_resume(tmp_path, METADATA)
    with pytest.raises(InputError, match="cannot keep a trajectory store in .*notes.txt"):
        Store.create_or_resume(tmp_path / "notes.txt", METADATA)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged: not JSON"),
        ("[1]", "another version: got list"),
        (json.dumps({"seed": 1}), r"another version: got \['seed'\], expected the fields \['block_size'"),
    ],
)
def test_damaged_settings_are_refused(store_copy, text, message):
    (store_copy / "store.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_metadata(store_copy)


def test_impossible_metadata_is_refused():
    with pytest.raises(InputError, match="shard_size of a trajectory store must be at least 1, got 0"):
        dataclasses.replace(METADATA, shard_size=0)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: bytes(len(data))])
def test_a_cut_shard_is_refused_by_name(store_copy, damage):
    path = shard_files(store_copy)[2]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"damaged trajectory shard .*{path.name}: .*; delete this file and run"):
        read(store_copy)


def test_a_shard_of_another_length_is_refused_by_name(store_copy):
    first, *_, last = shard_files(store_copy)
    shutil.copyfile(last, first)
    with pytest.raises(InputError, match=f"damaged trajectory shard .*{first.name}: got 2 records, expected 4; delete"):
        read(store_copy)


def test_a_flipped_bit_is_refused_by_name(store_copy):
    path = shard_files(store_copy)[2]
    data = bytearray(path.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd") + 100] ^= 1  # inside the first Zstandard frame, so inside a record
    path.write_bytes(data)
    trajectories = read(store_copy)
    refused = []
    for index in range(METADATA.num_records):
        try:
            assert trajectories[index]["hidden"].tobytes() == make_record(METADATA, index)["hidden"].tobytes()
        except InputError as error:
            refused.append((index, str(error)))
    ((index, message),) = refused
    assert index in METADATA.records(2)
    assert f"damaged trajectory shard {path}" in message


def test_a_damaged_index_is_refused_and_rewritten(store_copy):
    (store_copy / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="damaged index of the trajectory store"):
        read(store_copy)
    Store.create_or_resume(store_copy, METADATA).finish()
    assert_holds_all(read(store_copy), METADATA)


# Full disks


def test_a_disk_without_room_is_refused_at_the_start(tmp_path):
    huge = dataclasses.replace(METADATA, hidden_size=4096, gen_length=256, num_records=10**9, shard_size=10**6)
    with pytest.raises(InputError, match=r"may need [0-9,.]+ MiB, but the disk has [0-9,.]+ MiB free"):
        Store.create_or_resume(tmp_path, huge)
    assert contents(tmp_path) == {}


def test_a_disk_that_fills_up_costs_only_the_shard_in_progress(tmp_path):
    metadata = dataclasses.replace(METADATA, gen_length=64, hidden_size=256, num_records=8, shard_size=4)
    store = Store.create_or_resume(tmp_path, metadata)
    records = [make_record(metadata, i) for i in range(8)]
    store.write_shard(0, records[:4])
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # every file of this process: "File too large"
    try:
        with pytest.raises(
            InputError, match="cannot write .*-00001-of-00002: .*File too large.*finished shards are kept"
        ):
            store.write_shard(1, records[4:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    write_missing(Store.create_or_resume(tmp_path, metadata))
    assert_holds_all(read(tmp_path), metadata)


def test_a_disk_that_fills_up_on_sync_leaves_nothing(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Store.create_or_resume(tmp_path, METADATA)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="No space left on device"):
        store.write_shard(0, [make_record(METADATA, i) for i in METADATA.records(0)])
    assert list(contents(tmp_path)) == ["store.json"]
