"""The second gate of the TPU kernel: the chips' own compiler takes it (tests/test_block_attention.py is the first)."""

import jax
import jax.numpy as jnp
import pytest
from aot.chips import SLICES, compiled, kernels, mesh

from cdlm_jax.kernels.block_attention import block_attention

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
    "one key head, odd slots": (arguments(3, 12, 7, 1, 128, 1001), {}),
    "three key heads of 64": (arguments(8, 32, 9, 3, 64, 1000), {}),
    "four key heads of 64, float32": (arguments(8, 5, 8, 4, 64, 300, dtype="float32"), {}),
}
FAST = ("Dream, commit and refine", "LLaDA, block", "pages", "int8", "three key heads of 64")


@pytest.mark.parametrize(
    ("chip", "case"),
    [
        pytest.param(chip, case, marks=() if chip == "v5e" and case in FAST else pytest.mark.slow)
        for chip in SLICES
        for case in CASES
    ],
)
def test_the_kernel_compiles(chip, case):
    shapes, options = CASES[case]
    with jax.set_mesh(mesh(chip)):
        program = compiled(lambda shapes: block_attention(**shapes, **options), shapes)
    assert kernels(program.as_text()) == ["block_attention"]
