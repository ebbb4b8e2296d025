"""Distillation: every term and its gradient against a float64 twin of plain parts, what is trained, the data's order.

The twin shares nothing with the package but the order of its random draws: its forward is NumPy on rows without
padding, its states are Python lists, its softmax is dense.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from test_collect import BLOCK as STORE_BLOCK
from test_collect import LENGTH as STORE_LENGTH
from test_collect import MODEL as STORE_TEACHER
from test_collect import fill
from test_decoding import quick_jit
from test_denoising import (
    ALIGNMENTS,
    CONFIG,
    LENGTH,
    ROWS,
    plain_masked_denoising,
    plain_response_hidden,
    random_model,
    random_prompts,
    wide,
)
from test_vocab import largest_array, log_softmax

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab.api import TILE
from cdlm_jax.models import lora
from cdlm_jax.training import distill
from cdlm_jax.training.batches import trajectory_batches
from cdlm_jax.training.distill import DistillConfig, make_loss, make_student
from cdlm_jax.training.losses import LossWeights
from cdlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cdlm_jax.training.step import TrainState, make_train_step
from cdlm_jax.trajectories.collect import CollectConfig
from cdlm_jax.trajectories.states import state_at
from cdlm_jax.trajectories.store import read

BLOCK = 4
FIELDS = {"prompt", "prompt_length", "tokens", "order", "hidden", "answer"}


def config_of(**changes):
    weights = LossWeights(distill=1.0, consistency=0.5, dlm=0.3)
    return DistillConfig(**{"steps": 30, "batch_size": ROWS, "weights": weights, "lora_rank": 0} | changes)


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = partial(rng.integers, 2, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    starts = range(0, LENGTH, BLOCK)
    order = [np.concatenate([start + rng.permutation(BLOCK) for start in starts]) for _ in range(ROWS)]
    hidden = rng.normal(size=(ROWS, LENGTH, CONFIG.hidden_size)).astype(ml_dtypes.bfloat16)
    return random_prompts(rng) | {
        "tokens": ids(),
        "order": np.stack(order).astype(np.int32),
        "hidden": hidden,
        "answer": ids(),
    }


def moved(trainable, by=0.2, seed=5):
    """As if it had been trained: no leaf is the teacher's any more, and adapters add something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, by, leaf.shape).astype(np.float32), trainable)


# ---- the twin ------------------------------------------------------------------------------------------------------


def draw_state(key):
    """(step, the later step of `same_block`) of one row."""
    step_key, later_key = jax.random.split(key)
    step = int(jax.random.randint(step_key, (), 0, LENGTH))
    end = BLOCK * (step // BLOCK + 1)
    return step, int(jax.random.randint(later_key, (), step + 1, end + 1)), end


def draw_noise(key):
    t_key, mask_key = jax.random.split(key)
    t = max(1 - float(jax.random.uniform(t_key)), 1e-3)
    return np.asarray(jax.random.uniform(mask_key, (LENGTH,))) < np.float32(t), t


def divergence(log_p, log_q, positions):
    """Mean over a set of positions of KL(p || q); an empty set counts as 0."""
    return sum(np.sum(np.exp(log_p[i]) * (log_p[i] - log_q[i])) for i in positions) / max(len(positions), 1)


def twin(student, at_target, teacher, batch, keys, config):
    """(loss, metrics) of method.md section 3; `at_target` is the student that gives the consistency target."""
    halves = [jax.random.split(key) for key in keys]
    sums = dict.fromkeys(("distill", "consistency", "agreement"), 0.0)
    for row, length in enumerate(batch["prompt_length"]):
        prompt, final = batch["prompt"][row, :length].tolist(), batch["tokens"][row].tolist()
        order = batch["order"][row].tolist()
        step, later, end = draw_state(halves[row][0])
        if config.consistency_scope == "later_blocks":
            later = end
        y, y_star = (
            [token if at < k else CONFIG.mask_token_id for token, at in zip(final, order, strict=True)]
            for k in (step, later)
        )
        newly = [i for i in range(LENGTH) if step <= order[i] < later]
        remaining = [i for i in range(LENGTH) if order[i] >= later]
        if config.consistency_scope == "same_block":
            remaining = [i for i in remaining if order[i] < end]

        hidden = plain_response_hidden(student, prompt, y, BLOCK)
        log_q = log_softmax(hidden @ wide(student.head))
        target = log_softmax(plain_response_hidden(at_target, prompt, y_star, BLOCK) @ wide(at_target.head))
        if config.teacher == "online":
            teacher_hidden = plain_response_hidden(teacher, prompt, y)
        else:
            teacher_hidden = wide(batch["hidden"][row])
        log_p = log_softmax(teacher_hidden @ wide(teacher.head))
        sums["distill"] += divergence(log_p, log_q, newly) / ROWS
        sums["consistency"] += divergence(target, log_q, remaining) / ROWS
        sums["agreement"] += np.mean([np.argmax(log_q[i]) == final[i] for i in newly]) / ROWS

    masked, t = zip(*(draw_noise(half[1]) for half in halves), strict=True)
    dlm = plain_masked_denoising(student, batch, np.stack(masked), t, BLOCK)
    loss = 1.0 * sums["distill"] + 0.5 * sums["consistency"] + 0.3 * dlm
    return loss, sums | {"dlm": dlm}


@pytest.mark.parametrize(
    ("alignment", "scope", "asked", "rank"),
    [
        ("same_position", "later_blocks", "offline", 0),
        ("shifted", "same_block", "online", 3),
        pytest.param("shifted", "later_blocks", "online", 0, marks=pytest.mark.slow),
        pytest.param("same_position", "same_block", "offline", 3, marks=pytest.mark.slow),
        pytest.param("shifted", "later_blocks", "offline", 3, marks=pytest.mark.slow),
        pytest.param("same_position", "same_block", "online", 0, marks=pytest.mark.slow),
    ],
)
def test_loss_metrics_and_gradient_are_those_of_the_twin(alignment, scope, asked, rank):
    config = config_of(consistency_scope=scope, teacher=asked, lora_rank=rank)
    teacher, batch = random_model(alignment), random_batch()
    graphdef, trainable, frozen = make_student(teacher, config, jax.random.key(1))
    trainable = moved(trainable)
    keys = jax.random.split(jax.random.key(8), ROWS)
    steps = [draw_state(jax.random.split(key)[0])[0] // BLOCK for key in keys]
    assert {*steps} == {0, 1}  # both blocks occur, and so does an empty S under `later_blocks`

    loss_fn = quick_jit(jax.value_and_grad(make_loss(graphdef, config, BLOCK), has_aux=True))
    (loss, metrics), gradient = loss_fn(trainable, frozen, batch, keys, 0)
    exact = jax.tree.map(wide, trainable)
    student = nnx.merge(graphdef, exact, frozen.student)
    expected, parts = twin(student, student, teacher, batch, keys, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert metrics.keys() == parts.keys()
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert all(parts[name] > 0.01 for name in ("distill", "consistency", "dlm"))

    # Its slope along a random direction, with the consistency target and the teacher held fast.
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), exact)

    def at(distance):
        there = jax.tree.map(lambda leaf, way: leaf + distance * way, exact, direction)
        return twin(nnx.merge(graphdef, there, frozen.student), student, teacher, batch, keys, config)[0]

    products = jax.tree.map(lambda g, way: np.sum(wide(g) * way), gradient, direction)
    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-3)


# ---- teacher online and offline ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """16 greedy trajectories of a tiny `shifted` teacher."""
    config = CollectConfig(num_prompts=16, temperatures=(0.0,), batch_size=16, shard_size=16)
    return read(fill(tmp_path_factory.mktemp("distill") / "store", config=config).folder)


def test_online_and_offline_agree_where_a_token_was_finalized(store, monkeypatch):
    """At a greedy trajectory's own state k the online teacher sees what the collector saw when it took step k: the row
    of the position finalized next is the stored one. The rows of the other positions were stored at later states."""
    record = store[0]
    batch = {name: np.tile(record[name], (STORE_LENGTH,) + (1,) * record[name].ndim) for name in FIELDS}
    batch["prompt_length"] = batch["prompt_length"].reshape(-1)

    def states(tokens, order, keys, *, block_size, mask_token_id, scope):
        return state_at(tokens, order, jnp.arange(STORE_LENGTH), block_size=block_size, mask_token_id=mask_token_id)

    monkeypatch.setattr(distill, "sample_states", states)
    monkeypatch.setattr(distill, "distillation_loss", lambda teacher_hidden, *args, **options: teacher_hidden)
    graphdef, trainable, frozen = make_student(STORE_TEACHER, config_of(teacher="online"), jax.random.key(1))
    loss_fn = make_loss(graphdef, config_of(teacher="online"), STORE_BLOCK)
    keys = jax.random.split(jax.random.key(0), STORE_LENGTH)
    online = quick_jit(lambda: loss_fn(trainable, frozen, batch, keys, 0)[1]["distill"])()  # its hidden rows
    offline = batch["hidden"].astype(np.float32)
    next_one = record["order"] == np.arange(STORE_LENGTH)[:, None]
    close = np.isclose(online, offline, rtol=2**-7, atol=1e-5).all(axis=-1)  # stored in bfloat16
    assert next_one.sum() == STORE_LENGTH and close[next_one].all()
    later = record["order"] > np.arange(STORE_LENGTH)[:, None]
    assert close[later].mean() < 0.5


# ---- training ------------------------------------------------------------------------------------------------------


ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-2)
# A small weight for the answers: this teacher's trajectories have nothing to do with them.
FULL = config_of(batch_size=16, lora_rank=0, optimizer=ADAMW, ema_decay=0.9, weights=LossWeights(dlm=0.01))


@cache
def step_of(config):
    graphdef, _, _ = make_student(STORE_TEACHER, config, jax.random.key(1))
    loss_fn, optimizer = make_loss(graphdef, config, STORE_BLOCK), make_optimizer(config.optimizer, config.steps)
    return make_train_step(loss_fn, optimizer, seed=0, accumulate=config.accumulate, ema_decay=config.ema_decay)


def first_step(config, trainable, frozen, store):
    """A step that starts from these parameters, on draws and data that are always the same."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = TrainState.create(jax.tree.map(jnp.copy, trainable), optimizer, ema=True)
    return step_of(config)(state, frozen, next(iter(trajectory_batches([store], 16, seed=9))))


def assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        dataclasses.replace(FULL, lora_rank=4, lora_alpha=8.0, mode="packed", consistency_scope="same_block"),
        pytest.param(
            dataclasses.replace(FULL, optimizer=dataclasses.replace(ADAMW, name="muon")), marks=pytest.mark.slow
        ),
    ],
    ids=["full", "packed adapters", "muon"],
)
def test_thirty_steps_lower_the_loss_and_spare_the_teacher(store, config):
    _, trainable, frozen = make_student(STORE_TEACHER, config, jax.random.key(1))
    teacher, untouched, start = jax.tree.map(np.array, (STORE_TEACHER, frozen, trainable))  # copies, not views
    _, before = first_step(config, trainable, frozen, store)
    state = TrainState.create(trainable, make_optimizer(config.optimizer, config.steps), ema=True)
    batches = iter(trajectory_batches([store], 16, seed=0))
    for _ in range(config.steps):
        state, _ = step_of(config)(state, frozen, next(batches))
    _, after = first_step(config, state.trainable, frozen, store)
    assert after["loss"] < 0.9 * before["loss"] and after["distill"] < 0.9 * before["distill"], (before, after)

    assert_same(STORE_TEACHER, teacher)
    assert_same(frozen, untouched)
    if config.lora_rank:
        assert frozen.teacher_head is None
    else:
        assert_same(frozen.teacher_head, teacher.head)
    for (path, was), now in zip(jax.tree.leaves_with_path(start), jax.tree.leaves(state.trainable), strict=True):
        assert np.abs(now - was).max() > 1e-5, jax.tree_util.keystr(path)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(start)]
    if config.lora_rank:
        assert len(paths) == 2 * len(lora.TARGETS) and all("adapter" in path for path in paths)
    else:
        assert len(paths) == len(jax.tree.leaves(teacher)) and not jax.tree.leaves(frozen.student)


def test_accumulation_gives_the_update_of_one_batch(store):
    _, trainable, frozen = make_student(STORE_TEACHER, FULL, jax.random.key(1))
    (whole, metrics), (parts, others) = (
        first_step(dataclasses.replace(FULL, accumulate=count), moved(trainable), frozen, store) for count in (1, 2)
    )
    # Adam's moments hold the clipped gradient and its square; the update itself would magnify float noise.
    for a, b in zip(*map(jax.tree.leaves, (whole.opt_state, parts.opt_state)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole.opt_state[1][0].mu)) > 1e-3
    assert metrics.keys() == others.keys() == {"loss", "distill", "consistency", "dlm", "agreement", "grad_norm"}
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)


def test_no_logits_of_whole_responses():
    """The largest array of a train step is one tile of logits where the vocabulary is larger than the tile."""
    vocab = TILE + 904
    teacher = random_model("same_position", vocab_size=vocab, num_layers=1)
    config = config_of(teacher="online")
    graphdef, trainable, frozen = make_student(teacher, config, jax.random.key(1))
    optimizer = optax.sgd(0.1)
    step = make_train_step(make_loss(graphdef, config, BLOCK), optimizer, seed=0)
    lowered = step.lower(TrainState.create(trainable, optimizer, ema=False), frozen, random_batch())
    compiled = lowered.compile({"xla_backend_optimization_level": 0})  # of LLVM: what XLA materializes stays the same
    assert largest_array(compiled) == ROWS * LENGTH * TILE


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "distill.batch_size 4 must be a positive multiple of accumulate 3"),
        ({"batch_size": 0}, "distill.batch_size 0 must be a positive multiple of accumulate 1"),
        ({"teacher": "live"}, "distill.teacher must be offline or online, got 'live'"),
        ({"consistency_scope": "all"}, "distill.consistency_scope must be later_blocks or same_block, got 'all'"),
        ({"lora_rank": -1}, r"distill.lora_rank must be 0 \(train everything\) or more, got -1"),
        ({"ema_decay": 1.0}, r"distill.ema_decay must be in \[0, 1\), got 1.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config_of(**changes)


@pytest.mark.parametrize("asked", ["online", "offline"])
def test_a_teacher_network_is_kept_only_where_it_is_asked(asked):
    teacher = random_model(ALIGNMENTS[0])
    frozen = make_student(teacher, config_of(teacher=asked), jax.random.key(1))[2]
    assert (frozen.teacher is teacher) == (asked == "online")
    assert (frozen.teacher is None) == (asked == "offline")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_head_of_the_teacher_is_kept_only_where_training_changes_the_students(rank):
    frozen = make_student(random_model(ALIGNMENTS[0]), config_of(lora_rank=rank), jax.random.key(1))[2]
    assert (frozen.teacher_head is None) == (rank > 0)
