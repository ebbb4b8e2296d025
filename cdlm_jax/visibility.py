"""The one visibility rule (docs/method.md): position i of a row sees exactly the positions j < visible_end(i).

The training mask, the exact cache, the prefill, the cached block step and the kernels are this rule on other ranges.
Only a packed row (`packed`), which holds a response twice, needs a second range of visible positions beside it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Span(NamedTuple):
    """For each query the keys start <= j < end; both int32 [rows, Q], or [1, Q] where all rows have the same."""

    start: jax.Array
    end: jax.Array


def visible_end(prompt_lengths: jax.Array, seq_len: int, block_size: int | None) -> jax.Array:
    """First position that each position of each row cannot see: [rows] -> [rows, seq_len] int32.

    The prompt is one fully visible group; the response is cut into blocks of `block_size` that start at the prompt's
    end, and a block sees the prompt, all blocks before it and all of itself. `block_size=None` is a bidirectional
    teacher: everything is seen from everywhere. (CDLM section 3; the prompt group is our decision, it makes the prompt
    cache exact.)
    """
    if block_size is None:
        return jnp.full((prompt_lengths.shape[0], seq_len), seq_len, jnp.int32)
    return visible_end_at(jnp.arange(seq_len, dtype=jnp.int32)[None], prompt_lengths, block_size)


def visible_end_at(positions: jax.Array, prompt_lengths: jax.Array, block_size: int) -> jax.Array:
    """The block-causal rule at any positions: [rows, Q], [rows] -> [rows, Q] int32."""
    prompt = prompt_lengths[:, None].astype(jnp.int32)
    block = (positions - prompt) // block_size
    return jnp.where(positions < prompt, prompt, prompt + block_size * (block + 1))


def row_end(prompt_lengths: jax.Array, gen_length: int | jax.Array, seq_len: int) -> jax.Array:
    """A bidirectional teacher on ragged rows: every position sees its row's prompt and response, [rows, seq_len] int32.

    `visible_end(..., block_size=None)` is this for rows without padding.
    """
    end = (prompt_lengths + gen_length).astype(jnp.int32)
    return jnp.broadcast_to(end[:, None], (prompt_lengths.shape[0], seq_len))


class Packed(NamedTuple):
    """Where the tokens of packed rows belong and what they see; [rows, seq_len + L] each, `own` [1, seq_len + L]."""

    positions: jax.Array  # int32, of a noisy token that of the clean one
    visible_end: jax.Array  # int32
    own: Span  # of a noisy token its own block, of any other nothing


def packed(prompt_lengths: jax.Array, seq_len: int, gen_length: int, block_size: int) -> Packed:
    """Rows [prompt | clean response | padding | noisy response]: seq_len tokens under `visible_end`, then gen_length.

    A noisy block sees the prompt, the clean blocks before it and all of itself: what it would see if it stood in its
    clean block's place. So every noisy block is at once the last block of a row of its own. No clean token sees a noisy
    one. (The layout with which block diffusion is trained, BD3-LM, arXiv 2503.09573, section 3.2.)
    """
    index = jnp.arange(seq_len + gen_length, dtype=jnp.int32)[None]
    lengths, noisy = prompt_lengths[:, None].astype(jnp.int32), index >= seq_len
    positions = jnp.where(noisy, lengths + index - seq_len, index)
    end = visible_end_at(positions, prompt_lengths, block_size)
    own = jnp.where(noisy, index - (index - seq_len) % block_size, 0)
    return Packed(
        positions,
        visible_end=jnp.where(noisy, end - block_size, jnp.minimum(end, seq_len)),
        own=Span(own, jnp.where(noisy, own + block_size, 0)),
    )


def dense_mask(
    visible_end: jax.Array, num_keys: int, valid_start: jax.Array | None = None, own: Span | None = None
) -> jax.Array:
    """The rule as a boolean mask for the reference path: [rows, Q] -> [rows, Q, num_keys], True where seen.

    `own` adds a second range of visible keys; `valid_start` [rows] hides the keys before it (left padding).
    """
    keys = jnp.arange(num_keys)
    mask = keys < visible_end[..., None]
    if own is not None:
        mask |= (keys >= own.start[..., None]) & (keys < own.end[..., None])
    if valid_start is not None:
        mask &= keys >= valid_start[:, None, None]
    return mask
