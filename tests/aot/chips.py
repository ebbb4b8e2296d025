"""Chips that are not there: compiling needs a TPU's compiler (libtpu) or a GPU's (JAX's CUDA plugin), not the chip."""

import importlib.util
import os
import re

import jax
import pytest
from jax.experimental import topologies

from cdlm_jax import sharding
from cdlm_jax.config import InputError
from cdlm_jax.planning import topology
from cdlm_jax.sharding import MeshConfig

# Name -> (the smallest slice of whole hosts, what libtpu has to be told beside it)
SLICES = {
    "v4": ("2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("2x2", {}),
    "v5p": ("2x2x1", {}),
    "v6e": ("2x2", {}),
    "tpu7x": ("2x2x1", {}),
}


def devices(chip: str) -> list[jax.Device]:
    """A slice's devices, to compile for. Skips the test where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU needs libtpu: pip install libtpu")
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    shape, options = SLICES[chip]
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}", **options).devices)


def mesh(chip: str, config: MeshConfig | None = None) -> jax.sharding.Mesh:
    """A mesh of one such device, or of as many as `config` says, for `jax.set_mesh`."""
    found = devices(chip)
    return sharding.make_mesh(config or MeshConfig(fsdp=1), found if config else found[:1])


def gpu_mesh(board: str, config: MeshConfig | None = None) -> jax.sharding.Mesh:
    """A mesh of one GPU, or of as many as `config` says. Skips the test where the CUDA plugin is not installed."""
    count = config.fsdp * config.tensor if config else 1
    try:
        found = topology.load(f"{board}:{count}").devices
    except InputError as error:
        pytest.skip(str(error))
    return sharding.make_mesh(config or MeshConfig(fsdp=1), found)


def gpu_kernels(text: str) -> int:
    """How often a compiled program calls a kernel of Mosaic GPU."""
    return len(re.findall(r'custom_call_target="mosaic_gpu\w*"', text))


def compiled(function, *arguments, **keywords):
    """function compiled for the current mesh; arguments are ShapeDtypeStructs, whole on every device unless they say
    otherwise."""
    everywhere = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())

    def placed(x):
        return x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    arguments, keywords = jax.tree.map(placed, (arguments, keywords))
    return jax.jit(function).lower(*arguments, **keywords).compile()
