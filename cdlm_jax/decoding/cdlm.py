"""The student's decoder: block by block against the exact cache (CDLM section 4).

prefill   the prompt's keys and values enter the cache
refine    a forward over the current block; sure tokens are finalized
commit    a forward over a finished block, whose keys and values (of final tokens now) enter the cache;
          merged with the next block's first refine, or on its own
"""

import dataclasses
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from cdlm_jax.decoding.common import (
    DecodeResult,
    Progress,
    check_blocks,
    check_policy,
    check_request,
    predict,
    step_keys,
    take_rows,
)
from cdlm_jax.decoding.unmask import Threshold, Unmask
from cdlm_jax.models.cache import KVCache
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.visibility import visible_end_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """gen_length must be a multiple of block_size, which must be the one the student was trained with.

    unmask: which positions a forward finalizes.
    early_stop: end a row after the block that holds its first EOS.
    merge_commit: commit a block in the forward that first refines the next one (2 * block_size tokens wide) instead
        of in a forward of its own: one forward less for every block but the last, with the same tokens.
    """

    gen_length: int
    block_size: int
    unmask: Unmask = Threshold(0.9)
    temperature: float = 0.0
    early_stop: bool = True
    merge_commit: bool = True

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        check_policy(self.unmask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The loop's carry. pending: bool [rows], the block before the current one still has to be committed.

    before: [rows, d], the hidden row just before the current block, which predicts its first token in `shifted` models.
    It cannot see the block, so it is computed once.
    """

    progress: Progress
    cache: KVCache
    pending: jax.Array
    before: jax.Array


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    One compiled program per (shape, config), without a host round trip; usable inside a caller's own `jax.jit`. A
    row's tokens do not depend on the other rows. `key` (one, or one per row) is needed at temperature > 0.
    Raises InputError for requests that cannot be decoded.
    """
    check_request(model.config, prompts, prompt_lengths, config.gen_length, config.temperature, key)
    return _generate(model, prompts, prompt_lengths, key, config)


@partial(jax.jit, static_argnames="config")
def _generate(model, prompts, prompt_lengths, key, config: Config) -> DecodeResult:
    step = partial(decode_step, model, prompt_lengths, key, config)
    state = prefill(model, prompts, prompt_lengths, config)
    state = jax.lax.while_loop(lambda state: ~state.progress.done.all(), step, state)
    return state.progress.result(model.config.eos_token_id)


def prefill(model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config) -> State:
    """Every row's prompt into the cache; nothing is decoded yet."""
    rows, prompt_size = prompts.shape
    cache = KVCache.create(model.config, rows, prompt_size + config.gen_length, model.embed[...].dtype)
    end = jnp.broadcast_to(prompt_lengths[:, None], prompts.shape)
    with jax.named_scope("prefill"):
        hidden, cache = model.extend(prompts, cache, start=jnp.zeros_like(prompt_lengths), visible_end=end)
    return State(
        progress=Progress.start(rows, config.gen_length, model.config.mask_token_id),
        cache=cache.commit(prompt_lengths),
        pending=jnp.zeros(rows, bool),
        before=take_rows(hidden, prompt_lengths - 1, 1)[:, 0],
    )


def decode_step(
    model: Transformer, prompt_lengths: jax.Array, key: jax.Array | None, config: Config, state: State
) -> State:
    """One forward of the whole batch: each row refines its current block, and commits what it has to."""
    size = config.block_size
    start = prompt_lengths + state.progress.block * size
    masked = state.progress.masked(size)
    if config.merge_commit:
        merged, refined = partial(merged_forward, model, start, size), partial(refine, model, start, size)
        hidden, state = jax.lax.cond((state.pending & ~state.progress.done).any(), merged, refined, state)
    else:
        hidden, state = refine(model, start, size, state)
        state = commit(state, ~masked.any(axis=1), start + size, hidden)

    progress = state.progress
    if model.config.logit_alignment == "shifted":
        hidden = jnp.concatenate([state.before[:, None], hidden[:, :-1]], axis=1)
    keys = step_keys(key, progress) if config.temperature > 0 else None
    candidates = predict(model, hidden, keys, config.temperature)
    progress = progress.finalize(candidates.token, config.unmask(candidates, masked, progress.step))

    # A finished block is left at once when its commit is merged into the next forward, else after its own commit.
    complete = ~(progress.masked(size) if config.merge_commit else masked).any(axis=1)
    progress = progress.advance(complete, size, model.config.eos_token_id if config.early_stop else None)
    return replace(state, progress=progress, pending=complete & config.merge_commit)


def refine(model: Transformer, start: jax.Array, size: int, state: State) -> tuple[jax.Array, State]:
    """The current block against the cache: hidden [rows, B, d]. Its own keys and values are scratch."""
    tokens = state.progress.block_tokens(size)
    end = jnp.broadcast_to((start + size)[:, None], tokens.shape)
    with jax.named_scope("refine"):
        hidden, cache = model.extend(tokens, state.cache, start=start, visible_end=end)
    return hidden, replace(state, cache=cache)


def commit(state: State, rows: jax.Array, end: jax.Array, hidden: jax.Array) -> State:
    """Declare the block just run (hidden [rows, B, d], up to slot `end`) final in the given rows (bool [rows])."""
    return replace(
        state,
        cache=state.cache.commit(jnp.where(rows, end, state.cache.length)),
        before=jnp.where(rows[:, None], hidden[:, -1], state.before),
    )


def merged_forward(model: Transformer, start: jax.Array, size: int, state: State) -> tuple[jax.Array, State]:
    """Commit the block before and refine the current one in one 2B-wide forward: the latter's hidden [rows, B, d].

    Rows with nothing to commit run along; what they compute for the block before is dropped.
    """
    progress = state.progress
    tokens = jnp.concatenate([progress.block_tokens(size, offset=-1), progress.block_tokens(size)], axis=1)
    positions = start[:, None] - size + jnp.arange(2 * size)
    end = visible_end_at(positions, start, size)
    write = state.pending[:, None] | (jnp.arange(2 * size) >= size)
    with jax.named_scope("commit_and_refine"):
        hidden, cache = model.extend(tokens, state.cache, start=start - size, visible_end=end, write=write)
    return hidden[:, size:], commit(replace(state, cache=cache), state.pending, start, hidden[:, :size])
