"""Splash under the visibility rule, forward and backward: the chips' own compiler takes it, and the train step with it
(tests/test_training_attention.py has the values)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from aot.chips import SLICES, compiled, mesh
from test_planning import tiny_recipe

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import training_attention
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.planning.stages import stage
from cdlm_jax.visibility import Span

Shape = jax.ShapeDtypeStruct


def arguments(rows, seq_len, heads, kv_heads, head_dim, dtype="bfloat16", own=False, left_padding=False):
    keys, ends = Shape((rows, seq_len, kv_heads, head_dim), dtype), Shape((rows, seq_len), jnp.int32)
    seen = {"visible_end": ends}
    if own:
        seen["own"] = Span(ends, ends)
    if left_padding:
        seen["valid_start"] = Shape((rows,), jnp.int32)
    return (Shape((rows, seq_len, heads, head_dim), dtype), keys, keys), seen


def value_and_gradients(qkv, seen, **options):
    def total(q, k, v):
        return training_attention(q, k, v, **seen, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(total, (0, 1, 2))(*qkv)


DREAM, LLADA = (28, 4, 128), (32, 32, 128)
CASES = {
    "Dream": arguments(4, 768, *DREAM),
    "LLaDA": arguments(4, 768, *LLADA),
    "Dream, packed": arguments(4, 1024, *DREAM, own=True),
    "LLaDA, left padding": arguments(2, 700, *LLADA, left_padding=True),
    "Dream, long": arguments(1, 32768, *DREAM),
    "as many tiles as it takes": arguments(256, 1000, 4, 2, 128),
    "float32": arguments(2, 700, *LLADA, dtype="float32"),
    "three key heads of 64": arguments(8, 300, 9, 3, 64),
}


@pytest.mark.parametrize(
    ("chip", "case"),
    [
        pytest.param(chip, case, marks=() if (chip, case) == ("v5e", "Dream") else pytest.mark.slow)
        for chip in SLICES
        for case in (CASES if chip == "v5e" else ("Dream", "Dream, packed", "as many tiles as it takes"))
    ],
)
def test_splash_compiles(chip, case):
    """By default on a TPU: a kernel forward and two backward, and nothing of the size of a head's scores for all."""
    qkv, seen = CASES[case]
    rows, seq_len, heads, _ = qkv[0].shape
    with jax.set_mesh(mesh(chip)):
        program = compiled(value_and_gradients, qkv, seen)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert program.memory_analysis().temp_size_in_bytes < rows * heads * max(seq_len, 1024) * 128 * 32


def test_a_refusal_says_why():
    qkv, seen = arguments(4, 768, 8, 8, 96)
    with jax.set_mesh(mesh("v5e")):
        with pytest.raises(InputError, match="'splash' cannot run here: head_dim is 96"):
            jax.eval_shape(lambda *given: value_and_gradients(*given, implementation="splash"), qkv, seen)
        assert "splash" not in jax.jit(value_and_gradients).lower(qkv, seen).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "packed"])
@pytest.mark.parametrize("tensor", [1, 4])
def test_the_distillation_step_compiles_on_a_mesh(tensor, mode):
    """Of a small model with heads of 128, of which four devices of `tensor` share two key heads."""
    recipe = tiny_recipe(hidden_size=512, vocab_size=6144)
    changes = {"mode": mode, "consistency_scope": "same_block"} if mode == "packed" else {}
    recipe = dataclasses.replace(recipe, distill=dataclasses.replace(recipe.distill, **changes))
    with jax.set_mesh(mesh("v5e", MeshConfig(fsdp=4 // tensor, tensor=tensor))):
        text = stage("distill", recipe).lower().compile().as_text()
    calls = "\n".join(re.findall(r"%\S+ = .* custom-call\(.*", text))
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in calls
