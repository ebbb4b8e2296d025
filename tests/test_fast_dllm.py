"""Fast-dLLM against a plain loop over one row, with caches that go stale in the open. Upstream's: *_golden.py."""

import dataclasses
import math
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from budget import again
from flax import nnx
from plain import PlainModel, Twin, check_company, check_twins, look
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
from cdlm_jax.decoding import fast_dllm
from cdlm_jax.models.transformer import Transformer

# ---- the twin ------------------------------------------------------------------------------------------------------


def decode_plainly(config, model, prompt, key):
    """One row. `kept` holds the keys and values that the decoder of each kind may use, however old they are."""
    shift, start = int(model.config.logit_alignment == "shifted"), len(prompt)
    policy, size = config.policy(model.config.logit_alignment), config.size(model.config.logit_alignment)
    tokens, kept = [*map(int, prompt), *[MASK] * GEN], None
    finalized_at, forwards, doubt = [-1] * GEN, 0, math.inf
    for first in range(start, start + GEN, size):
        block, step = range(first, first + size), 0
        while any(finalized_at[i - start] < 0 for i in block):
            if step == 0 or config.cache == "none":
                kept = model.nothing_kept(len(tokens))
                logits = model.run(tokens, kept=kept)[[i - shift for i in block]]
            else:
                last = len(tokens) if config.cache == "prefix" else first + size
                logits = model.run(tokens[first:last], first=first, kept=kept)
                logits = logits[[max(i - first - shift, 0) for i in block]]
            seen, lead = look(logits, MASK)
            chosen, closest = decide(policy, seen, [finalized_at[i - start] < 0 for i in block], step)
            doubt = min([doubt, closest, *(lead[i] for i in chosen)])
            for i in chosen:
                tokens[block[i]], finalized_at[block[i] - start] = int(seen.token[i]), forwards
            forwards, step = forwards + 1, step + 1
    return Twin.of(tokens[start:], forwards, finalized_at, doubt, EOS)


make = partial(fast_dllm.Config, gen_length=GEN, block_size=BLOCK)
CASES = {
    "prefix, threshold": ("same_position", make(cache="prefix", threshold=0.5)),
    "dual, factor": ("same_position", make(cache="dual", factor=0.9)),
    "prefix, steps": ("same_position", make(cache="prefix", steps=6)),
    "none, factor": ("same_position", make(factor=0.9)),
    "Dream, prefix, threshold": ("shifted", make(cache="prefix", threshold=0.5)),
    "Dream, dual, threshold": ("shifted", make(cache="dual", threshold=0.5)),
    "Dream, dual, steps": ("shifted", make(cache="dual", steps=9)),
    "Dream, none": ("shifted", make(steps=3, threshold=0.5)),
}


@cache
def quickly(config):
    compiled = quick_jit(partial(fast_dllm.generate, config=config))
    return lambda request: jax.device_get(compiled(*request[:3]))


@again
@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_twin(alignment, config):
    """Rows of a ragged batch, which are at different blocks and steps, against each alone."""
    check_twins(partial(make_request, alignment), quickly(config), partial(decode_plainly, config))


@pytest.mark.parametrize("name", ["prefix, threshold", "Dream, dual, threshold"])
def test_batch_invariance(name):
    alignment, config = CASES[name]
    check_company(partial(make_request, alignment), quickly(config), partial(decode_plainly, config))


def test_random_requests_are_worth_testing():
    """Rows take different numbers of forwards, so that they are at different blocks; and the stale caches matter."""
    alignment, config = CASES["prefix, threshold"]
    lengths = [1, 4, 7, 12]
    requests = [make_request(alignment, seed, lengths) for seed in range(8)]
    results = [quickly(config)(request) for request in requests]
    assert sum(len(set(result.forwards.tolist())) > 1 for result in results) > 4
    exact = dataclasses.replace(config, cache="none")
    changed = 0
    for request, result in zip(requests, results, strict=True):
        model = PlainModel(request.model)
        uncached = [
            decode_plainly(exact, model, prompt[:n], None)
            for prompt, n in zip(request.prompts, request.lengths, strict=True)
        ]
        changed += sum(
            twin.finalized_at != row for twin, row in zip(uncached, result.finalized_at.tolist(), strict=True)
        )
    assert changed > 4


def test_dream_sets_the_first_token_of_a_block_first():
    alignment, config = CASES["Dream, dual, steps"]
    result = quickly(config)(make_request(alignment, 4, [1, 4, 7, 12]))
    blocks = result.finalized_at.reshape(ROWS, -1, BLOCK)
    assert (blocks[..., :1] < blocks[..., 1:]).all()
    # Of the others int(3 (1 - s / t)) = 0 go with the first cached forward, which counts all the same.
    np.testing.assert_array_equal(blocks.max(axis=2) - blocks[..., 0], np.full((ROWS, 3), 2))
    np.testing.assert_array_equal(result.forwards, [9] * ROWS)


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trouble", ["mask", "nan"])
def test_a_model_that_predicts_masks_or_nothing_ends(alignment, config, trouble):
    request = make_request(alignment, 1, [1, 5, 12, 8])
    head = request.model.lm_head.kernel
    head[...] = head[...].at[:, MASK].multiply(100) if trouble == "mask" else np.full(head.shape, np.nan)
    result = quickly(config)(request)
    assert (result.forwards <= GEN).all() and (result.finalized_at >= 0).all()
    assert not (result.tokens == MASK).any()


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_one_program_per_shape_and_config():
    compiled = fast_dllm._generate._cache_size
    before = compiled()
    config = fast_dllm.Config(gen_length=4, block_size=2, threshold=0.75, cache="dual")
    for seed, lengths in ((0, [1, 2]), (1, [12, 3])):
        fast_dllm.generate(*make_request("same_position", seed, lengths)[:3], config)
        assert compiled() == before + 1


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_no_host_round_trip_and_no_logits_of_whole_rows(alignment, config):
    """No callback in the program; logits of the current block, or (without blocks) of a tile of the vocabulary."""
    without_blocks = config.size(alignment) == GEN
    vocab, tile = (5000, 4096) if without_blocks else (1000, 1000)
    size = 24  # of a hidden row, not to be mistaken for a number of rows
    model_config = dataclasses.replace(CONFIG, vocab_size=vocab, logit_alignment=alignment, hidden_size=size)
    model = Transformer(model_config, rngs=nnx.Rngs(0))
    request = make_request(alignment, 0, [3, 12, 7, 9])
    program = fast_dllm._generate.lower(model, *request[1:3], config).as_text()
    assert program.count("stablehlo.while") >= 1
    assert not re.search("callback|infeed|outfeed|send|recv", program)
    shapes = {tuple(map(int, dims[:-1].split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", program)}
    largest = max(shapes - {(size, vocab), (vocab, size)}, key=math.prod)
    assert largest == (ROWS * config.size(alignment), tile)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_size": 5}, "gen_length 12 must be a positive multiple of block_size 5"),
        ({"steps": 4}, "steps must be a multiple of the 3 blocks and at most 12, got 4"),
        ({"threshold": 0.5, "factor": 1.0}, r"give either a threshold or a factor, got 0\.5 and 1\.0"),
        ({"threshold": 1.5}, r"Threshold: tau must be in \[0, 1\], got 1\.5"),
        ({"factor": -1.0}, r"Factor: factor must be positive, got -1\.0"),
        ({"cache": "both"}, "cache must be none, prefix or dual, got 'both'"),
    ],
)
def test_configs_refused(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"factor": 1.0}, r"the factor rule is not defined for `shifted` models \(Dream\); give a threshold or steps"),
        ({}, r"a `shifted` model \(Dream\) without a cache needs a threshold; see also decoding\.dream"),
        ({"threshold": 0.5, "steps": 9}, "steps must divide gen_length 12, got 9"),
        (
            {"cache": "dual", "steps": 3},
            r"a `shifted` model \(Dream\) with a cache needs at least 2 steps per block, got 1",
        ),
        (
            {"cache": "prefix", "threshold": 0.5, "block_size": 1},
            r"a `shifted` model \(Dream\) with a cache needs a block_size of at least 2, got 1",
        ),
    ],
)
def test_configs_that_a_shifted_model_refuses(changes, message):
    config = make(**changes)
    with pytest.raises(InputError, match=f"^{message}$"):
        fast_dllm.generate(TEMPLATES["shifted"], PROMPTS, np.array([6, 6]), config)


def test_requests_refused():
    masked = np.where(np.arange(6) == 3, MASK, PROMPTS)
    with pytest.raises(InputError, match="^prompt 0 holds the mask token 1 at position 3$"):
        fast_dllm.generate(TEMPLATES["same_position"], masked, np.array([6, 6]), make())
    causal = Transformer(
        dataclasses.replace(CONFIG, family="llama", logit_alignment="shifted", mask_token_id=None), rngs=nnx.Rngs(0)
    )
    with pytest.raises(InputError, match=r"^llama is autoregressive: decode it with decoding\.autoregressive$"):
        fast_dllm.generate(causal, PROMPTS, np.array([6, 6]), make())


def test_configs_are_frozen_values():
    assert make(threshold=0.5) == make(threshold=0.5) and hash(make(threshold=0.5)) == hash(make(threshold=0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().threshold = 0.5
