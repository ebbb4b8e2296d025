"""The bound: golden numbers, the exact expectation by enumeration, upstream's draw, greedy decoding as a plain loop."""

import dataclasses
import itertools
import math
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from conftest import golden_ids, load_case
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY

from cdlm_jax.config import InputError
from cdlm_jax.decoding import naive
from cdlm_jax.evaluation.likelihood import draw_masks, is_greedy, log_likelihood, masked_nll
from cdlm_jax.models.hf import load_model
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.visibility import visible_end

MASK, VOCAB = 1, 24
CONFIG = dataclasses.replace(TINY, vocab_size=VOCAB, mask_token_id=MASK, max_length=48)
BLOCK = 2
VARIANTS = [("same_position", BLOCK, 0.0), ("shifted", None, 0.8)]  # the golden cases are the plain ones


@cache
def random_model(alignment="same_position"):
    config = dataclasses.replace(CONFIG, logit_alignment=alignment)
    model = Transformer(config, rngs=nnx.Rngs(3))
    model.lm_head.kernel[...] *= 4.0  # wide logits: probabilities that spread
    return model


def ragged(lengths, width, seed):
    """[rows, width] of ordinary tokens, with rubbish (also masks) beyond each length."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (len(lengths), width), dtype=np.int32)
    tokens[np.arange(width) >= np.array(lengths)[:, None]] = MASK
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


@jax.jit
def forward(model, tokens, end):
    return model.unembed(model(tokens, visible_end=end))


def plain_logits(model, prompt, answer, masked, block_size, cfg_scale):
    """float64 [L, V] for one row without padding; the prompt may be masked for the unguided copy."""

    def logits(prompt):
        tokens = np.full((1, CONFIG.max_length), MASK, np.int32)  # one width, of which nothing sees more than `size`
        size = len(prompt) + len(answer)
        tokens[0, :size] = np.concatenate([prompt, np.where(masked, MASK, answer)])
        end = np.minimum(visible_end(jnp.array([len(prompt)]), CONFIG.max_length, block_size), size)
        rows = np.asarray(forward(model, tokens, end), np.float64)[0]
        start = len(prompt) - (model.config.logit_alignment == "shifted")
        return rows[start : start + len(answer)]

    guided = logits(prompt)
    if cfg_scale:
        unguided = logits(np.full_like(prompt, MASK))
        guided = unguided + (cfg_scale + 1) * (guided - unguided)
    return guided


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def rows_of(tokens, lengths):
    return [row[:length] for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]


# ---- golden --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", golden_ids("log_likelihood"))
def test_golden(case_id):
    case = load_case(case_id)
    arrays, size = case.arrays, case.args["prompt_length"]
    rows, length = arrays["x0"].shape[0], case.args["answer_length"]
    nll = masked_nll(
        load_model(case.model),
        jnp.asarray(arrays["x0"][:, :size]),
        jnp.full(rows, size),
        jnp.asarray(arrays["x0"][:, size:]),
        jnp.full(rows, length),
        jnp.asarray(arrays["mask"][:, size:]),
        jnp.asarray(arrays["p_mask"][:, size]),
        cfg_scale=case.args.get("cfg_scale", 0.0),
    )
    np.testing.assert_allclose(nll, arrays["weighted_sum_per_row"], **case.tolerance)
    expected = arrays["nll"] if "nll" in arrays else -arrays["log_likelihood"]
    np.testing.assert_allclose(np.mean(nll), expected, **case.tolerance)


def test_golden_cases_are_there():
    assert golden_ids("log_likelihood") == ["llada/log_likelihood_cfg0", "llada/log_likelihood_cfg1.5", "dream/nll"]


# ---- the deterministic part ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alignment", "block_size", "cfg_scale"), VARIANTS)
def test_masked_nll_of_ragged_rows_is_that_of_each_row_alone(alignment, block_size, cfg_scale):
    model = random_model(alignment)
    prompts, prompt_lengths = ragged([5, 1, 3], 6, seed=1)
    answers, answer_lengths = ragged([3, 6, 1], 6, seed=2)
    masked = np.array([[1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    p_mask = np.array([0.5, 0.7, 1.0], np.float32)
    options = {"cfg_scale": cfg_scale, "block_size": block_size}
    nll = masked_nll(model, prompts, prompt_lengths, answers, answer_lengths, jnp.asarray(masked), p_mask, **options)
    pairs = zip(rows_of(prompts, prompt_lengths), rows_of(answers, answer_lengths), strict=True)
    for row, (prompt, answer) in enumerate(pairs):
        chosen = masked[row, : len(answer)]
        log_p = log_softmax(plain_logits(model, prompt, answer, chosen, block_size, cfg_scale))
        expected = -log_p[np.arange(len(answer)), answer][chosen].sum() / p_mask[row]
        np.testing.assert_allclose(nll[row], expected, rtol=1e-4)


# ---- the draw ------------------------------------------------------------------------------------------------------


@examples(5, 20)
@given(lengths=st.lists(st.integers(1, 9), min_size=3, max_size=3), seed=st.integers(0, 2**31))
def test_draw_is_stratified(lengths, seed):
    """Counts go up by L / samples around 1..L; p_mask is the count's share; nothing beyond the answer is masked."""
    samples, width = 6, 9
    keys = jax.random.split(jax.random.key(seed), 3)
    masked, p_mask = map(np.asarray, draw_masks(keys, jnp.array(lengths), samples, width))
    for row, length in enumerate(lengths):
        assert not masked[:, row, length:].any()
        counts = masked[:, row].sum(axis=1)
        np.testing.assert_allclose(p_mask[:, row], counts / length, rtol=1e-6)
        first = counts[0]
        expected = [math.floor(first + Fraction(i * length, samples) + Fraction(1, 2)) for i in range(samples)]
        assert counts.tolist() == [(count - 1) % length + 1 for count in expected]


def test_draw_is_uniform():
    """Over many keys, in every sample (also those that fall on a half), each count and each place is equally likely."""
    rows, length, samples = 4000, 4, 8
    keys = jax.random.split(jax.random.key(0), rows)
    masked, _ = map(np.asarray, draw_masks(keys, jnp.full(rows, length), samples, length))
    for sample in masked:
        counts = np.bincount(sample.sum(axis=1), minlength=length + 1)
        assert counts[0] == 0
        np.testing.assert_allclose(counts[1:] / rows, 1 / length, atol=0.03)
        np.testing.assert_allclose(sample.mean(axis=0), (length + 1) / 2 / length, atol=0.03)


# ---- the bound -----------------------------------------------------------------------------------------------------


def exact_bound(model, prompt, answer, **options):
    """The expectation over all masks: sizes 1..L equally likely, and so are the sets of each size."""
    length = len(answer)
    sets = [s for n in range(1, length + 1) for s in itertools.combinations(range(length), n)]
    masked = np.array([[i in chosen for i in range(length)] for chosen in sets])
    counts = masked.sum(axis=1)
    share = np.array([1 / (length * np.sum(counts == count)) for count in counts])
    rows = len(sets)
    nll = masked_nll(
        model,
        jnp.tile(prompt, (rows, 1)),
        jnp.full(rows, len(prompt)),
        jnp.tile(answer, (rows, 1)),
        jnp.full(rows, length),
        jnp.asarray(masked),
        jnp.asarray(counts / length),
        **options,
    )
    return -np.sum(share * np.asarray(nll))


@pytest.mark.parametrize(
    ("alignment", "block_size", "cfg_scale"), [VARIANTS[0], pytest.param(*VARIANTS[1], marks=pytest.mark.slow)]
)
def test_log_likelihood_estimates_the_exact_expectation(alignment, block_size, cfg_scale):
    model, options = random_model(alignment), {"cfg_scale": cfg_scale, "block_size": block_size}
    rows = 64
    prompts, prompt_lengths = ragged([3], 4, seed=4)
    answers, answer_lengths = ragged([4], 5, seed=5)
    repeated = [jnp.repeat(x, rows, axis=0) for x in (prompts, prompt_lengths, answers, answer_lengths)]
    bounds = np.asarray(log_likelihood(model, *repeated, jax.random.key(0), samples=8, **options))
    exact = exact_bound(model, np.asarray(prompts)[0, :3], np.asarray(answers)[0, :4], **options)
    error = bounds.std(ddof=1) / np.sqrt(rows)
    assert 0 < error < 0.02 * abs(exact)
    assert abs(bounds.mean() - exact) < 4 * error


def test_one_token_is_exact():
    model = random_model()
    prompts, prompt_lengths = ragged([4, 2], 4, seed=6)
    answers, answer_lengths = ragged([1, 1], 1, seed=7)
    bounds = log_likelihood(model, prompts, prompt_lengths, answers, answer_lengths, jax.random.key(0))
    for row, (prompt, answer) in enumerate(zip(rows_of(prompts, prompt_lengths), np.asarray(answers), strict=True)):
        log_p = log_softmax(plain_logits(model, prompt, answer, np.array([True]), None, 0.0))
        np.testing.assert_allclose(bounds[row], log_p[0, answer[0]], rtol=1e-4)


def test_a_row_depends_on_neither_padding_nor_neighbours():
    model = random_model("shifted")
    prompts, prompt_lengths = ragged([4, 2], 7, seed=8)
    answers, answer_lengths = ragged([3, 5], 8, seed=9)
    keys = jax.random.split(jax.random.key(1), 2)
    together = log_likelihood(model, prompts, prompt_lengths, answers, answer_lengths, keys, samples=5)
    alone = log_likelihood(
        model, prompts[:1, :4], prompt_lengths[:1], answers[:1, :3], answer_lengths[:1], keys[:1], samples=5
    )
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-4)


# ---- greedy --------------------------------------------------------------------------------------------------------


def plain_greedy(model, prompt, length, block_size, cfg_scale):
    """LLaDA's `suffix_greedy_prediction` as a loop, block by block for a student."""
    tokens = np.full(length, MASK, np.int32)
    size = block_size or length
    for start in range(0, length, size):
        stop = min(start + size, length)
        for _ in range(start, stop):
            p = np.exp(log_softmax(plain_logits(model, prompt, tokens, tokens == MASK, block_size, cfg_scale)))
            p[:, MASK] = 0
            confidence = np.where(tokens == MASK, p.max(axis=1), -1)[start:stop]
            place = start + int(np.argmax(confidence))
            tokens[place] = p[place].argmax()
    return tokens


@pytest.mark.parametrize(("alignment", "block_size", "cfg_scale"), VARIANTS)
def test_is_greedy(alignment, block_size, cfg_scale):
    model, options = random_model(alignment), {"cfg_scale": cfg_scale, "block_size": block_size}
    lengths = [5, 3, 1, 4]
    prompts, prompt_lengths = ragged([4, 2, 6, 3], 6, seed=10)
    answers = np.full((4, 6), MASK, np.int32)
    for row, prompt in enumerate(rows_of(prompts, prompt_lengths)):
        answers[row, : lengths[row]] = plain_greedy(model, prompt, lengths[row], block_size, cfg_scale)
    given = (model, prompts, prompt_lengths)
    assert is_greedy(*given, jnp.asarray(answers), jnp.array(lengths), **options).tolist() == [True] * 4
    for row, place in [(0, 4), (1, 0), (2, 0), (3, 2)]:
        changed = answers.copy()
        changed[row, place] = 3 + (changed[row, place] - 2) % (VOCAB - 3)
        expected = [other != row for other in range(4)]
        assert is_greedy(*given, jnp.asarray(changed), jnp.array(lengths), **options).tolist() == expected


def test_is_greedy_agrees_with_the_naive_decoder():
    model, length = load_model(load_case("llada/log_likelihood_cfg0").model), 8
    prompts = jnp.asarray(load_case("llada/log_likelihood_cfg0").arrays["x0"][:1, :13])
    lengths = jnp.array([13])
    result = naive.generate(model, prompts, lengths, naive.Config(gen_length=length, block_size=length))
    assert is_greedy(model, prompts, lengths, result.tokens, jnp.array([length])).all()
    assert not is_greedy(model, prompts, lengths, result.tokens + 1, jnp.array([length])).any()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [[3, MASK]]}, "answer 0 holds token 1 at position 1; allowed: 0..23 but the mask token 1"),
        ({"answers": [[3, 24]]}, "answer 0 holds token 24 at position 1"),
        ({"answer_lengths": [0]}, "answer lengths must be in 1..2, got 0..0"),
        ({"answer_lengths": [3]}, "answer lengths must be in 1..2, got 3..3"),
        ({"answers": [[3, 4], [3, 4]]}, r"answers must be \[1, L_max\]"),
        ({"prompt_lengths": [0]}, "prompt lengths must be in 1..3"),
        ({"prompts": [[3, MASK, 4]]}, "prompt 0 holds the mask token 1 at position 1"),
        ({"answers": [[3] * 46], "answer_lengths": [2]}, "exceeds the model's 48 positions"),
    ],
)
@pytest.mark.parametrize("function", ["log_likelihood", "is_greedy"])
def test_refusals(function, change, message):
    given = {"prompts": [[3, 4, 5]], "prompt_lengths": [3], "answers": [[6, 7]], "answer_lengths": [2]} | change
    arrays = [jnp.asarray(value, jnp.int32) for value in given.values()]
    with pytest.raises(InputError, match=message):
        if function == "is_greedy":
            is_greedy(random_model(), *arrays)
        else:
            log_likelihood(random_model(), *arrays, jax.random.key(0))


def test_refuses_a_missing_key_and_no_samples():
    arrays = [jnp.asarray(value, jnp.int32) for value in ([[3, 4]], [2], [[5, 6]], [2])]
    with pytest.raises(InputError, match="samples must be at least 1, got 0"):
        log_likelihood(random_model(), *arrays, jax.random.key(0), samples=0)
    with pytest.raises(InputError, match="key must be one"):
        log_likelihood(random_model(), *arrays, jax.random.PRNGKey(0))
