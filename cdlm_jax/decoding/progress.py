"""Where every row of a batch stands, and the loop that all decoders run: forward, decide, finalize, advance."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from cdlm_jax.mesh.sharding import by_rows


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where every row of a batch stands. Rows are independent: each has its own block, and its own count of forwards.

    response, finalized_at: [rows, L] as in DecodeResult, with the mask token and -1 where nothing is finalized yet;
    block: [rows] the current block; step: [rows] forwards spent on it; forwards: [rows]; done: bool [rows].
    """

    response: jax.Array
    finalized_at: jax.Array
    block: jax.Array
    step: jax.Array
    forwards: jax.Array
    done: jax.Array

    @classmethod
    def start(cls, rows: int, gen_length: int, mask_token_id: int) -> "Progress":
        zeros = by_rows(jnp.zeros(rows, jnp.int32))
        unset = by_rows(jnp.full((rows, gen_length), -1, jnp.int32))
        return cls(jnp.full_like(unset, mask_token_id), unset, zeros, zeros, zeros, jnp.zeros_like(zeros, bool))

    def block_tokens(self, size: int, offset: int = 0) -> jax.Array:
        """Tokens of the block `offset` after the current one: [rows, size]."""
        return take_rows(self.response, (self.block + offset) * size, size)

    def masked(self, size: int) -> jax.Array:
        """True where the current block has nothing finalized yet: bool [rows, size]."""
        return take_rows(self.finalized_at, self.block * size, size) < 0

    def finalize(self, tokens: jax.Array, select: jax.Array) -> "Progress":
        """Count one forward of the rows not done, and set the selected tokens [rows, B] of their current block."""
        size = tokens.shape[1]
        at = jnp.arange(self.response.shape[1]) - (self.block * size)[:, None]  # [rows, L] place inside the block
        inside = jnp.clip(at, 0, size - 1)
        chosen = (at == inside) & jnp.take_along_axis(select, inside, axis=1)
        active = ~self.done
        return replace(
            self,
            response=jnp.where(chosen, jnp.take_along_axis(tokens, inside, axis=1), self.response),
            finalized_at=jnp.where(chosen, self.forwards[:, None], self.finalized_at),
            forwards=self.forwards + active,
            step=self.step + active,
        )

    def advance(self, ready: jax.Array, size: int, stop_token_id: int | None) -> "Progress":
        """Send the rows in `ready` [rows] on to their next block, and mark those done that have none.

        With a `stop_token_id` (EOS), a row is also done after the first block that holds it.
        """
        complete = ~self.masked(size).any(axis=1)
        stop = self.block == self.response.shape[1] // size - 1
        if stop_token_id is not None:
            stop |= (self.block_tokens(size) == stop_token_id).any(axis=1)
        done = self.done | (complete & stop)
        onward = ready & ~done
        return replace(self, done=done, block=self.block + onward, step=jnp.where(onward, 0, self.step))

    def result(self, eos_token_id: int) -> DecodeResult:
        lengths = response_lengths(self.response, eos_token_id)
        after = jnp.arange(self.response.shape[1]) > lengths[:, None]
        tokens = jnp.where(after, eos_token_id, self.response)
        return DecodeResult(tokens, lengths, self.forwards, self.finalized_at)


# forward(progress, carry) -> (hidden rows that predict the current block [rows, B, d], carry)
Forward = Callable[[Progress, Any], tuple[jax.Array, Any]]
# decide(progress, hidden) -> (tokens [rows, B], which of them to finalize: bool [rows, B])
Decide = Callable[[Progress, jax.Array], tuple[jax.Array, jax.Array]]


def block_step(
    state: tuple[Progress, Any],
    forward: Forward,
    decide: Decide,
    *,
    size: int,
    stop_token_id: int | None = None,
    hold: bool = False,
) -> tuple[Progress, Any]:
    """One forward of the whole batch. state: the progress, and what else a decoder carries.

    A row enters its next block as soon as its block is complete; with `hold` only after one more forward (a commit).
    """
    progress, carry = state
    hidden, carry = forward(progress, carry)
    was_masked = progress.masked(size)
    progress = progress.finalize(*decide(progress, hidden))
    left = was_masked if hold else progress.masked(size)
    return progress.advance(~left.any(axis=1), size, stop_token_id), carry


def until_done(step: Callable, state: tuple[Progress, Any]) -> tuple[Progress, Any]:
    """The decode loop: steps until every row is done."""
    return jax.lax.while_loop(lambda state: ~state[0].done.all(), step, state)


def switch(index: jax.Array, forwards: Sequence[Forward], progress: Progress, carry: Any) -> tuple[jax.Array, Any]:
    """`forwards[index](progress, carry)`, index a scalar: a `lax.switch` that leaves the cache where it is.

    XLA copies what the branches of a conditional change, while a loop changes what it carries in place: here every
    forward is in a loop of its own, of which one runs, one round. The planner knows these loops by their scope's name.
    """
    index = jnp.clip(jnp.asarray(index, jnp.int32), 0, len(forwards) - 1)
    hidden = jnp.zeros_like(jax.eval_shape(forwards[0], progress, carry)[0])
    for i, forward in enumerate(forwards):
        once = lambda s, forward=forward: (jnp.zeros_like(s[0]), *forward(progress, s[2]))  # noqa: E731
        with jax.named_scope("switch"):
            _, hidden, carry = jax.lax.while_loop(lambda s: s[0], once, (index == i, hidden, carry))
    return hidden, carry


# ---- rows ----------------------------------------------------------------------------------------------------------


def take_at(values: jax.Array, at: jax.Array) -> jax.Array:
    """values [rows, S, ...] at positions at [rows, Q], clipped to the row: [rows, Q, ...]."""
    at = jnp.clip(at, 0, values.shape[1] - 1)
    return jnp.take_along_axis(values, at.reshape(at.shape + (1,) * (values.ndim - 2)), axis=1)


def take_rows(values: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """values [rows, S, ...] from start[row] on: [rows, length, ...]; positions are clipped to the row."""
    return take_at(values, start[:, None] + jnp.arange(length))


def response_lengths(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """Tokens before the first EOS: [rows, L] -> [rows] int32."""
    is_eos = tokens == eos_token_id
    return jnp.where(is_eos.any(axis=1), jnp.argmax(is_eos, axis=1), tokens.shape[1]).astype(jnp.int32)
