"""One table of accelerators: what a device can compute, hold and move, as its vendor describes it.

Every figure is of one JAX device, which is a chip but on TPU7x, whose two cores JAX shows as two devices.
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator.

    kinds: the `jax.Device.device_kind`s that mean it.
    flops: dense bfloat16 FLOP/s. hbm_bytes: memory that a program can use. bandwidth: of that memory, bytes/s.
    link: bytes/s that one link to a neighbour carries each way (TPU), or that the device sends into its switch (GPU).
    torus: the length from which an axis of a TPU slice is closed to a ring; 0 is a GPU.
    per_chip: JAX devices of one chip, which share its links.
    source: where the figures come from, in words.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm_bytes: int
    bandwidth: float
    link: float
    torus: int = 0
    per_chip: int = 1
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on computing, not memory, is the limit."""
        return self.flops / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """The share of the peak FLOP/s that memory allows, 0..1."""
        return min(1.0, intensity / self.ridge)


# Of a TPU: the compiler of libtpu says how much memory it hands out, Google Cloud's pages the rest. They give the links
# of a chip together and in both directions: v5e, v6e have 4 of them, v4, v5p, TPU7x have 6.
_CLOUD = "Google Cloud's page of the chip; memory as libtpu hands it out"
_NVIDIA = "NVIDIA's data sheet of the SXM board, without sparsity"

CHIPS = (
    Chip(
        name="A100 80GB",
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        hbm_bytes=80 * 10**9,
        bandwidth=2.039e12,
        link=300e9,
        source=_NVIDIA,
    ),
    Chip(
        name="H100",
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989.4e12,
        hbm_bytes=80 * 10**9,
        bandwidth=3.35e12,
        link=450e9,
        source=_NVIDIA,
    ),
    Chip(
        name="H200",
        kinds=("NVIDIA H200",),
        flops=989.4e12,
        hbm_bytes=141 * 10**9,
        bandwidth=4.8e12,
        link=450e9,
        source=_NVIDIA,
    ),
    Chip(
        name="B200",
        kinds=("NVIDIA B200",),
        flops=2250e12,
        hbm_bytes=180 * 10**9,
        bandwidth=8e12,
        link=900e9,
        source="NVIDIA's data sheet of the HGX B200, without sparsity; memory as in the DGX B200",
    ),
    Chip(
        name="TPU v4",
        kinds=("TPU v4",),
        flops=275e12,
        hbm_bytes=int(30.75 * GIB),
        bandwidth=1.228e12,
        link=50e9,
        torus=4,
        source=_CLOUD,
    ),
    Chip(
        name="TPU v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        hbm_bytes=int(15.75 * GIB),
        bandwidth=0.819e12,
        link=50e9,
        torus=16,
        source=_CLOUD,
    ),
    Chip(
        name="TPU v5p",
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        hbm_bytes=int(95.74 * GIB),
        bandwidth=2.765e12,
        link=100e9,
        torus=4,
        source=_CLOUD,
    ),
    Chip(
        name="TPU v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        hbm_bytes=int(31.25 * GIB),
        bandwidth=1.638e12,
        link=100e9,
        torus=16,
        source=_CLOUD,
    ),
    Chip(
        name="TPU7x",
        kinds=("TPU7x",),
        flops=2307e12 / 2,
        hbm_bytes=int(94.75 * GIB),
        bandwidth=7.38e12 / 2,
        link=100e9,
        torus=4,
        per_chip=2,
        source=_CLOUD + "; half a chip, one of its two cores",
    ),
)


def find(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


# Streaming multiprocessors of an H100 SXM and an H200. Others that `is_hopper` takes have fewer (an H100 PCIe 114, an
# H20 78): work cut for 132 is right there too, if not in the best number of pieces.
HOPPER_CORES = 132
HOPPER_SHARED = 227 * 2**10  # bytes of shared memory that a program can have; two programs have about half of it each


def is_hopper(device_kind: str) -> bool:
    """Whether it is an NVIDIA Hopper, which alone has wgmma. The name is all that is known of a mesh's devices."""
    return re.search(r"\bG?H(20|100|200|800)\b", device_kind) is not None
