"""Block attention on XLA: `jax.nn.dot_product_attention` under the visibility rule as a dense mask."""

import math

import jax
import jax.numpy as jnp

from cdlm_jax import sharding
from cdlm_jax.kernels.block_attention import reference
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
    scale: float | None = None,
) -> jax.Array:
    """Arguments as in `api`. Unseen keys and values are multiplied by 0, so they must be finite."""
    k, v = (like_queries(reference.dense(x, layer, None, None, q.dtype), q) for x in (k, v))
    mask = dense_mask(visible_end, k.shape[1], valid_start, own)  # [rows, Q, S]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="xla")


def like_queries(x: jax.Array, q: jax.Array) -> jax.Array:
    """Key heads (the axis before the last) that are whole on every device, where query heads are split over them: each
    device takes those that its query heads use, which repeats some of them."""
    axis = x.ndim - 2
    over = sharding.pieces(q, 2)
    if over == sharding.pieces(x, axis):
        return x
    repeats = math.lcm(over, x.shape[axis]) // x.shape[axis]
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = jax.typeof(q).sharding.spec[2]
    return jax.reshard(jnp.repeat(x, repeats, axis=axis), jax.P(*spec))
