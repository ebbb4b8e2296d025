"""Every implementation of block attention against float64, with all that no query sees poisoned.

The TPU kernel runs in interpret mode, the first of its two gates; tests/aot holds the second.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from cdlm_jax import chips, sharding
from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import block_attention, reference, tpu, xla
from cdlm_jax.kernels.block_attention.cost import cost, keys_fetched
from cdlm_jax.kernels.block_attention.tiles import Tiles, choose, heuristic, shape_name
from cdlm_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of a call. slots: of a row, whole pages of them where paged."""

    rows: int = 3
    queries: int = 8
    group: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    slots: int = 160
    page_size: int | None = None
    dtype: str = "float32"
    int8: bool = False
    tiles: Tiles = Tiles(rows=2, queries=8, keys=128, chunk=16)

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


CASES = {
    "two tiles": Case(),
    "ragged slots, many queries": Case(
        rows=2, queries=20, group=3, kv_heads=4, slots=300, dtype="bfloat16", tiles=Tiles(rows=1, queries=16, keys=128)
    ),
    "one key head": Case(rows=1, group=5, kv_heads=1, head_dim=128, slots=137),
    "three key heads": Case(rows=5, queries=3, group=1, kv_heads=3, slots=40, dtype="bfloat16"),
    "small pages": Case(page_size=8, slots=144, head_dim=128, dtype="bfloat16"),
    "large pages": Case(page_size=256, slots=512, kv_heads=4, group=1),
    "int8": Case(int8=True, kv_heads=4, group=1),
    "int8 pages": Case(int8=True, kv_heads=8, group=1, page_size=16, dtype="bfloat16"),
}
LAYERS, LAYER = 2, 1


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a call whose unseen slots, pages and scales are nan, and the same with finite ones."""

    case: Case
    q: jax.Array
    poisoned: dict[str, jax.Array]
    finite: dict[str, jax.Array]
    expected: np.ndarray  # float64 [rows, Q, H, D]
    expected_lse: np.ndarray  # float64 [rows, Q, H]


def make_call(case: Case, seed: int, ends: np.ndarray) -> Call:
    """Random values; ends [rows, Q] is what the queries see."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(case.rows, case.queries, case.heads, case.head_dim)), case.dtype)
    shape = (case.rows, case.slots, case.kv_heads, case.head_dim)
    arrays, meaning = {}, {}
    for name in "kv":
        if case.int8:
            arrays[name] = rng.integers(-127, 128, shape, dtype=np.int8)
            arrays[f"{name}_scale"] = rng.uniform(0.001, 0.02, shape[:3]).swapaxes(1, 2).astype(np.float32)
            meaning[name] = arrays[name] * arrays[f"{name}_scale"].swapaxes(1, 2)[..., None].astype(np.float64)
        else:
            arrays[name] = np.asarray(jnp.asarray(rng.normal(size=shape), case.dtype).astype(jnp.float32))
            meaning[name] = arrays[name]
    expected, lse = float64_attention(np.asarray(q, np.float64), meaning["k"], meaning["v"], ends)
    unseen = np.arange(case.slots) >= ends.max(axis=1)[:, None]  # [rows, S]
    poisoned = {name: poison(x, unseen) for name, x in arrays.items()}
    table = {}
    if case.page_size:
        pages = case.slots // case.page_size
        used = rng.permutation(case.rows * pages + 3)[: case.rows * pages].reshape(case.rows, pages).astype(np.int32)
        arrays = {name: paged(x, used, case.page_size, 0) for name, x in arrays.items()}
        poisoned = {name: paged(x, used, case.page_size, np.nan) for name, x in poisoned.items()}
        first_slots = np.arange(pages) * case.page_size
        table = {"page_table": jnp.asarray(np.where(first_slots < ends.max(axis=1)[:, None], used, 10**6))}
    common = {"visible_end": jnp.asarray(ends), "layer": jnp.int32(LAYER), **table}
    finite = common | {name: stacked(x, case, 0) for name, x in arrays.items()}
    poisoned = common | {name: stacked(x, case, np.nan) for name, x in poisoned.items()}
    return Call(case, q, poisoned, finite, expected, lse)


def float64_attention(q, k, v, ends):
    k, v = (np.repeat(np.asarray(x, np.float64), q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    seen = np.arange(k.shape[1]) < ends[:, None, :, None]
    scores = np.where(seen, np.einsum("rqhd,rshd->rhqs", q, k) / math.sqrt(q.shape[3]), -np.inf)
    highest = np.maximum(scores.max(axis=-1, keepdims=True), -1e300)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("rhqs,rshd->rqhd", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        return out, (np.log(total) + highest)[..., 0].swapaxes(1, 2)


def poison(x, unseen):
    """int8 cannot hold nan, its scales [rows, K, S] can."""
    if x.dtype == np.int8:
        return x
    return np.where(unseen[:, :, None, None] if x.ndim == 4 else unseen[:, None], np.nan, x)


def paged(x, table, page_size, rest):
    """[rows, S, K, D] (scales [rows, K, S]) -> [pages, page_size, K, D] ([pages, K, page_size]) with spare pages."""
    by_slot = x if x.ndim == 4 else x.swapaxes(1, 2)
    spare = 0 if x.dtype == np.int8 else rest
    pool = np.full((table.size + 3, page_size, *by_slot.shape[2:]), spare, x.dtype)
    pool[table.reshape(-1)] = by_slot.reshape(-1, page_size, *by_slot.shape[2:])
    return pool if x.ndim == 4 else pool.swapaxes(1, 2)


def stacked(x, case, rest):
    """The one layer that is used among others."""
    dtype = x.dtype if case.int8 else case.dtype
    other = np.full_like(x, 0 if x.dtype == np.int8 else rest)
    return jnp.asarray(np.stack([x if i == LAYER else other for i in range(LAYERS)]), dtype)


@functools.cache
def kernel(case: Case):
    """The TPU kernel for a case's shapes, interpreted: out and log-sum-exp of `block_attention`'s arguments."""

    def run(q, k, v, k_scale=None, v_scale=None, **options):
        if case.int8:
            scales = [each[LAYER] for each in (k_scale, v_scale)]
            if case.page_size:
                scales = [reference.dense_scale(each, options["page_table"]) for each in scales]
            options |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
        options |= {"scale": case.head_dim**-0.5, "tiles": case.tiles, "return_lse": True, "interpret": True}
        return tpu.block_attention(q, k, v, **options)

    return jax.jit(run)


@functools.cache
def plain(case: Case):
    return jax.jit(reference.block_attention)


def ragged(case: Case):
    """What queries see: any numbers of keys, most often some of a row's first ones for all, as in a block."""
    any_end = st.integers(0, case.slots)
    row = st.one_of(
        any_end.map(lambda end: [end] * case.queries), st.lists(any_end, min_size=case.queries, max_size=case.queries)
    )
    return st.lists(row, min_size=case.rows, max_size=case.rows).map(lambda ends: np.array(ends, np.int32))


def worst(found, expected) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max(initial=0))


def check(call: Call, run):
    out, lse = run(call.q, **call.poisoned)
    assert out.dtype == call.q.dtype and lse.dtype == jnp.float32
    exact = call.case.dtype == "float32"
    assert worst(out, call.expected) < (5e-6 if exact else 2e-2)
    sees = np.isfinite(call.expected_lse)
    np.testing.assert_array_equal(np.isfinite(lse), sees)
    assert worst(np.asarray(lse)[sees], call.expected_lse[sees]) < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", [plain, kernel], ids=["reference", "tpu"])
def test_values(name, implementation):
    case = CASES[name]

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), ragged(case))
    def holds(seed, ends):
        check(make_call(case, seed, ends), implementation(case))

    holds()
