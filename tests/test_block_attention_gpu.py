"""The GPU kernel of block attention, the first of its two gates: against float64 in interpret mode, with all that no
query sees poisoned. tests/aot/test_aot_block_attention_gpu.py holds the second."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from devices import TESTS, environment
from gpu_cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from test_block_attention import float64_attention

from cdlm_jax.kernels.block_attention import gpu, gpu_tiles
from cdlm_jax.kernels.block_attention.cost import gpu_cost
from cdlm_jax.kernels.block_attention.gpu_tiles import GpuTiles, choose, heuristic
from cdlm_jax.kernels.block_attention.tiles import shape_name
from cdlm_jax.mesh import chips

OLD = jax.__version_info__ < (0, 12)
FAST = ("one row",)  # the public function adds small pages


def interpreted(*names: str) -> None:
    done = subprocess.run(
        [sys.executable, TESTS / "gpu_cases.py", *names],
        env=environment(1) | {"NPROC": "8"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_values():
    interpreted(*FAST, "bfloat16", "public")


@pytest.mark.slow
def test_more_values():
    interpreted(*(name for name in CASES if name not in FAST))


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="JAX before 0.12 does not follow copies to the end when it looks for races")
def test_there_are_no_races():
    interpreted("races")


@examples(3, 8)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_parts_merge(seed, sizes):
    """Attention to parts of the keys, some of them empty, is attention to all."""
    rng = np.random.default_rng(seed)
    q, (k, v) = rng.normal(size=(2, 3, 4, 8)), rng.normal(size=(2, 2, sum(sizes), 2, 8))
    ends = rng.integers(0, sum(sizes) + 1, (2, 3))
    first, parts = 0, []
    for size in sizes:
        here = slice(first, first + size)
        parts.append(float64_attention(q, k[:, here], v[:, here], np.clip(ends - first, 0, size)) if size else None)
        first += size
    nothing = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    outs, lses = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*(part or nothing for part in parts), strict=True))
    out, lse = gpu.merge(outs, lses)
    expected = float64_attention(q, k, v, ends) if sum(sizes) else nothing
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


# ---- what it takes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_kind": "NVIDIA B200"}, "it needs Hopper's wgmma, which the NVIDIA B200 has not"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "it needs Hopper's wgmma"),
        ({"dtype": jnp.float32}, "q is float32, not bfloat16"),
        ({"keys": jnp.int8}, "k is int8, not bfloat16"),
        ({"head_dim": 96}, "head_dim is 96, not 64 or 128"),
        ({"heads": 66}, "33 query heads share a key head, at most 32"),
        ({"page_size": 12}, "page_size is 12: it must be a multiple of 8 that divides 64, or one of 64"),
        ({"page_size": 96}, "page_size is 96"),
        ({"page_size": 128, "device_kind": "NVIDIA H200"}, None),
        ({"device_kind": "NVIDIA GH200 480GB"}, None),
    ],
)
def test_what_the_kernel_takes(changes, message):
    call = {
        "device_kind": "NVIDIA H100 80GB HBM3",
        "dtype": jnp.bfloat16,
        "head_dim": 64,
        "heads": 4,
        "page_size": None,
    }
    call |= {"keys": changes.get("dtype", jnp.bfloat16)} | changes
    q = jax.ShapeDtypeStruct((2, 16, call["heads"], call["head_dim"]), call["dtype"])
    k = jax.ShapeDtypeStruct((2, 16, 2, call["head_dim"]), call["keys"])
    reason = gpu.refusal(q, k, call["page_size"], call["device_kind"])
    assert (reason is None) if message is None else re.match(message, reason)


def test_every_hopper_of_the_table_is_taken():
    q = jax.ShapeDtypeStruct((2, 16, 4, 64), jnp.bfloat16)
    taken = {chip.name for chip in chips.CHIPS for kind in chip.kinds if gpu.refusal(q, q, None, kind) is None}
    assert taken == {"H100", "H200"}


# ---- tiles ---------------------------------------------------------------------------------------------------------


@examples(30, 100)
@given(
    st.integers(1, 64),
    st.integers(1, 600),
    st.integers(1, 32),
    st.integers(1, 32),
    st.sampled_from([64, 128]),
    st.integers(8, 40000),
)
def test_tiles_fit(rows, queries, group, kv_heads, head_dim, slots):
    q = jax.ShapeDtypeStruct((rows, queries, group * kv_heads, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, slots, kv_heads, head_dim), jnp.bfloat16)
    tiles = heuristic(q, k)
    assert tiles.shared(group, head_dim) <= chips.HOPPER_SHARED
    assert tiles.blocks(group) * gpu_tiles.WGMMA <= gpu_tiles.MOST_ROWS
    assert tiles.stages >= 2
    programs = rows * kv_heads * -(-queries // tiles.queries)
    assert tiles.splits == 1 or programs * tiles.splits <= chips.HOPPER_CORES


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "slots", "splits"),
    [(32, 28, 4, 1056, 1), (32, 32, 32, 1056, 1), (1, 28, 4, 32768, 33), (1, 32, 32, 32768, 4), (1, 28, 4, 1024, 4)],
)
def test_keys_are_split_where_programs_are_few(rows, heads, kv_heads, slots, splits):
    q = jax.ShapeDtypeStruct((rows, 32, heads, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, slots, kv_heads, 128), jnp.bfloat16)
    assert heuristic(q, k).splits == splits


def test_tiles_that_were_measured_are_taken(monkeypatch):
    q = jax.ShapeDtypeStruct((4, 32, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, 512, 4, 128), jnp.bfloat16)
    tuned = {"queries": 16, "keys": 128, "stages": 2}
    monkeypatch.setattr(gpu_tiles.device_tiles, "_tuned", lambda: {"NVIDIA H300": {shape_name(q, k): tuned}})
    found = choose("NVIDIA H300", q, k)
    assert {name: getattr(found, name) for name in tuned} == tuned
    assert choose("NVIDIA H301", q, k) == heuristic(q, k)


# ---- what it moves -------------------------------------------------------------------------------------------------


@examples(8, 30)
@given(st.integers(0, 2000), st.integers(1, 9), st.sampled_from([64, 128]))
def test_the_splits_share_the_tiles_that_the_cost_model_counts(length, splits, keys):
    tiles = GpuTiles(queries=8, keys=keys, stages=2, splits=splits)
    shares = [gpu.share(jnp.int32(length), jnp.int32(split), tiles) for split in range(splits)]
    fetched = [t for first, last in shares for t in range(int(first), int(last))]
    assert fetched == list(range(-(-length // keys)))
    q, k = (jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.bfloat16))
    moved, without = (gpu_cost(q, k, np.full((1, 8), each), tiles).moved for each in (length, 0))
    assert moved - without == len(fetched) * keys * 64 * 2 * 2


@pytest.mark.parametrize("context", [1024, 4096, 32768])
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (32, 32)], ids=["Dream", "LLaDA"])
def test_hardly_a_byte_is_moved_twice(context, heads, kv_heads):
    """A block of 32 after any prompt: at most 1.05 times what has to be moved."""
    rows, block = 32, 32
    q = jax.ShapeDtypeStruct((rows, block, heads, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, context + block, kv_heads, 128), jnp.bfloat16)
    ends = np.random.default_rng(0).integers(context - block, context + 1, rows) + block
    found = gpu_cost(q, k, np.repeat(ends[:, None], block, axis=1), heuristic(q, k))
    assert 1 <= found.ratio < 1.05
    assert found.on_chip <= chips.HOPPER_SHARED
    assert found.seconds(chips.find("NVIDIA H200")) < found.seconds(chips.find("NVIDIA H100 80GB HBM3"))


def test_what_splits_move_for_their_merge():
    """Float32 results of every split, written and read, and queries read by each: small enough for an H100's cache."""
    q = jax.ShapeDtypeStruct((1, 32, 28, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 32768, 4, 128), jnp.bfloat16)
    tiles = heuristic(q, k)
    split, whole = (gpu_cost(q, k, np.full((1, 32), 32768), dataclasses.replace(tiles, splits=n)) for n in (33, 1))
    assert tiles.splits == 33 and whole.ratio < 1.01
    assert whole.moved < split.moved < whole.moved + 50 * 2**20
