"""A trace of a few training steps, for XProf: `pip install xprof`, then `xprof --logdir=FOLDER`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from cdlm_jax.mesh.distributed import is_main

STEPS = 3
WARM_UP = 2  # the first step is compiled, the second may still wait for it


class Profile:
    """Traces `STEPS` steps of those from `start` to `end` into `folder`, after `WARM_UP` where there are so many."""

    def __init__(self, folder: Path, start: int, end: int):
        first = start + min(WARM_UP, max(0, end - start - STEPS))
        self._folder = folder
        self._steps = range(first, min(first + STEPS, end)) if is_main() else range(0)
        self._running = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the call that starts step number `step`."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def started(self, step: int, results) -> None:
        """After that call: `results` are what the step computes. The last traced one is waited for."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
