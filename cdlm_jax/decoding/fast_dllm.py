"""Fast-dLLM (arXiv 2505.22618): parallel decoding of a bidirectional model, with caches that are only nearly exact.

The first forward of a block runs the whole sequence. `prefix` keeps the keys and values of what precedes the block,
and later forwards run the block and all that follows it; `dual` keeps all of them, and later forwards run the block
alone. What is kept was computed while later positions were still masked, so it is a little stale.

LLaDA and Dream have rules of their own upstream (`v1/llada/generate.py`, `v1/dream/model/generation_utils*.py`).
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError, LogitAlignment
from cdlm_jax.decoding.common import (
    append_response,
    check_blocks,
    check_request,
    check_steps,
    decide,
    full_forward,
    predicting_rows,
    steps_per_block,
)
from cdlm_jax.decoding.progress import DecodeResult, Progress, block_step, switch, take_rows, until_done
from cdlm_jax.decoding.unmask import Allowance, Factor, FirstThen, Quota, Threshold, Timesteps, Unmask
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.cache import KVCache
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.visibility import row_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a forward finalizes: every position of at least `threshold`, or as many as the `factor` rule allows, or a
    fixed share: `steps` forwards in all, None one token a forward. Always the best. The first two ignore `steps`.

    For `shifted` models (Dream) the rules are upstream's other ones: with a cache the first forward of a block sets its
    first token, whatever its confidence; without `threshold` the schedule is Dream's, by entropy; without a cache there
    are no blocks, and `steps` (None: one per block) deals out the positions that a step may look at.
    """

    gen_length: int
    block_size: int
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    cache: Literal["none", "prefix", "dual"] = "none"

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        check_steps(self.steps, self.gen_length, self.block_size)
        if self.threshold is not None and self.factor is not None:
            raise InputError(f"give either a threshold or a factor, got {self.threshold} and {self.factor}")
        if self.cache not in ("none", "prefix", "dual"):
            raise InputError(f"cache must be none, prefix or dual, got {self.cache!r}")
        self.policy("same_position")

    @property
    def block_steps(self) -> int | None:
        return steps_per_block(self.steps, self.gen_length, self.block_size)

    def size(self, alignment: LogitAlignment) -> int:
        """Positions that a forward decides about."""
        return self.gen_length if alignment == "shifted" and self.cache == "none" else self.block_size

    def policy(self, alignment: LogitAlignment) -> Unmask:
        if alignment == "shifted":
            return self._policy_of_dream()
        if self.threshold is not None:
            return Threshold(self.threshold, inclusive=True)
        return Quota(self.block_steps) if self.factor is None else Factor(self.factor)

    def _policy_of_dream(self) -> Unmask:
        if self.factor is not None:
            raise InputError("the factor rule is not defined for `shifted` models (Dream); give a threshold or steps")
        if self.cache == "none":
            if self.threshold is None:
                raise InputError("a `shifted` model (Dream) without a cache needs a threshold; see also decoding.dream")
            steps = self.steps or self.gen_length // self.block_size
            if self.gen_length % steps:
                raise InputError(f"steps must divide gen_length {self.gen_length}, got {steps}")
            return Allowance(steps, self.threshold)
        if self.block_size == 1:
            raise InputError("a `shifted` model (Dream) with a cache needs a block_size of at least 2, got 1")
        if self.threshold is not None:
            return FirstThen(Threshold(self.threshold, inclusive=True))
        steps = self.block_steps or self.block_size
        if steps < 2:
            # Upstream leaves such a block masked: its only step is the one that sets the first token.
            raise InputError("a `shifted` model (Dream) with a cache needs at least 2 steps per block, got 1")
        return FirstThen(Timesteps(steps))


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    The same contract as `cdlm.generate`. `forwards` counts full and cached forwards alike, one each (upstream's nfe).
    Decoding is greedy; confidences are float32 (upstream: float64).
    """
    check_request(model.config, prompts, prompt_lengths, config.gen_length, 0.0, key)
    config.policy(model.config.logit_alignment)
    return _generate(model, prompts, prompt_lengths, config)


@partial(jax.jit, static_argnames="config")
def _generate(model, prompts, prompt_lengths, config: Config) -> DecodeResult:
    prompts, prompt_lengths = by_rows((prompts, prompt_lengths))
    rows, alignment = prompts.shape[0], model.config.logit_alignment
    size = config.size(alignment)
    progress = Progress.start(rows, config.gen_length, model.config.mask_id)
    if config.cache == "none":
        carry = None

        def forward(progress, carry):
            return full_forward(model, prompts, prompt_lengths, progress, size), carry
    else:
        carry = KVCache.create(model.config, rows, prompts.shape[1] + config.gen_length, model.embed[...].dtype)
        forward = partial(cached_forward, model, prompts, prompt_lengths, config)
    step = partial(
        block_step, forward=forward, decide=partial(decide, model, None, config.policy(alignment), 0.0), size=size
    )
    return until_done(step, (progress, carry))[0].result(model.config.eos_token_id)


def cached_forward(model: Transformer, prompts, prompt_lengths, config: Config, progress: Progress, cache: KVCache):
    """(hidden rows that predict the current block [rows, B, d], cache).

    While some row is at the first forward of a block, the whole width is run for all; the others then write only what
    their narrow forward would have written, and so get the same result.
    """
    refresh = ~progress.done & (progress.step == 0)
    whole = partial(_whole, model, prompts, prompt_lengths, config, refresh)
    narrow = partial(_dual if config.cache == "dual" else _prefix, model, prompt_lengths, config)
    return switch(refresh.any(), (narrow, whole), progress, cache)


def _whole(model, prompts, prompt_lengths, config: Config, refresh, progress: Progress, cache: KVCache):
    tokens = append_response(prompts, prompt_lengths, progress.response)
    start = prompt_lengths + progress.block * config.block_size
    at = jnp.arange(tokens.shape[1]) - start[:, None]
    fresh = (at >= 0) & (at < config.block_size) if config.cache == "dual" else at >= 0
    hidden, cache = model.extend(
        tokens,
        cache,
        start=jnp.zeros_like(start),
        visible_end=row_end(prompt_lengths, config.gen_length, tokens.shape[1]),
        write=refresh[:, None] | fresh,
    )
    return predicting_rows(hidden, start, config.block_size, model.config.logit_alignment), cache


def _dual(model, prompt_lengths, config: Config, progress: Progress, cache: KVCache):
    return _cached(model, prompt_lengths, config, progress, cache, config.block_size)


def _prefix(model, prompt_lengths, config: Config, progress: Progress, cache: KVCache):
    """From the block to the end of the response: at least as wide as the row that is furthest behind needs.

    There is one compiled forward per width, so only a few are offered, each about half of the one before.
    """
    blocks = config.gen_length // config.block_size
    widths = [blocks]  # in blocks
    while widths[-1] > 1:
        widths.append(-(-widths[-1] // 2))
    needed = jnp.max(jnp.where(progress.done, 1, blocks - progress.block))
    steps = [partial(_cached, model, prompt_lengths, config, width=width * config.block_size) for width in widths]
    return switch((jnp.array(widths) >= needed).sum() - 1, steps, progress, cache)


def _cached(model, prompt_lengths, config: Config, progress: Progress, cache: KVCache, width: int):
    """`width` positions from the current block on, against the cached keys and values of all others."""
    first = progress.block * config.block_size
    tokens = take_rows(progress.response, first, width)  # past the end of the response: repeated, and seen by nobody
    end = row_end(prompt_lengths, config.gen_length, width)
    hidden, cache = model.extend(tokens, cache, start=prompt_lengths + first, visible_end=end)
    # Row i of a `shifted` model predicts position i + 1; the first position was set by the whole forward.
    shift = int(model.config.logit_alignment == "shifted")
    at = jnp.maximum(jnp.arange(config.block_size) - shift, 0)
    return hidden[:, at], cache
