"""Every implementation of block attention against float64, with all that no query sees poisoned.

The TPU kernel runs in interpret mode, the first of its two gates; tests/aot holds the second.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import again, examples
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import block_attention, reference, tpu, xla
from cdlm_jax.kernels.block_attention.tiles import Tiles
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.visibility import Span


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
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait", detect_races=True)


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


FAST = ("two tiles", "ragged slots, many queries", "int8 pages")  # they take every path of the kernel but a page's


@again
@pytest.mark.parametrize(
    ("implementation", "name"),
    [pytest.param(plain, name, id=f"reference, {name}") for name in CASES]
    + [pytest.param(kernel, name, id=f"tpu, {name}", marks=() if name in FAST else pytest.mark.slow) for name in CASES],
)
def test_values(name, implementation):
    case = CASES[name]

    @examples(2, 5)
    @given(st.integers(0, 2**32 - 1), ragged(case))
    def holds(seed, ends):
        check(make_call(case, seed, ends), implementation(case))

    holds()


@st.composite
def calls(draw):
    """Of any shapes that the kernel takes."""
    page_size = draw(st.sampled_from([None, None, 8, 16, 256]))
    queries = draw(st.integers(1, 20))
    case = Case(
        rows=draw(st.integers(1, 4)),
        queries=queries,
        group=draw(st.integers(1, 4)),
        kv_heads=draw(st.integers(1, 4)),
        slots=page_size * draw(st.integers(1, 2 if page_size == 256 else 12))
        if page_size
        else draw(st.integers(1, 200)),
        page_size=page_size,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        int8=draw(st.booleans()),
        tiles=Tiles(rows=draw(st.integers(1, 2)), queries=16, keys=128, chunk=draw(st.sampled_from([16, 32]))),
    )
    return make_call(case, draw(st.integers(0, 2**32 - 1)), draw(ragged(case)))


@examples(2, 6)
@given(calls())
def test_the_reference_for_any_shapes(call):
    check(call, plain(call.case))


@examples(2, 6)
@given(calls())
def test_xla_for_any_shapes(call):
    """Without options that concern keys: their poison, pages and scales are what the others have."""
    case = call.case
    if case.page_size or case.int8:
        call = make_call(
            dataclasses.replace(case, page_size=None, int8=False), 0, np.asarray(call.finite["visible_end"])
        )
    out = jax.jit(functools.partial(block_attention, implementation="xla"))(call.q, **call.finite)
    sees = np.isfinite(call.expected_lse)[..., None]
    assert worst(jnp.where(sees, out, 0), call.expected) < (5e-6 if case.dtype == "float32" else 3e-2)


@examples(1, 3)
@given(calls())
def test_the_kernel_for_any_shapes(call):
    check(call, kernel(call.case))


def test_copies_are_waited_for():
    """The kernel again, with copies that arrive only when they are waited for, and races looked for."""
    case = CASES["two tiles"]
    call = make_call(case, 0, np.repeat(np.array([[case.slots], [0], [130]], np.int32), case.queries, axis=1))
    options = {"scale": case.head_dim**-0.5, "tiles": case.tiles, "return_lse": True, "interpret": STRICT}
    check(call, lambda q, **arguments: tpu.block_attention(q, **arguments, **options))


def test_parts_of_the_keys_merge():
    case = CASES["two tiles"]
    ends = np.random.default_rng(0).integers(0, case.slots + 1, (case.rows, case.queries), dtype=np.int32)
    call = make_call(case, 0, ends)
    cut = 70
    run = jax.jit(functools.partial(block_attention, return_lse=True))
    outs, sums = [], []
    for part in (slice(0, cut), slice(cut, None)):
        k, v = (call.finite[name][:, :, part] for name in "kv")
        seen = np.clip(ends - part.start, 0, k.shape[2])
        out, lse = run(call.q, k, v, visible_end=seen, layer=call.finite["layer"])
        outs.append(out)
        sums.append(lse)
    whole = np.logaddexp(*sums)
    shares = [np.where(np.isfinite(whole), np.exp(each - np.where(np.isfinite(whole), whole, 0)), 0) for each in sums]
    merged = sum(share[..., None] * out for share, out in zip(shares, outs, strict=True))
    assert worst(merged, call.expected) < 5e-6


@pytest.mark.parametrize("name", ["ragged slots, many queries", pytest.param("small pages", marks=pytest.mark.slow)])
def test_bfloat16_is_no_worse_than_on_xla(name):
    case = dataclasses.replace(CASES[name], page_size=None)
    ends = np.full((case.rows, case.queries), case.slots, np.int32)
    call = make_call(case, 3, ends)
    k, v = (call.finite[each][LAYER] for each in "kv")
    on_xla = worst(xla.block_attention(call.q, k, v, visible_end=jnp.asarray(ends)), call.expected)
    assert worst(kernel(case)(call.q, **call.poisoned)[0], call.expected) <= 2 * on_xla


# ---- the public function -------------------------------------------------------------------------------------------


def test_the_public_function_on_a_mesh():
    """Its options go through shard_map; a mesh of one device changes nothing."""
    call = make_call(CASES["small pages"], 1, np.full((3, 8), 100, np.int32))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        q, arguments = jax.tree.map(jnp.array, (call.q, call.finite))
        out, lse = jax.jit(lambda q, arguments: block_attention(q, **arguments, return_lse=True))(q, arguments)
    assert worst(out, call.expected) < 2e-2 and worst(lse, call.expected_lse) < 2e-2


def test_kv_length_limits_what_is_seen():
    call = make_call(CASES["two tiles"], 0, np.full((3, 8), 40, np.int32))
    arguments = call.poisoned | {"visible_end": jnp.full((1, 8), 160), "kv_length": jnp.full(3, 40)}
    assert worst(jax.jit(block_attention)(call.q, **arguments), call.expected) < 5e-6


Q, K = np.zeros((2, 3, 4, 8), np.float32), np.zeros((2, 5, 2, 8), np.float32)
ENDS, SCALE = np.ones((2, 3), np.int32), np.ones((2, 2, 5), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "tpu"}, r"'tpu' cannot run here: the device is a cpu; allowed: 'xla'"),
        ({"implementation": "gpu"}, r"'gpu' cannot run here: the device is a cpu; allowed: 'xla'"),
        ({"implementation": "cuda"}, r"unknown implementation 'cuda' of block_attention, allowed: 'tpu', 'gpu', 'xla'"),
        ({"visible_end": ENDS[:, :2]}, r"visible_end must be \[rows, Q\] = \(2, 3\)"),
        ({"k": K[:, :, 0]}, r"k, v \[rows, S, kv_heads, D\], got"),
        ({"layer": 0}, r"k, v \[layers, rows, S, kv_heads, D\], got"),
        ({"q": Q[:, :, :3]}, "must agree in rows and D, with kv_heads a divisor of heads"),
        ({"page_table": np.zeros((3, 1), np.int32)}, r"page_table must be \[rows, max_pages\] of 2 rows, got \(3, 1\)"),
        ({"k_scale": SCALE}, "int8 k and v, and no others, need k_scale and v_scale"),
        ({"k": K.astype(np.int8), "v": K.astype(np.int8)}, r"need k_scale and v_scale \(2, 2, 5\); k is int8, got"),
        ({"k": K.astype(jnp.bfloat16), "v": K.astype(jnp.bfloat16)}, "must have q's dtype float32 or be int8"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"k": K[:, :0], "v": K[:, :0]}, r"k and v must hold a slot, got \(2, 0, 2, 8\)"),
        ({"k": K[None], "v": K[None], "layer": ENDS}, r"layer must be a scalar, got \(2, 3\)"),
        ({"kv_length": 5}, r"kv_length must be \[rows\] = \(2,\), got \(\)"),
        ({"kv_length": ENDS[0]}, r"kv_length must be \[rows\] = \(2,\), got \(3,\)"),
        ({"valid_start": ENDS[0]}, r"valid_start must be \[rows\] = \(2,\), got \(3,\)"),
        ({"own": Span(ENDS, ENDS[:, :2])}, r"own's end must be \[rows, Q\] = \(2, 3\)"),
        ({"k": K.astype(np.int8), "k_scale": SCALE, "v_scale": SCALE}, "be int8, got int8, float32"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        block_attention(**({"q": Q, "k": K, "v": K, "visible_end": ENDS} | changes))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "page_size", "message"),
    [
        (128, jnp.float16, None, "q is float16, not bfloat16 or float32"),
        (96, jnp.float32, None, "head_dim is 96, not 64 or 128"),
        (64, jnp.float32, 48, "page_size is 48: it must divide 128 or be a multiple of it"),
        (64, jnp.float32, 2, "page_size is 2: .* hold 8 rows"),
        (64, jnp.bfloat16, 16, None),
    ],
)
def test_what_the_kernel_takes(head_dim, dtype, page_size, message):
    q, k = (jax.ShapeDtypeStruct((2, 16, 2, head_dim), dtype) for _ in range(2))
    reason = tpu.refusal(q, k, page_size)
    assert (reason is None) if message is None else re.match(message, reason)


def test_a_second_range_is_seen_with_every_option():
    """What only the plain call on XLA has, and what only the others have, agree where they meet."""
    case = CASES["two tiles"]
    call = make_call(case, 0, np.full((case.rows, case.queries), case.slots, np.int32))
    q, k, v = call.q, *(call.finite[name][LAYER] for name in "kv")
    row = jnp.arange(case.queries)[None]
    arguments = {"visible_end": row + 3, "own": Span(row + 50, row + 60), "valid_start": jnp.arange(case.rows)}
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        q, k, v, arguments = jax.tree.map(jnp.array, (q, k, v, arguments))
        plain, (whole, _) = (
            jax.jit(functools.partial(block_attention, return_lse=each))(q, k, v, **arguments) for each in (False, True)
        )
    np.testing.assert_allclose(plain, whole, atol=2e-6)
