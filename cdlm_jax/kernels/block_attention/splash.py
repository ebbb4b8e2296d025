"""Whole sequences on TPU, with gradients: JAX's splash attention under the visibility rule.

Splash computes a mask inside its kernels from one number of each query and the position of each key. `visible_end` is
such a number, so there is no mask in memory, and the numbers may be traced and differ from row to row:

- The rows of a batch lie behind each other in one sequence, [heads, rows * S, D]. (Under `vmap`, the prefetched
  scalars of each row make Pallas loop over the rows.) A query only ever meets the key tiles of its own row, as the
  prefetched table says which tiles a step fetches; those that no query of a tile sees are skipped.
- The key heads are not repeated: query head h reads key head h // (heads / kv_heads).

Source: jax.experimental.pallas.ops.tpu.splash_attention.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from cdlm_jax.kernels.block_attention.tiles import LANES
from cdlm_jax.visibility import Span

TILE = 512  # queries, and keys, of a tile at most: scores are float32 [TILE, TILE] in VMEM
SPAN_BITS = 10  # of a position, where a query's number holds three of them
SPAN_LENGTH = 2**SPAN_BITS
TABLE = 512  # rows of the table of tiles that fit the chips' scalar memory


def refusal(q: jax.Array, own: Span | None, rows: int) -> str | None:
    """Why splash cannot take q [..., S, H, D], `rows` of them on each device; None if it can."""
    seq_len, head_dim = q.shape[1], q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16 or float32"
    if head_dim not in (64, 128):
        return f"head_dim is {head_dim}, not 64 or 128"
    if own is not None and seq_len > SPAN_LENGTH:
        return f"rows with own have {seq_len} positions, more than {SPAN_LENGTH}"
    tiles = math.ceil(seq_len / TILE)
    if rows * tiles > TABLE:
        return f"{rows} rows of {seq_len} positions are {rows * tiles} tiles on a device, more than {TABLE}"
    return None


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    valid_start: jax.Array | None = None,
    own: Span | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Result [rows, S, H, D] for q [rows, S, H, D] and k, v [rows, S, K, D] on one device; the others as in `api`,
    with a row for each of q's."""
    rows, seq_len, heads, head_dim = q.shape
    tile, padded = _tiling(seq_len, own)
    scale = head_dim**-0.5 if scale is None else scale

    def along_sequence(x):
        """[rows, S, heads, D] -> [heads, rows * padded, D]"""
        x = jnp.pad(x, ((0, 0), (0, padded - seq_len), (0, 0), (0, 0)))
        return x.reshape(rows * padded, *x.shape[2:]).swapaxes(0, 1)

    def to_rows(x):
        return jnp.pad(x, ((0, 0), (0, padded - seq_len))).reshape(-1)

    end = jnp.clip(visible_end, 0, seq_len)
    numbers = to_rows(end if own is None else _with_span(end, own))
    if own is None:
        numbers += jnp.repeat(jnp.arange(rows, dtype=jnp.int32) * padded, padded)
    active = _active(end, valid_start, own, tile, padded)
    by_query = _tiles(active, numbers)
    sizes = splash.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
    )
    kernel = splash.SplashAttentionKernel(
        by_query,
        by_query,
        _tiles(active, numbers, of_keys=True),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_before_end if own is None else _before_end_or_in_span,
        interpret=interpret,
    )
    segments = None
    if valid_start is not None:
        valid = (jnp.arange(seq_len) >= valid_start[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.ones_like(numbers), kv=to_rows(valid))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    out = cast(jax.Array, kernel(along_sequence(q), along_sequence(k), along_sequence(v), segments))
    return out.swapaxes(0, 1).reshape(rows, padded, heads, head_dim)[:, :seq_len]


# ---- what a query sees, from its number and the place of a key in the whole sequence --------------------------------


def _before_end(number, key):
    """number: the end of what it sees."""
    return key < number


def _before_end_or_in_span(number, key):
    """number: visible_end and the first and last position of `own`, in the row (`_with_span`)."""
    key &= SPAN_LENGTH - 1
    first, last = (number >> SPAN_BITS) & (SPAN_LENGTH - 1), number & (SPAN_LENGTH - 1)
    return (key < number >> 2 * SPAN_BITS) | ((key >= first) & (key <= last))


def _with_span(end: jax.Array, own: Span) -> jax.Array:
    """[rows, S] each. An empty span becomes one that ends before it starts."""
    empty = own.start >= own.end
    first, last = jnp.where(empty, 1, own.start), jnp.where(empty, 0, own.end - 1)
    return (end << 2 * SPAN_BITS) | (first << SPAN_BITS) | last


# ---- tiles ---------------------------------------------------------------------------------------------------------


def _tiling(seq_len: int, own: Span | None) -> tuple[int, int]:
    """(length of a tile, of a padded row): tiles of nearly TILE with little padding."""
    if own is not None:
        return min(TILE, SPAN_LENGTH), SPAN_LENGTH
    count = math.ceil(seq_len / TILE)
    tile = math.ceil(seq_len / count / LANES) * LANES
    return tile, count * tile


def _active(end: jax.Array, valid_start: jax.Array | None, own: Span | None, tile: int, padded: int) -> jax.Array:
    """Which tiles of keys any query of a tile sees: [rows, tiles of queries, tiles of keys]. Queries that see nothing
    are given the first one, which makes their result finite."""
    first = jnp.arange(0, padded, tile)
    sees = end[..., None] > first
    if own is not None:
        start, stop = (x[..., None] for x in own)
        sees |= (start < stop) & (start < first + tile) & (stop > first)
    if valid_start is not None:
        sees &= first + tile > valid_start[:, None, None]
    sees = jnp.pad(sees, ((0, 0), (0, padded - end.shape[1]), (0, 0)))
    active = sees.reshape(end.shape[0], len(first), tile, len(first)).any(axis=2)
    return active | ((first == 0) & ~active.any(axis=-1, keepdims=True))


def _tiles(active: jax.Array, numbers: jax.Array, of_keys: bool = False) -> MaskInfo:
    """What splash prefetches: for each tile of queries, the tiles of keys of its row (of_keys: the other way round),
    and which of them to skip. A skipped one is not fetched: the first that is not stands in its place."""
    rows, count, _ = active.shape
    axis = 1 if of_keys else 2
    index = jax.lax.broadcasted_iota(jnp.int32, active.shape, axis)
    fetched = jnp.where(active, index, active.argmax(axis=axis, keepdims=True).astype(jnp.int32))
    fetched += count * jnp.arange(rows, dtype=jnp.int32)[:, None, None]

    def arranged(x):
        return x.swapaxes(0, 1).reshape(1, count, rows * count) if of_keys else x.reshape(1, rows * count, count)

    return MaskInfo(
        data_next=arranged(fetched),
        mask_next=None,
        block_mask=arranged(active.astype(jnp.int32)),
        partial_mask_blocks=None,
        q_sequence=numbers,  # type: ignore[arg-type]  # traced, which its annotation does not know
    )
