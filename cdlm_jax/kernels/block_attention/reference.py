"""Block attention on XLA: `jax.nn.dot_product_attention` under the visibility rule as a dense mask."""

import jax

from cdlm_jax.visibility import dense_mask


def block_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, visible_end: jax.Array, valid_start: jax.Array | None = None
) -> jax.Array:
    """Attention in which query i of a row sees the keys j < visible_end[row, i] (and j >= valid_start[row]).

    q [rows, Q, heads, D]; k, v [rows, S, kv_heads, D], query head h using key head h // (heads / kv_heads);
    visible_end [rows, Q] int32; valid_start [rows] int32. Scores are divided by sqrt(D); softmax in float32.
    Returns [rows, Q, heads, D] in q's dtype.
    """
    mask = dense_mask(visible_end, k.shape[1], valid_start)  # [rows, Q, S]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
