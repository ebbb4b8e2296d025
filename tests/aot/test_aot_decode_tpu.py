"""The student's whole decoder at the published models' sizes, with the kernel inside, compiled for TPUs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from aot.chips import SLICES, compiled, kernels, mesh
from published import DREAM, LLADA

from cdlm_jax.config import ModelConfig
from cdlm_jax.decoding import cdlm
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.models.hf import abstract

ROWS, PROMPT, LENGTH, BLOCK = 8, 768, 256, 32


def decoder(model: ModelConfig, **options):
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
    config = cdlm.Config(gen_length=LENGTH, block_size=BLOCK, **options)
    return compiled(lambda *inputs: cdlm.generate(*inputs, config), weights, prompts, lengths)


def inside(forwards: int) -> list[str]:
    """The kernels of a decoder with so many forwards: each writes the cache and attends, one confidence serves all."""
    return ["block_attention"] * forwards + ["cache_write"] * forwards + ["vocab_statistics"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "model", "tensor"),
    [
        *(pytest.param(chip, DREAM, 2, id=f"{chip}-Dream") for chip in SLICES),
        pytest.param("v4", LLADA, 4, id="v4-LLaDA"),
    ],
)
def test_the_decoder_compiles_with_the_kernels_inside(chip, model, tensor):
    with jax.set_mesh(mesh(chip, MeshConfig(fsdp=4 // tensor, tensor=tensor))):
        text = decoder(model).as_text()
    assert kernels(text) == inside(forwards=3)  # prefill, refine, commit_and_refine


@pytest.mark.parametrize("merge_commit", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_cache_stays_where_it_is(merge_commit):
    """Neither is a layer cut out of the cache, nor the whole of it copied, in front of a kernel."""
    sizes = {"hidden_size": 512, "num_layers": 6, "num_heads": 4, "num_kv_heads": 4, "mlp_size": 512}
    ids = {"vocab_size": 1024, "mask_token_id": 5, "eos_token_id": 6, "pad_token_id": 6}
    with jax.set_mesh(mesh("v5e")):
        text = decoder(dataclasses.replace(LLADA, **sizes, **ids), merge_commit=merge_commit).as_text()
    assert kernels(text) == inside(forwards=3 if merge_commit else 2)
    assert f"bf16[6,{ROWS},{PROMPT + LENGTH},4,128]" in text
    assert not re.findall(rf"= bf16\[(?:6|1),{ROWS},{PROMPT + LENGTH},\S* (?:copy|dynamic-slice)\(", text)
