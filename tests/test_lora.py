"""LoRA: fresh adapters change nothing, merged adapters change nothing more, and only they are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINY

from cdlm_jax.config import InputError
from cdlm_jax.models.lora import TARGETS, LoRAParam, attach, merge
from cdlm_jax.models.transformer import Transformer

CONFIG = TINY
TOKENS = jnp.arange(12).reshape(2, 6)


def base(dtype=jnp.float32):
    return Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)


def trained(model):
    """The adapted model with random b, as if it had been trained."""
    graph, lora, rest = nnx.split(model, LoRAParam, ...)
    keys = iter(jax.random.split(jax.random.key(9), len(jax.tree.leaves(lora))))
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), lora), rest)


def eager_logits(model):
    return model.unembed(model(TOKENS))


logits = jax.jit(eager_logits, compiler_options={"xla_backend_optimization_level": 0})  # compiled in half the time


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_a_fresh_adapter_adds_nothing(dtype):
    model = base(dtype)
    adapted = attach(model, rank=3, alpha=6.0, key=jax.random.key(1))
    np.testing.assert_array_equal(logits(model), logits(adapted))
    np.testing.assert_array_equal(logits(model), logits(merge(adapted)))


def test_merged_equals_adapted():
    adapted = trained(attach(base(), rank=3, alpha=6.0, key=jax.random.key(1)))
    assert np.abs(logits(adapted) - logits(base())).max() > 0.1
    np.testing.assert_allclose(logits(merge(adapted)), logits(adapted), atol=2e-5, rtol=1e-5)


def test_merge_rounds_the_float32_sum_once():
    adapted = trained(attach(base(jnp.bfloat16), rank=3, alpha=6.0, key=jax.random.key(1)))
    linear, merged = adapted.layers.gate, merge(adapted).layers.gate
    a, b, kernel = (np.asarray(x[...], np.float64) for x in (linear.adapter.a, linear.adapter.b, linear.kernel))
    expected = kernel + 6.0 / 3 * a @ b
    assert merged.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(merged.kernel[...], np.float64), expected, rtol=2**-8)


def test_arguments_stay_as_they_were():
    model = base()
    leaves, structure = jax.tree.leaves(model), jax.tree.structure(model)
    adapted = attach(model, rank=3, alpha=6.0, key=jax.random.key(1))
    adapted_leaves, adapted_structure = jax.tree.leaves(adapted), jax.tree.structure(adapted)
    merged = merge(adapted)
    assert jax.tree.structure(model) == structure == jax.tree.structure(merged)
    assert jax.tree.structure(adapted) == adapted_structure != structure
    assert all(now is before for now, before in zip(jax.tree.leaves(model), leaves, strict=True))
    assert all(now is before for now, before in zip(jax.tree.leaves(adapted), adapted_leaves, strict=True))


def test_only_the_adapters_are_selected_and_shared_arrays_are_not_copied():
    model = base()
    adapted = attach(model, rank=3, alpha=6.0, key=jax.random.key(1))
    _, lora, rest = nnx.split(adapted, LoRAParam, ...)
    shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(lora)}
    assert set(shapes) == {f"layers/{name}/adapter/{ab}" for name in TARGETS for ab in "ab"}
    assert shapes["layers/down/adapter/a"] == (2, 24, 3)
    assert shapes["layers/down/adapter/b"] == (2, 3, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    assert {id(leaf) for leaf in jax.tree.leaves(rest)} == {id(leaf) for leaf in jax.tree.leaves(model)}


def test_every_adapter_has_a_gradient():
    graph, lora, rest = nnx.split(trained(attach(base(), rank=3, alpha=6.0, key=jax.random.key(1))), LoRAParam, ...)
    gradients = jax.jit(jax.grad(lambda lora: jnp.square(eager_logits(nnx.merge(graph, lora, rest))).mean()))(lora)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, path


def test_adapters_differ_between_layers_and_keys():
    first = attach(base(), rank=3, alpha=6.0, key=jax.random.key(1)).layers
    second = attach(base(), rank=3, alpha=6.0, key=jax.random.key(2)).layers
    assert not np.array_equal(first.q.adapter.a[0], first.q.adapter.a[1])
    assert not np.array_equal(first.q.adapter.a[...], first.k.adapter.a[...])
    assert not np.array_equal(first.q.adapter.a[...], second.q.adapter.a[...])


def test_refusals():
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        attach(base(), rank=0, alpha=1.0, key=jax.random.key(1))
    adapted = attach(base(), rank=1, alpha=1.0, key=jax.random.key(1))
    with pytest.raises(InputError, match="has LoRA adapters already"):
        attach(adapted, rank=1, alpha=1.0, key=jax.random.key(1))
