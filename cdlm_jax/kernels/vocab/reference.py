"""The definitions, with materialized logits: what every streamed implementation is tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Confidence(NamedTuple):
    """What the decoders ask of softmax(hidden @ head), per row."""

    token: jax.Array  # int32 [...], the most probable token; ties go to the lowest id
    probability: jax.Array  # float32 [...], of that token
    margin: jax.Array  # float32 [...], top probability minus second
    entropy: jax.Array  # float32 [...], in nats


def logits(hidden, head):
    """hidden [..., d] @ head [d, V], accumulated and returned in float32."""
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def confidence(hidden, head, forbidden=None):
    log_p = jax.nn.log_softmax(logits(hidden, head))
    p = jnp.exp(log_p)
    allowed = log_p if forbidden is None else jnp.where(jnp.arange(p.shape[-1]) == forbidden, -jnp.inf, log_p)
    top = jnp.exp(jax.lax.top_k(allowed, 2)[0])
    token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    return Confidence(token, top[..., 0], top[..., 0] - top[..., 1], -jnp.sum(p * log_p, axis=-1))


def linear_kl(teacher_hidden, student_hidden, head, weights, *, teacher_head=None):
    teacher_head = head if teacher_head is None else teacher_head
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits(teacher_hidden, teacher_head)))
    log_q = jax.nn.log_softmax(logits(student_hidden, head))
    return jnp.sum(jax.lax.stop_gradient(weights) * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def linear_nll(hidden, head, targets, weights):
    log_q = jax.nn.log_softmax(logits(hidden, head))
    picked = jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jax.lax.stop_gradient(weights) * picked)
