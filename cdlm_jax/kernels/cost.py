"""What a call of a kernel moves and computes, and the bound that a chip sets on its time."""

import dataclasses
import json

from jax.experimental import pallas as pl
from jax.experimental.xla_metadata import set_xla_metadata

from cdlm_jax.mesh.chips import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """moved: bytes between HBM and the chip. least: those that any kernel has to move. flops: of the matrix products.
    on_chip: bytes that the kernel asks for, of VMEM, or of a GPU's shared memory for each program."""

    moved: int
    least: int
    flops: int
    on_chip: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.moved

    def seconds(self, chip: Chip) -> float:
        """The roofline's bound: what memory or arithmetic alone would take."""
        return max(self.moved / chip.bandwidth, self.flops / chip.flops)


def estimated(cost: pl.CostEstimate):
    """A context for the call of a GPU's kernel, whose cost the compiled program then says, for the planner to read.

    A TPU's kernels take the estimate itself, which Mosaic GPU drops.
    """
    said = {"flops": str(cost.flops), "bytes_accessed": str(cost.bytes_accessed)}
    return set_xla_metadata(cost_estimate=json.dumps(said, separators=(",", ":")))
