"""How the TPU kernel cuts its work, and what that moves: `tiles` and `cost`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.kernels.block_attention import tiles as tiles_module
from cdlm_jax.kernels.block_attention import tpu
from cdlm_jax.kernels.block_attention.cost import cost, keys_fetched
from cdlm_jax.kernels.block_attention.tiles import Tiles, choose, heuristic, shape_name, vmem
from cdlm_jax.mesh import chips


@examples(30, 100)
@given(st.data())
def test_tiles_fit_or_are_refused(data):
    group, kv_heads = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 64))
    page_size = data.draw(st.sampled_from([None, 16, 128, 256, 384]))
    head_dim, dtype = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from(["bfloat16", "float32"]))
    rows, queries, slots = (
        data.draw(st.integers(1, 64)),
        data.draw(st.integers(1, 600)),
        data.draw(st.integers(8, 40000)),
    )
    q = jax.ShapeDtypeStruct((rows, queries, group * kv_heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct(
        (rows, page_size or slots * 8, kv_heads, head_dim), data.draw(st.sampled_from([dtype, "int8"]))
    )
    tiles = heuristic(q, k, page_size is not None)
    assert tiles.rows >= 1 and tiles.queries % 16 == 0 and tiles.keys % 128 == 0
    assert not page_size or page_size % tiles.keys == 0 or tiles.keys % page_size == 0
    reason = tpu.refusal(q, k, page_size)
    fits = vmem(q, k, tiles) <= tiles_module.VMEM
    assert fits == (reason is None or "vector memory" not in reason)
    assert fits or (tiles.rows, tiles.queries, tiles.keys) == (1, 16, 128)


def test_tiles_that_were_measured_are_taken(monkeypatch):
    q = jax.ShapeDtypeStruct((4, 32, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, 512, 4, 128), jnp.bfloat16)
    tuned = {"rows": 1, "queries": 16, "keys": 256, "chunk": 64}
    monkeypatch.setattr(tiles_module, "_tuned", lambda: {"TPU v9": {shape_name(q, k): tuned}})
    assert choose("TPU v9", q, k, False) == Tiles(**tuned)
    assert choose("TPU v8", q, k, False) == heuristic(q, k, False)


# ---- what it moves -------------------------------------------------------------------------------------------------


@examples(4, 15)
@given(st.data())
def test_the_cost_model_counts_the_kernels_own_copies(data):
    page_size = data.draw(st.sampled_from([None, 8, 32, 128, 256, 384]))
    tiles = Tiles(
        rows=1, queries=8, keys=data.draw(st.sampled_from([128, 256])), chunk=data.draw(st.sampled_from([16, 32]))
    )
    if page_size and page_size % tiles.keys and tiles.keys % page_size:
        tiles = dataclasses.replace(tiles, keys=128)
    slots = data.draw(st.integers(1, 1000)) if page_size is None else 4 * page_size
    length = data.draw(st.integers(0, slots))
    walk = tpu.Walk.of(tiles, page_size or slots, 4 if page_size else 0)
    copied = np.zeros(slots, int)

    def visit_tile(first):
        placed = jax.new_ref(jnp.zeros(tiles.keys, jnp.int32))

        def visit(offset, size):
            at = jnp.arange(tiles.keys)
            placed[...] += (at >= offset) & (at < offset + size)

        walk.for_each_copy(first, jnp.int32(length) - first, visit)
        return placed[...]

    for first in range(0, max(length, 1), tiles.keys):
        found = np.asarray(jax.jit(visit_tile)(jnp.int32(first)))
        assert not found[slots - first :].any()  # nothing beyond the row
        copied[first : first + tiles.keys] += found[: slots - first]
    assert (copied[:length] == 1).all() and copied.max() <= 1
    assert copied.sum() == keys_fetched(length, tiles, slots, page_size)


@pytest.mark.parametrize("context", [1024, 4096, 32768])
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (32, 32)], ids=["Dream", "LLaDA"])
def test_hardly_a_byte_is_moved_twice(context, heads, kv_heads):
    """A block of 32 after any prompt: at most 1.05 times what has to be moved."""
    rows, block = 32, 32
    q = jax.ShapeDtypeStruct((rows, block, heads, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, context + block, kv_heads, 128), jnp.bfloat16)
    ends = np.random.default_rng(0).integers(context - block, context + 1, rows) + block
    found = cost(q, k, np.repeat(ends[:, None], block, axis=1), heuristic(q, k, False))
    assert 1 <= found.ratio < 1.05
    assert found.on_chip < 16 * 2**20  # the smallest VMEM
    memory = found.moved / chips.find("TPU v5e").bandwidth
    assert found.seconds(chips.find("TPU v5e")) >= memory


@pytest.mark.parametrize("page_size", [None, 16])
def test_int8_counts_the_copy_of_its_scales(page_size):
    """Every slot's, read and written, beside those that the kernel reads."""
    q = jax.ShapeDtypeStruct((4, 32, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, page_size or 1000, 4, 128), jnp.int8)
    tiles = Tiles(rows=2, queries=32, keys=256)
    counted = [cost(q, k, np.full((4, 32), end), tiles, page_size).moved for end in (1000, 0)]
    keys = 2 * 4 * 4 * keys_fetched(1000, tiles, page_size or 1000, page_size) * 128
    scales, seen_scales = 2 * 4 * 4 * 4 * (1024 + (1008 if page_size else 1000)), 2 * 4 * 4 * 4 * 1024
    assert counted[0] - counted[1] == keys + seen_scales + (scales if page_size else 0)
    assert page_size or counted[1] > scales
