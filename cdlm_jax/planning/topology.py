"""Machines that are not there: the devices of a named TPU slice or GPU node, for which a program can be compiled."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from cdlm_jax.config import InputError
from cdlm_jax.mesh import chips
from cdlm_jax.mesh.chips import Chip

# Name -> (dimensions of a slice, its largest shape, what libtpu has to be told beside the name)
SLICES = {
    "v4": (3, "16x16x16", {"chip_config_name": "megacore"}),
    "v5e": (2, "16x16", {}),
    "v5p": (3, "16x16x24", {}),
    "v6e": (2, "16x16", {}),
    "tpu7x": (3, "16x16x36", {}),
}
SMALLEST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}  # slices of whole hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """What the compiler must know of a GPU, as CUDA reports it. capability: (major, minor); clock in GHz; bytes."""

    kind: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    l2: int
    clock: float
    shared_memory: int
    shared_memory_per_core: int


BOARDS = {
    "a100": Board(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus_per_core=64,
        l2=40 * 2**20,
        clock=1.41,
        shared_memory=163 * 2**10,
        shared_memory_per_core=164 * 2**10,
    ),
    "h100": Board(
        kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        fpus_per_core=128,
        l2=50 * 2**20,
        clock=1.98,
        shared_memory=227 * 2**10,
        shared_memory_per_core=228 * 2**10,
    ),
    "b200": Board(
        kind="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        fpus_per_core=128,
        l2=126 * 2**20,
        clock=1.965,
        shared_memory=227 * 2**10,
        shared_memory_per_core=228 * 2**10,
    ),
}
MOST_GPUS = 8  # of one node, all on one NVLink switch


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine by name. dims: chips along each axis of a slice, () for GPUs."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    dims: tuple[int, ...]

    @property
    def network(self) -> float:
        """Bytes/s that a device can send at most: over all links of its chip, at a corner of the slice.

        An axis of a slice gives a corner two links where it is closed to a ring, else one.
        """
        links = sum(0 if size == 1 else 2 if size >= self.chip.torus else 1 for size in self.dims)
        return self.chip.link * (links if self.dims else 1) / self.chip.per_chip


def known() -> str:
    """The names that `load` takes, in words."""
    slices = [f"{name}:{'x'.join('22' + '1' * (dims - 2))} to {most}" for name, (dims, most, _) in SLICES.items()]
    return ", ".join(slices + [f"{name}:1 to {MOST_GPUS}" for name in BOARDS])


def load(name: str) -> Topology:
    """The machine named `v5e:4x4` (a TPU slice, chips along each axis) or `h100:8` (GPUs of one node).

    No such device has to be present; its compiler does: libtpu, or JAX's CUDA plugin. InputError names what is missing,
    or, for an unknown name, those that are known.
    """
    kind, _, shape = name.partition(":")
    if kind in SLICES and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        return _slice(name, kind, tuple(map(int, shape.split("x"))))
    if kind in BOARDS and shape.isdecimal() and 1 <= int(shape) <= MOST_GPUS:
        return _gpus(name, BOARDS[kind], int(shape))
    raise InputError(f"unknown topology {name!r}, known: {known()}")


def _slice(name: str, kind: str, dims: tuple[int, ...]) -> Topology:
    count, most, options = SLICES[kind]
    if len(dims) != count or any(size > int(limit) for size, limit in zip(dims, most.split("x"), strict=True)):
        raise InputError(f"unknown topology {name!r}, known: {known()}")
    _needs("libtpu", "a TPU", "plan")
    # A process of its own: no TPU is looked for, neither in this machine nor by its cloud's metadata server.
    jax.config.update("jax_platforms", "cpu")
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", f"{'v5litepod' if kind == 'v5e' else kind}-{math.prod(dims)}"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu's own, of several types
        raise InputError(f"libtpu has no topology {name!r}: {str(error).splitlines()[0]}") from error
    return Topology(name, _chip(devices[0].device_kind), devices, dims)  # type: ignore[attr-defined]


def _chip(device_kind: str) -> Chip:
    """The chip of a machine that `load` knows."""
    chip = chips.find(device_kind)
    assert chip is not None, f"{device_kind} is in no entry of mesh/chips.py"
    return chip


def _gpus(name: str, board: Board, count: int) -> Topology:
    _needs("jax_plugins.xla_cuda13", "an NVIDIA GPU", "cuda13")
    jax.config.update("jax_platforms", "cpu")
    chip = _chip(board.kind)
    config = _target_config(board, chip)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, target_config=config, topology=f"1x1x{count}"
        )
    except Exception as error:
        raise InputError(f"JAX's CUDA plugin has no topology {name!r}: {str(error).splitlines()[0]}") from error
    return Topology(name, chip, found.devices, ())


def _target_config(board: Board, chip: Chip) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    major, minor = board.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {board.shared_memory}
  shared_memory_per_core: {board.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {board.cores}
  fpus_per_core: {board.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {round(chip.bandwidth)}
  device_memory_size: {chip.hbm_bytes}
  l2_cache_size: {board.l2}
  clock_rate_ghz: {board.clock}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{board.kind}"
"""


def _needs(module: str, whose: str, extra: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the package that it is in
        found = None
    if found is None:
        raise InputError(f"compiling for {whose} needs its compiler: pip install 'cdlm_jax[{extra}]'")
