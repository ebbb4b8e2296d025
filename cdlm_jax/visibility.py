"""The one visibility rule (docs/method.md): position i of a row sees exactly the positions j < visible_end(i).

The training mask, the exact cache, the prefill, the cached block step and the kernels are this rule on other ranges.
"""

import jax
import jax.numpy as jnp


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


def dense_mask(visible_end: jax.Array, num_keys: int, valid_start: jax.Array | None = None) -> jax.Array:
    """The rule as a boolean mask for the reference path: [rows, Q] -> [rows, Q, num_keys], True where seen.

    `valid_start` [rows] hides the keys before it (left padding).
    """
    keys = jnp.arange(num_keys)
    mask = keys < visible_end[..., None]
    if valid_start is not None:
        mask &= keys >= valid_start[:, None, None]
    return mask
