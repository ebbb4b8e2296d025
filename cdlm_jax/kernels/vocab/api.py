"""Public functions over (hidden rows, lm_head). Hidden rows are final and normed; logits = hidden @ head.

Leading dimensions are free: hidden may be [rows, d] or [rows, L, d]. Inputs may be bfloat16 or float32; products
accumulate, and all statistics are kept, in float32. None of them holds an array of [..., V] elements when V > tile.
"""

from numbers import Integral
from typing import Literal, get_args

import jax

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import gpu, ops, tpu, xla
from cdlm_jax.kernels.vocab.noise import row_seeds
from cdlm_jax.kernels.vocab.reference import Confidence
from cdlm_jax.mesh import sharding

Implementation = Literal["tpu", "gpu", "xla"]
KERNELS = {"tpu": tpu, "gpu": gpu}

TILE = 4096  # head columns at a time; memory is a few float32 arrays of [at most 2048 rows, TILE]


def confidence(
    hidden: jax.Array,
    head: jax.Array,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    forbidden: tuple[int, ...] = (),
    implementation: Implementation | None = None,
    tile: int = TILE,
) -> Confidence:
    """A token for each row and how sure softmax(hidden @ head) is of it.

    At temperature 0 the token is the most probable one, the lowest id among equals. Above, it is drawn from
    softmax(hidden @ head / temperature), by Gumbel noise that depends only on the key, the row's place under that key,
    and the token's id: neither tile nor mesh nor implementation changes it. The numbers are always those of
    softmax(hidden @ head), without temperature or noise.

    Args:
      hidden: [..., d].
      head: [d, V].
      temperature: 0 or more.
      key: random keys, needed above 0: one, or an array of the first of hidden's leading dimensions.
      forbidden: token ids that are never the answer, while their share of the probability still counts.

    Returns:
      Confidence of [...] arrays: token (int32), its probability, margin (of the tokens allowed: top probability minus
      second) and entropy in nats, in float32. One pass over the vocabulary; plain dense computation if V <= tile.

    Raises:
      InputError: hidden and head differ in d, temperature is negative or has no key, the key does not fit the rows, a
        forbidden id is not in the vocabulary, or no token is allowed.
    """
    _check_heads(hidden=(hidden, head))
    if not temperature >= 0:
        raise InputError(f"temperature must be 0 or more, got {temperature}")
    _check_forbidden(forbidden, head.shape[1])
    seeds = row_seeds(key, hidden) if temperature > 0 else None
    op = "confidence, drawn" if temperature > 0 else "confidence"
    engine = _engine(implementation, op, (hidden,), (head,), tile)
    return ops.confidence(engine, hidden, head, tuple(forbidden), temperature, seeds)


def linear_kl(
    teacher_hidden: jax.Array,
    student_hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    *,
    teacher_head: jax.Array | None = None,
    implementation: Implementation | None = None,
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
      InputError: the leading dimensions of the rows and the weights differ, rows and their head in d, or the two heads
        in V.
    """
    _check_rows(weights, teacher_hidden=teacher_hidden.shape[:-1], student_hidden=student_hidden.shape[:-1])
    if teacher_head is not None and teacher_head.shape[1] != head.shape[1]:
        raise InputError(f"teacher_head has a vocabulary of {teacher_head.shape[1]}, head of {head.shape[1]}")
    heads = (head,) if teacher_head is None else (head, jax.lax.stop_gradient(teacher_head))
    _check_heads(student_hidden=(student_hidden, head), teacher_hidden=(teacher_hidden, heads[-1]))
    engine = _engine(implementation, "KL", (student_hidden, teacher_hidden), heads, tile)
    teacher_hidden, weights = jax.lax.stop_gradient((teacher_hidden, weights))
    return ops.linear_kl(engine, student_hidden, teacher_hidden, heads, weights)


def linear_nll(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    implementation: Implementation | None = None,
    tile: int = TILE,
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
      InputError: the leading dimensions of hidden, targets and weights differ, or hidden and head in d.
    """
    _check_rows(weights, hidden=hidden.shape[:-1], targets=targets.shape)
    _check_heads(hidden=(hidden, head))
    engine = _engine(implementation, "NLL", (hidden,), (head,), tile)
    return ops.linear_nll(engine, hidden, head, targets, jax.lax.stop_gradient(weights))


def nll(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    implementation: Implementation | None = None,
    tile: int = TILE,
) -> jax.Array:
    """-log softmax(hidden @ head)[targets] of each row by itself, float32 [...], in nats. Not differentiable.

    hidden: [..., d]; head: [d, V]; targets: int32 [...], in [0, V). InputError if leading dimensions differ, or the d.
    """
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"hidden has rows {hidden.shape[:-1]}, targets have {targets.shape}: they must be equal")
    _check_heads(hidden=(hidden, head))
    engine = _engine(implementation, "NLL of each row", (hidden,), (head,), tile)
    return ops.nll(engine, hidden, head, targets)


def _engine(implementation: Implementation | None, op: str, hiddens, heads, tile: int):
    """op: of `tiles.OPS`."""
    if implementation is None:
        platform = sharding.device().platform
        runs = platform in KERNELS and _refusal(platform, op, hiddens, heads) is None
        implementation = platform if runs else "xla"
    elif implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise InputError(f"unknown implementation {implementation!r} of the vocabulary, allowed: {allowed}")
    elif implementation != "xla" and (reason := _refusal(implementation, op, hiddens, heads)):
        name = f"the vocabulary's implementation {implementation!r}"
        raise InputError(f"{name} cannot run here: {reason}; allowed: 'xla'")
    return xla.Engine(tile) if implementation == "xla" else KERNELS[implementation].Engine()


def _refusal(kernel: str, op: str, hiddens, heads) -> str | None:
    """Why this kernel cannot run here; None if it can."""
    if kernel == "gpu" and not op.startswith("confidence"):
        return "there is a GPU kernel for confidence alone"
    if (device := sharding.device()).platform != kernel:
        return f"the device is a {device.platform}"
    return KERNELS[kernel].refusal(op, hiddens, heads)


def _check_rows(weights, **leading):
    for name, shape in leading.items():
        if shape != weights.shape:
            raise InputError(f"{name} has rows {shape}, weights have {weights.shape}: they must be equal")


def _check_heads(**rows_and_head):
    for name, (hidden, head) in rows_and_head.items():
        if hidden.shape[-1:] != head.shape[:1]:
            raise InputError(f"{name} {hidden.shape} and its head {head.shape} must be [..., d] and [d, V]")


def _check_forbidden(forbidden, vocab: int):
    for token in forbidden:
        if not isinstance(token, Integral) or not 0 <= int(token) < vocab:
            raise InputError(f"forbidden must hold ids of the vocabulary 0..{vocab - 1}, got {token!r}")
    if len(set(forbidden)) == vocab:
        raise InputError(f"forbidden holds all {vocab} tokens of the vocabulary")
