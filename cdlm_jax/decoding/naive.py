"""The teacher's decoder: LLaDA's semi-autoregressive `generate`, a full bidirectional forward per step, no cache."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.decoding.common import (
    DecodeResult,
    Progress,
    append_response,
    check_blocks,
    check_policy,
    check_request,
    predict,
    predicting_rows,
    step_keys,
)
from cdlm_jax.decoding.unmask import Quota, Unmask
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.visibility import row_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """gen_length must be a multiple of block_size, steps of the number of blocks.

    steps: forwards in all, spread evenly over the blocks; None is one token per forward.
    remasking: finalize the most confident positions of a step, or random ones.
    cfg_scale: w of classifier-free guidance, u + (w + 1)(c - u), where u has the prompt masked.
    unmask: a policy in place of the fixed schedule, e.g. Threshold(0.9): Fast-dLLM's parallel decoding without a cache.
    early_stop: end a row after the block that holds its first EOS (not in LLaDA's script).
    """

    gen_length: int
    block_size: int
    steps: int | None = None
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    unmask: Unmask | None = None
    early_stop: bool = False

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        if self.unmask is not None:
            check_policy(self.unmask)
        blocks = self.gen_length // self.block_size
        if self.steps is not None and not (0 < self.steps <= self.gen_length and self.steps % blocks == 0):
            raise InputError(
                f"steps must be a multiple of the {blocks} blocks and at most {self.gen_length}, got {self.steps}"
            )
        if self.steps is not None and self.unmask is not None:
            raise InputError(f"give either steps or an unmask policy, got steps {self.steps} and {self.unmask}")
        if self.remasking not in ("low_confidence", "random"):
            raise InputError(f"remasking must be low_confidence or random, got {self.remasking!r}")
        if not self.cfg_scale >= 0:
            raise InputError(f"cfg_scale must be 0 or more, got {self.cfg_scale}")

    @property
    def policy(self) -> Unmask:
        if self.unmask is not None:
            return self.unmask
        return Quota(None if self.steps is None else self.steps // (self.gen_length // self.block_size))


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    The same contract as `cdlm.generate`; `forwards` counts full forwards over the whole sequence.
    """
    check_request(model.config, prompts, prompt_lengths, config.gen_length, config.temperature, key)
    if config.remasking == "random" and key is None:
        raise InputError("remasking 'random' needs a random key, got none")
    progress, _ = decode(model, prompts, prompt_lengths, key, config)
    return progress.result(model.config.eos_token_id)


@partial(jax.jit, static_argnames=("config", "keep_hidden"))
def decode(
    model: Transformer,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array | None,
    config: Config,
    *,
    keep_hidden: bool = False,
) -> tuple[Progress, jax.Array | None]:
    """The whole decode loop: the final Progress and, if asked, the hidden rows that finalized [rows, L, d]."""
    size, alignment = config.block_size, model.config.logit_alignment
    stop_token_id = model.config.eos_token_id if config.early_stop else None
    end = row_end(prompt_lengths, config.gen_length, prompts.shape[1] + config.gen_length)

    def block_hidden(prompts, progress):
        tokens = append_response(prompts, prompt_lengths, progress.response)
        hidden = model(tokens, visible_end=end)
        return predicting_rows(hidden, prompt_lengths + progress.block * size, size, alignment)  # [rows, B, d]

    def step(carry):
        progress, kept = carry
        hidden = block_hidden(prompts, progress)
        if config.cfg_scale > 0:
            # The lm_head is linear: guiding the hidden rows is guiding the logits.
            masked_prompts = jnp.full_like(prompts, model.config.mask_token_id)
            unguided = block_hidden(masked_prompts, progress)
            hidden = unguided + (config.cfg_scale + 1) * (hidden - unguided)
        keys = step_keys(key, progress) if config.temperature > 0 or config.remasking == "random" else None
        candidates = predict(model, hidden, keys, config.temperature)
        scored = candidates
        if config.remasking == "random":
            draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (size,)))(keys)
            scored = candidates._replace(probability=draws)
        before = progress
        progress = progress.finalize(candidates.token, config.policy(scored, progress.masked(size), progress.step))
        if keep_hidden:
            new = (progress.finalized_at != before.finalized_at)[..., None]  # [rows, L, 1]
            at = jnp.arange(config.gen_length) - (before.block * size)[:, None]
            kept = jnp.where(new, jnp.take_along_axis(hidden, jnp.clip(at, 0, size - 1)[..., None], axis=1), kept)
        complete = ~progress.masked(size).any(axis=1)
        return progress.advance(complete, size, stop_token_id), kept

    rows = prompts.shape[0]
    progress = Progress.start(rows, config.gen_length, model.config.mask_token_id)
    kept = None
    if keep_hidden:
        kept = jnp.zeros((rows, config.gen_length, model.config.hidden_size), model.embed[...].dtype)
    progress, kept = jax.lax.while_loop(lambda carry: ~carry[0].done.all(), step, (progress, kept))
    return progress, kept
