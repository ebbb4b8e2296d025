"""The definitions, with materialized logits: what every streamed implementation is tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cdlm_jax.kernels.vocab.noise import Seeds, gumbel


class Confidence(NamedTuple):
    """What the decoders ask of softmax(hidden @ head), per row."""

    token: jax.Array  # int32 [...], the most probable token that is allowed (ties: the lowest id), or the one drawn
    probability: jax.Array  # float32 [...], of that token
    margin: jax.Array  # float32 [...], of the allowed tokens: top probability minus second
    entropy: jax.Array  # float32 [...], in nats


def logits(hidden, head):
    """hidden [..., d] @ head [d, V], accumulated and returned in float32."""
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def confidence(hidden, head, forbidden=(), temperature=0.0, seeds: Seeds | None = None):
    """seeds: of [...] arrays, needed at temperature > 0."""
    z = logits(hidden, head)
    ids = jnp.arange(z.shape[-1])
    barred = jnp.isin(ids, jnp.array(forbidden, jnp.int32))
    log_p = jax.nn.log_softmax(z)
    p = jnp.exp(log_p)
    top = jnp.exp(jax.lax.top_k(jnp.where(barred, -jnp.inf, log_p), 2)[0])
    scores = z if temperature == 0 else z / temperature + gumbel(jax.tree.map(lambda x: x[..., None], seeds), ids)
    token = jnp.argmax(jnp.where(barred, -jnp.inf, scores), axis=-1).astype(jnp.int32)
    return Confidence(
        token=token,
        probability=jnp.take_along_axis(p, token[..., None], axis=-1)[..., 0],
        margin=top[..., 0] - top[..., 1],
        entropy=-jnp.sum(p * log_p, axis=-1),
    )


def linear_kl(teacher_hidden, student_hidden, head, weights, *, teacher_head=None):
    teacher_head = head if teacher_head is None else teacher_head
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits(teacher_hidden, teacher_head)))
    log_q = jax.nn.log_softmax(logits(student_hidden, head))
    return jnp.sum(jax.lax.stop_gradient(weights) * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def linear_nll(hidden, head, targets, weights):
    log_q = jax.nn.log_softmax(logits(hidden, head))
    picked = jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jax.lax.stop_gradient(weights) * picked)
