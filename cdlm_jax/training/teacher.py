"""Masked-denoising pre-training of a bidirectional diffusion model: the teacher of the tiny recipe.

What made tiny teachers learn: Muon, stratified t, a curriculum that begins with few masks, loss weight 1/t, EMA.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from cdlm_jax.config import InputError
from cdlm_jax.decoding.common import append_response, predicting_rows
from cdlm_jax.decoding.progress import response_lengths
from cdlm_jax.training.loop import LoopConfig
from cdlm_jax.training.losses import masked_denoising_loss
from cdlm_jax.training.optimizer import OptimizerConfig
from cdlm_jax.visibility import row_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Mask ratios t ~ U(0, t_max).

    t_max grows from `first_t_max` to 1 over the first `curriculum` share of the steps; `min_t` bounds the weight 1/t.
    """

    curriculum: float = 0.28
    first_t_max: float = 0.3
    min_t: float = 0.02

    def __post_init__(self):
        for name in ("curriculum", "first_t_max", "min_t"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"noise.{name} must be in (0, 1], got {getattr(self, name)}")

    def ratios(self, key: jax.Array, rows: int, progress: jax.Array) -> jax.Array:
        """One t per row, float32 [rows]. Stratified: in random row order, the batch covers (0, t_max) evenly."""
        t_max = jnp.minimum(1.0, self.first_t_max + (1 - self.first_t_max) * progress / self.curriculum)
        shuffle, jitter = jax.random.split(key)
        strata = jax.random.permutation(shuffle, rows) + jax.random.uniform(jitter, (rows,))
        return jnp.maximum(strata / rows * t_max, self.min_t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """How to train a model from random weights.

    objective: a bidirectional teacher by masked denoising, or a causal model to compare with by next-token prediction
        (`training/causal.py`, which has no noise).
    filler_weight: importance of the EOS tokens after the first in masked denoising. Where answers are much shorter than
        the response, a plain mean leaves the answer itself little gradient.
    """

    objective: Literal["masked_denoising", "autoregressive"] = "masked_denoising"
    batch_size: int = 64
    ema_decay: float = 0.995
    filler_weight: float = 1.0
    optimizer: OptimizerConfig = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0)
    noise: NoiseSchedule = NoiseSchedule()

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise InputError(f"pretrain.batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"pretrain.ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.filler_weight <= 1:
            raise InputError(f"pretrain.filler_weight must be in [0, 1], got {self.filler_weight}")


def make_loss(graphdef: nnx.GraphDef, config: PretrainConfig):
    """The `LossFn` of pre-training: E_t[1/(t L) * sum over masked of -log p(answer)] under full attention.

    batch: {prompt [rows, P_max], prompt_length [rows], answer [rows, L]}.
    """

    def loss_fn(trainable, frozen, batch, keys, step):
        model = nnx.merge(graphdef, trainable, frozen)
        answer, prompt_lengths = batch["answer"], batch["prompt_length"]
        rows, length = answer.shape
        t_key, mask_key = jax.random.split(keys[0])
        t = config.noise.ratios(t_key, rows, step / config.steps)
        masked = jax.random.uniform(mask_key, answer.shape) < t[:, None]
        y = jnp.where(masked, model.config.mask_token_id, answer)
        tokens = append_response(batch["prompt"], prompt_lengths, y)
        hidden = model(tokens, visible_end=row_end(prompt_lengths, length, tokens.shape[1]))
        hidden = predicting_rows(hidden, prompt_lengths, length, model.config.logit_alignment)
        filler = jnp.arange(length) > response_lengths(answer, model.config.eos_token_id)[:, None]
        importance = jnp.where(filler, config.filler_weight, 1.0)
        return masked_denoising_loss(hidden, model.head, answer, masked, t, importance=importance), {}

    return loss_fn
