"""The streamed vocabulary functions against a float64 twin, and the promise that logits are never materialized."""

import math
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from devices import TESTS, environment
from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import confidence, linear_kl, linear_nll, nll, reference, xla
from cdlm_jax.kernels.vocab.noise import Seeds, exponential, gumbel, threefry


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def twin_kl(teacher, student, head, weights, teacher_head):
    """(value, d student, d head) in float64."""
    log_p, log_q = log_softmax(teacher @ teacher_head), log_softmax(student @ head)
    dz = weights[:, None] * (np.exp(log_q) - np.exp(log_p))
    return (weights[:, None] * np.exp(log_p) * (log_p - log_q)).sum(), dz @ head.T, student.T @ dz


def twin_nll(hidden, head, targets, weights):
    log_q = log_softmax(hidden @ head)
    one_hot = np.eye(head.shape[1])[targets]
    dz = weights[:, None] * (np.exp(log_q) - one_hot)
    return -(weights[:, None] * one_hot * log_q).sum(), dz @ head.T, hidden.T @ dz


def inputs(n=12, d=8, vocab=50, seed=0, scale=1.0):
    """float32 arrays: teacher, student [n, d], teacher_head, head [d, vocab], targets, weights [n] (some 0)."""
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(size=(2, n, d)).astype(np.float32) * scale
    teacher_head, head = rng.normal(size=(2, d, vocab)).astype(np.float32)
    weights = (rng.uniform(size=n) * (rng.uniform(size=n) < 0.7)).astype(np.float32)
    return teacher, student, teacher_head, head, rng.integers(vocab, size=n, dtype=np.int32), weights


def wide(*arrays):
    return [a.astype(np.float64) if a.dtype != np.int32 else a for a in arrays]


def check(results, expected, rtol=1e-5, atol=2e-5):
    (value, gradients), (expected_value, *expected_gradients) = results, expected
    np.testing.assert_allclose(value, expected_value, rtol=rtol, atol=1e-6)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=rtol, atol=atol)


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 5),
        "d": st.sampled_from([1, 8]),
        "vocab": st.integers(1, 40),
        "seed": st.integers(0, 2**31),
        "scale": st.sampled_from([0.1, 1.0, 5.0]),
    }
)
few = examples(4, 12)
TILES = [16, pytest.param(64, marks=pytest.mark.slow)]  # the vocabulary of `inputs` in several, or in one
reference_confidence = jax.jit(reference.confidence, static_argnums=(2, 3))


@few
@given(shapes, st.integers(1, 45))
def test_losses_match_float64(shape, tile):
    teacher, student, teacher_head, head, targets, weights = inputs(**shape)

    def kl(student, head):
        return linear_kl(teacher, student, head, weights, teacher_head=teacher_head, tile=tile)

    def nll(student, head):
        return linear_nll(student, head, targets, weights, tile=tile)

    check(
        jax.jit(jax.value_and_grad(kl, (0, 1)))(student, head),
        twin_kl(*wide(teacher, student, head, weights, teacher_head)),
    )
    check(jax.jit(jax.value_and_grad(nll, (0, 1)))(student, head), twin_nll(*wide(student, head, targets, weights)))


@few
@given(shapes, st.integers(1, 45))
def test_confidence_matches_float64(shape, tile):
    teacher, _, head, *_ = inputs(**shape)
    log_p = log_softmax(np.matmul(*wide(teacher, head)))
    p = np.exp(log_p)
    ranked = np.sort(np.pad(p, ((0, 0), (1, 0))))  # a vocabulary of one has a second probability of 0
    got = jax.jit(partial(confidence, tile=tile))(teacher, head)
    assert got.token.dtype == jnp.int32
    np.testing.assert_array_equal(got.token, p.argmax(-1))
    np.testing.assert_allclose(got.probability, ranked[:, -1], rtol=1e-5)
    np.testing.assert_allclose(got.margin, ranked[:, -1] - ranked[:, -2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.entropy, -(p * log_p).sum(-1), rtol=1e-4, atol=1e-5)


@few
@given(shapes, st.integers(1, 45), st.sampled_from(["first", "last", "any", "top"]))
def test_forbidden_is_never_the_answer_but_keeps_its_probability(shape, tile, which):
    """The reference, at ids in the first tile, in the last, anywhere, and where the id is what one row would answer."""
    shape["vocab"] += 1  # something must remain
    hidden, _, head, *_ = inputs(**shape)
    top = int((hidden @ head)[0].argmax())
    forbidden = {"first": 0, "last": shape["vocab"] - 1, "any": shape["seed"] % shape["vocab"], "top": top}[which]
    got = jax.jit(partial(confidence, tile=tile, forbidden=(forbidden,)))(hidden, head)
    plain = reference_confidence(hidden, head, (forbidden,), 0.0, None)
    assert got.token.dtype == jnp.int32 and not (got.token == forbidden).any()
    np.testing.assert_array_equal(got.token, plain.token)
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    p = np.exp(log_softmax(np.matmul(*wide(hidden, head))))
    np.testing.assert_allclose(got.probability, np.delete(p, forbidden, axis=1).max(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tile", "forbidden"),
    [
        pytest.param(tile, forbidden, marks=() if (tile, forbidden) in {(3, 9), (4, 4), (5, 0)} else pytest.mark.slow)
        for tile in (3, 4, 5, 16)
        for forbidden in (0, 4, 9)
    ],
)
def test_a_forbidden_id_far_above_all_others(tile, forbidden):
    """In the first tile (one column wide at tile 3), a middle one, and the last; ties of the others stay in order."""
    z = np.array([[1, 2, 3, 3, 0, 3, 1, 2, 3, 1], [0] * 10], np.float32)
    z[:, forbidden] = 60
    got = jax.jit(partial(confidence, tile=tile, forbidden=(forbidden,)))(z, np.eye(10, dtype=np.float32))
    np.testing.assert_array_equal(got.token, [2, 1 if forbidden == 0 else 0])
    np.testing.assert_array_equal(got.margin, [0, 0])
    np.testing.assert_allclose(got.probability, np.exp([3.0 - 60, 0.0 - 60]), rtol=1e-5)
    without = jax.jit(partial(confidence, tile=tile))(z, np.eye(10, dtype=np.float32))
    np.testing.assert_array_equal(without.token, [forbidden] * 2)
    np.testing.assert_array_equal(without.entropy, got.entropy)


@pytest.mark.parametrize("tile", [16, 50])
def test_reference_agrees(tile):
    teacher, student, teacher_head, head, targets, weights = inputs()
    got = jax.jit(partial(confidence, tile=tile))(teacher, head)
    plain = reference_confidence(teacher, head, (), 0.0, None)
    np.testing.assert_array_equal(got.token, plain.token)
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for streamed, dense in (
        (
            lambda h, w: linear_kl(teacher, h, w, weights, teacher_head=teacher_head, tile=tile),
            lambda h, w: reference.linear_kl(teacher, h, w, weights, teacher_head=teacher_head),
        ),
        (
            lambda h, w: linear_nll(h, w, targets, weights, tile=tile),
            lambda h, w: reference.linear_nll(h, w, targets, weights),
        ),
    ):
        value, gradients = jax.jit(jax.value_and_grad(dense, (0, 1)))(student, head)
        check(jax.jit(jax.value_and_grad(streamed, (0, 1)))(student, head), (value, *gradients))


@pytest.mark.parametrize("tile", [3, 4, 5, 16])
def test_ties_go_to_the_lowest_id(tile):
    z = np.array([[0, 2, 1, 2, 2, 0, 1, 2, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0, 0, 3], [1] * 10], np.float32)
    got = jax.jit(partial(confidence, tile=tile))(z, np.eye(10, dtype=np.float32))
    np.testing.assert_array_equal(got.token, [1, 0, 0])
    np.testing.assert_array_equal(got.margin, [0, 0, 0])
    np.testing.assert_allclose(got.entropy[2], math.log(10), rtol=1e-6)


@pytest.mark.parametrize("tile", TILES)
def test_leading_dimensions_are_free(tile):
    teacher, student, _, head, targets, weights = inputs()

    def split(a):
        return a.reshape(3, 4, *a.shape[1:])

    @jax.jit
    def run(teacher, student, targets, weights):
        kl = linear_kl(teacher, student, head, weights, tile=tile)
        return kl, linear_nll(student, head, targets, weights, tile=tile), confidence(teacher, head, tile=tile).entropy

    flat = teacher, student, targets, weights
    kl, nll, entropy = run(*flat)
    found = run(*map(split, flat))
    np.testing.assert_allclose(found[:2], (kl, nll), rtol=1e-6)
    np.testing.assert_allclose(found[2], split(entropy), rtol=1e-6)


@pytest.mark.parametrize("tile", TILES)
def test_rows_of_weight_zero_contribute_exactly_nothing(tile):
    teacher, student, _, head, targets, weights = inputs()
    weights[::3] = 0
    unused = (weights == 0)[:, None]

    def losses(teacher, student, head):
        kl = linear_kl(teacher, student, head, weights, tile=tile)
        return kl + linear_nll(student, head, targets, weights, tile=tile)

    run = jax.jit(jax.value_and_grad(losses, (1, 2)))
    clean = run(teacher, student, head)
    huge = np.float32(3e38) * np.sign(teacher)
    garbage = [np.where(unused, huge, teacher), np.where(unused, -huge, student), head]
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(run(*garbage)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(clean[1][0][unused[:, 0]])
    nothing = np.zeros_like(weights)
    assert linear_kl(huge, -huge, head, nothing, tile=tile) == 0 == linear_nll(huge, head, targets, nothing, tile=tile)


def test_no_gradient_into_the_teacher_or_the_weights():
    teacher, student, teacher_head, head, targets, weights = inputs()

    def kl(teacher, teacher_head, weights):
        return linear_kl(teacher, student, head, weights, teacher_head=teacher_head, tile=16)

    def nll(weights):
        return linear_nll(student, head, targets, weights, tile=16)

    gradients = jax.jit(lambda *given: (jax.grad(kl, (0, 1, 2))(*given), jax.grad(nll)(given[2])))
    for gradient in jax.tree.leaves(gradients(teacher, teacher_head, weights)):
        assert not np.any(gradient)
    shared = jax.jit(jax.grad(lambda head: linear_kl(teacher, student, head, weights, tile=16)))(head)
    np.testing.assert_allclose(shared, twin_kl(*wide(teacher, student, head, weights, head))[2], rtol=1e-5, atol=2e-5)


def test_equal_distributions_have_no_divergence():
    teacher, _, _, head, _, weights = inputs()
    value, gradient = jax.value_and_grad(lambda h: linear_kl(teacher, h, head, weights, tile=16))(teacher)
    assert value == 0 and not np.any(gradient)


def test_bfloat16_inputs_keep_float32_statistics():
    teacher, student, _, head, targets, weights = inputs(vocab=200)
    teacher, student, head = (jnp.asarray(a, jnp.bfloat16) for a in (teacher, student, head))
    exact = [np.asarray(a, np.float64) for a in (teacher, student, head)]

    def kl(student, head):
        return linear_kl(teacher, student, head, weights, tile=64)

    def nll(student, head):
        return linear_nll(student, head, targets, weights, tile=64)

    for loss, twin in (
        (kl, twin_kl(*exact, weights, exact[2])),
        (nll, twin_nll(exact[1], exact[2], targets, weights)),
    ):
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, head)
        assert value.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in gradients)
        check((value, gradients), twin, rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(value, twin[0], rtol=1e-5)


def largest_array(compiled):
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", compiled.as_text()))


def test_logits_are_never_materialized():
    n, vocab = 96, 640
    teacher, student, _, head, targets, weights = inputs(n=n, vocab=vocab)

    def compiled(kl, nll):
        def total(student, head):
            return kl(teacher, student, head, weights) + nll(student, head, targets, weights)

        return jax.jit(jax.value_and_grad(total, (0, 1))).lower(student, head).compile()

    assert largest_array(compiled(reference.linear_kl, reference.linear_nll)) >= n * vocab
    assert largest_array(compiled(partial(linear_kl, tile=64), partial(linear_nll, tile=64))) <= n * 64
    decode = jax.jit(partial(confidence, tile=64)).lower(student, head).compile()
    assert largest_array(decode) <= n * 64


@pytest.mark.parametrize("gradients", [(), (0,), (0, 1)])
def test_memory_at_full_size(gradients):
    """Temporaries below 1/20 of one float32 [n, V], of Dream's head and 64 rows of 256 tokens. In float32: the CPU's
    compiler widens a bfloat16 head as a whole first (tests/aot has what a TPU's does with it)."""
    n, d, vocab = 16384, 3584, 152064
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    hidden, head, weights = shape((n, d)), shape((d, vocab)), shape((n,))
    targets = shape((n,), dtype=jnp.int32)

    def kl(student, head, teacher, weights):
        return linear_kl(teacher, student, head, weights)

    for loss, arguments in (
        (kl, (hidden, head, hidden, weights)),
        (linear_nll, (hidden, head, targets, weights)),
    ):
        program = jax.jit(jax.value_and_grad(loss, gradients) if gradients else loss).lower(*arguments).compile()
        assert program.memory_analysis().temp_size_in_bytes < n * vocab * 4 / 20


@pytest.mark.parametrize("tile", TILES)
def test_chunks_of_rows_change_nothing(tile, monkeypatch):
    teacher, student, teacher_head, head, targets, weights = inputs(n=23)

    def run():
        @jax.jit
        @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def losses(student, head):
            seen = confidence(student, head, forbidden=(3,), tile=tile, temperature=0.5, key=jax.random.key(0))
            kl = linear_kl(teacher, student, head, weights, teacher_head=teacher_head, tile=tile)
            return kl + linear_nll(student, head, targets, weights, tile=tile), seen

        return losses(student, head)

    whole = run()
    monkeypatch.setattr(xla, "CHUNK", 5)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_small_vocabulary_compiles_without_a_loop():
    teacher, _, _, head, *_ = inputs()
    assert "while" not in jax.jit(confidence).lower(teacher, head).compile().as_text()
    tiled = jax.jit(partial(confidence, tile=16)).lower(teacher, head).compile()
    assert "while" in tiled.as_text()


def test_a_frozen_head_costs_no_gradient():
    teacher, student, _, head, _, weights = inputs(n=64, vocab=640)

    def kl(student, head):
        return linear_kl(teacher, student, head, weights, tile=64)

    def flops(wanted):
        return jax.jit(jax.grad(kl, wanted)).lower(student, head).compile().cost_analysis()["flops"]

    tile_product = 2 * 64 * 8 * 64
    assert flops((0, 1)) - flops(0) >= tile_product


def test_wrong_rows_are_refused():
    teacher, student, _, head, targets, weights = inputs()
    with pytest.raises(InputError, match=r"student_hidden has rows \(11,\), weights have \(12,\)"):
        linear_kl(teacher, student[1:], head, weights)
    with pytest.raises(InputError, match="vocabulary of 49, head of 50"):
        linear_kl(teacher, student, head, weights, teacher_head=head[:, 1:])
    with pytest.raises(InputError, match="targets has rows"):
        linear_nll(student, head, targets[1:], weights)


def test_heads_of_another_width_are_refused():
    teacher, student, _, head, targets, weights = inputs()
    message = r"hidden \(12, 7\) and its head \(8, 50\) must be \[..., d\] and \[d, V\]"
    for call in (
        lambda narrow: confidence(narrow, head),
        lambda narrow: nll(narrow, head, targets),
        lambda narrow: linear_nll(narrow, head, targets, weights),
        lambda narrow: linear_kl(teacher, narrow, head, weights),
        lambda narrow: linear_kl(narrow, student, head, weights),
        lambda narrow: linear_kl(narrow, student, head, weights, teacher_head=head),
    ):
        with pytest.raises(InputError, match=message):
            call(student[:, 1:])


def test_nll_of_each_row():
    _, student, _, head, targets, weights = inputs()
    found = nll(student.reshape(3, 4, -1), head, targets.reshape(3, 4), tile=7)
    z = log_softmax(np.float64(student) @ np.float64(head))
    np.testing.assert_allclose(found.ravel(), -z[np.arange(12), targets], rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(found.ravel() * weights), linear_nll(student, head, targets, weights), rtol=1e-5)
    with pytest.raises(InputError, match=r"hidden has rows \(12,\), targets have \(11,\): they must be equal"):
        nll(student, head, targets[1:])


def test_there_is_no_gpu_kernel_for_the_losses():
    _, student, _, head, targets, weights = inputs()
    with pytest.raises(InputError, match="'gpu' cannot run here: there is a GPU kernel for confidence alone"):
        linear_nll(student, head, targets, weights, implementation="gpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"temperature": 0.5}, "temperature above 0 needs a random key, got none"),
        ({"temperature": 0.5, "key": jnp.zeros(2, jnp.uint32)}, r"whose shape begins \(12,\); got uint32 \(2,\)"),
        ({"temperature": 0.5, "key": jax.random.split(jax.random.key(0), 5)}, r"begins \(12,\); got key<fry> \(5,\)"),
        ({"forbidden": tuple(range(50))}, "forbidden holds all 50 tokens of the vocabulary"),
        ({"forbidden": (3, 50)}, r"forbidden must hold ids of the vocabulary 0\.\.49, got 50"),
        ({"forbidden": (-1,)}, r"forbidden must hold ids of the vocabulary 0\.\.49, got -1"),
        ({"forbidden": (2.0,)}, r"forbidden must hold ids of the vocabulary 0\.\.49, got 2\.0"),
        ({"forbidden": (None,)}, r"forbidden must hold ids of the vocabulary 0\.\.49, got None"),
        ({"implementation": "cpu"}, "unknown implementation 'cpu' of the vocabulary, allowed: 'tpu', 'gpu', 'xla'"),
        ({"implementation": "gpu"}, "implementation 'gpu' cannot run here: the device is a cpu; allowed: 'xla'"),
        ({"implementation": "tpu"}, "implementation 'tpu' cannot run here: the device is a cpu; allowed: 'xla'"),
    ],
)
def test_what_confidence_refuses(options, message):
    hidden, _, _, head, *_ = inputs()
    with pytest.raises(InputError, match=message):
        confidence(hidden, head, **options)


# ---- draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_answers(key, count, expected):
    words = [tuple(map(jnp.uint32, pair)) for pair in (key, count)]
    assert tuple(map(int, threefry(*words))) == expected


def test_exponential_is_exact():
    u = np.concatenate([np.logspace(-18, -1, 2000), 1 - np.logspace(-7, -1, 500)]).astype(np.float32)
    np.testing.assert_allclose(jax.jit(exponential)(u), -np.log1p(-u.astype(np.float64)), rtol=1e-6)


def test_noise_is_gumbel_and_independent():
    """Of 2**20 numbers: the distribution function at each (Kolmogorov-Smirnov), and neighbours along both axes."""
    size = 2**10
    seeds = Seeds(jnp.uint32(1), jnp.uint32(2), jnp.arange(size, dtype=jnp.uint32)[:, None])
    noise = np.asarray(gumbel(seeds, jnp.arange(size)), np.float64)
    u = np.exp(-np.exp(-np.sort(noise, axis=None)))
    assert np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 2 / size
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / size
    assert np.isfinite(noise).all() and noise.max() > 10  # of 2**20, the largest is about log(2**20) = 13.9


@examples(3, 6)
@given(shapes, st.integers(1, 45), st.sampled_from([0.3, 1.0, 2.0]), st.sets(st.integers(0, 40), max_size=4))
def test_draws_are_the_reference_s(shape, tile, temperature, forbidden):
    shape["vocab"] += 5  # something must remain
    hidden, _, head, *_ = inputs(**shape)
    key = jax.random.key(shape["seed"])
    forbidden = {token for token in forbidden if token < shape["vocab"]}
    options = {"temperature": temperature, "forbidden": tuple(sorted(forbidden)), "key": key}
    got = jax.jit(partial(confidence, tile=tile, **options))(hidden, head)
    words = jnp.broadcast_to(jax.random.key_data(key), (shape["n"], 2))
    seeds = Seeds(words[:, 0], words[:, 1], jnp.arange(shape["n"], dtype=jnp.uint32))
    plain = reference_confidence(hidden, head, options["forbidden"], temperature, seeds)
    np.testing.assert_array_equal(got.token, plain.token)
    assert not set(got.token.tolist()) & forbidden
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [7, 64])
def test_draws_follow_the_tempered_distribution(tile):
    temperature, draws, vocab = 0.6, 20000, 20
    z = np.random.default_rng(0).normal(size=vocab).astype(np.float32)
    weights = np.exp(z.astype(np.float64) / temperature)
    weights[[2, 5]] = 0
    options = {"temperature": temperature, "key": jax.random.key(5), "forbidden": (5, 2), "tile": tile}
    got = jax.jit(partial(confidence, **options))(jnp.ones((draws, 1)), z[None])
    expected = draws * weights / weights.sum()
    counts = np.bincount(got.token, minlength=vocab)
    assert not counts[[2, 5]].any()
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # mean and spread of its distribution
    p = np.exp(log_softmax(z.astype(np.float64)))
    np.testing.assert_allclose(got.probability, p[np.asarray(got.token)], rtol=1e-5)  # neither tempered nor noised


def test_draws_depend_on_key_place_and_token_only():
    hidden, _, _, head, *_ = inputs(n=24, vocab=300)
    draw = jax.jit(lambda hidden, key: confidence(hidden, head, temperature=1.0, key=key))
    key = jax.random.key(1)
    together = draw(hidden, key=key).token
    np.testing.assert_array_equal(draw(hidden.reshape(2, 3, 4, -1), key=key).token.ravel(), together)
    np.testing.assert_array_equal(draw(hidden[:7], key=key).token, together[:7])
    assert (draw(hidden, key=jax.random.key(2)).token != together).mean() > 0.5
    keys = jax.random.split(key, 2)
    rows = draw(hidden.reshape(2, 12, -1), key=keys).token
    for row in range(2):
        np.testing.assert_array_equal(rows[row], draw(hidden.reshape(2, 12, -1)[row], key=keys[row]).token)
    same = draw(np.tile(hidden[0], (24, 1)), key=key).token
    assert len(set(same.tolist())) > 6  # places are drawn apart
    each = draw(hidden, key=jax.random.split(key, 24)).token
    np.testing.assert_array_equal(draw(hidden[::-1], key=jax.random.split(key, 24)[::-1]).token, each[::-1])


def test_same_values_on_a_mesh():
    """By every engine; the TPU's kernels interpreted, the GPU's as XLA."""
    command = [sys.executable, TESTS / "vocab_mesh_cases.py"]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["xla", "tpu", "gpu"], done.stderr[-2000:]
