"""dLLM-Cache against a plain loop over one row that keeps its features in the open, and against no cache at all."""

import dataclasses
import math
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from budget import again
from flax import nnx
from plain import Twin, check_company, check_twins, look
from test_decoding import (
    BLOCK,
    CONFIG,
    EOS,
    GEN,
    MASK,
    PROMPTS,
    ROWS,
    TEMPLATES,
    make_request,
    quick_jit,
)
from test_unmask import decide

from cdlm_jax.config import InputError
from cdlm_jax.decoding import dllm_cache, naive
from cdlm_jax.models.transformer import Transformer

LAYERS = 3  # the first is never cached
MODELS = {
    alignment: Transformer(dataclasses.replace(CONFIG, num_layers=LAYERS, logit_alignment=alignment), rngs=nnx.Rngs(0))
    for alignment in ("same_position", "shifted")
}


def deep_request(alignment, seed, lengths):
    """As in test_decoding, of a model deep enough for features to be stale in several layers."""
    rng = np.random.default_rng(seed)
    model = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), MODELS[alignment])
    model.lm_head.kernel[...] *= 3
    return make_request(alignment, seed, lengths)._replace(model=model)


# ---- the twin ------------------------------------------------------------------------------------------------------

LIKE = 100.0  # likenesses are told apart to 1e-6: what they decide is in doubt where that times this is a near tie


class Kept:
    """What one layer keeps of every position."""

    def __init__(self, config, size):
        heads = (size, config.num_kv_heads, config.head_dim)
        self.k, self.v = np.full(heads, np.nan), np.full(heads, np.nan)
        self.attention, self.mlp = (np.full((size, config.hidden_size), np.nan) for _ in range(2))


def least_alike(new, old, count):
    """Places of the `count` lowest cosines between rows, and how far the choice is from another."""
    new, old = new.reshape(len(new), -1), old.reshape(len(old), -1)
    cosine = (new * old).sum(axis=1) / np.linalg.norm(new, axis=1) / np.linalg.norm(old, axis=1)
    order = sorted(range(len(new)), key=lambda i: (cosine[i], i))
    gap = cosine[order[count]] - cosine[order[count - 1]] if 0 < count < len(order) else math.inf
    return order[:count], gap * LIKE


def forward(model, config, tokens, start, number, kept):
    """Logits of forward `number`, by upstream's `cache_hook_feature`; and the closest choice of rows."""
    x, doubt, size = model.embed[tokens], math.inf, len(tokens)
    prompt, response = list(range(start)), list(range(start, size))
    for index, (layer, own) in enumerate(zip(model.layers, kept, strict=True)):
        due = prompt if index == 0 or number % config.prompt_interval == 0 else []
        if index == 0 or number % config.response_interval == 0:
            due = due + response
        elif config.update_ratio > 0:
            v = model.project(layer, x[response], response)[2]
            places, closest = least_alike(v, own.v[response], int(GEN * config.update_ratio))
            own.v[response] = v  # of all, also of those that are left alone
            due, doubt = due + [response[i] for i in places], min(doubt, closest)
        if due:
            q, own.k[due], own.v[due] = model.project(layer, x[due], due)
            own.attention[due] = model.attend(layer, q, own.k, own.v, [size] * len(due))
            own.mlp[due] = model.mlp(layer, (x + own.attention)[due])
        x = x + own.attention + own.mlp
    return model.logits(x), doubt


def decode_plainly(config, model, prompt, key):
    start, shift = len(prompt), int(model.config.logit_alignment == "shifted")
    tokens, kept = [*map(int, prompt), *[MASK] * GEN], [Kept(model.config, len(prompt) + GEN) for _ in range(LAYERS)]
    finalized_at, forwards, doubt = [-1] * GEN, 0, math.inf
    for first in range(start, start + GEN, BLOCK):
        block, step = range(first, first + BLOCK), 0
        while any(finalized_at[i - start] < 0 for i in block):
            logits, changed = forward(model, config, tokens, start, forwards, kept)
            seen, lead = look(logits[[i - shift for i in block]], MASK)
            chosen, closest = decide(config.policy, seen, [finalized_at[i - start] < 0 for i in block], step)
            doubt = min([doubt, closest, changed, *(lead[i] for i in chosen)])
            for i in chosen:
                tokens[block[i]], finalized_at[block[i] - start] = int(seen.token[i]), forwards
            forwards, step = forwards + 1, step + 1
    return Twin.of(tokens[start:], forwards, finalized_at, doubt, EOS)


make = partial(dllm_cache.Config, gen_length=GEN, block_size=BLOCK)
CASES = {
    "both intervals": ("same_position", make(prompt_interval=5, response_interval=3)),
    "Dream": ("shifted", make(prompt_interval=4, response_interval=3, update_ratio=0.4)),
    "prompt more often": ("same_position", make(prompt_interval=2, response_interval=5, update_ratio=0.5, steps=6)),
    "nothing in between": ("shifted", make(prompt_interval=3, response_interval=4, update_ratio=0.0)),
    "values only in between": ("same_position", make(prompt_interval=2, response_interval=5, update_ratio=0.05)),
}


@cache
def quickly(config):
    module = naive if isinstance(config, naive.Config) else dllm_cache
    compiled = quick_jit(partial(module.generate, config=config))
    return lambda request: jax.device_get(compiled(*request[:3]))


@again
@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_twin(alignment, config):
    check_twins(partial(deep_request, alignment), quickly(config), partial(decode_plainly, config))


@pytest.mark.parametrize("name", [pytest.param("both intervals", marks=pytest.mark.slow), "Dream"])
def test_batch_invariance(name):
    alignment, config = CASES[name]
    check_company(partial(deep_request, alignment), quickly(config), partial(decode_plainly, config))


@pytest.mark.parametrize(
    "alignment, prompt_interval, response_interval, ratio",
    [("same_position", 1, 1, 0.0), ("shifted", 1, 5, 1.0)],
    ids=["all refreshed", "all recomputed"],
)
def test_nothing_stale_is_naive(alignment, prompt_interval, response_interval, ratio):
    config = make(prompt_interval=prompt_interval, response_interval=response_interval, update_ratio=ratio, steps=6)
    uncached = naive.Config(gen_length=GEN, block_size=BLOCK, steps=6)
    for seed in range(3):
        request = deep_request(alignment, seed, [1, 5, 12, 8])
        jax.tree.map(np.testing.assert_array_equal, quickly(config)(request), quickly(uncached)(request))


def test_stale_features_matter():
    alignment, config = CASES["both intervals"]
    uncached = naive.Config(gen_length=GEN, block_size=BLOCK)
    requests = [deep_request(alignment, seed, [1, 5, 12, 8]) for seed in range(6)]
    same = [quickly(config)(request).tokens == quickly(uncached)(request).tokens for request in requests]
    assert 0.1 < np.mean(same) < 0.99


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trouble", ["mask", "nan"])
def test_a_model_that_predicts_masks_or_nothing_ends(alignment, config, trouble):
    request = deep_request(alignment, 1, [1, 5, 12, 8])
    head = request.model.lm_head.kernel
    head[...] = head[...].at[:, MASK].multiply(100) if trouble == "mask" else np.full(head.shape, np.nan)
    result = quickly(config)(request)
    np.testing.assert_array_equal(result.forwards, [config.steps or GEN] * ROWS)
    assert (result.finalized_at >= 0).all() and not (result.tokens == MASK).any()


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_one_program_per_shape_and_config():
    compiled = dllm_cache._generate._cache_size
    before = compiled()
    config = dllm_cache.Config(gen_length=4, block_size=2, prompt_interval=2, response_interval=2)
    for seed, lengths in ((0, [1, 2]), (1, [12, 3])):
        dllm_cache.generate(*make_request("same_position", seed, lengths)[:3], config)
        assert compiled() == before + 1


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_no_host_round_trip_and_no_logits_of_whole_rows(alignment, config):
    vocab = 1000
    size = 24  # of a hidden row, not to be mistaken for a number of rows
    model_config = dataclasses.replace(CONFIG, vocab_size=vocab, logit_alignment=alignment, hidden_size=size)
    model = Transformer(model_config, rngs=nnx.Rngs(0))
    request = make_request(alignment, 0, [3, 12, 7, 9])
    program = dllm_cache._generate.lower(model, *request[1:3], config).as_text()
    assert program.count("stablehlo.while") >= 1
    assert not re.search("callback|infeed|outfeed|send|recv", program)
    shapes = {tuple(map(int, dims[:-1].split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", program)}
    largest = max(shapes - {(size, vocab), (vocab, size)}, key=math.prod)
    assert largest == (ROWS * BLOCK, vocab)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_size": 5}, "gen_length 12 must be a positive multiple of block_size 5"),
        ({"steps": 4}, "steps must be a multiple of the 3 blocks and at most 12, got 4"),
        *(({"prompt_interval": bad}, f"prompt_interval must be a positive integer, got {bad}") for bad in (0, 2.5)),
        *(({"response_interval": bad}, f"response_interval must be a positive integer, got {bad}") for bad in (0, -1)),
        *(({"update_ratio": bad}, rf"update_ratio must be in \[0, 1\], got {bad}") for bad in (-0.1, 1.5, math.nan)),
    ],
)
def test_configs_refused(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make(**{"prompt_interval": 2, "response_interval": 2} | changes)


def test_requests_refused():
    config = make(prompt_interval=2, response_interval=2)
    with pytest.raises(InputError, match=r"^prompt 6 \+ gen_length 60 exceeds the model's 64 positions$"):
        long = dataclasses.replace(config, gen_length=60)
        dllm_cache.generate(TEMPLATES["shifted"], PROMPTS, np.array([6, 6]), long)
    causal = Transformer(
        dataclasses.replace(CONFIG, family="llama", logit_alignment="shifted", mask_token_id=None), rngs=nnx.Rngs(0)
    )
    with pytest.raises(InputError, match=r"^llama is autoregressive: decode it with decoding\.autoregressive$"):
        dllm_cache.generate(causal, PROMPTS, np.array([6, 6]), config)
