"""The teacher's decoder: LLaDA's semi-autoregressive `generate`, a full bidirectional forward per step, no cache."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.decoding.common import (
    check_blocks,
    check_policy,
    check_request,
    check_steps,
    full_forward,
    predict,
    step_keys,
    steps_per_block,
)
from cdlm_jax.decoding.progress import DecodeResult, Progress, block_step, until_done
from cdlm_jax.decoding.unmask import Quota, Unmask
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """gen_length must be a multiple of block_size, steps of the number of blocks.

    steps: forwards in all, spread evenly over the blocks; None is one token per forward.
    remasking: finalize the most confident positions of a step, or random ones.
    cfg_scale: w of classifier-free guidance, u + (w + 1)(c - u), where u has the prompt masked.
    logits_eos_inf: never predict EOS.
    confidence_eos_eot_inf: finalize EOS, and the token `eot_token_id` (LLaDA: 126348) if given, after all others; no
        other confidence counts their share. (At temperature > 0 upstream spares EOS by an oversight; we do not.)
    unmask: a policy in place of the fixed schedule, e.g. Threshold(0.9): Fast-dLLM's parallel decoding without a cache.
    early_stop: end a row after the block that holds its first EOS (not in LLaDA's script).
    """

    gen_length: int
    block_size: int
    steps: int | None = None
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eot_token_id: int | None = None
    unmask: Unmask | None = None
    early_stop: bool = False

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        if self.unmask is not None:
            check_policy(self.unmask)
        check_steps(self.steps, self.gen_length, self.block_size)
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
        return Quota(steps_per_block(self.steps, self.gen_length, self.block_size))


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    The same contract as `cdlm.generate`; `forwards` counts full forwards over the whole sequence.
    """
    check_request(model.config, prompts, prompt_lengths, config.gen_length, config.temperature, key)
    if config.remasking == "random" and key is None:
        raise InputError("remasking 'random' needs a random key, got none")
    if config.eot_token_id is not None and not 0 <= config.eot_token_id < model.config.vocab_size:
        allowed = f"the vocabulary 0..{model.config.vocab_size - 1}"
        raise InputError(f"eot_token_id {config.eot_token_id} is outside {allowed}")
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
    prompts, prompt_lengths = by_rows((prompts, prompt_lengths))
    size = config.block_size

    def forward(progress, kept):
        hidden = full_forward(model, prompts, prompt_lengths, progress, size)  # [rows, B, d]
        if config.cfg_scale > 0:
            # The lm_head is linear: guiding the hidden rows is guiding the logits.
            masked_prompts = jnp.full_like(prompts, model.config.mask_id)
            unguided = full_forward(model, masked_prompts, prompt_lengths, progress, size)
            hidden = unguided + (config.cfg_scale + 1) * (hidden - unguided)
        if keep_hidden:
            # Rows of positions still masked: the last to be kept is the one that finalizes.
            at = jnp.arange(config.gen_length) - (progress.block * size)[:, None]
            now = (at >= 0) & (at < size) & (progress.finalized_at < 0)
            placed = jnp.take_along_axis(hidden, jnp.clip(at, 0, size - 1)[..., None], axis=1)
            kept = jnp.where(now[..., None], placed, kept)
        return hidden, kept

    rows = prompts.shape[0]
    kept = None
    if keep_hidden:
        kept = by_rows(jnp.zeros((rows, config.gen_length, model.config.hidden_size), model.embed[...].dtype))
    step = partial(
        block_step,
        forward=forward,
        decide=partial(_decide, model, key, config),
        size=size,
        stop_token_id=model.config.eos_token_id if config.early_stop else None,
    )
    return until_done(step, (Progress.start(rows, config.gen_length, model.config.mask_id), kept))


def _decide(model, key, config: Config, progress, hidden):
    keys = step_keys(key, progress) if config.temperature > 0 or config.remasking == "random" else None
    eos, eot = model.config.eos_token_id, config.eot_token_id
    banned = (eos,) if config.logits_eos_inf else ()
    unsure = tuple(token for token in (eos, eot) if token is not None) if config.confidence_eos_eot_inf else ()
    candidates = scored = predict(model, hidden, keys, config.temperature, banned=banned, unsure=unsure)
    if config.remasking == "random":
        draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), hidden.shape[1:2]))(keys)
        scored = candidates._replace(probability=draws)
    return candidates.token, config.policy(scored, progress.masked(config.block_size), progress.step)
