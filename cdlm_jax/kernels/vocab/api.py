"""Public functions over (hidden rows, lm_head). Hidden rows are final and normed; logits = hidden @ head.

Leading dimensions are free: hidden may be [rows, d] or [rows, L, d]. Inputs may be bfloat16 or float32; products
accumulate, and all statistics are kept, in float32. None of them holds an array of [..., V] elements when V > tile.
"""

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import xla
from cdlm_jax.kernels.vocab.reference import Confidence

TILE = 4096  # head columns at a time; memory is a few float32 arrays of [..., TILE]


def confidence(hidden: jax.Array, head: jax.Array, *, forbidden: int | None = None, tile: int = TILE) -> Confidence:
    """The most probable token of each row and how sure softmax(hidden @ head) is of it.

    Args:
      hidden: [..., d].
      head: [d, V].
      forbidden: a token id that is never the answer, while its share of the probability still counts.

    Returns:
      Confidence of [...] arrays: token (int32, the lowest id among equals), probability, margin (top minus second
      probability) and entropy in nats, in float32. One pass over the vocabulary; plain dense computation if V <= tile.
    """
    return xla.confidence(hidden, head, forbidden, tile)


def linear_kl(
    teacher_hidden: jax.Array,
    student_hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    *,
    teacher_head: jax.Array | None = None,
    tile: int = TILE,
) -> jax.Array:
    """sum_i weights_i KL( softmax(teacher_hidden_i @ teacher_head) || softmax(student_hidden_i @ head) ), in nats.

    Differentiable in student_hidden and head (as the student's); the teacher side and the weights are constants.

    Args:
      teacher_hidden: [..., d_teacher].
      student_hidden: [..., d].
      head: [d, V].
      weights: float32 [...]. A row of weight 0 contributes exactly 0 to value and gradient, whatever it holds.
      teacher_head: [d_teacher, V]; head if None.

    Returns:
      float32 scalar.

    Raises:
      InputError: the leading dimensions of the rows and the weights differ, or the two heads differ in V.
    """
    teacher_head = head if teacher_head is None else teacher_head
    _check_rows(weights, teacher_hidden=teacher_hidden.shape[:-1], student_hidden=student_hidden.shape[:-1])
    if teacher_head.shape[1] != head.shape[1]:
        raise InputError(f"teacher_head has a vocabulary of {teacher_head.shape[1]}, head of {head.shape[1]}")
    constants = jax.lax.stop_gradient((_used(teacher_hidden, weights), teacher_head, weights))
    return xla.linear_kl(*constants[:2], _used(student_hidden, weights), head, constants[2], tile)


def linear_nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, tile: int = TILE
) -> jax.Array:
    """sum_i weights_i * -log softmax(hidden_i @ head)[targets_i], in nats. Differentiable in hidden and head.

    Args:
      hidden: [..., d].
      head: [d, V].
      targets: int32 [...], in [0, V).
      weights: float32 [...], constants; a row of weight 0 contributes exactly 0, whatever it holds.

    Returns:
      float32 scalar.

    Raises:
      InputError: the leading dimensions of hidden, targets and weights differ.
    """
    _check_rows(weights, hidden=hidden.shape[:-1], targets=targets.shape)
    return xla.linear_nll(_used(hidden, weights), head, targets, jax.lax.stop_gradient(weights), tile)


def _check_rows(weights, **leading):
    for name, shape in leading.items():
        if shape != weights.shape:
            raise InputError(f"{name} has rows {shape}, weights have {weights.shape}: they must be equal")


def _used(hidden, weights):
    """Zeroes the rows of weight 0, so that nothing in them can overflow into the sum (0 * inf is nan)."""
    return jnp.where(weights[..., None] != 0, hidden, jnp.zeros((), hidden.dtype))
