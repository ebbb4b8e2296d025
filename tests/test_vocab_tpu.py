"""The first gate of the vocabulary's TPU kernels: values in interpret mode (the second is in tests/aot/).

What a tile reads past the end of its array is nan there, and so are the rows of weight 0 here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from test_vocab import inputs, log_softmax, reference_confidence, twin_kl, twin_nll, wide

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import confidence, linear_kl, linear_nll, nll, ops, tpu, xla
from cdlm_jax.kernels.vocab.cost import on_tpu
from cdlm_jax.kernels.vocab.noise import Seeds
from cdlm_jax.kernels.vocab.tiles import MIB, OPS, Sizes, Tiles, choose, walks
from cdlm_jax.kernels.vocab.tpu import Engine

few = examples(2, 4)
shapes = st.fixed_dictionaries(
    {
        "n": st.sampled_from([1, 5, 16, 40, 70]),
        "d": st.sampled_from([1, 8]),
        "vocab": st.sampled_from([5, 40, 128, 300, 520]),
        "seed": st.integers(0, 2**31),
        "scale": st.sampled_from([0.1, 1.0, 5.0]),
    }
)
tiles = st.sampled_from(
    [
        None,
        Tiles(rows=16, columns=128),
        Tiles(rows=32, columns=256),
        Tiles(rows=128, columns=128, splits=2),
        Tiles(rows=128, columns=256, splits=3),
    ]
)


def seeds_of(n, seed=0):
    words = np.random.default_rng(seed).integers(2**32, size=(2, n), dtype=np.uint32)
    return Seeds(*map(jnp.asarray, words), jnp.arange(n, dtype=jnp.uint32))


@few
@given(shapes, tiles, st.sampled_from([0, 0.7]), st.sets(st.integers(0, 300), max_size=3))
def test_confidence_is_the_reference_s(shape, tiles, temperature, forbidden):
    hidden, _, head, *_ = inputs(**shape)
    forbidden = tuple(forbidden)
    seeds = seeds_of(shape["n"], shape["seed"]) if temperature else None
    run = partial(ops.confidence, Engine(interpret=True, tiles=tiles))
    got = jax.jit(run, static_argnums=(2, 3))(hidden, head, forbidden, temperature, seeds)
    plain = reference_confidence(hidden, head, forbidden, temperature, seeds)
    assert got.token.dtype == jnp.int32
    np.testing.assert_array_equal(got.token, plain.token)
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@few
@given(shapes, tiles, st.booleans())
def test_losses_match_float64(shape, tiles, own_head):
    teacher, student, teacher_head, head, targets, weights = inputs(**shape)
    teacher_head = teacher_head if own_head else head
    unused = (weights == 0)[:, None]
    engine = Engine(interpret=True, tiles=tiles)

    def losses(student, head):
        heads = (head, teacher_head) if own_head else (head,)
        poisoned = [jnp.where(unused, jnp.nan, x) for x in (student, teacher)]
        kl = ops.linear_kl(engine, *poisoned, heads, weights)
        return kl, ops.linear_nll(engine, poisoned[0], head, targets, weights)

    @jax.jit
    def run(student, head):
        values, pull_back = jax.vjp(losses, student, head)
        return values, [pull_back((jnp.float32(a), jnp.float32(1 - a))) for a in (1, 0)]

    values, gradients = run(student, head)
    kl = twin_kl(*wide(teacher, student, head, weights, teacher_head))
    nll = twin_nll(*wide(student, head, targets, weights))
    np.testing.assert_allclose(values, [kl[0], nll[0]], rtol=1e-5, atol=1e-5)
    for got, want in zip(jax.tree.leaves(gradients), (*kl[1:], *nll[1:]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_steps_within_a_tile_of_rows(monkeypatch):
    """More rows than are computed with at a time, the last of them fewer."""
    monkeypatch.setattr(tpu, "STEP", 16)
    tiles = Tiles(rows=32, columns=128)
    n = 3 * 16 + 10
    teacher, student, _, head, targets, weights = inputs(n=n, vocab=200)
    run = jax.jit(partial(ops.confidence, Engine(interpret=True, tiles=tiles)), static_argnums=(2, 3))
    got, plain = (each(student, head, (1,), 0.5, seeds_of(n)) for each in (run, reference_confidence))
    np.testing.assert_array_equal(got.token, plain.token)

    def gradients(engine):
        loss = jax.grad(lambda s, w: ops.linear_kl(engine, s, teacher, (w,), weights), (0, 1))
        return jax.jit(loss)(student, head)

    for a, b in zip(gradients(Engine(interpret=True, tiles=tiles)), gradients(xla.Engine(4096)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_ties_go_to_the_lowest_id(splits):
    """Within a tile of columns, between tiles, and between the parts that cores walk on their own."""
    z = np.zeros((4, 700), np.float32)
    z[0, [300, 301, 699]] = 2
    z[1, [127, 128, 600]] = 3
    z[2, [5, 640]] = 1
    engine = Engine(interpret=True, tiles=Tiles(rows=4, columns=128, splits=splits))
    got = ops.confidence(engine, z, np.eye(700, dtype=np.float32), (5,), 0.0, None)
    np.testing.assert_array_equal(got.token, [300, 127, 640, 0])
    np.testing.assert_array_equal(got.margin[jnp.array([0, 1, 3])], [0, 0, 0])


def plain_bfloat16(teacher, student, head, weights):
    """What one would write: logits in bfloat16, statistics in float32."""

    def loss(student, head):
        log_p, log_q = (jax.nn.log_softmax((x @ head).astype(jnp.float32)) for x in (teacher, student))
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    return jax.value_and_grad(loss, (0, 1))(student, head)


@pytest.mark.parametrize("engine", [xla.Engine(128), Engine(interpret=True)], ids=["xla", "tpu"])
def test_error_in_bfloat16(engine):
    """Against float64, at most twice that of plain bfloat16."""
    teacher, student, _, head, _, weights = inputs(n=64, d=64, vocab=1000, scale=0.5)
    teacher, student, head = (jnp.asarray(a, jnp.bfloat16) for a in (teacher, student, head))
    exact = twin_kl(*(np.asarray(a, np.float64) for a in (teacher, student, head, weights, head)))
    loss = jax.jit(jax.value_and_grad(lambda s, w: ops.linear_kl(engine, s, teacher, (w,), weights), (0, 1)))

    def errors(found):
        return [np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip(jax.tree.leaves(found), exact, strict=True)]

    for mine, plain in zip(
        errors(loss(student, head)), errors(plain_bfloat16(teacher, student, head, weights)), strict=True
    ):
        assert mine <= 2 * plain
    seen = jax.jit(partial(ops.confidence, engine), static_argnums=(2, 3))(student, head, (), 0.0, None)
    p = np.exp(log_softmax(np.asarray(student, np.float64) @ np.asarray(head, np.float64)))
    plain = jax.nn.softmax((student @ head).astype(jnp.float32)).max(axis=-1)
    assert np.abs(seen.probability - p.max(axis=-1)).max() <= 2 * np.abs(plain - p.max(axis=-1)).max()


# ---- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vmem", [16, 64, 128])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("n", [1, 32, 300, 16384])
@pytest.mark.parametrize("vocab", [1000, 126464, 152064])
def test_tiles_fit(vmem, columns_first, n, vocab):
    sizes = Sizes(rows=n, d=3584, vocab=vocab, row=2 * 7168, column=7168, per_row=0, per_column=0)
    tiles = choose(sizes, columns_first, 2, vmem * 2**20)
    assert sizes.vmem(tiles.rows, tiles.columns) <= 0.8 * vmem * 2**20
    assert tiles.rows == n or tiles.rows % 16 == 0
    assert tiles.columns % 128 == 0 and (vocab % tiles.columns == 0 or vocab == 1000)
    assert tiles.splits == (1 if columns_first or tiles.rows < n else 2)
    if vmem > 16 and not columns_first:
        assert tiles.rows >= min(n, 1024)  # the head is read once for so many rows


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("tiles", [Tiles(rows=64, columns=256), Tiles(rows=300, columns=128, splits=2)])
def test_bytes_moved_are_those_of_the_walk(tiles, columns_first):
    """Counted along the grid: a tile of rows or of columns is fetched when it is not the one of the step before."""
    sizes = Sizes(rows=300, d=8, vocab=512, row=16, column=32, per_row=0, per_column=0)
    row_tiles, column_tiles = -(-300 // tiles.rows), 512 // tiles.columns
    if columns_first:
        tiles = Tiles(rows=tiles.rows, columns=tiles.columns)
        walk = [(row, column) for column in range(column_tiles) for row in range(row_tiles)]
    else:
        each = column_tiles // tiles.splits
        walk = [
            (row, split * each + column)
            for split in range(tiles.splits)
            for row in range(row_tiles)
            for column in range(each)
        ]
        if tiles.splits > 1:  # every core fetches its own first tile
            walk.insert(each, (None, None))
    fetched = {"row": 0, "column": 0}
    for before, now in zip([(None, None), *walk], walk, strict=False):
        if now[0] is not None:
            fetched["row"] += (now[0] != before[0]) * min(tiles.rows, 300 - now[0] * tiles.rows) * sizes.row
            fetched["column"] += (now[1] != before[1]) * tiles.columns * sizes.column
    assert sizes.moved(tiles, columns_first) == sum(fetched.values())


@pytest.mark.parametrize("n", [32, 1024])
def test_a_block_s_confidence_reads_everything_once(n):
    """Of Dream's head, at most 1.05 times the least, on chips with more VMEM than a v4."""
    for cores, vmem in ((1, 128 * MIB), (2, 64 * MIB)):
        found = on_tpu("confidence", "statistics", n, 3584, 152064, cores, vmem)
        assert found.ratio <= 1.05 and found.on_chip <= 0.8 * vmem


@pytest.mark.parametrize("op", OPS)
def test_the_walks_of_a_function_are_those_that_its_kernels_make(monkeypatch, op):
    """By their sizes, of a teacher with a head of its own: what `refusal` tries, and what tuned tiles are found by."""
    made = {}
    monkeypatch.setattr(tpu, "choose", lambda sizes, *given: made.setdefault(sizes, choose(sizes, *given)))
    teacher, student, teacher_head, head, targets, weights = inputs(n=20, vocab=300)
    teacher, teacher_head = np.tile(teacher, 200), np.tile(teacher_head, (200, 1))
    engine, seeds = Engine(interpret=True), seeds_of(20) if op == "confidence, drawn" else None
    call = {
        "KL": jax.grad(lambda s, w: ops.linear_kl(engine, s, teacher, (w, teacher_head), weights), (0, 1)),
        "NLL": jax.grad(lambda s, w: ops.linear_nll(engine, s, w, targets, weights), (0, 1)),
        "NLL of each row": lambda s, w: ops.nll(engine, s, w, targets),
    }.get(op, lambda s, w: ops.confidence(engine, s, w, (1,), 0.5 if seeds else 0.0, seeds))
    jax.eval_shape(call, student, head)
    rows, heads = ((student, teacher), (head, teacher_head)) if op == "KL" else ((student,), (head,))
    assert list(made) == list(walks(op, rows, heads).values())


class V4:
    platform, device_kind = "tpu", "TPU v4"


@pytest.fixture
def on_v4(monkeypatch):
    monkeypatch.setattr("cdlm_jax.mesh.sharding.device", V4)
    monkeypatch.setattr(tpu, "cores_and_vmem", lambda: (2, 16 * MIB))


def shaped(d, vocab=1024, n=32, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, vocab), dtype)


def test_a_function_whose_gradients_do_not_fit_uses_xla(on_v4):
    """On a v4, of 8192: the statistics fit, d head does not."""
    hidden, head = shaped(8192)
    assert tpu.refusal("confidence", (hidden,), (head,)) is None
    seen = jax.make_jaxpr(confidence)(hidden, head)
    assert "vocab_statistics" in str(seen)
    weights, targets = jax.ShapeDtypeStruct((32,), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.int32)
    assert "vocab_statistics" in str(jax.make_jaxpr(nll)(hidden, head, targets))
    assert "pallas_call" not in str(jax.make_jaxpr(jax.grad(linear_nll, (0, 1)))(hidden, head, targets, weights))
    message = "d head of rows of 8192 bfloat16 does not fit the 16 MiB of VMEM of this TPU; allowed: 'xla'"
    with pytest.raises(InputError, match=message):
        jax.eval_shape(partial(linear_nll, implementation="tpu"), hidden, head, targets, weights)


def test_every_row_and_head_has_one_dtype(on_v4):
    student, head = shaped(64)
    teacher, teacher_head = shaped(64, dtype=jnp.float32)
    weights = jax.ShapeDtypeStruct((32,), jnp.float32)

    def kl(student, head, teacher, teacher_head, weights, implementation=None):
        return linear_kl(teacher, student, head, weights, teacher_head=teacher_head, implementation=implementation)

    given = student, head, teacher, teacher_head, weights
    assert "pallas_call" not in str(jax.make_jaxpr(jax.grad(kl, (0, 1)))(*given))
    with pytest.raises(InputError, match="rows are bfloat16, float32 and bfloat16, float32 heads, not all bfloat16 or"):
        jax.eval_shape(partial(kl, implementation="tpu"), *given)
