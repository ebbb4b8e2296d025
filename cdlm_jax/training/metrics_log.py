"""Metrics of a run as JSON lines, and in TensorBoard where tensorboardX is installed; written by one process."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from cdlm_jax.files import MAX_DATA, read_text
from cdlm_jax.mesh.distributed import is_main
from cdlm_jax.training.throughput import Throughput


class MetricsLog:
    """Means over the steps since the last line, in `folder/metrics.jsonl`; `status` is the latest in a few words
    (before there is one, the loss so far).

    What an earlier run wrote after the checkpoint at step `start` is dropped: those steps are run again. Only the first
    process of a cluster writes. `due(step)` says whether a step ends a line.
    """

    def __init__(self, folder: Path, start: int, due: Callable[[int], bool], throughput: Throughput):
        self._path, self._due, self._throughput = folder / "metrics.jsonl", due, throughput
        self._writes = is_main()
        self._board = _board(folder / "tensorboard", start) if self._writes else None
        if self._writes and self._path.exists():
            lines = read_text(self._path, MAX_DATA).splitlines(keepends=True)
            kept = self._path.with_suffix(".partial")
            kept.write_text("".join(line for line in lines if _before(line, start)))
            kept.replace(self._path)
        self.status, self._early = "", True
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def step(self, step: int, values: dict[str, float], tokens: int) -> None:
        """Step number `step` is done: its metrics, and how many response tokens it had."""
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1
        self._throughput.step(tokens)
        if self._due(step):
            means = {name: total / self._count for name, total in self._sums.items()}
            speed = self._throughput.read()
            self.write(step, means | speed)
            self.status = f"loss {means['loss']:.4f}  {speed['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in speed:
                self.status += f"  MFU {100 * speed['mfu']:.1f} %"
            self._early = False
            self._restart()
        elif self._early:
            self.status = f"loss {self._sums['loss'] / self._count:.4f}"

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _before(line: str, start: int) -> bool:
    """Whether a line of metrics is whole and of a step up to `start`."""
    try:
        return json.loads(line)["step"] <= start
    except ValueError:
        return False


def _board(folder: Path, start: int):
    """A TensorBoard writer that hides what was written after step `start`; None without tensorboardX."""
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1)
