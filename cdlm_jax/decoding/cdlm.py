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

from cdlm_jax.decoding.common import check_blocks, check_policy, check_request, decide
from cdlm_jax.decoding.progress import DecodeResult, Progress, block_step, switch, take_rows, until_done
from cdlm_jax.decoding.unmask import Threshold, Unmask
from cdlm_jax.mesh.sharding import by_rows
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
class Carry:
    """The cache, and before: [rows, d], the hidden row just before the current block, which predicts its first token in
    `shifted` models. It cannot see the block, so it is computed once.
    """

    cache: KVCache
    before: jax.Array


State = tuple[Progress, Carry]


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
    prompts, prompt_lengths = by_rows((prompts, prompt_lengths))
    step = partial(decode_step, model, prompt_lengths, key, config)
    progress, _ = until_done(step, prefill(model, prompts, prompt_lengths, config))
    return progress.result(model.config.eos_token_id)


def prefill(model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config) -> State:
    """Every row's prompt into the cache; nothing is decoded yet."""
    rows, prompt_size = prompts.shape
    cache = KVCache.create(model.config, rows, prompt_size + config.gen_length, model.embed[...].dtype)
    end = jnp.broadcast_to(prompt_lengths[:, None], prompts.shape)
    with jax.named_scope("prefill"):
        hidden, cache = model.extend(prompts, cache, start=jnp.zeros_like(prompt_lengths), visible_end=end)
    progress = Progress.start(rows, config.gen_length, model.config.mask_id)
    return progress, Carry(cache.commit(prompt_lengths), take_rows(hidden, prompt_lengths - 1, 1)[:, 0])


def decode_step(
    model: Transformer, prompt_lengths: jax.Array, key: jax.Array | None, config: Config, state: State
) -> State:
    """One forward of the whole batch: each row refines its current block, and commits what it has to."""

    def forward(progress, carry):
        start = prompt_lengths + progress.block * config.block_size
        hidden, new = (merged if config.merge_commit else separate)(model, start, config.block_size, progress, carry)
        if model.config.logit_alignment == "shifted":
            hidden = jnp.concatenate([new.before[:, None], hidden[:, :-1]], axis=1)
        return hidden, new

    return block_step(
        state,
        forward,
        partial(decide, model, key, config.unmask, config.temperature),
        size=config.block_size,
        stop_token_id=model.config.eos_token_id if config.early_stop else None,
        hold=not config.merge_commit,
    )


def separate(model: Transformer, start: jax.Array, size: int, progress: Progress, carry: Carry):
    """Refine or, where the block is complete, commit it by the same forward over its final tokens."""
    hidden, carry = refine(model, start, size, progress, carry)
    return hidden, commit(carry, ~progress.masked(size).any(axis=1), start + size, hidden)


def merged(model: Transformer, start: jax.Array, size: int, progress: Progress, carry: Carry):
    """Refine; the rows that just entered a block commit the one before in the same, then twice as wide, forward."""
    pending = (progress.step == 0) & (progress.block > 0)
    narrow, wide = partial(refine, model, start, size), partial(commit_and_refine, model, start, size, pending)
    return switch(pending.any(), (narrow, wide), progress, carry)


def refine(model: Transformer, start: jax.Array, size: int, progress: Progress, carry: Carry):
    """The current block against the cache: hidden [rows, B, d]. Its own keys and values are scratch."""
    tokens = progress.block_tokens(size)
    end = jnp.broadcast_to((start + size)[:, None], tokens.shape)
    with jax.named_scope("refine"):
        hidden, cache = model.extend(tokens, carry.cache, start=start, visible_end=end)
    return hidden, replace(carry, cache=cache)


def commit(carry: Carry, rows: jax.Array, end: jax.Array, hidden: jax.Array) -> Carry:
    """Declare the block just run (hidden [rows, B, d], up to slot `end`) final in the given rows (bool [rows])."""
    return Carry(
        cache=carry.cache.commit(jnp.where(rows, end, carry.cache.length)),
        before=jnp.where(rows[:, None], hidden[:, -1], carry.before),
    )


def commit_and_refine(
    model: Transformer, start: jax.Array, size: int, pending: jax.Array, progress: Progress, carry: Carry
):
    """The block before and the current one in one 2B-wide forward: hidden [rows, B, d] of the latter.

    Rows with nothing to commit run along; what they compute for the block before is dropped.
    """
    tokens = jnp.concatenate([progress.block_tokens(size, offset=-1), progress.block_tokens(size)], axis=1)
    positions = start[:, None] - size + jnp.arange(2 * size)
    end = visible_end_at(positions, start, size)
    write = pending[:, None] | (jnp.arange(2 * size) >= size)
    with jax.named_scope("commit_and_refine"):
        hidden, cache = model.extend(tokens, carry.cache, start=start - size, visible_end=end, write=write)
    return hidden[:, size:], commit(replace(carry, cache=cache), pending, start, hidden[:, :size])
