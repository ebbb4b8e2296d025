"""From hidden rows to the vocabulary without materialized logits."""

from cdlm_jax.kernels.vocab.api import TILE, Confidence, confidence, linear_kl, linear_nll, nll

__all__ = ["TILE", "Confidence", "confidence", "linear_kl", "linear_nll", "nll"]
