"""Chips that are not there: compiling needs a TPU's compiler (libtpu) or a GPU's (JAX's CUDA plugin), not the chip."""

import re

import jax
import pytest

from cdlm_jax.config import InputError
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.planning import topology

SLICES = topology.SMALLEST


def mesh(chip: str, config: MeshConfig | None = None) -> jax.sharding.Mesh:
    """A mesh of one such device (a TPU of `SLICES`, else a GPU), or of as many as `config` says, for `jax.set_mesh`.
    Skips the test where the chip's compiler is not installed."""
    count = config.fsdp * config.tensor if config else 1
    try:
        devices = topology.load(f"{chip}:{SLICES.get(chip, count)}").devices
    except InputError as error:
        pytest.skip(str(error))
    return sharding.make_mesh(config or MeshConfig(fsdp=1), list(devices)[:count])


def compiled(function, *arguments):
    """function compiled for the current mesh; arguments are ShapeDtypeStructs, whole on every device unless they say
    otherwise."""
    everywhere = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())

    def placed(x):
        return x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    return jax.jit(function).lower(*jax.tree.map(placed, arguments)).compile()


def kernels(text: str) -> list[str]:
    """Names of the Pallas kernels that a compiled program calls, sorted."""
    calls = [line for line in text.splitlines() if re.search('custom_call_target="(tpu_custom_call|mosaic_gpu)', line)]
    return sorted(re.search(r'op_name="[^"]*?(\w+)/\w+"', call)[1] for call in calls)
