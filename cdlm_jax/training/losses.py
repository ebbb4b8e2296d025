"""The three CDLM losses (method.md section 3), streamed over the vocabulary.

Hidden rows are final, normed and already *aligned*: row i is the one whose logits predict response token i (the caller
shifts them for `shifted` models). Each loss is a mean over the batch rows of a per-row mean; a row whose set is empty
contributes 0. Gradient accumulation over equal micro-batches is therefore exact.
"""

import math
from dataclasses import astuple, dataclass

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.decoding.progress import response_lengths
from cdlm_jax.kernels.vocab import linear_kl, linear_nll


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """L = distill * L_distill + consistency * L_cons + dlm * L_dlm. Raises InputError for unusable weights."""

    distill: float = 1.0
    consistency: float = 0.5
    dlm: float = 0.1

    def __post_init__(self):
        weights = astuple(self)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise InputError(f"{self}: weights must be finite, not negative, and not all zero")


# The paper's settings.
DREAM = LossWeights(distill=1.0, consistency=0.5, dlm=0.01)
LLADA = LossWeights(distill=1.0, consistency=0.5, dlm=0.1)


def distillation_loss(
    teacher_hidden: jax.Array,
    student_hidden: jax.Array,
    head: jax.Array,
    newly: jax.Array,
    *,
    teacher_head: jax.Array | None = None,
) -> jax.Array:
    """L_distill = mean over U of KL( teacher || student at y ), the teacher's distribution rebuilt from hidden rows.

    Args:
      teacher_hidden: [rows, L, d], bfloat16 or float32: the row that finalized each position.
      student_hidden: [rows, L, d], the student at y.
      head: [d, V], the student's lm_head.
      newly: bool [rows, L], U (`trajectories.states.State.newly`).
      teacher_head: [d, V], the frozen lm_head of the teacher; needed only where training changes `head`.

    Returns:
      float32 scalar; differentiable in student_hidden and head.
    """
    return linear_kl(teacher_hidden, student_hidden, head, _mean_weights(newly), teacher_head=teacher_head)


def consistency_loss(
    target_hidden: jax.Array, student_hidden: jax.Array, head: jax.Array, remaining: jax.Array
) -> jax.Array:
    """L_cons = mean over S of KL( stop_gradient(student at y*) || student at y ).

    Args:
      target_hidden: [rows, L, d], the student at y*; a constant.
      student_hidden: [rows, L, d], the student at y.
      head: [d, V].
      remaining: bool [rows, L], S (`trajectories.states.State.remaining`).

    Returns:
      float32 scalar; differentiable in student_hidden and head.
    """
    return linear_kl(target_hidden, student_hidden, head, _mean_weights(remaining))


def masked_denoising_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    masked: jax.Array,
    t: jax.Array,
    *,
    share: jax.Array | None = None,
) -> jax.Array:
    """L_dlm = mean over rows of 1 / (t L) * sum over the masked positions of -log q(target), as in LLaDA (2502.09992).

    Args:
      hidden: [rows, L, d], the model at the masked ground-truth response.
      head: [d, V].
      targets: int32 [rows, L], the ground-truth response.
      masked: bool [rows, L].
      t: float32 [rows], the masking probability of each row, > 0 (or what else to divide its terms by).
      share: float32 [rows, L], what each position is of its row's mean, in place of 1 / L (`answer_share`).

    Returns:
      float32 scalar; differentiable in hidden and head.
    """
    weights = masked * (1 / masked.shape[1] if share is None else share)
    return linear_nll(hidden, head, targets, weights / (t[:, None] * masked.shape[0]))


def answer_share(answer: jax.Array, eos_token_id: int, filler_weight: float) -> jax.Array:
    """Weights of a mean over an answer's tokens up to its first EOS: [rows, L] -> float32 [rows, L], rows sum to 1.

    The EOS after that count as `filler_weight` of a token. In a plain mean a short answer has little gradient.
    """
    filler = jnp.arange(answer.shape[1]) > response_lengths(answer, eos_token_id)[:, None]
    weight = jnp.where(filler, filler_weight, 1.0)
    return weight / weight.sum(axis=1, keepdims=True)


def _mean_weights(mask):
    """[rows, L] weights of a mean over each row's set, then over rows."""
    counts = jnp.sum(mask, axis=1, keepdims=True)
    return mask / (jnp.maximum(counts, 1) * mask.shape[0]).astype(jnp.float32)
