"""The training loop: batches in, train steps, metrics, checkpoints, held-out evaluation; the same for every trainer."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import grain
import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cdlm_jax.config import InputError
from cdlm_jax.sharding import place
from cdlm_jax.training.checkpoints import Checkpoints
from cdlm_jax.training.step import TrainState


class NonFiniteLoss(InputError):
    """Training met a loss that is not a number; the message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """`steps` updates. `*_every` counts steps; each also happens at the end, with 0 only there."""

    steps: int
    checkpoint_every: int = 0
    evaluate_every: int = 0
    log_every: int = 20

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        for name in ("checkpoint_every", "evaluate_every", "log_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")

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
) -> TrainState:
    """Runs until `config.steps`, continuing from the latest checkpoint under `folder` if there is one.

    Metrics go to `folder/metrics.jsonl` (one JSON object per logged step, means over the steps since the last one; and
    tokens_per_second, of responses) and to a progress bar. A continued run ends in the same state as an uninterrupted
    one: the checkpoint holds the state and the data iterator's place, and a step's randomness depends on its number
    only. Batches are dicts with an `answer` [rows, L].
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Checkpoints(folder / "checkpoints", settings)) as checkpoints:
        iterator = iter(batches)
        if (restored := checkpoints.restore(state)) is not None:
            state, iterator_state = restored
            iterator.set_state(iterator_state)
        log = _MetricsLog(folder / "metrics.jsonl", config, int(state.step))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        pending = None  # the metrics of the step before: read only after the next step is under way
        with Progress(*columns, TextColumn("{task.fields[status]}")) as progress:
            bar = progress.add_task(label, total=config.steps, completed=int(state.step), status="")
            for step in range(int(state.step), config.steps):
                batch = place(next(iterator))
                state, metrics = train_step(state, frozen, batch)
                if pending is not None:
                    _read(pending, log, checkpoints)
                pending = (step, metrics, batch["answer"].size)
                done = step + 1
                saves = config.due(config.checkpoint_every, done)
                evaluates = evaluate is not None and config.due(config.evaluate_every, done)
                if saves or evaluates:
                    # A state is used only once its own loss is known to be finite.
                    _read(pending, log, checkpoints)
                    pending = None
                if evaluates:
                    log.write(done, {f"heldout/{name}": value for name, value in evaluate(state).items()})
                if saves:
                    checkpoints.save(state, iterator.get_state())
                progress.update(bar, completed=done, status=log.status)
    return state


def _read(pending: tuple[int, dict, int], log: "_MetricsLog", checkpoints: Checkpoints) -> None:
    step, metrics, tokens = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(map(math.isfinite, values.values())):
        bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
        good = checkpoints.latest_step
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
        raise NonFiniteLoss(f"step {step + 1}: {bad}; stopped, {where}")
    log.step(step + 1, values, tokens)


class _MetricsLog:
    """Averages metrics over `log_every` steps and writes them as JSON lines; `status` is the latest in a few words.

    What an earlier run wrote after the checkpoint at step `start` is dropped: those steps are run again.
    """

    def __init__(self, path: Path, config: LoopConfig, start: int):
        self._path, self._config = path, config
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if _before(line, start)))
        self.status = ""
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, float] = {}
        self._count, self._tokens, self._since = 0, 0, time.perf_counter()

    def step(self, step: int, values: dict[str, float], tokens: int) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1
        self._tokens += tokens
        if self._config.due(self._config.log_every, step):
            seconds = time.perf_counter() - self._since
            means = {name: total / self._count for name, total in self._sums.items()}
            speed = {"seconds_per_step": seconds / self._count, "tokens_per_second": self._tokens / seconds}
            self.write(step, means | speed)
            self.status = f"loss {means['loss']:.4f}"
            self._restart()

    def write(self, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _before(line: str, start: int) -> bool:
    """Whether a line of metrics is whole and of a step up to `start`."""
    try:
        return json.loads(line)["step"] <= start
    except ValueError:
        return False
