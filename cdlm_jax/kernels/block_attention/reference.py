"""Block attention in plain jnp, which every implementation is tested against."""

import math

import jax
import jax.numpy as jnp

from cdlm_jax.visibility import Span, dense_mask


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    valid_start: jax.Array | None = None,
    own: Span | None = None,
    layer: jax.Array | None = None,
    kv_length: jax.Array | None = None,
    page_table: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Result [rows, Q, heads, D] in q's dtype and log-sum-exp float32 [rows, Q, heads]; arguments as in `api`.

    The softmax is in float32, and so are the products' sums. A query that sees no key has result 0, log-sum-exp -inf.
    """
    k = dense(k, layer, page_table, k_scale, q.dtype)
    v = dense(v, layer, page_table, v_scale, q.dtype)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    mask = dense_mask(limited(visible_end, kv_length), k.shape[1], valid_start, own)  # [rows, Q, S]
    v = jnp.where(mask.any(axis=1)[..., None, None], v, 0)  # what no query sees may be nan, and 0 * nan is nan
    mask = mask[:, None]  # [rows, 1, Q, S]
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    highest = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-math.inf)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.where(mask, jnp.exp(scores - highest), 0)
    total = weights.sum(axis=-1, keepdims=True)
    probabilities = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("rhqk,rkhd->rqhd", probabilities.astype(v.dtype), v)
    return out.astype(q.dtype), (jnp.log(total) + highest)[..., 0].swapaxes(1, 2)


def dense(x: jax.Array, layer, page_table, scale, dtype) -> jax.Array:
    """One layer's keys or values as [rows, S, kv_heads, D]: taken from the stack, put together from pages, and int8
    ones multiplied by their scales (in float32, then cast to dtype)."""
    if layer is not None:
        x, scale = x[layer], None if scale is None else scale[layer]
    if page_table is not None:
        x = x[page_table].reshape(page_table.shape[0], -1, *x.shape[2:])
        scale = None if scale is None else dense_scale(scale, page_table)
    return x if scale is None else (x * scale.swapaxes(1, 2)[..., None]).astype(dtype)


def dense_scale(scale: jax.Array, page_table: jax.Array) -> jax.Array:
    """Scales of pages [pages, kv_heads, page_size] -> [rows, kv_heads, S]."""
    found = jnp.moveaxis(scale[page_table], 2, 1)  # [rows, kv_heads, max_pages, page_size]
    return found.reshape(*found.shape[:2], -1)


def limited(visible_end: jax.Array, kv_length: jax.Array | None) -> jax.Array:
    """visible_end [rows, Q], where no query of a row sees past its kv_length [rows]."""
    return visible_end if kv_length is None else jnp.minimum(visible_end, kv_length[:, None])
