"""What every decoder and every loss shares: where the response lies in a row, and which hidden row predicts what."""

import dataclasses

import jax
import jax.numpy as jnp

from cdlm_jax.config import LogitAlignment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """A decoded batch.

    tokens: [rows, gen_length] int32; everything after the first EOS is EOS.
    lengths: [rows] int32, tokens before the first EOS.
    forwards: [rows] int32, forward passes of that row after the prefill: a refine or a merged pass counts one, a
        separate commit one. The prefill of the prompt is not counted.
    finalized_at: [rows, gen_length] int32, the row's own forward (from 0) that finalized the position; -1 where
        nothing did because decoding stopped early.
    """

    tokens: jax.Array
    lengths: jax.Array
    forwards: jax.Array
    finalized_at: jax.Array


def append_response(prompts: jax.Array, prompt_lengths: jax.Array, response: jax.Array) -> jax.Array:
    """[rows, P_max], [rows], [rows, L] -> [rows, P_max + L]: each response begins right at its own prompt's end.

    What is left at the end of a row repeats its last response token: callers hide it by `visible_end`.
    """
    prompt_size, length = prompts.shape[1], response.shape[1]
    at = jnp.arange(prompt_size + length) - prompt_lengths[:, None]  # place inside the response, negative in the prompt
    placed = jnp.take_along_axis(response, jnp.clip(at, 0, length - 1), axis=1)
    padded = jnp.pad(prompts, ((0, 0), (0, length)))
    return jnp.where(at < 0, padded, placed)


def take_rows(values: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """values [rows, S, ...] from start[row] on: [rows, length, ...]; indices are clipped to the row."""
    at = jnp.clip(start[:, None] + jnp.arange(length), 0, values.shape[1] - 1)
    return jnp.take_along_axis(values, at.reshape(at.shape + (1,) * (values.ndim - 2)), axis=1)


def predicting_rows(hidden: jax.Array, start: jax.Array, length: int, alignment: LogitAlignment) -> jax.Array:
    """The hidden rows whose logits predict the tokens start[row] .. start[row] + length - 1.

    hidden [rows, S, d] of a whole sequence -> [rows, length, d]. `shifted` models (Dream) predict a token one row
    before its place.
    """
    return take_rows(hidden, start - (alignment == "shifted"), length)


def response_lengths(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """Tokens before the first EOS: [rows, L] -> [rows] int32."""
    is_eos = tokens == eos_token_id
    return jnp.where(is_eos.any(axis=1), jnp.argmax(is_eos, axis=1), tokens.shape[1]).astype(jnp.int32)


def fill_after_eos(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """Everything after the first EOS becomes EOS: [rows, L] -> [rows, L]."""
    after = jnp.arange(tokens.shape[1]) > response_lengths(tokens, eos_token_id)[:, None]
    return jnp.where(after, eos_token_id, tokens)
