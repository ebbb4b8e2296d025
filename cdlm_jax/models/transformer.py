"""One pre-norm Transformer for LLaDA, Dream and the tiny models; teacher and student differ in `visible_end` only.

Shape letters: S sequence, Q queries, d hidden_size, H heads, K kv_heads, D head_dim, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from cdlm_jax.config import ModelConfig
from cdlm_jax.kernels.block_attention import block_attention, training_attention
from cdlm_jax.mesh import sharding
from cdlm_jax.models.cache import KVCache
from cdlm_jax.visibility import Span


class Linear(nnx.Module):
    """x [..., in] -> [..., out], computed in x's dtype, plus a LoRA adapter when `models.lora` has attached one."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool = False, scale: float = 1.0, rngs: nnx.Rngs, dtype):
        std = scale * size_in**-0.5
        self.kernel = nnx.Param((std * jax.random.normal(rngs.params(), (size_in, size_out))).astype(dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros(size_out, dtype)) if bias else None)
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = sharding.matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if self.adapter is not None:
            y += self.adapter(x)
        return y


class RMSNorm(nnx.Module):
    """Statistics in float32, cast back, then times the weight (both upstreams do it in this order)."""

    def __init__(self, size: int, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotary(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles: [rows, S] -> two of [rows, S, 1, head_dim / 2], float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding in the half-split layout: x [rows, S, heads, D]."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Layer(nnx.Module):
    """One block of the stack, in two halves around the attention: every caller brings its own keys and values."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        d, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        residual = (2 * config.num_layers) ** -0.5
        make = {"rngs": rngs, "dtype": dtype}
        self.attention_norm = RMSNorm(d, config.norm_eps, dtype)
        self.q = Linear(d, heads * head_dim, bias=config.qkv_bias, **make)
        self.k = Linear(d, kv_heads * head_dim, bias=config.qkv_bias, **make)
        self.v = Linear(d, kv_heads * head_dim, bias=config.qkv_bias, **make)
        self.out = Linear(heads * head_dim, d, scale=residual, **make)
        self.mlp_norm = RMSNorm(d, config.norm_eps, dtype)
        self.gate = Linear(d, config.mlp_size, **make)
        self.up = Linear(d, config.mlp_size, **make)
        self.down = Linear(config.mlp_size, d, scale=residual, **make)
        self.head_dim = head_dim

    def project(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [rows, Q, d] -> rotated q [rows, Q, H, D], rotated k and plain v [rows, Q, K, D]."""
        normed = self.attention_norm(x)
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (self.q(normed), self.k(normed), self.v(normed))
        )
        return rotate(q, angles), rotate(k, angles), v

    def attention_out(self, attended: jax.Array) -> jax.Array:
        """The attention's result [rows, Q, H, D] -> what it adds to the stream, [rows, Q, d]."""
        with jax.named_scope("attention_out"):
            return self.out(attended.reshape(*attended.shape[:-2], -1))

    def mlp(self, x: jax.Array) -> jax.Array:
        """What the feed-forward half adds to the stream: [rows, Q, d] -> [rows, Q, d]."""
        with jax.named_scope("mlp"):
            normed = self.mlp_norm(x)
            return self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))

    def update(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x [rows, Q, d] and the attention's result [rows, Q, H, D] -> the layer's output [rows, Q, d]."""
        x += self.attention_out(attended)
        return x + self.mlp(x)


class Transformer(nnx.Module):
    """The model as a plain pytree of parameters: `jax.jit`, `jax.grad` and optax work on it as it is.

    Layers are stacked: every array under `layers` has a leading axis of `num_layers`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        embedding = 0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size))
        self.embed = nnx.Param(embedding.astype(dtype))

        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Layer(config, rngs=rngs, dtype=dtype)

        self.layers = stacked(rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.lm_head = nnx.data(None)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs, dtype=dtype)

    @property
    def head(self) -> jax.Array:
        """The lm_head's matrix [d, V]."""
        return self.embed[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] -> logits float32 [..., V]."""
        with jax.named_scope("unembed"):
            head = sharding.gathered(self.head, "fsdp")
            return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens [rows, S] int32 -> [rows, S, d]."""
        return sharding.lookup(self.embed[...], tokens)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        visible_end: jax.Array | None = None,
        valid_start: jax.Array | None = None,
        own: Span | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """Whole sequences without a cache: tokens [rows, S] int32 -> hidden [rows, S, d], final norm applied.

        Row i of the result is what the lm_head turns into logits row i (see `config.logit_alignment` for the token it
        predicts). positions [rows, S] default to 0..S-1; visible_end [rows, S] defaults to full bidirectional
        attention; valid_start [rows] hides left padding; `own` adds a range to what a position sees
        (`visibility.packed`). `remat` recomputes each layer in a backward pass.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        if visible_end is None:
            visible_end = jnp.full_like(tokens, tokens.shape[1], jnp.int32)
        angles = rotary(positions, self.config.head_dim, self.config.rope_theta)

        def step(x, layer):
            q, k, v = layer.project(x, angles)
            with jax.named_scope("attention"):
                attended = training_attention(q, k, v, visible_end=visible_end, valid_start=valid_start, own=own)
            return layer.update(x, attended), None

        step = jax.checkpoint(step) if remat else step
        x, _ = jax.lax.scan(step, self.embed_tokens(tokens), self.layers)
        return self.final_norm(x)

    def extend(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        start: jax.Array,
        visible_end: jax.Array,
        write: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Run Q tokens per row against the cache: tokens [rows, Q] at positions start[row] .. start[row] + Q - 1.

        Their keys and values are written to their own slots first, so the visibility rule needs nothing else: query i
        sees the slots j < visible_end[row, i]. `write` [rows, Q] False leaves a token's slot alone (the others then
        see what the cache holds there). Returns hidden [rows, Q, d] and the cache, its `length` unchanged.
        """
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        angles = rotary(positions, self.config.head_dim, self.config.rope_theta)
        # A position before 0 belongs to no slot; sent past the end, its write is dropped.
        keep = positions >= 0 if write is None else write & (positions >= 0)
        slots = jnp.where(keep, positions, cache.k.shape[2])

        def step(carry, layer_and_index):
            x, cache = carry
            layer, index = layer_and_index
            q, k, v = layer.project(x, angles)
            with jax.named_scope("cache_write"):
                cache = cache.write(index, k, v, slots)
            with jax.named_scope("attention"):
                attended = block_attention(q, cache.k, cache.v, layer=index, visible_end=visible_end)
            return (layer.update(x, attended), cache), None

        layers = (self.layers, jnp.arange(self.config.num_layers))
        (x, cache), _ = jax.lax.scan(step, (self.embed_tokens(tokens), cache), layers)
        return self.final_norm(x), cache
