"""What all decoders owe their callers, whatever they do inside: one contract, in both dtypes, also under a jit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoding import BLOCK, CONFIG, EOS, GEN, MASK, ROWS, make_request, quick_jit

from cdlm_jax import decoding
from cdlm_jax.decoding import autoregressive, cdlm, dllm_cache, dream, fast_dllm, naive
from cdlm_jax.models.transformer import Transformer

blocks = {"gen_length": GEN, "block_size": BLOCK}
CASES = {
    "cdlm": ("shifted", cdlm, cdlm.Config(**blocks)),
    "naive": ("same_position", naive, naive.Config(**blocks, steps=6, temperature=0.5)),
    "dream": ("shifted", dream, dream.Config(gen_length=GEN, steps=6, temperature=0.5, top_p=0.9, alg_temp=0.1)),
    "fast_dllm, prefix": ("shifted", fast_dllm, fast_dllm.Config(**blocks, threshold=0.5, cache="prefix")),
    "fast_dllm, dual": ("same_position", fast_dllm, fast_dllm.Config(**blocks, factor=1.0, cache="dual")),
    "dllm_cache": ("shifted", dllm_cache, dllm_cache.Config(**blocks, prompt_interval=4, response_interval=2)),
    "autoregressive": ("causal", autoregressive, autoregressive.Config(gen_length=GEN, temperature=0.5, top_k=5)),
}


def model_of(kind, dtype):
    changes = {"logit_alignment": "shifted" if kind == "causal" else kind}
    if kind == "causal":
        changes |= {"family": "qwen2", "mask_token_id": None}
    return Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(3), dtype=dtype)


def test_every_decoder_is_here():
    assert {getattr(decoding, name) for name in decoding.__all__} == {module for _, module, _ in CASES.values()}


@pytest.mark.parametrize("kind, module, config", CASES.values(), ids=CASES)
def test_contract(kind, module, config):
    """In bfloat16, inside a caller's jit, with one key: shapes, dtypes, and what the fields say of each other."""
    request = make_request("shifted", 2, [1, 4, 12, 7])
    model = model_of(kind, jnp.bfloat16)
    run = quick_jit(lambda model, prompts, lengths, key: module.generate(model, prompts, lengths, config, key))
    result, again = (jax.device_get(run(model, *request[1:3], jax.random.key(1))) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, result, again)
    assert {field.name: getattr(result, field.name).shape for field in dataclasses.fields(result)} == {
        "tokens": (ROWS, GEN),
        "lengths": (ROWS,),
        "forwards": (ROWS,),
        "finalized_at": (ROWS, GEN),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {np.dtype(np.int32)}
    places = np.arange(GEN)
    np.testing.assert_array_equal(result.lengths, [[*row, EOS].index(EOS) for row in result.tokens.tolist()])
    assert (result.tokens[places > result.lengths[:, None]] == EOS).all()
    assert kind == "causal" or not (result.tokens == MASK).any()
    assert (result.finalized_at[places < result.lengths[:, None]] >= 0).all()
    # Every row's last forward finalized something.
    np.testing.assert_array_equal(result.finalized_at.max(axis=1), result.forwards - 1)
