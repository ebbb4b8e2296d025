"""Attention of whole sequences to themselves, with gradients: the libraries' kernels under the visibility rule."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import splash, xla
from cdlm_jax.kernels.block_attention.mesh import per_device
from cdlm_jax.mesh import sharding
from cdlm_jax.visibility import Span

Implementation = Literal["splash", "xla"]


def training_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    valid_start: jax.Array | None = None,
    own: Span | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`block_attention` of all queries of a sequence to its keys, differentiable in q, k and v.

    Args:
      q: [rows, S, heads, D], bfloat16 or float32.
      k, v: [rows, S, kv_heads, D] in q's dtype. Query head h uses key head h // (heads / kv_heads).
      visible_end: int32 [rows, S], or [1, S] where all rows have the same: query i of a row sees the keys
        j < visible_end[row, i].
      valid_start: int32 [rows], the first visible key of each row (left padding).
      own: a second range of visible keys of each query (packed rows), [rows, S] or [1, S] each, within 0..S.
      scale: what scores are multiplied by; 1 / sqrt(D) if None.
      implementation: "splash" (JAX's kernels for TPU: no array of S x S) or "xla" (`jax.nn.dot_product_attention`);
        None is splash where there is a TPU and it takes these arguments, else "xla".

    Returns:
      [rows, S, heads, D] in q's dtype; softmax and sums are in float32. Of a query that sees no key it is finite and
      without meaning.

    Raises:
      InputError: shapes that do not fit, or an implementation that cannot run here, with the reason.
    """
    kv_heads = k.shape[2] if k.ndim == 4 else 1
    if q.ndim != 4 or not k.shape == v.shape == (*q.shape[:2], kv_heads, q.shape[3]) or q.shape[2] % kv_heads:
        raise InputError(
            "q must be [rows, S, heads, D] and k, v [rows, S, kv_heads, D], with kv_heads a divisor of heads, "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if visible_end.shape not in (q.shape[:2], (1, q.shape[1])):
        raise InputError(f"visible_end must be [rows, S] = {q.shape[:2]} (or one row for all), got {visible_end.shape}")
    if implementation not in (None, *get_args(Implementation)):
        raise InputError(f"unknown implementation {implementation!r} of training_attention, allowed: 'splash', 'xla'")
    reason = _refusal(q, own)
    if implementation == "splash" and reason:
        raise InputError(f"training_attention's implementation 'splash' cannot run here: {reason}; allowed: 'xla'")
    if implementation == "xla" or reason:
        return xla.block_attention(q, k, v, visible_end=visible_end, valid_start=valid_start, own=own, scale=scale)

    def every_row(x):
        return jnp.broadcast_to(x, q.shape[:2])

    options = {"visible_end": every_row(visible_end)}
    if valid_start is not None:
        options["valid_start"] = valid_start
    if own is not None:
        options["own"] = jax.tree.map(every_row, own)
    return per_device(
        lambda q, k, v, options: splash.block_attention(q, k, v, **options, scale=scale), q, k, v, options
    )


def _refusal(q: jax.Array, own: Span | None) -> str | None:
    """Why splash cannot run here; None if it can."""
    if (platform := sharding.device().platform) != "tpu":
        return f"the device is a {platform}"
    return splash.refusal(q, own, rows=q.shape[0] // sharding.pieces(q, 0))
