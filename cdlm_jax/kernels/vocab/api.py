"""Public functions over (hidden rows, lm_head). Hidden rows are final and normed; logits = hidden @ head.

Leading dimensions are free: hidden may be [rows, d] or [rows, L, d]. Inputs may be bfloat16 or float32; products
accumulate, and all statistics are kept, in float32. None of them holds an array of [..., V] elements when V > tile.
"""

import math
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cdlm_jax import sharding
from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import gpu, ops, tpu, xla
from cdlm_jax.kernels.vocab.noise import Seeds
from cdlm_jax.kernels.vocab.reference import Confidence

Implementation = Literal["tpu", "gpu", "xla"]

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
      InputError: temperature is negative or has no key, the key does not fit the rows, or no token is allowed.
    """
    if not temperature >= 0:
        raise InputError(f"temperature must be 0 or more, got {temperature}")
    if len(set(forbidden)) >= head.shape[1]:
        raise InputError(f"forbidden holds {len(set(forbidden))} tokens, of a vocabulary of {head.shape[1]}")
    seeds = _seeds(key, hidden) if temperature > 0 else None
    engine = _engine(implementation, hidden, head, tile, kernels=("tpu", "gpu"))
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
      InputError: the leading dimensions of the rows and the weights differ, or the two heads differ in V.
    """
    _check_rows(weights, teacher_hidden=teacher_hidden.shape[:-1], student_hidden=student_hidden.shape[:-1])
    if teacher_head is not None and teacher_head.shape[1] != head.shape[1]:
        raise InputError(f"teacher_head has a vocabulary of {teacher_head.shape[1]}, head of {head.shape[1]}")
    engine = _engine(implementation, student_hidden, head, tile)
    teacher_hidden, teacher_head, weights = jax.lax.stop_gradient((teacher_hidden, teacher_head, weights))
    heads = (head,) if teacher_head is None else (head, teacher_head)
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
      InputError: the leading dimensions of hidden, targets and weights differ.
    """
    _check_rows(weights, hidden=hidden.shape[:-1], targets=targets.shape)
    engine = _engine(implementation, hidden, head, tile)
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

    hidden: [..., d]; head: [d, V]; targets: int32 [...], in [0, V). InputError if their leading dimensions differ.
    """
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"hidden has rows {hidden.shape[:-1]}, targets have {targets.shape}: they must be equal")
    return ops.nll(_engine(implementation, hidden, head, tile), hidden, head, targets)


def _engine(implementation: Implementation | None, hidden, head, tile: int, kernels=("tpu",)):
    """kernels: those of the function at hand."""
    if implementation is None:
        platform = sharding.device().platform
        runs = platform in kernels and _refusal(platform, hidden, head, kernels) is None
        implementation = platform if runs else "xla"
    elif implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise InputError(f"unknown implementation {implementation!r} of the vocabulary, allowed: {allowed}")
    elif implementation != "xla" and (reason := _refusal(implementation, hidden, head, kernels)):
        name = f"the vocabulary's implementation {implementation!r}"
        raise InputError(f"{name} cannot run here: {reason}; allowed: 'xla'")
    return {"tpu": tpu.Engine, "gpu": gpu.Engine, "xla": partial(xla.Engine, tile)}[implementation]()


def _refusal(kernel: str, hidden, head, kernels) -> str | None:
    """Why this kernel cannot run here; None if it can."""
    if kernel not in kernels:
        return "there is a GPU kernel for confidence alone"
    if (device := sharding.device()).platform != kernel:
        return f"the device is a {device.platform}"
    return {"tpu": tpu, "gpu": gpu}[kernel].refusal(hidden, head)


def _check_rows(weights, **leading):
    for name, shape in leading.items():
        if shape != weights.shape:
            raise InputError(f"{name} has rows {shape}, weights have {weights.shape}: they must be equal")


def _seeds(key, hidden) -> Seeds:
    """[...] each: a row's place is its number in the dimensions of hidden that the keys leave."""
    if key is None:
        raise InputError("temperature above 0 needs a random key, got none")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != hidden.shape[: key.ndim]:
        raise InputError(
            f"key must be a jax.random.key, or an array of them whose shape begins {hidden.shape[:-1]}; "
            f"got {key.dtype} {key.shape}"
        )
    words = jax.random.key_data(key)[..., :2]  # every generator keeps its seed in the first two words
    left = hidden.shape[key.ndim : -1]
    zeros = jnp.zeros_like(hidden[..., 0], jnp.uint32)
    high, low = (words[..., i].reshape(key.shape + (1,) * len(left)) for i in range(2))
    place = jnp.arange(math.prod(left), dtype=jnp.uint32).reshape(left)
    return Seeds(zeros + high, zeros + low, zeros + place)
