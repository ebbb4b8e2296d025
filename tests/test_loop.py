"""The training loop and its checkpoints on a toy problem: exact continuation, refusals, non-finite stops, metrics."""

import gzip
import json
import math
import os
import shutil
import signal
from collections import Counter
from functools import cache, partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.mesh.preemption import Preempted
from cdlm_jax.models import lora
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.training.checkpoints import Checkpoints
from cdlm_jax.training.loop import LoopConfig, NonFiniteLoss, train
from cdlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cdlm_jax.training.profile import Profile
from cdlm_jax.training.step import TrainState, make_train_step

STEPS, EVERY = 10, 4
SETTINGS = {"seed": 1, "distill": {"steps": STEPS, "temperatures": (0.0, 0.5)}}
OPTIMIZER = make_optimizer(OptimizerConfig(name="muon", learning_rate=0.1), STEPS)


def loss_fn(trainable, frozen, batch, keys, step):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    x = jnp.einsum("bi,lij->bj", batch["x"] + noise, trainable["stack"]) + trainable["bias"]
    return jnp.mean(x**2), {"mean_id": jnp.mean(batch["id"].astype(jnp.float32))}


@cache
def step_with(ema):
    return make_train_step(loss_fn, OPTIMIZER, seed=7, ema_decay=0.9 if ema else 0.0)


def start(ema=True):
    params = {"stack": jnp.ones((2, 3, 3)), "bias": jnp.zeros(3)}
    return TrainState.create(params, OPTIMIZER, ema=ema)


def batches():
    x = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
    rows = [{"id": np.int32(i), "x": x[i], "answer": np.zeros(5, np.int32)} for i in range(21)]
    dataset = grain.MapDataset.source(rows).seed(3).shuffle().repeat().batch(4)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def run(folder, *, ema=True, step=None, evaluate=None, **config):
    """A whole run, by default of 10 steps with checkpoints at 4, 8 and 10."""
    return train(
        step_with(ema) if step is None else step,
        start(ema),
        None,
        batches(),
        LoopConfig(**{"steps": STEPS, "checkpoint_every": EVERY, "log_every": 1} | config),
        folder=folder,
        settings=SETTINGS,
        label="toy",
        evaluate=evaluate,
    )


class Stop(Exception):
    """The end of a run that somebody interrupts."""


def stopping(at, ema=True):
    def step(state, frozen, batch):
        if int(state.step) == at:
            raise Stop
        return step_with(ema)(state, frozen, batch)

    return step


def poisoned(at):
    """The data of one step are not numbers, and so are its loss and the parameters after it."""

    def step(state, frozen, batch):
        scale = np.float32("nan" if int(state.step) == at else 1)
        return step_with(True)(state, frozen, batch | {"x": scale * batch["x"]})

    return step


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder):
    """step -> metrics, without times."""
    timed = lines(folder)
    for line in timed:
        assert line.pop("seconds_per_step") > line.pop("input_wait") >= 0 and line.pop("tokens_per_second") > 0
    return {line.pop("step"): line for line in timed}


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_state(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """ema -> (final state, folder) of a run that nothing disturbed."""
    return cache(lambda ema: (run(folder := tmp_path_factory.mktemp("run"), ema=ema), folder))


# ---- continuation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ema", "interruption"), [(True, "error"), (False, "fewer steps"), (True, "not a number")])
def test_a_continued_run_equals_an_uninterrupted_one(uninterrupted, tmp_path, ema, interruption):
    expected, folder = uninterrupted(ema)
    if interruption == "fewer steps":
        run(tmp_path, ema=ema, steps=EVERY)
    else:
        error, step = (Stop, stopping(6)) if interruption == "error" else (NonFiniteLoss, poisoned(6))
        with pytest.raises(error):
            run(tmp_path, ema=ema, step=step)
    assert saved(tmp_path) == [EVERY]

    continued = []
    assert_same_state(run(tmp_path, ema=ema, step=lambda *args: continued.append(1) or step_with(ema)(*args)), expected)
    assert len(continued) == STEPS - EVERY
    assert (expected.ema is None) == (not ema)
    assert logged(tmp_path) == logged(folder)  # their mean_id shows the place in the data
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_every_step_counts(uninterrupted):
    """What the comparisons above rest on: data and parameters of all steps differ."""
    state, folder = uninterrupted(True)
    values = logged(folder)
    assert sorted(values) == list(range(1, STEPS + 1))
    for name in ("loss", "mean_id", "grad_norm"):
        assert len({metrics[name] for metrics in values.values()}) > STEPS // 2
    assert np.abs(state.trainable["stack"] - state.ema["stack"]).max() > 1e-3


def test_a_finished_run_is_not_run_again(uninterrupted):
    state, folder = uninterrupted(True)
    before = (folder / "metrics.jsonl").read_bytes()
    assert_same_state(run(folder, step=stopping(STEPS)), state)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_of_other_settings_is_refused(uninterrupted, tmp_path):
    _, folder = uninterrupted(True)
    shutil.copytree(folder, tmp_path / "run")
    for settings, message in (
        (SETTINGS | {"seed": 2}, "holds checkpoints of another run: seed is 1 there, 2 here"),
        (SETTINGS | {"distill": {"steps": 5}}, r"distill\.steps is 10 there, 5 here"),
        (SETTINGS | {"teacher": "x"}, "teacher is None there, 'x' here"),
        ({"seed": 1}, r"distill\.\w+ is .* there, None here"),
    ):
        with pytest.raises(InputError, match=message):
            train(
                stopping(0),
                start(),
                None,
                batches(),
                LoopConfig(steps=STEPS),
                folder=tmp_path / "run",
                settings=settings,
                label="toy",
            )
    assert saved(tmp_path / "run") == saved(folder)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def advanced(state, steps):
    return TrainState(
        state.step + steps, jax.tree.map(lambda x: x + steps, state.trainable), state.opt_state, state.ema
    )


def test_no_save_is_skipped_and_the_last_two_are_kept(tmp_path):
    """Saves that come faster than the disk, each of a state that the next step gives away."""
    give = jax.jit(partial(advanced, steps=1), donate_argnums=0)
    state = start(ema=False)
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    for place in range(4):
        state = give(state)
        checkpoints.save(state, {"next": place})
    state = give(state)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    restored, place = Checkpoints(tmp_path, SETTINGS).restore(state)
    assert place == {"next": 3}
    assert_same_state(restored, advanced(start(ema=False), 4))


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", SETTINGS)
    assert checkpoints.latest_step is None
    assert checkpoints.restore(start()) is None


@pytest.mark.parametrize("ema", [True, False])
def test_a_students_state_round_trips(tmp_path, ema):
    """Adapters, both of Muon's inner states and the average, restored into a fresh state of other values."""
    config = ModelConfig(
        vocab_size=12,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        mlp_size=8,
        rope_theta=100.0,
        norm_eps=1e-5,
        mask_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        max_length=16,
    )
    model = lora.attach(Transformer(config, rngs=nnx.Rngs(0)), rank=2, alpha=2.0, key=jax.random.key(0))
    trainable = nnx.split(model, lora.LoRAParam, ...)[1]
    state = TrainState.create(trainable, OPTIMIZER, ema=ema)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    drawn = TrainState(jnp.int32(5), drawn.trainable, drawn.opt_state, drawn.ema)
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    checkpoints.save(drawn, {})
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path, SETTINGS).restore(state)
    assert_same_state(restored, drawn)


def test_a_leftover_of_a_killed_run_is_never_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, SETTINGS)
    checkpoints.save(advanced(start(), 1), {"next": 1})
    checkpoints.close()
    leftovers = [tmp_path / "2.orbax-checkpoint-tmp", tmp_path / "3.orbax-checkpoint-tmp-1700000000000000"]
    shutil.copytree(tmp_path / "1", leftovers[0])  # all but renamed
    leftovers[1].mkdir()  # just begun
    again = Checkpoints(tmp_path, SETTINGS)
    assert again.latest_step == 1
    restored, place = again.restore(start())
    assert place == {"next": 1}
    assert_same_state(restored, advanced(start(), 1))
    again.save(advanced(start(), 2), {"next": 2})  # the steps of the leftovers are free
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert_same_state(Checkpoints(tmp_path, SETTINGS).restore(start())[0], advanced(start(), 2))


def test_chosen_checkpoints_are_kept(tmp_path):
    run(tmp_path, checkpoint_every=2, keep_every=4, keep_checkpoints=1)
    assert saved(tmp_path) == [4, 8, STEPS]
    run(tmp_path / "other", checkpoint_every=2, keep_checkpoints=3)
    assert saved(tmp_path / "other") == [6, 8, STEPS]


def test_a_damaged_checkpoint_is_named(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted(True)[1], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / str(STEPS) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match=rf"checkpoints/{STEPS} cannot be read \(\w+\); if it is damaged, remove it"):
        run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    assert_same_state(run(tmp_path / "run"), uninterrupted(True)[0])


# ---- profile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start_at", "steps", "traced"), [(0, 10, [2, 3, 4]), (3, 7, [4, 5, 6]), (8, 10, [8, 9])])
def test_three_steps_are_traced(tmp_path, monkeypatch, start_at, steps, traced):
    running, seen = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.pop)
    trace = Profile(tmp_path, start_at, steps)
    for step in range(start_at, steps):
        with trace.step(step):
            seen += [step] * len(running)
        trace.started(step, {})
    assert seen == traced and not running


def test_a_run_leaves_a_trace(tmp_path):
    run(tmp_path / "plain", steps=3)
    assert not (tmp_path / "plain" / "profile").exists()
    train(
        step_with(True),
        start(),
        None,
        batches(),
        LoopConfig(steps=6),
        folder=tmp_path,
        settings=SETTINGS,
        label="toy",
        flops_per_step=1e6,
        profile=True,
    )
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["2", "3", "4"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert all(line["model_flops_per_second"] > 0 for line in lines(tmp_path))


# ---- preemption ----------------------------------------------------------------------------------------------------


def told(at):
    """SIGTERM comes while one step is started."""

    def step(state, frozen, batch):
        if int(state.step) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_with(True)(state, frozen, batch)

    return step


@pytest.mark.parametrize(("at", "kept"), [(0, [1]), (4, [4, 5]), (EVERY - 1, [4]), (STEPS - 1, [8, 10])])
def test_a_preempted_run_continues(uninterrupted, tmp_path, at, kept):
    expected, folder = uninterrupted(True)
    with pytest.raises(Preempted, match=f"^preempted at step {at + 1}, saved; run the same command to continue$"):
        run(tmp_path, step=told(at))
    assert saved(tmp_path) == kept
    assert_same_state(run(tmp_path), expected)
    assert logged(tmp_path) == logged(folder)


# ---- losses that are not numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "message", "kept"),
    [
        (1, "step 2: grad_norm = nan, loss = nan; stopped, there is no checkpoint yet", []),
        (EVERY - 1, "step 4: grad_norm = nan, loss = nan; stopped, there is no checkpoint yet", []),
        (EVERY, "step 5: grad_norm = nan, loss = nan; stopped, the last good checkpoint is step 4", [4]),
        (STEPS - 1, "step 10: grad_norm = nan, loss = nan; stopped, the last good checkpoint is step 8", [4, 8]),
    ],
)
def test_a_loss_that_is_not_a_number_stops(tmp_path, at, message, kept):
    with pytest.raises(NonFiniteLoss) as error:
        run(tmp_path, step=poisoned(at))
    assert str(error.value) == message
    assert saved(tmp_path) == kept
    finite = logged(tmp_path)
    assert sorted(finite) == list(range(1, at + 1))
    assert all(math.isfinite(value) for metrics in finite.values() for value in metrics.values())


def test_any_metric_may_stop(tmp_path):
    def step(state, frozen, batch):
        state, metrics = step_with(True)(state, frozen, batch)
        return state, metrics | {"grad_norm": jnp.float32("inf")}

    with pytest.raises(NonFiniteLoss, match="^step 1: grad_norm = inf; stopped, there is no checkpoint yet$"):
        run(tmp_path, step=step)


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_the_logged_steps(uninterrupted, tmp_path):
    single = logged(uninterrupted(True)[1])
    assert all(metrics.keys() == {"loss", "mean_id", "grad_norm"} for metrics in single.values())
    run(tmp_path, log_every=5, checkpoint_every=0)
    averaged = logged(tmp_path)
    assert sorted(averaged) == [5, 10]
    for last, metrics in averaged.items():
        for name, value in metrics.items():
            assert math.isclose(value, np.mean([single[n][name] for n in range(last - 4, last + 1)]), rel_tol=1e-6)


def test_heldout_evaluation(tmp_path):
    def evaluate(state):
        return {"accuracy": float(state.step), "average": float(state.evaluated["bias"].sum())}

    state = run(tmp_path, evaluate=evaluate, evaluate_every=5, log_every=5, checkpoint_every=0)
    heldout = [line for line in lines(tmp_path) if "heldout/accuracy" in line]
    assert [(line["step"], line["heldout/accuracy"]) for line in heldout] == [(5, 5.0), (10, 10.0)]
    assert heldout[-1] == {"step": 10, "heldout/accuracy": 10.0, "heldout/average": float(state.ema["bias"].sum())}
    assert Counter(line["step"] for line in lines(tmp_path)) == {5: 2, 10: 2}


@pytest.mark.parametrize(("every", "at"), [(0, [STEPS]), (4, [4, 8, STEPS])])
def test_everything_happens_at_the_end_too(uninterrupted, tmp_path, every, at):
    single = logged(uninterrupted(True)[1])

    def evaluate(state):
        return {"accuracy": float(state.step)}

    run(tmp_path, evaluate=evaluate, evaluate_every=every, checkpoint_every=every, log_every=every)
    assert saved(tmp_path) == at[-2:]
    heldout = [line for line in lines(tmp_path) if "loss" not in line]
    assert heldout == [{"step": step, "heldout/accuracy": step} for step in at]
    averaged = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    assert list(averaged) == at
    since = [single[step]["loss"] for step in range(at[-2] + 1 if every else 1, STEPS + 1)]
    assert math.isclose(averaged[STEPS], np.mean(since), rel_tol=1e-6)


def test_a_state_that_is_not_a_number_is_not_evaluated(tmp_path):
    seen = []
    with pytest.raises(NonFiniteLoss, match="^step 4: "):
        run(tmp_path, step=poisoned(3), evaluate=lambda state: seen.append(int(state.step)) or {}, evaluate_every=2)
    assert seen == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"keep_every": -4}, "keep_every must not be negative, got -4"),
        ({"keep_every": 4}, "keep_every 4 must be a multiple of checkpoint_every 0"),
        ({"keep_every": 6, "checkpoint_every": 4}, "keep_every 6 must be a multiple of checkpoint_every 4"),
        ({"checkpoint_every": -1}, "checkpoint_every must not be negative, got -1"),
        ({"evaluate_every": -2}, "evaluate_every must not be negative, got -2"),
        ({"log_every": -3}, "log_every must not be negative, got -3"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LoopConfig(**{"steps": 1} | changes)
