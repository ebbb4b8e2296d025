"""Run by test_block_attention_gpu in a process of its own, since XLA's threads are counted when JAX starts: interpreted
warpgroups are programs that wait for each other, which with fewer threads (NPROC) than warpgroups is forever.

python gpu_cases.py "one row" "large pages"   fails where the interpreted kernel's values are wrong
"""

import dataclasses
import functools
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public names yet
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from test_block_attention import LAYER, Case, check, make_call, worst

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import block_attention, gpu, xla
from cdlm_jax.kernels.block_attention.gpu_tiles import GpuTiles
from cdlm_jax.mesh import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuCase(Case):
    dtype: str = "bfloat16"
    tiles: GpuTiles = GpuTiles(queries=8, keys=64, stages=2)


CASES = {
    "one row": GpuCase(rows=1, kv_heads=1, slots=200),
    "ragged slots, padded queries": GpuCase(rows=2, queries=12, group=3, slots=299),
    "two warpgroups, splits": GpuCase(
        rows=2,
        queries=24,
        group=5,
        kv_heads=1,
        head_dim=128,
        slots=440,
        tiles=GpuTiles(queries=24, keys=64, stages=2, splits=3),
    ),
    "four blocks, large tiles": GpuCase(
        rows=2, queries=32, group=7, kv_heads=1, head_dim=128, slots=304, tiles=GpuTiles(queries=32, keys=128, stages=3)
    ),
    "fewer slots than a tile": GpuCase(
        rows=2, kv_heads=1, slots=40, tiles=GpuTiles(queries=8, keys=64, stages=2, splits=2)
    ),
    "small pages": GpuCase(rows=2, page_size=8, slots=144),
    "large pages": GpuCase(page_size=128, slots=384, rows=2, kv_heads=1),
}
# What lies behind a row's last slot arrives as zeros on a GPU, as nan here.
INTERPRETED = InterpretGPUParams(out_of_bounds_reads="uninitialized")


@functools.cache
def kernel(case: GpuCase, interpret: InterpretGPUParams = INTERPRETED):
    """Out and log-sum-exp of `block_attention`'s arguments."""
    options = {"scale": case.head_dim**-0.5, "tiles": case.tiles, "return_lse": True, "interpret": interpret}
    return jax.jit(functools.partial(gpu.block_attention, **options))


def values(name: str) -> None:
    """Where every query sees another number of keys, and where all of a row's see the same, of the last row's none."""
    case = CASES[name]
    ends = np.random.default_rng(0).integers(0, case.slots + 1, (case.rows, case.queries), dtype=np.int32)
    block = np.repeat(ends[:, :1], case.queries, axis=1)
    block[1:][-1:] = 0
    for seed, each in enumerate((ends, block)):
        check(make_call(case, seed, each), kernel(case))


def races() -> None:
    """No warpgroup reads what another, or a copy, may be writing."""
    case = CASES["two warpgroups, splits"]
    call = make_call(case, 0, np.repeat(np.array([[case.slots], [130]], np.int32), case.queries, axis=1))
    check(call, kernel(case, dataclasses.replace(INTERPRETED, detect_races=True)))
    assert not gpu_callbacks.get_races().races_found


def bfloat16() -> None:
    """The error is at most twice that of XLA on bfloat16."""
    case = CASES["one row"]
    ends = np.full((case.rows, case.queries), case.slots, np.int32)
    call = make_call(case, 3, ends)
    k, v = (call.finite[each][-1] for each in "kv")
    on_xla = worst(xla.block_attention(call.q, k, v, visible_end=jnp.asarray(ends)), call.expected)
    assert worst(kernel(case)(call.q, **call.poisoned)[0], call.expected) <= 2 * on_xla


def public() -> None:
    """The public function on a Hopper, with tiles of its own choice, limits behind the row's end, and its refusals."""
    board = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    interpreted = functools.partial(gpu.block_attention, interpret=INTERPRETED)
    with mock.patch.object(sharding, "device", lambda: board), mock.patch.object(gpu, "block_attention", interpreted):
        for case in (CASES["one row"], CASES["small pages"]):
            ends = np.full((case.rows, case.queries), 70, np.int32)
            call = make_call(case, 0, ends)
            limited = call.poisoned | {"visible_end": jnp.full((1, case.queries), 1000), "layer": LAYER}
            limited["kv_length"] = jnp.full(case.rows, 70)
            run = functools.partial(block_attention, return_lse=True, implementation="gpu")
            check(dataclasses.replace(call, poisoned=limited), run)
        try:
            jax.grad(lambda q: block_attention(q, **call.finite).astype(jnp.float32).sum())(call.q)
        except InputError as error:
            assert "'gpu' has no gradient: use training_attention" in str(error)
        else:
            raise AssertionError("a gradient was not refused")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        {"races": races, "bfloat16": bfloat16, "public": public}.get(name, functools.partial(values, name))()
        print(name, "holds")
