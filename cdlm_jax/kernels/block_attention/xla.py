"""Block attention on XLA: `jax.nn.dot_product_attention` under the visibility rule as a dense mask."""

import jax

from cdlm_jax.kernels.block_attention import reference
from cdlm_jax.kernels.block_attention.mesh import like_queries
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
