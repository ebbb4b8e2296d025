"""The training loop: batches in, train steps, metrics, checkpoints, held-out evaluation; the same for every trainer."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import grain
import jax

from cdlm_jax.config import InputError
from cdlm_jax.mesh import preemption, sharding
from cdlm_jax.mesh.distributed import Agreement
from cdlm_jax.mesh.preemption import Preempted
from cdlm_jax.mesh.progress import progress
from cdlm_jax.training.checkpoints import Checkpoints
from cdlm_jax.training.metrics_log import MetricsLog
from cdlm_jax.training.profile import Profile
from cdlm_jax.training.step import TrainState
from cdlm_jax.training.throughput import Throughput


class NonFiniteLoss(InputError):
    """Training met a loss that is not a number; the message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """`steps` updates. `*_every` counts steps; each also happens at the end, with 0 only there.

    keep_checkpoints: how many of the latest checkpoints are kept.
    keep_every: also those at multiples of so many steps; 0 keeps no others.
    """

    steps: int
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    evaluate_every: int = 0
    log_every: int = 20

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if self.keep_checkpoints < 1:
            raise InputError(f"keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        for name in ("checkpoint_every", "keep_every", "evaluate_every", "log_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise InputError(
                f"keep_every {self.keep_every} must be a multiple of checkpoint_every {self.checkpoint_every}"
            )

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens `every` so many steps happens after step `done`."""
        return done == self.steps or (every > 0 and done % every == 0)


def train(
    train_step: Callable,
    state: TrainState,
    frozen,
    batches: grain.IterDataset,
    config: LoopConfig,
    *,
    folder: Path,
    settings: dict,
    label: str,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    flops_per_step: float | None = None,
    profile: bool = False,
) -> TrainState:
    """Runs until `config.steps`, continuing from the latest checkpoint under `folder` if there is one.

    Metrics go to `folder/metrics.jsonl` (one JSON object per logged step: means over the steps since the last one, and
    the figures of `Throughput.read`, tokens being those of responses), to TensorBoard, and to a bar or a log. A
    continued run ends in the same state as an uninterrupted one: the checkpoint holds the state and the data iterator's
    place, and a step's randomness depends on its number only.

    Args:
      batches: dicts with an `answer` [rows, L]; of each batch this process's rows, as NumPy arrays.
      evaluate: gives the held-out metrics of a state.
      flops_per_step: model FLOPs (`training/flops.py`), for the accounting.
      profile: write a trace of a few steps to `folder/profile`.

    Raises:
      NonFiniteLoss: the loss or another metric is not a number.
      Preempted: SIGTERM came, here or to another process of the cluster; the state after the running step is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep = {"keep": config.keep_checkpoints, "keep_every": config.keep_every}
    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(preemption.noticed())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder / "checkpoints", settings, **keep)))
        iterator = iter(batches)
        if (restored := checkpoints.restore(state)) is not None:
            state, iterator_state = restored
            iterator.set_state(iterator_state)
        start = int(state.step)
        speed, agreement = Throughput(flops_per_step), Agreement()
        ends_line = functools.partial(config.due, config.log_every)
        log = stack.enter_context(contextlib.closing(MetricsLog(folder, start, ends_line, speed)))
        traced_to = config.steps if profile else start
        trace = stack.enter_context(contextlib.closing(Profile(folder / "profile", start, traced_to)))
        bar = stack.enter_context(progress(label, config.steps, done=start))
        pending = None  # the metrics of the step before: read only after the next step is under way
        for step in range(start, config.steps):
            with speed.waiting():
                batch = next(iterator)
            batch = sharding.place(batch)
            with trace.step(step):
                state, metrics = train_step(state, frozen, batch)
            trace.started(step, metrics)
            if pending is not None:
                _read(pending, log, checkpoints)
            pending = (step, metrics, batch["answer"].size)
            done = step + 1
            stops = agreement(notice.received)
            saves = stops or config.due(config.checkpoint_every, done)
            evaluates = evaluate is not None and config.due(config.evaluate_every, done)
            if saves or evaluates:
                # A state is used only once its own loss is known to be finite.
                _read(pending, log, checkpoints)
                pending = None
            with speed.apart():
                if evaluate is not None and evaluates:
                    log.write(done, {f"heldout/{name}": value for name, value in evaluate(state).items()})
                if saves:
                    checkpoints.save(state, iterator.get_state())
            bar.advance(status=log.status)
            if stops:
                raise Preempted(done)
    return state


def _read(pending: tuple[int, dict, int], log: MetricsLog, checkpoints: Checkpoints) -> None:
    """Waits for a step's metrics, which are the same in all processes."""
    step, metrics, tokens = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(map(math.isfinite, values.values())):
        bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
        good = checkpoints.latest_step
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
        raise NonFiniteLoss(f"step {step + 1}: {bad}; stopped, {where}")
    log.step(step + 1, values, tokens)
