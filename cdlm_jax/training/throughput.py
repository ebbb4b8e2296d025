"""How fast a run trains: step time, tokens, share of the chips' peak, waiting for input, memory."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax

from cdlm_jax.mesh import chips
from cdlm_jax.mesh.sharding import mesh_sizes


class Throughput:
    """A stopwatch over the steps since the last `read`. A run's first step takes as long as it is compiled.

    flops_per_step: model FLOPs of one step over all devices (`training/flops.py`); None where nobody counted them.
    """

    def __init__(self, flops_per_step: float | None = None):
        self._flops = flops_per_step
        chip = chips.find(jax.local_devices()[0].device_kind)
        self._peak = None if chip is None else chip.flops * math.prod(mesh_sizes().values())
        self._restart()

    def _restart(self) -> None:
        self._steps, self._tokens, self._waited, self._apart = 0, 0, 0.0, 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around work that is not training: its time does not count."""
        begin = time.perf_counter()
        yield
        self._apart += time.perf_counter() - begin

    def step(self, tokens: int) -> None:
        """One more step is done, on so many response tokens."""
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last call, of which there must be one; begins anew.

        seconds_per_step; tokens_per_second; input_wait, seconds per step that no batch was ready; where they can be
        known model_flops_per_second, over all devices; mfu, its share of what their chips could do, 0..1;
        peak_memory_bytes, the most that any device of this process has held so far.
        """
        seconds = time.perf_counter() - self._since - self._apart
        figures = {
            "seconds_per_step": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "input_wait": self._waited / self._steps,
        }
        if self._flops is not None:
            figures["model_flops_per_second"] = self._flops * self._steps / seconds
            if self._peak is not None:
                figures["mfu"] = figures["model_flops_per_second"] / self._peak
        if peaks := _peak_memory():
            figures["peak_memory_bytes"] = max(peaks)
        self._restart()
        return figures


def _peak_memory() -> list[int]:
    """Of each device of this process; a CPU keeps no account."""
    accounts = (device.memory_stats() or {} for device in jax.local_devices())
    return [account["peak_bytes_in_use"] for account in accounts if "peak_bytes_in_use" in account]
