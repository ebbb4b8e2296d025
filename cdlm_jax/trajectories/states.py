"""Training states rebuilt from a trajectory's final tokens and finalization order (method.md section 3).

A trajectory finalizes exactly one token per step, blocks left to right, so `order` [rows, L] (the step 0..L-1 at which
each position got its token) holds every intermediate state: after k steps, the positions with order < k show their
final token and the others the mask. State k lies in block k // block_size, the one its next step works on.

A block alone, its order counted from 0, is a trajectory of L = block_size as well (`training/packed.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError

SCOPES = ("later_blocks", "same_block")
MIN_MASK_PROBABILITY = 1e-3


class State(NamedTuple):
    """A pair of states (y, y*) of one trajectory and the sets the losses average over; all [rows, L]."""

    tokens: jax.Array  # int32, y: the state the student predicts from
    completed: jax.Array  # int32, y*: a later state, by default y's current block fully revealed
    newly: jax.Array  # bool, U: masked in y, revealed in y* (distillation)
    remaining: jax.Array  # bool, S: still masked in y* (consistency)


class MaskedResponse(NamedTuple):
    """A partly masked ground-truth response."""

    tokens: jax.Array  # int32 [rows, L], y_hat_t
    masked: jax.Array  # bool [rows, L]
    t: jax.Array  # float32 [rows], the probability with which each position was masked


def state_at(
    tokens: jax.Array,
    order: jax.Array,
    step: jax.Array,
    later_step: jax.Array | None = None,
    *,
    block_size: int,
    mask_token_id: int,
) -> State:
    """The state after `step` finalized tokens, beside its block completion or another later state of its block.

    Args:
      tokens: int32 [rows, L], the final tokens.
      order: int32 [rows, L], the step at which each position was finalized: a permutation of 0..L-1, block by block.
      step: int32 [rows], in 0..L-1.
      later_step: None for y* = block completion and S = all later blocks (`later_blocks`); otherwise int32 [rows], in
        step+1..end of the block, for y* = that state and S = the masks it leaves in the same block (`same_block`).

    Raises:
      InputError: L is not a multiple of block_size.
    """
    _check_blocks(order, block_size)
    end = _block_end(step, block_size)
    step, later, end = step[:, None], (end if later_step is None else later_step)[:, None], end[:, None]
    masked_later = order >= later
    return State(
        tokens=jnp.where(order < step, tokens, mask_token_id),
        completed=jnp.where(masked_later, mask_token_id, tokens),
        newly=(order >= step) & ~masked_later,
        remaining=masked_later if later_step is None else masked_later & (order < end),
    )


def sample_states(
    tokens: jax.Array,
    order: jax.Array,
    keys: jax.Array,
    *,
    block_size: int,
    mask_token_id: int,
    scope: str = "later_blocks",
) -> State:
    """One state per row, its step uniform over the L non-final ones (0..L-1 tokens finalized).

    Args:
      tokens, order: as in `state_at`.
      keys: one random key per row, such as jax.random.split(key, rows): a row's draw depends on its own key alone, so
        a batch may be split into micro-batches together with its keys.
      scope: "later_blocks" (y* is block completion, S the later blocks) or "same_block" (y* is uniform over the later
        states of the same block, its completion included, where S is empty).

    Raises:
      InputError: unknown scope, or L is not a multiple of block_size.
    """
    if scope not in SCOPES:
        raise InputError(f"consistency scope {scope!r} is unknown; allowed: {', '.join(SCOPES)}")
    _check_blocks(order, block_size)

    def draw(key):
        step_key, later_key = jax.random.split(key)
        step = jax.random.randint(step_key, (), 0, order.shape[1])
        return step, jax.random.randint(later_key, (), step + 1, _block_end(step, block_size) + 1)

    step, later_step = jax.vmap(draw)(keys)  # [rows] each
    if scope == "later_blocks":
        later_step = None
    return state_at(tokens, order, step, later_step, block_size=block_size, mask_token_id=mask_token_id)


def masked_response(targets: jax.Array, keys: jax.Array, *, mask_token_id: int) -> MaskedResponse:
    """Masks each position of the ground-truth response independently with probability t ~ U(0, 1], one t per row.

    Args:
      targets: int32 [rows, L], truncated or EOS-padded to L.
      keys: one random key per row; not the keys given to `sample_states`, or the two draws would be correlated.

    Returns:
      MaskedResponse; t is at least MIN_MASK_PROBABILITY, since the loss divides by it.
    """

    def draw(key):
        t_key, mask_key = jax.random.split(key)
        t = jnp.maximum(1 - jax.random.uniform(t_key), MIN_MASK_PROBABILITY)
        return t, jax.random.uniform(mask_key, targets.shape[1:]) < t

    t, masked = jax.vmap(draw)(keys)
    return MaskedResponse(jnp.where(masked, mask_token_id, targets), masked, t)


def _block_end(step, block_size):
    return (step // block_size + 1) * block_size


def _check_blocks(order, block_size):
    if block_size < 1 or order.shape[1] % block_size:
        raise InputError(f"{order.shape[1]} response positions are not a multiple of block_size {block_size}")
