"""Trajectory collection: golden decodes in company, the records of a tiny model, continuation, refusals."""

import shutil

import jax
import numpy as np
import pytest
from conftest import golden_ids
from flax import nnx
from test_store import contents

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.models.hf import fingerprint, load_model
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.tasks.mixture import ProblemMixture
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.trajectories import collect as collecting
from cdlm_jax.trajectories.collect import CollectConfig, collect, trajectories
from cdlm_jax.trajectories.store import read

# ---- golden --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", golden_ids("teacher_trajectory"))
def test_golden_trajectory_among_other_rows(case_id, golden):
    """The golden prompt between two others, one shorter and one longer, all right-padded."""
    case = golden(case_id)
    model, prompt = load_model(case.model), case.arrays["prompt"][0]
    lengths = np.array([5, len(prompt), len(prompt) + 3])
    prompts = np.random.default_rng(0).integers(0, 400, (3, lengths.max()), dtype=np.int32)
    prompts[1, : len(prompt)] = prompt
    sizes = {"gen_length": case.args["gen_length"], "block_size": case.args["block_length"]}
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, order, hidden = trajectories(model, prompts, lengths, temperature=0.0, keys=keys, **sizes)
    np.testing.assert_array_equal(tokens[1], case.arrays["output_ids"][0, len(prompt) :])
    np.testing.assert_array_equal(order[1], case.arrays["step_of"])
    np.testing.assert_allclose(hidden[1], case.arrays["hidden"], atol=case.tolerance["atol"], rtol=1e-4)


# ---- a tiny store --------------------------------------------------------------------------------------------------

TOKENIZER = Tokenizer.characters(tasks.CHARACTERS)
EOS, MASK = TOKENIZER.token_to_id("<eos>"), TOKENIZER.token_to_id("<mask>")
LENGTH, BLOCK = 8, 4
PROBLEMS = ProblemMixture({"sort": 1.0, "chain": 2.0}, "train", 6, seed=5)
SETTINGS = CollectConfig(num_prompts=6, temperatures=(0.0, 0.5), batch_size=4, shard_size=5)


def make_model(seed):
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=24,
        rope_theta=100.0,
        norm_eps=1e-5,
        logit_alignment="shifted",
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
        max_length=64,
    )
    rng = np.random.default_rng(seed)
    model = Transformer(config, rngs=nnx.Rngs(seed))
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), model)


MODEL = make_model(0)
ENCODER = Encoder(TOKENIZER, MODEL.config, 23, LENGTH)


def fill(folder, model=MODEL, encoder=ENCODER, problems=PROBLEMS, config=SETTINGS, block_size=BLOCK):
    return collect(
        model, encoder, problems, config, block_size=block_size, model_fingerprint=fingerprint(model), folder=folder
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store that nothing interrupted: 12 records in shards of 5, 5 and 2."""
    return fill(tmp_path_factory.mktemp("finished") / "store").folder


@pytest.fixture(scope="module")
def records(finished):
    source = read(finished)
    return [source[index] for index in range(len(source))]


class Stop(Exception):
    """The end of a collection that somebody interrupts."""


def interrupted(monkeypatch, at):
    """Lets `at` batches through, then stops; counts them."""
    calls = []

    def counted(*args, **options):
        if len(calls) == at:
            raise Stop
        calls.append(options["temperature"])
        return trajectories(*args, **options)

    monkeypatch.setattr(collecting, "trajectories", counted)
    return calls


def test_records_are_prompts_times_temperatures(finished, records):
    assert len(list(finished.glob("*array_record-*"))) == 3
    assert [int(r["prompt_id"]) for r in records] == [*range(6), *range(6)]
    assert [float(r["temperature"]) for r in records] == [0.0] * 6 + [0.5] * 6
    metadata = read(finished).metadata
    assert (
        metadata.temperatures == (0.0, 0.5) and metadata.seed == 5 and metadata.model_fingerprint == fingerprint(MODEL)
    )
    for record in records:
        name, problem = PROBLEMS[int(record["prompt_id"])]
        prompt, length = ENCODER.prompt(problem.prompt)
        assert metadata.tasks[record["task"]] == name
        assert record["prompt_length"] == length
        np.testing.assert_array_equal(record["prompt"], prompt)
        np.testing.assert_array_equal(record["answer"], ENCODER.answer(problem.answer))
    assert {metadata.tasks[record["task"]] for record in records} == {"sort", "chain"}


def test_one_token_a_step_block_by_block(records):
    for record in records:
        blocks = record["order"].reshape(-1, BLOCK)
        for place, block in enumerate(blocks):
            assert sorted(block) == list(range(BLOCK * place, BLOCK * (place + 1)))
        assert MASK not in record["tokens"]
    assert any(np.any(np.diff(record["order"]) < 0) for record in records)  # not simply left to right


def test_temperatures_draw_other_tokens(records):
    cold, warm = records[:6], records[6:]
    assert any(np.any(a["tokens"] != b["tokens"]) for a, b in zip(cold, warm, strict=True))


def test_every_choice_follows_from_its_state(records):
    """Replayed with one full forward per state: the hidden row kept, the token it gives, and that none was surer."""

    forward = jax.jit(lambda tokens, ends: MODEL(tokens, visible_end=ends))
    for record in records[:6]:
        length, order, final = int(record["prompt_length"]), record["order"], record["tokens"]
        states = np.where(order < np.arange(LENGTH)[:, None], final, MASK)  # [steps, L]
        rows = np.full((LENGTH, 23 + LENGTH), EOS)  # padding, hidden below
        rows[:, :length] = record["prompt"][:length]
        rows[:, length : length + LENGTH] = states
        hidden = forward(rows, np.full(rows.shape, length + LENGTH))
        hidden = hidden[:, length - 1 : length - 1 + LENGTH]  # shifted: one row before the position
        probabilities = np.array(jax.nn.softmax(MODEL.unembed(hidden)))
        for step, position in enumerate(np.argsort(order)):
            kept = record["hidden"][position].astype(np.float32)
            np.testing.assert_allclose(kept, hidden[step, position], rtol=2**-7, atol=1e-5)
            allowed = np.where(np.arange(MODEL.config.vocab_size) == MASK, -1, probabilities[step])
            assert allowed[position].argmax() == final[position]
            block = slice(step // BLOCK * BLOCK, (step // BLOCK + 1) * BLOCK)
            masked = np.flatnonzero(states[step][block] == MASK) + block.start
            assert allowed[position].max() >= allowed[masked].max() - 1e-6


def test_batch_size_does_not_change_the_records(finished, records, tmp_path):
    folder = fill(tmp_path / "store", config=CollectConfig(num_prompts=6, batch_size=3, shard_size=5)).folder
    assert contents(folder).keys() == contents(finished).keys()
    for record, other in zip(records, read(folder), strict=True):
        assert record.keys() == other.keys()
        for name in record:
            if name != "hidden":
                np.testing.assert_array_equal(record[name], other[name], err_msg=name)
        pair = (r["hidden"].astype(np.float32) for r in (record, other))
        np.testing.assert_allclose(*pair, rtol=2**-7, atol=1e-5)


# ---- continuation --------------------------------------------------------------------------------------------------


def test_interrupted_anywhere_it_ends_the_same(finished, tmp_path, monkeypatch):
    """Five batches fill the shards: 4 + 1 records, 1 + 4 of two temperatures, 2. One run each is stopped after 0..4."""
    folder, done = tmp_path / "store", []
    for at in range(5):
        interrupted(monkeypatch, at)
        with pytest.raises(Stop):
            fill(folder)
        done.append(len(list(folder.glob("*array_record-*"))))
        with pytest.raises(InputError, match="is unfinished"):
            read(folder)
        shutil.copytree(folder, tmp_path / f"after{at}")
        shutil.rmtree(folder)
    assert done == [0, 0, 1, 1, 2]
    for at, batches in enumerate((5, 5, 3, 3, 1)):
        calls = interrupted(monkeypatch, None)
        fill(tmp_path / f"after{at}")
        assert len(calls) == batches  # finished shards are not decoded again
        assert contents(tmp_path / f"after{at}") == contents(finished)


def test_a_deleted_shard_is_made_again(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "store")
    shards = sorted(folder.glob("*array_record-*"))
    shards[1].unlink()
    untouched = [path.stat().st_mtime_ns for path in shards[::2]]
    calls = interrupted(monkeypatch, None)
    fill(folder)
    assert calls == [0.0, 0.5]
    assert contents(folder) == contents(finished)
    assert [path.stat().st_mtime_ns for path in shards[::2]] == untouched


def test_a_finished_store_is_left_alone(finished, monkeypatch):
    interrupted(monkeypatch, 0)
    before = contents(finished)
    assert fill(finished).folder == finished
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": make_model(1)}, "model_fingerprint: got "),
        ({"block_size": 8}, "block_size: got 4, expected 8"),
        ({"encoder": Encoder(TOKENIZER, MODEL.config, 24, LENGTH)}, "prompt_length: got 23, expected 24"),
        (
            {"config": CollectConfig(num_prompts=6, temperatures=(0.0, 1.0), shard_size=5)},
            r"temperatures: got \(0.0, 0.5",
        ),
        ({"config": CollectConfig(num_prompts=7, shard_size=5)}, "num_records: got 12, expected 14"),
        ({"problems": ProblemMixture({"sort": 1.0, "chain": 2.0}, "train", 6, seed=6)}, "seed: got 5, expected 6"),
        (
            {"problems": ProblemMixture({"sort": 1.0, "chain": 1.0}, "train", 6, seed=5)},
            r"source: got 'sort:1 chain:2 \(train\)', expected 'sort:1 chain:1 \(train\)'",
        ),
    ],
)
def test_a_store_of_other_settings_is_refused(finished, monkeypatch, changes, message):
    interrupted(monkeypatch, 0)
    before = contents(finished)
    with pytest.raises(InputError, match=f"was made with other settings: .*{message}"):
        fill(finished, **changes)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "collect.num_prompts must be at least 1, got 0"),
        ({"batch_size": -1}, "collect.batch_size must be at least 1, got -1"),
        ({"shard_size": 0}, "collect.shard_size must be at least 1, got 0"),
        ({"temperatures": ()}, r"collect.temperatures must be a list of numbers >= 0, got \(\)"),
        ({"temperatures": (0.0, -0.5)}, r"collect.temperatures must be a list of numbers >= 0, got \(0.0, -0.5\)"),
        ({"temperatures": (float("nan"),)}, "collect.temperatures must be a list of numbers >= 0, got"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        CollectConfig(**{"num_prompts": 1} | changes)
