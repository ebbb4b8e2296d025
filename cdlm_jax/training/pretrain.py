"""Settings of pre-training: a teacher by masked denoising, or a causal model to compare with.

What made tiny teachers learn: Muon, stratified t, a curriculum that begins with few masks, EMA.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.training.loop import LoopConfig
from cdlm_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Mask ratios t ~ U(0, t_max).

    t_max grows from `first_t_max` to 1 over the first `curriculum` share of the steps.
    weighting: of a masked token. `likelihood` is 1 / t, not above 1 / min_t: LLaDA's bound of the likelihood.
        `uniform` counts all alike, as MaskGIT does (2202.04200): the gradient varies less, which tiny models need for
        arithmetic.
    """

    curriculum: float = 0.28
    first_t_max: float = 0.3
    min_t: float = 0.02
    weighting: Literal["likelihood", "uniform"] = "likelihood"

    def __post_init__(self):
        for name in ("curriculum", "first_t_max", "min_t"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"noise.{name} must be in (0, 1], got {getattr(self, name)}")
        if self.weighting not in ("likelihood", "uniform"):
            raise InputError(f"noise.weighting must be likelihood or uniform, got {self.weighting!r}")

    def ratios(self, key: jax.Array, rows: int, progress: jax.Array) -> jax.Array:
        """One t per row, float32 [rows]. Stratified: in random row order, the batch covers (0, t_max) evenly."""
        t_max = jnp.minimum(1.0, self.first_t_max + (1 - self.first_t_max) * progress / self.curriculum)
        shuffle, jitter = jax.random.split(key)
        strata = jax.random.permutation(shuffle, rows) + jax.random.uniform(jitter, (rows,))
        return jnp.maximum(strata / rows * t_max, self.min_t)

    def divisor(self, t: jax.Array) -> jax.Array:
        """What a masked token's loss is divided by: t, or where all count alike the mean of t ~ U(0, 1)."""
        return t if self.weighting == "likelihood" else jnp.full_like(t, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """How to train a model from random weights.

    objective: a bidirectional teacher by masked denoising (`training/denoising.py`), or a causal model to compare with
        by next-token prediction (`training/causal.py`, which has no noise).
    filler_weight: of the EOS tokens after the first in masked denoising (`losses.answer_share`).
    """

    objective: Literal["masked_denoising", "autoregressive"] = "masked_denoising"
    batch_size: int = 64
    ema_decay: float = 0.995
    filler_weight: float = 1.0
    optimizer: OptimizerConfig = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0)
    noise: NoiseSchedule = NoiseSchedule()

    @property
    def role(self) -> Literal["teacher", "autoregressive"]:
        """What the model will be in the recipe."""
        return "teacher" if self.objective == "masked_denoising" else "autoregressive"

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise InputError(f"pretrain.batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"pretrain.ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.filler_weight <= 1:
            raise InputError(f"pretrain.filler_weight must be in [0, 1], got {self.filler_weight}")
