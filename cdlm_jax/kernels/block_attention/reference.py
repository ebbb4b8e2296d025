"""Block attention on XLA: `jax.nn.dot_product_attention` under the visibility rule as a dense mask."""

import math

import jax
import jax.numpy as jnp

from cdlm_jax import sharding
from cdlm_jax.visibility import Span, dense_mask


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    valid_start: jax.Array | None = None,
    own: Span | None = None,
) -> jax.Array:
    """Attention in which query i of a row sees the keys j < visible_end[row, i] and those of its `own` range, without
    those before valid_start[row].

    q [rows, Q, heads, D]; k, v [rows, S, kv_heads, D], query head h using key head h // (heads / kv_heads);
    visible_end, own: [rows, Q] int32; valid_start [rows] int32. Scores are divided by sqrt(D); softmax in float32.
    Returns [rows, Q, heads, D] in q's dtype.
    """
    k, v = _like_queries(k, q), _like_queries(v, q)
    mask = dense_mask(visible_end, k.shape[1], valid_start, own)  # [rows, Q, S]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")


def _like_queries(x: jax.Array, q: jax.Array) -> jax.Array:
    """Key heads that are whole on every device, where query heads are split over them: each device takes those that its
    query heads use, which repeats some of them."""
    over = sharding.pieces(q, 2)
    if over == sharding.pieces(x, 2):
        return x
    repeats = math.lcm(over, x.shape[2]) // x.shape[2]
    return jax.reshard(jnp.repeat(x, repeats, axis=2), jax.typeof(q).sharding.spec)
