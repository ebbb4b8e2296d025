"""Autoregressive decoding with a KV cache against a full causal forward for every token."""

import dataclasses
import math
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from budget import again
from flax import nnx
from plain import Twin, check_company, check_twins
from test_decoding import (
    CONFIG,
    EOS,
    GEN,
    PROMPTS,
    ROWS,
    TEMPLATES,
    make_request,
    quick_jit,
)
from test_sampling import sample_plainly

from cdlm_jax.config import InputError
from cdlm_jax.decoding import autoregressive
from cdlm_jax.decoding.sampling import Sampling
from cdlm_jax.models.transformer import Transformer

CAUSAL = dataclasses.replace(CONFIG, logit_alignment="shifted", mask_token_id=None)
MODELS = {
    "qwen2": Transformer(dataclasses.replace(CAUSAL, family="qwen2", tie_embeddings=True), rngs=nnx.Rngs(0)),
    "llama": Transformer(dataclasses.replace(CAUSAL, family="llama", qkv_bias=False), rngs=nnx.Rngs(0)),
}


def causal_request(family, seed, lengths):
    """As in test_decoding: prompts of ordinary tokens, padding of anything at all, a model that is random all over."""
    rng = np.random.default_rng(seed)
    model = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), MODELS[family])
    return make_request("shifted", seed, lengths)._replace(model=model)


# ---- the twin ------------------------------------------------------------------------------------------------------


def decode_plainly(config, model, prompt, key):
    """One row: the whole of it for every token, which sees itself and what is before it."""
    sampling = Sampling(config.temperature, config.top_p, config.top_k)
    tokens, response, doubt = [*map(int, prompt)], [], math.inf
    while len(response) < GEN and EOS not in response:
        logits = model.run(tokens, ends=range(1, len(tokens) + 1))[-1]
        token_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, len(response)), 0), 0)
        answer, closest = sample_plainly(logits, sampling, None, token_key)
        doubt = min(doubt, closest)
        tokens.append(answer.token)
        response.append(answer.token)
    count = len(response)
    rest = GEN - count
    return Twin.of(response + [EOS] * rest, count, [*range(count), *[-1] * rest], doubt, EOS)


make = partial(autoregressive.Config, gen_length=GEN)
CASES = {
    "qwen2, greedy": ("qwen2", make()),
    "llama, greedy": ("llama", make()),
    "qwen2, sampled": ("qwen2", make(temperature=0.9)),
    "llama, sampled and cut": ("llama", make(temperature=1.3, top_p=0.8, top_k=6)),
}


@cache
def quickly(config):
    compiled = quick_jit(lambda *request: autoregressive.generate(*request[:3], config, request[3]))
    return lambda request: jax.device_get(compiled(*request))


@again
@pytest.mark.parametrize("family, config", CASES.values(), ids=CASES)
def test_twin(family, config):
    check_twins(partial(causal_request, family), quickly(config), partial(decode_plainly, config))


@pytest.mark.parametrize("name", ["qwen2, greedy", "llama, sampled and cut"])
def test_batch_invariance(name):
    family, config = CASES[name]
    check_company(partial(causal_request, family), quickly(config), partial(decode_plainly, config))


def test_a_row_ends_with_its_first_eos():
    family, config = CASES["qwen2, sampled"]
    results = [quickly(config)(causal_request(family, seed, [1, 4, 7, 12])) for seed in range(10)]
    lengths, forwards = (np.concatenate([getattr(r, name) for r in results]) for name in ("lengths", "forwards"))
    assert (lengths == GEN).any() and ((lengths > 0) & (lengths < GEN)).any()
    np.testing.assert_array_equal(forwards, np.minimum(lengths + 1, GEN))
    for result in results:
        for tokens, length, order in zip(result.tokens, result.lengths, result.finalized_at, strict=True):
            assert EOS not in tokens[:length] and (tokens[length:] == EOS).all()
            count = min(length + 1, GEN)
            np.testing.assert_array_equal(order, [*range(count), *[-1] * (GEN - count)])


def test_samples_follow_the_key():
    family, config = CASES["qwen2, sampled"]
    request = causal_request(family, 3, [5])
    request = request.rows([0] * ROWS)
    same = quickly(config)(request)
    assert (same.tokens == same.tokens[0]).all()
    several = quickly(config)(request._replace(keys=jax.random.split(jax.random.key(1), ROWS)))
    assert len({tuple(row) for row in several.tokens.tolist()}) > 1


def test_a_model_that_is_not_a_number_ends():
    family, config = CASES["llama, greedy"]
    request = causal_request(family, 1, [1, 5, 12, 8])
    request.model.lm_head.kernel[...] = np.full(request.model.lm_head.kernel.shape, np.nan)
    assert (quickly(config)(request).forwards <= GEN).all()


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_one_program_per_shape_and_config():
    compiled = autoregressive._generate._cache_size
    before = compiled()
    for seed, lengths in ((0, [1, 2]), (1, [12, 3])):
        autoregressive.generate(*causal_request("llama", seed, lengths)[:3], make())
        assert compiled() == before + 1


@pytest.mark.parametrize("config", [make(), make(temperature=0.5), make(top_k=3)], ids=str)
def test_no_host_round_trip_and_no_logits_of_whole_rows(config):
    vocab = 2000
    model = Transformer(dataclasses.replace(CAUSAL, vocab_size=vocab), rngs=nnx.Rngs(0))
    request = make_request("shifted", 0, [3, 12, 7, 9])._replace(model=model)
    program = autoregressive._generate.lower(*request, config).as_text()
    assert program.count("stablehlo.while") >= 1
    assert not re.search("callback|infeed|outfeed|send|recv", program)
    shapes = {tuple(map(int, dims[:-1].split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", program)}
    largest = max(math.prod(shape) for shape in shapes - {(CONFIG.hidden_size, vocab), (vocab, CONFIG.hidden_size)})
    assert largest == (2 if config.temperature > 0 else 1) * ROWS * vocab


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gen_length": 0}, "gen_length must be a positive integer, got 0"),
        ({"gen_length": 2.0}, r"gen_length must be a positive integer, got 2\.0"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
    ],
)
def test_configs_refused(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make(**changes)


@pytest.mark.parametrize(
    "prompts, lengths, changes, message",
    [
        (PROMPTS, [6, 0], {}, r"prompt lengths must be in 1\.\.6, got 0\.\.6"),
        (PROMPTS, [6], {}, r"prompts must be \[rows, P_max\] and prompt_lengths \[rows\], got \(2, 6\) and \(1,\)"),
        (PROMPTS, [6, 6], {"gen_length": 60}, r"prompt 6 \+ gen_length 60 exceeds the model's 64 positions"),
        (PROMPTS + 20, [6, 6], {}, r"prompt 0 holds token 25, outside the vocabulary 0\.\.23"),
        (PROMPTS, [6, 6], {"temperature": 0.5}, r"temperature 0\.5 needs a random key, got none"),
    ],
)
def test_requests_refused(prompts, lengths, changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        autoregressive.generate(MODELS["llama"], prompts, np.array(lengths), make(**changes))


def test_masked_models_are_refused():
    with pytest.raises(InputError, match=r"^autoregressive decoding needs a causal model \(qwen2, llama\), got llada$"):
        autoregressive.generate(TEMPLATES["shifted"], PROMPTS, np.array([6, 6]), make())
