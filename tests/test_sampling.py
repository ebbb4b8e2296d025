"""Cutting, tempering and drawing against a NumPy twin in float64, and the draws against their probabilities."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import again, examples
from flax import nnx
from hypothesis import given
from plain import NEAR_TIE, log_softmax
from test_decoding import CONFIG, MASK, VOCAB, quick_jit, random_model, seeds

from cdlm_jax.config import InputError
from cdlm_jax.decoding.sampling import ROWS_AT_ONCE, Sampling
from cdlm_jax.kernels.vocab import Confidence
from cdlm_jax.models.transformer import Transformer

# ---- the twin ------------------------------------------------------------------------------------------------------


def cut_plainly(logits, sampling, forbidden):
    """Tempered logits [V] with -inf where cut, token by token; and the closest decision."""
    z = logits / (sampling.temperature or 1)
    order = sorted(range(len(z)), key=lambda token: (-z[token], token))
    p, doubt = np.exp(log_softmax(z)), math.inf
    kept, ahead = [], 0.0
    for token in order:
        if sampling.top_p is None or sampling.top_p == 1 or ahead <= sampling.top_p:
            kept.append(token)
        if sampling.top_p is not None and ahead > 0:
            doubt = min(doubt, abs(ahead - sampling.top_p))
        ahead += p[token]
    if sampling.top_k is not None and sampling.top_k < len(kept):
        doubt = min(doubt, z[kept[sampling.top_k - 1]] - z[kept[sampling.top_k]])
        kept = kept[: sampling.top_k]
    best = next(token for token in order if token != forbidden)
    return np.where(np.isin(np.arange(len(z)), [*kept, best]), z, -math.inf), doubt


def sample_plainly(logits, sampling, forbidden, key):
    """(Confidence of scalars, how far the closest decision was from going the other way)."""
    z, doubt = cut_plainly(logits, sampling, forbidden)
    log_p = log_softmax(z)
    scores = log_p.copy()
    if forbidden is not None:
        scores[forbidden] = -math.inf
    two = np.exp(np.sort(scores)[-2:])
    if sampling.temperature > 0:
        scores += np.asarray(jax.random.gumbel(key, scores.shape, mode="high"), np.float64)
    token = int(scores.argmax())
    p = np.exp(log_p)
    entropy = -sum(p[i] * log_p[i] for i in np.flatnonzero(p))
    return Confidence(token, p[token], two[1] - two[0], entropy), min(doubt, *np.diff(np.sort(scores)[-2:]))


# ---- tests ---------------------------------------------------------------------------------------------------------

ROWS, SIZE = 3, 13  # more positions than are sampled together
SAMPLINGS = [
    *(Sampling(), Sampling(top_p=0.9), Sampling(top_k=5), Sampling(top_p=1.0, top_k=VOCAB + 1)),
    *(Sampling(temperature=0.7), Sampling(temperature=2.0, top_p=0.6), Sampling(temperature=0.5, top_k=2)),
    *(Sampling(temperature=1.5, top_p=0.8, top_k=4), Sampling(top_p=1e-6), Sampling(top_k=1)),
]


@cache
def quickly(sampling):
    return quick_jit(lambda model, hidden, keys: sampling(model, hidden, keys))


def request(seed):
    """A model whose mask token is often the most probable one, hidden rows, and a key per row."""
    rng = np.random.default_rng(seed)
    model = random_model("same_position", rng)
    hidden = rng.normal(size=(ROWS, SIZE, CONFIG.hidden_size)).astype(np.float32)
    model.lm_head.kernel[...] = model.lm_head.kernel[...].at[:, MASK].multiply(3)
    return model, hidden, jax.random.split(jax.random.key(seed), ROWS)


@again
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_twin(sampling):
    unlike = []

    @examples(2, 6)
    @given(seeds)
    def check(seed):
        model, hidden, keys = request(seed)
        answers = jax.device_get(quickly(sampling)(model, hidden, keys))
        assert ROWS * SIZE > ROWS_AT_ONCE and {a.shape for a in answers} == {(ROWS, SIZE)}
        logits = np.einsum("...d,dv->...v", hidden.astype(np.float64), np.asarray(model.head, np.float64))
        for row, place in np.ndindex(ROWS, SIZE):
            key = jax.random.fold_in(keys[row], place)
            expected, doubt = sample_plainly(logits[row, place], sampling, MASK, key)
            answer = Confidence(*(values[row, place] for values in answers))
            same = answer.token == expected.token and np.allclose(answer[1:], expected[1:], rtol=1e-3, atol=1e-5)
            assert same or doubt < NEAR_TIE, (answer, expected, doubt)
            unlike.append(not same)

    check()
    assert sum(unlike) <= 0.01 * len(unlike)


def test_the_order_of_cuts():
    """Temperature first: it decides how many tokens top_p leaves; then top_k, of those."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

    def left(**options):
        sampling = Sampling(**options)
        return np.isfinite(sampling.cut(logits / (sampling.temperature or 1))).tolist()

    assert left(top_p=0.6) == [True, True, False, False]
    assert left(temperature=0.25, top_p=0.6) == [True, False, False, False]
    assert left(temperature=4.0, top_p=0.6) == [True, True, True, False]
    assert left(temperature=4.0, top_p=0.6, top_k=2) == [True, True, False, False]
    assert left(top_p=0.4, top_k=2) == [True, False, False, False]
    assert left(top_k=3) == [True, True, True, False]


def test_bounds_of_cuts():
    """A token stays while those ahead of it have no more than top_p; equals of the k-th stay, too."""
    quarters = jnp.zeros(4)
    assert np.isfinite(Sampling(top_p=0.5).cut(quarters)).tolist() == [True, True, True, False]
    assert np.isfinite(Sampling(top_p=0.499).cut(quarters)).tolist() == [True, True, False, False]
    assert np.isfinite(Sampling(top_k=1).cut(quarters)).all()
    np.testing.assert_array_equal(Sampling(top_p=1.0, top_k=9).cut(quarters), quarters)


@pytest.mark.parametrize("cuts", [{"top_k": 1}, {"top_p": 0.5}, {"top_p": 0.5, "top_k": 1}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cuts_that_would_leave_the_mask_token_alone(cuts, temperature):
    """The best token that may be the answer stays beside it, and the mask token keeps its share."""
    logits = np.full(VOCAB, -5.0, np.float32)
    logits[[MASK, 7, 8]] = 3.0, 1.0, 0.5
    sampling, key = Sampling(temperature, **cuts), jax.random.key(0)
    answer = quick_jit(lambda logits, key: sampling._answer(logits, key, MASK))(logits, key)
    share = 1 / (1 + math.exp(2))
    assert answer.token == 7
    np.testing.assert_allclose(answer.probability, share, rtol=1e-5)
    np.testing.assert_allclose(answer.margin, share, rtol=1e-5)


DRAWS = 4000


@pytest.mark.parametrize(
    "sampling", [Sampling(0.5), Sampling(1.0, top_p=0.8), Sampling(2.0, top_k=6), Sampling(1.5, 0.9, 8)], ids=str
)
def test_draws_follow_the_distribution(sampling):
    """Pearson's statistic of 4000 draws; the mask token and whatever is cut are never drawn."""
    model = random_model("same_position", np.random.default_rng(5))
    hidden = jax.random.normal(jax.random.key(0), (1, 1, CONFIG.hidden_size)) / 4
    keys = jax.random.split(jax.random.key(1), DRAWS)
    seen = quickly(sampling)(model, jnp.repeat(hidden, DRAWS, axis=0), keys)
    logits = np.asarray(hidden[0, 0], np.float64) @ np.asarray(model.head, np.float64)
    p = np.exp(log_softmax(cut_plainly(logits, sampling, MASK)[0]))
    np.testing.assert_allclose(seen.probability[:, 0], p[np.asarray(seen.token[:, 0])], rtol=1e-4)
    p[MASK] = 0
    p /= p.sum()
    counts = np.bincount(seen.token[:, 0], minlength=VOCAB)
    possible = p > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() >= 4
    statistic = ((counts - DRAWS * p)[possible] ** 2 / (DRAWS * p[possible])).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # mean and spread of its distribution


def test_positions_are_drawn_apart():
    model = random_model("same_position", np.random.default_rng(6))
    hidden = jnp.ones((2, 40, CONFIG.hidden_size)) / 50
    keys = jnp.repeat(jax.random.split(jax.random.key(3), 1), 2)
    token = np.asarray(quickly(Sampling(1.0))(model, hidden, keys).token)
    np.testing.assert_array_equal(token[0], token[1])  # a row's draws are its key's
    assert len(set(token[0].tolist())) > 10


def test_a_model_without_a_mask_token():
    config = dataclasses.replace(CONFIG, mask_token_id=None, logit_alignment="shifted")
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.lm_head.kernel[...] = model.lm_head.kernel[...].at[:, MASK].set(1.0)
    hidden = jnp.ones((2, 1, CONFIG.hidden_size))
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        run = quick_jit(lambda model, hidden, sampling=sampling: sampling(model, hidden))
        np.testing.assert_array_equal(run(model, hidden).token, [[MASK], [MASK]])


@pytest.mark.parametrize(
    "options, message",
    [
        *(({"temperature": bad}, f"temperature must be 0 or more, got {bad}") for bad in (-0.5, math.nan)),
        *(({"top_p": bad}, rf"top_p must be in \(0, 1\], got {bad}") for bad in (0, 1.5, -0.1, math.nan)),
        *(({"top_k": bad}, f"top_k must be a positive integer, got {bad}") for bad in (0, -2, 2.5)),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Sampling(**options)
