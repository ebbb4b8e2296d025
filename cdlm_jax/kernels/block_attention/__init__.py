"""Attention of any query range to keys limited by the visibility rule."""

from cdlm_jax.kernels.block_attention.api import block_attention
from cdlm_jax.kernels.block_attention.training import training_attention

__all__ = ["block_attention", "training_attention"]
