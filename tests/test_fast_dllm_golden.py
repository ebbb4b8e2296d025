"""Fast-dLLM against upstream's own decodes and cached steps."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_ids
from test_decoding import quick_jit, replay

from cdlm_jax.decoding import fast_dllm
from cdlm_jax.decoding.progress import Progress
from cdlm_jax.models.cache import KVCache
from cdlm_jax.models.hf import load_model
from cdlm_jax.visibility import row_end

GOLDEN = [case_id for case_id in golden_ids("decode") if "/fastdllm_" in case_id]
SECOND = ("threshold0.9", "steps32")  # the second value of a dial that another case turns already
golden_model = cache(load_model)


def marked(case_id):
    return pytest.param(case_id, marks=pytest.mark.slow) if case_id.endswith(SECOND) else case_id


def golden_config(case):
    """The Config that says what the arguments of upstream's function say."""
    args = case.args
    if case.family == "llada":
        kind = args["function"].removeprefix("generate").removeprefix("_with_").removesuffix("_cache") or "none"
    else:
        kind = {True: "dual", False: "prefix", None: "none"}[args.get("dual_cache")]
    return fast_dllm.Config(
        gen_length=args.get("gen_length") or args["max_new_tokens"],
        block_size=args.get("block_length", 8),  # Dream without a cache has no blocks
        steps=args["steps"],
        threshold=args.get("threshold"),
        factor=args.get("factor"),
        cache=kind,
    )


def test_all_golden_decodes_are_here():
    assert len(GOLDEN) == 25


@pytest.mark.parametrize("case_id", [marked(case_id) for case_id in GOLDEN])
def test_golden(case_id, golden):
    case = golden(case_id)
    model, config = golden_model(case.model), golden_config(case)
    prompt, expected = case.arrays["prompt"], case.arrays["output_ids"]
    width = prompt.shape[1]
    run = quick_jit(partial(fast_dllm.generate, config=config))
    result = jax.device_get(run(model, prompt, np.array([width])))
    eos = model.config.eos_token_id
    response = expected[0, width:].tolist()
    length = [*response, eos].index(eos)
    assert result.lengths == length
    np.testing.assert_array_equal(result.tokens[0], response[:length] + [eos] * (config.gen_length - length))
    assert result.forwards == case.arrays["nfe"]
    np.testing.assert_array_equal(replay(case, response, result.finalized_at[0]), case.arrays["states"][:, width:])


@pytest.mark.parametrize("case_id", golden_ids("cache_step"))
def test_golden_cached_step(case_id, golden):
    """One step of each kind through `extend`, with the writes that the decoder makes."""
    case = golden(case_id)
    model, start, end = golden_model(case.model), case.args["block_start"], case.args["block_end"]
    before, now = case.arrays["x_at_refresh"], case.arrays["x_now"]
    size = now.shape[1]
    empty = KVCache.create(model.config, 1, size, np.float32)

    @quick_jit
    def logits(tokens, kept, first):
        ends = row_end(np.array([size]), 0, tokens.shape[1])
        hidden, kept = model.extend(tokens, kept, start=first, visible_end=ends)
        return model.unembed(hidden), kept

    full, kept = logits(before, empty, np.array([0]))
    stale = {
        "logits_full": full,
        "logits_prefix_step": logits(now[:, start:], kept, np.array([start]))[0],
        "logits_dual_step": logits(now[:, start:end], kept, np.array([start]))[0],
    }
    fresh = logits(now, kept, np.array([0]))[0]
    tolerance = {name: case.tolerance[name] for name in ("atol", "rtol")}
    for name, value in (stale | {"logits_fresh": fresh}).items():
        np.testing.assert_allclose(value, case.arrays[name], **tolerance, err_msg=name)
    for name in ("logits_prefix_step", "logits_dual_step"):  # what is kept is stale indeed
        assert np.abs(stale[name] - fresh[:, start : start + stale[name].shape[1]]).max() > 0.01


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("case_id", golden_ids("cache_step"))
def test_golden_cached_step_of_the_decoder(case_id, kind, golden):
    """The same two forwards by the decoder itself: a new block, then one in which two more tokens are final."""
    case = golden(case_id)
    model, start, end = golden_model(case.model), case.args["block_start"], case.args["block_end"]
    size, gen_length = end - start, 32
    width = case.arrays["x_now"].shape[1] - gen_length
    config = fast_dllm.Config(gen_length=gen_length, block_size=size, cache=kind)
    forward = quick_jit(
        partial(fast_dllm.cached_forward, model, case.arrays["x_now"][:, :width], np.array([width]), config)
    )
    progress = Progress.start(1, gen_length, model.config.mask_token_id)
    progress = dataclasses.replace(progress, block=progress.block + (start - width) // size)
    kept = KVCache.create(model.config, 1, width + gen_length, np.float32)
    shift = int(model.config.logit_alignment == "shifted")
    tolerance = {name: case.tolerance[name] for name in ("atol", "rtol")}
    for step, (tokens, expected, rows) in enumerate(
        (
            ("x_at_refresh", "logits_full", np.arange(start, end) - shift),
            ("x_now", f"logits_{kind}_step", np.maximum(np.arange(size) - shift, 0)),
        )
    ):
        response = jnp.asarray(case.arrays[tokens][:, width:])
        hidden, kept = forward(dataclasses.replace(progress, response=response, step=progress.step + step), kept)
        np.testing.assert_allclose(model.unembed(hidden), case.arrays[expected][:, rows], **tolerance)
