"""LoRA (arXiv 2106.09685): low-rank adapters on attention and MLP; embeddings and lm_head are left alone."""

import jax
import jax.numpy as jnp
from flax import nnx

from cdlm_jax.config import InputError
from cdlm_jax.mesh import sharding
from cdlm_jax.models.transformer import Linear, Transformer

TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


class LoRAParam(nnx.Param):
    """What LoRA trains: `nnx.split(model, LoRAParam, ...)` selects these leaves and no others."""


class Adapter(nnx.Module):
    """x [..., in] -> x a b * alpha / rank [..., out], in x's dtype.

    a: [layers, in, rank] float32, Gaussian; b: [layers, rank, out] float32, zero, so that a fresh adapter adds nothing.
    The scan over the layers takes the leading axis away before `__call__` sees them.
    """

    def __init__(self, kernel_shape: tuple[int, int, int], *, rank: int, alpha: float, key: jax.Array):
        layers, size_in, size_out = kernel_shape
        self.a = LoRAParam(size_in**-0.5 * jax.random.normal(key, (layers, size_in, rank), jnp.float32))
        self.b = LoRAParam(jnp.zeros((layers, rank, size_out), jnp.float32))
        self.scale = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = sharding.matmul(x, self.a[...].astype(x.dtype))
        return sharding.matmul(inner, self.b[...].astype(x.dtype)) * self.scale


def attach(model: Transformer, *, rank: int, alpha: float, key: jax.Array) -> Transformer:
    """A model with a fresh adapter on every target, sharing the arrays of `model`, which stays as it was.

    Its forward is that of `model` exactly until the adapters are trained. Raises InputError for rank < 1 and for a
    model that has adapters already.
    """
    if rank < 1:
        raise InputError(f"LoRA rank must be at least 1, got {rank}")
    model = _shallow_copy(model)
    for linear, adapter_key in zip(_targets(model), jax.random.split(key, len(TARGETS)), strict=True):
        if linear.adapter is not None:
            raise InputError("the model has LoRA adapters already; merge them first")
        layers, size_in, size_out = linear.kernel.shape
        linear.adapter = Adapter((layers, size_in, size_out), rank=rank, alpha=alpha, key=adapter_key)
    return sharding.shard(model)


def merge(model: Transformer) -> Transformer:
    """A model without adapters, their products added to the kernels; `model` stays as it was.

    The sum is formed in float32 and rounded once, to the kernel's dtype.
    """
    model = _shallow_copy(model)
    for linear in _targets(model):
        if linear.adapter is not None:
            linear.kernel = nnx.Param(_merged(linear.kernel[...], linear.adapter))
            linear.adapter = nnx.data(None)
    return model


@jax.jit
def _merged(kernel: jax.Array, adapter: Adapter) -> jax.Array:
    """kernel [layers, in, out] + scale a b, layer by layer so that only one is held in float32 at a time."""

    def one(layer):
        kernel, a, b = layer
        delta = adapter.scale * jnp.matmul(a, b, precision="highest")
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

    return jax.lax.map(one, (kernel, adapter.a[...], adapter.b[...]))


def _shallow_copy(model: Transformer) -> Transformer:
    """New modules around the same arrays."""
    return jax.tree.map(lambda leaf: leaf, model)


def _targets(model: Transformer) -> list[Linear]:
    return [getattr(model.layers, name) for name in TARGETS]
