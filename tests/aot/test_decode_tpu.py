"""The student's whole decoder at the published models' sizes, with the kernel inside, compiled for TPUs."""

import re

import jax
import jax.numpy as jnp
import pytest
from aot.chips import compiled, mesh

from cdlm_jax import sharding
from cdlm_jax.config import ModelConfig
from cdlm_jax.decoding import cdlm
from cdlm_jax.models.hf import abstract
from cdlm_jax.sharding import MeshConfig

# Sizes of Dream-7B and LLaDA-8B as their config.json files give them.
DREAM = ModelConfig(
    family="dream",
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    mlp_size=18944,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    logit_alignment="shifted",
    mask_token_id=151666,
    eos_token_id=151643,
    pad_token_id=151643,
    max_length=131072,
)
LLADA = ModelConfig(
    family="llada",
    vocab_size=126464,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    mlp_size=12288,
    rope_theta=5e5,
    norm_eps=1e-5,
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
    max_length=4096,
)
ROWS, PROMPT, LENGTH, BLOCK = 8, 768, 256, 32
KERNELS = 3  # prefill, refine, commit_and_refine


def decoder(model: ModelConfig):
    """`cdlm.generate` in bfloat16, compiled for the current mesh."""
    weights = abstract(model, jnp.bfloat16)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for x, place in zip(jax.tree.leaves(weights), sharding.parameter_shardings(weights), strict=True)
    ]
    weights = jax.tree.unflatten(jax.tree.structure(weights), placed)
    rows = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec("rows"))
    prompts = jax.ShapeDtypeStruct((ROWS, PROMPT), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=rows)
    config = cdlm.Config(gen_length=LENGTH, block_size=BLOCK)
    return compiled(lambda *inputs: cdlm.generate(*inputs, config), weights, prompts, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("model", [DREAM, LLADA], ids=["Dream", "LLaDA"])
def test_the_decoder_compiles_with_the_kernel_inside(chip, model):
    over = MeshConfig(fsdp=1, tensor=4)
    with jax.set_mesh(mesh(chip, over)):
        program = decoder(model)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == KERNELS
    # The cache stays where it is: neither is a layer of it cut out nor the whole of it copied in front of a kernel.
    slots, kv_heads = PROMPT + LENGTH, model.num_kv_heads // over.tensor
    cache = 2 * model.num_layers * ROWS * slots * kv_heads * model.head_dim * 2  # bytes, keys and values
    copies = re.findall(rf"= bf16\[(?:{model.num_layers}|1),{ROWS},{slots},\S* (?:copy|dynamic-slice)\(", text)
    print(copies, program.memory_analysis().temp_size_in_bytes / cache)
    assert not copies
    assert program.memory_analysis().temp_size_in_bytes < 2 * cache
