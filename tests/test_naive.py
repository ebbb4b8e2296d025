"""What LLaDA's `generate` does with EOS on request, against that script written out (the rest: test_decoding)."""

import math
from functools import cache, partial

import jax
import numpy as np
import pytest
from budget import again
from plain import Twin, check_twins, log_softmax
from test_decoding import (
    BLOCK,
    CONFIG,
    EOS,
    GEN,
    MASK,
    PROMPTS,
    ROWS,
    TEMPLATES,
    VOCAB,
    make_request,
    quick_jit,
)
from test_unmask import falling, leading

from cdlm_jax.config import InputError
from cdlm_jax.decoding import common, naive
from cdlm_jax.decoding.unmask import Margin
from cdlm_jax.kernels.vocab import confidence, reference
from cdlm_jax.kernels.vocab.noise import row_seeds

EOT, STEPS = 3, 6
make = partial(naive.Config, gen_length=GEN, block_size=BLOCK, steps=STEPS)
CASES = {
    "no EOS": make(logits_eos_inf=True),
    "EOS last": make(confidence_eos_eot_inf=True),
    "EOS and EOT last": make(confidence_eos_eot_inf=True, eot_token_id=EOT),
    "no EOS, EOT last": make(logits_eos_inf=True, confidence_eos_eot_inf=True, eot_token_id=EOT),
}


def wordy_request(seed, lengths):
    """Of a model that likes to say EOS and EOT, and is not so sure of anything that confidences round to 1."""
    request = make_request("same_position", seed, lengths)
    head = request.model.lm_head.kernel
    head[...] = (head[...] / 2).at[:, [EOS, EOT]].multiply(2)
    return request


def decode_plainly(config, model, prompt, key):
    start, count = len(prompt), BLOCK * STEPS // GEN
    x, finalized_at, doubt = np.array([*prompt, *[MASK] * GEN]), np.full(GEN, -1), math.inf
    for step in range(STEPS):
        logits = model.run(x)[start:]
        if config.logits_eos_inf:
            logits[:, EOS] = -math.inf
        allowed = np.where(np.arange(VOCAB) == MASK, -math.inf, logits)  # the one departure from the script
        x0, lead = allowed.argmax(axis=1), np.diff(np.sort(allowed, axis=1)[:, -2:])[:, 0]
        if config.confidence_eos_eot_inf:
            logits[:, [EOS] if config.eot_token_id is None else [EOS, config.eot_token_id]] = -math.inf
        confidence = np.exp(log_softmax(logits))[np.arange(GEN), x0]
        first = step // count * BLOCK
        open_places = [i for i in range(first, first + BLOCK) if finalized_at[i] < 0]
        chosen, closest = leading(falling(confidence, open_places), confidence, BLOCK // count)
        # Positions of no confidence at all are no near tie: the first of them comes first.
        doubt = min([doubt, closest or math.inf, *(lead[i] for i in open_places)])
        for i in chosen:
            x[start + i], finalized_at[i] = x0[i], step
    return Twin.of(x[start:], STEPS, finalized_at.tolist(), doubt, EOS)


@cache
def quickly(config):
    compiled = quick_jit(partial(naive.generate, config=config))
    return lambda request: jax.device_get(compiled(*request[:3]))


@again
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_twin(config):
    check_twins(wordy_request, quickly(config), partial(decode_plainly, config))


def test_what_the_options_do():
    plain, without, last = (
        [quickly(config)(wordy_request(seed, [1, 5, 12, 8])) for seed in range(6)]
        for config in (make(), CASES["no EOS"], CASES["EOS last"])
    )
    lengths = [np.concatenate([result.lengths for result in results]) for results in (plain, without, last)]
    assert (lengths[0] < GEN).mean() > 0.3
    assert (lengths[1] == GEN).all()
    assert lengths[2].mean() > lengths[0].mean()  # other tokens have their say first


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_confidence_without_the_tokens(temperature):
    """Banned tokens have no part in anything; unsure ones may be predicted, with probability 0."""
    request = wordy_request(0, [1, 5, 12, 8])
    hidden = np.random.default_rng(0).normal(size=(ROWS, 50, CONFIG.hidden_size)).astype(np.float32)
    logits = hidden @ np.asarray(request.model.head)
    seen = common.predict(request.model, hidden, request.keys, temperature, banned=(EOS,), unsure=(EOT,))
    assert not np.isin(seen.token, [EOS, MASK]).any() and (seen.token == EOT).any()
    logits[..., [EOS, EOT]] = -math.inf
    log_p = log_softmax(logits.astype(np.float64))
    p = np.exp(log_p)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(seen.probability, np.take_along_axis(p, np.asarray(seen.token)[..., None], axis=-1)[..., 0])
    close(seen.margin, np.diff(np.sort(np.delete(p, MASK, axis=-1), axis=-1)[..., -2:])[..., 0])
    close(seen.entropy, -(p * np.where(p > 0, log_p, 0)).sum(axis=-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_without_those_banned_are_the_definition_s(temperature):
    """With the noise of all other draws, and from one product with the lm_head."""
    model, keys = TEMPLATES["same_position"], jax.random.split(jax.random.key(3), ROWS)
    hidden = jax.random.normal(jax.random.key(4), (ROWS, 50, CONFIG.hidden_size))

    def predict(hidden):
        return common.predict(model, hidden, keys, temperature, banned=(EOS,), unsure=(EOT,))

    seen = predict(hidden)
    seeds = row_seeds(keys, hidden)
    right = reference.confidence(hidden, model.head, (MASK, EOS), temperature, seeds)
    np.testing.assert_array_equal(seen.token, right.token)
    drawn = confidence(hidden, model.head, temperature=temperature, key=keys, forbidden=(MASK, EOS))
    np.testing.assert_array_equal(seen.token, drawn.token)
    assert str(jax.make_jaxpr(predict)(hidden)).count("dot_general") == 1


def test_other_policies_take_the_options_too():
    config = naive.Config(gen_length=GEN, block_size=BLOCK, unmask=Margin(0.3), logits_eos_inf=True)
    assert (quickly(config)(wordy_request(1, [1, 5, 12, 8])).lengths == GEN).all()


def test_a_token_outside_the_vocabulary_is_refused():
    config = make(confidence_eos_eot_inf=True, eot_token_id=126348)
    with pytest.raises(InputError, match=r"^eot_token_id 126348 is outside the vocabulary 0\.\.23$"):
        naive.generate(TEMPLATES["same_position"], PROMPTS, np.array([6, 6]), config)
