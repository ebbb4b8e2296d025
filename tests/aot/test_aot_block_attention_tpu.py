"""The second gate of the TPU kernel: the chips' own compiler takes it (tests/test_block_attention.py is the first)."""

import re

import jax
import jax.numpy as jnp
import pytest
from aot.chips import SLICES, compiled, kernels, mesh

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import block_attention
from cdlm_jax.kernels.block_attention.cache_write import SLOTS, cache_write
from cdlm_jax.kernels.block_attention.tiles import SCALARS, VMEM, heuristic, vmem

Shape = jax.ShapeDtypeStruct
LAYERS, PAGES, PAGE_SIZE = 2, 64, 16


def arguments(rows, queries, heads, kv_heads, head_dim, slots, dtype="bfloat16", paged=False, int8=False):
    """Shapes of a call on a stacked cache."""
    place = (PAGES, PAGE_SIZE) if paged else (rows, slots)
    keys = Shape((LAYERS, *place, kv_heads, head_dim), jnp.int8 if int8 else dtype)
    found = {
        "q": Shape((rows, queries, heads, head_dim), dtype),
        "k": keys,
        "v": keys,
        "visible_end": Shape((rows, queries), jnp.int32),
        "layer": Shape((), jnp.int32),
    }
    if paged:
        found["page_table"] = Shape((rows, slots // PAGE_SIZE), jnp.int32)
    if int8:
        found["k_scale"] = found["v_scale"] = Shape((LAYERS, place[0], kv_heads, place[1]), jnp.float32)
    return found


DREAM, LLADA = (28, 4, 128), (32, 32, 128)
CASES = {
    "Dream, block": (arguments(32, 32, *DREAM, 1056), {}),
    "LLaDA, block": (arguments(32, 32, *LLADA, 1056), {}),
    "Dream, commit and refine": (arguments(32, 64, *DREAM, 1056), {}),
    "LLaDA, commit and refine": (arguments(32, 64, *LLADA, 1056), {}),
    "Dream, prefill": (arguments(4, 500, *DREAM, 700), {}),
    "LLaDA, prefill": (arguments(4, 500, *LLADA, 700), {}),
    "Dream, one row": (arguments(1, 32, *DREAM, 32768), {}),
    "pages": (arguments(8, 32, *DREAM, 1024, paged=True), {"return_lse": True}),
    "int8": (arguments(8, 32, *DREAM, 1024, int8=True), {}),
    "int8 pages, LLaDA": (arguments(8, 32, *LLADA, 1024, int8=True, paged=True), {}),
    "log-sum-exp": (arguments(8, 32, *LLADA, 1024), {"return_lse": True}),
    "float32": (arguments(7, 20, *LLADA, 1000, dtype="float32"), {}),
    "float32, LLaDA, Q=64": (arguments(32, 64, *LLADA, 1056, dtype="float32"), {}),
    "float32, Dream, Q=64": (arguments(32, 64, *DREAM, 1056, dtype="float32"), {}),
    "64 key heads": (arguments(4, 64, 64, 64, 128, 1056), {}),
    "a large page table": (arguments(8, 32, *DREAM, PAGE_SIZE * (SCALARS // 8 - 1), paged=True), {}),
    "one key head, odd slots": (arguments(3, 12, 7, 1, 128, 1001), {}),
    "three key heads of 64": (arguments(8, 32, 9, 3, 64, 1000), {}),
    "four key heads of 64, float32": (arguments(8, 5, 8, 4, 64, 300, dtype="float32"), {}),
}
FAST = {
    "v5e": ("Dream, commit and refine", "pages", "int8", "three key heads of 64"),
    "v4": ("float32, LLaDA, Q=64",),  # the tightest: on the smallest VMEM
}
EVERYWHERE = ("Dream, commit and refine", "LLaDA, block", "int8 pages, LLaDA", "64 key heads", "float32, LLaDA, Q=64")


@pytest.mark.parametrize(
    ("chip", "case"),
    [
        pytest.param(chip, case, marks=() if case in FAST.get(chip, ()) else pytest.mark.slow)
        for chip in SLICES
        for case in (CASES if chip in FAST else EVERYWHERE)
    ],
)
def test_the_kernel_compiles(chip, case):
    shapes, options = CASES[case]
    with jax.set_mesh(mesh(chip)):
        program = compiled(lambda shapes: block_attention(**shapes, **options, implementation="tpu"), shapes)
    text = program.as_text()
    assert kernels(text) == ["block_attention"]
    (call,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    taken = int(
        re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', call)[1]
    )
    q, k = shapes["q"], shapes["k"]
    estimate = vmem(q, k, heuristic(q, k, "page_table" in shapes))
    assert taken - 2**20 < estimate <= VMEM


@pytest.mark.parametrize("case", [(64, 64, 128), (128, 8, 128), (64, 64, 64)], ids=str)
def test_what_does_not_fit_runs_on_xla(case):
    """Though the smallest tiles are chosen."""
    shapes = arguments(4, 64, *case, 1056, dtype="float32")
    with jax.set_mesh(mesh("v4")):
        with pytest.raises(InputError, match=r"cannot run here: \d+ heads of .* MiB of vector memory, more than 15"):
            jax.eval_shape(lambda shapes: block_attention(**shapes, implementation="tpu"), shapes)
        text = jax.jit(lambda shapes: block_attention(**shapes)).trace(shapes).jaxpr
    assert "pallas_call" not in str(text)


@pytest.mark.parametrize(
    ("chip", "rows", "queries"),
    [
        pytest.param(chip, *sizes, marks=() if (chip, *sizes) == ("v4", 8, 32768) else pytest.mark.slow)
        for chip in SLICES
        for sizes in ([(32, 64), (8, 32768), (64, 4096), (1, SLOTS)] if chip == "v4" else [(8, 32768)])
    ],
    ids=str,
)
def test_the_cache_write_compiles(chip, rows, queries):
    """Also where the slots of all rows are more than the scalar memory holds."""
    cache, new = (Shape((*lead, queries, 4, 128), jnp.bfloat16) for lead in ((LAYERS, rows), (rows,)))
    slots = Shape((rows, queries), jnp.int32)
    with jax.set_mesh(mesh(chip)):
        write = lambda *arrays: cache_write(*arrays[:4], layer=arrays[4], slots=arrays[5])  # noqa: E731
        program = compiled(write, cache, cache, new, new, Shape((), jnp.int32), slots)
    assert kernels(program.as_text()) == ["cache_write"]
