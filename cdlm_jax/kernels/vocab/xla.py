"""Streams the vocabulary in tiles of head columns; only [..., tile] logits ever exist, forward and backward.

On a mesh that cuts the head's columns into P pieces, each device streams its own: arrays have one more axis, P before
`size`, and what the pieces say is merged at the end. A tile's `fsdp` pieces are gathered when its turn comes.

Softmax statistics are kept relative to a running maximum and merged tile by tile (online softmax, Milakov and
Gimelshein, arXiv 1805.02867). Backward passes recompute each tile and read its probabilities off the saved
log-sum-exp.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cdlm_jax.kernels.vocab.reference import Confidence, logits
from cdlm_jax.sharding import gathered, pieces, whole

LANES = 128  # columns that a TPU keeps together

# Statistics of no columns at all: what is not named here is 0. A maximum is finite, since it is subtracted.
NOTHING = {"top": -1e30, "first": -jnp.inf, "second": -jnp.inf}

# ---- walking over the vocabulary -----------------------------------------------------------------------------------


def in_pieces(head, like=None):
    """[d, V] -> [d, P, V / P], one piece of consecutive columns per device, if `like` (the head itself) is cut so."""
    count = pieces(head if like is None else like, 1)
    return head if count == 1 else head.reshape(head.shape[0], count, -1)


def over_columns(x, head):
    """[...] -> [..., 1] or [..., 1, 1], to meet a tile's logits."""
    return x.reshape(x.shape + (1,) * (head.ndim - 1))


def sweep(step, carry, vocab, tile):
    """carry = step(carry, start, size) over all columns of a piece, left to right.

    A vocabulary of at most one tile compiles without a loop. For a larger one, the tile becomes the largest multiple of
    LANES that divides it, if there is one above half a tile: then a program holds the step once. Otherwise the first
    tile takes the remainder.
    """
    if vocab <= tile:
        return step(carry, 0, vocab)
    even = (size for size in range(tile - tile % LANES, tile // 2, -LANES) if vocab % size == 0)
    tile = next(even, tile)
    full, first = divmod(vocab, tile)
    if first:
        carry = step(carry, 0, first)
    return jax.lax.fori_loop(0, full, lambda i, carry: step(carry, first + i * tile, tile), carry)


def merge_tiles(measure, merge, head, tile):
    """The statistics measure(start, size) of every tile, merged left to right, and then over the pieces."""
    shapes = jax.eval_shape(partial(measure, 0, 1))
    nothing = jax.tree.map_with_path(lambda path, x: jnp.full_like(x, NOTHING.get(path[-1].name, 0)), shapes)
    statistics = sweep(lambda carry, *at: merge(carry, measure(*at)), nothing, head.shape[-1], tile)
    if head.ndim == 2:
        return statistics
    statistics = jax.tree.map(whole, statistics)
    return reduce(merge, (jax.tree.map(lambda x, i=i: x[..., i], statistics) for i in range(head.shape[1])))


def columns(head, start, size):
    """[d, size], or of every piece together [d, P * size]."""
    return jax.lax.dynamic_slice_in_dim(head, start, size, axis=-1).reshape(head.shape[0], -1)


def tile_logits(hidden, head, start, size):
    z = logits(hidden, gathered(columns(head, start, size), "fsdp"))
    return z.reshape(*z.shape[:-1], *head.shape[1:-1], size)  # float32 [..., size]


def tokens(head, start, size):
    """int32 [size], the ids of a tile's columns."""
    ids = start + jnp.arange(size, dtype=jnp.int32)
    if head.ndim == 2:
        return ids
    return ids + jnp.arange(head.shape[1], dtype=jnp.int32)[:, None] * head.shape[2]


# ---- log-sum-exp ---------------------------------------------------------------------------------------------------


class LogSum(NamedTuple):
    top: jax.Array  # float32 [...], the largest logit so far
    mass: jax.Array  # float32 [...], sum of exp(z - top)

    def value(self):
        return self.top + jnp.log(self.mass)


def log_sum(z):
    """z [..., size] -> (LogSum, exp(z - top))."""
    top = jnp.max(z, axis=-1)
    exp = jnp.exp(z - top[..., None])
    return LogSum(top, exp.sum(axis=-1)), exp


def merge_log_sums(a: LogSum, b: LogSum):
    """(merged, scale_a, scale_b); a sum weighted with exp(z - a.top) joins the merged one times scale_a."""
    top = jnp.maximum(a.top, b.top)
    scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return LogSum(top, scale_a * a.mass + scale_b * b.mass), scale_a, scale_b


# ---- confidence ----------------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    total: LogSum
    token: jax.Array  # int32 [...], the allowed id with the largest logit
    first: jax.Array  # float32 [...], that logit
    second: jax.Array  # float32 [...], the second largest allowed logit, equal to the first when tied
    moment: jax.Array  # float32 [...], sum of (z - top) exp(z - top)


def peak(z, ids, forbidden):
    """z [..., size] of the tokens ids [size]."""
    total, exp = log_sum(z)
    moment = jnp.sum((z - total.top[..., None]) * exp, axis=-1)
    if forbidden is not None:
        z = jnp.where(ids == forbidden, -jnp.inf, z)
    token = ids[..., 0] + jnp.argmax(z, axis=-1).astype(jnp.int32)  # the first of equals
    others = jnp.where(ids == token[..., None], -jnp.inf, z)
    return Peak(total, token, jnp.max(z, axis=-1), jnp.max(others, axis=-1), moment)


def merge_peaks(a: Peak, b: Peak):
    """All ids of a are below those of b, so a wins ties."""
    total, scale_a, scale_b = merge_log_sums(a.total, b.total)
    return Peak(
        total,
        token=jnp.where(a.first >= b.first, a.token, b.token),
        first=jnp.maximum(a.first, b.first),
        second=jnp.maximum(jnp.minimum(a.first, b.first), jnp.maximum(a.second, b.second)),
        # The deviations of each part were taken from its own maximum: move them to the common one.
        moment=scale_a * (a.moment + (a.total.top - total.top) * a.total.mass)
        + scale_b * (b.moment + (b.total.top - total.top) * b.total.mass),
    )


def confidence(hidden, head, forbidden, tile):
    head = in_pieces(head)

    def measure(start, size):
        return peak(tile_logits(hidden, head, start, size), tokens(head, start, size), forbidden)

    (top, mass), token, first, second, moment = merge_tiles(measure, merge_peaks, head, tile)
    return Confidence(
        token=token,
        probability=jnp.exp(first - top) / mass,
        margin=(jnp.exp(first - top) - jnp.exp(second - top)) / mass,
        entropy=jnp.log(mass) - moment / mass,
    )


# ---- gradient of the losses ----------------------------------------------------------------------------------------


def product(subscripts, a, b, like):
    """A float32 matrix product, sharded like the array that it is the gradient of."""
    sharding = jax.typeof(like).sharding
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, out_sharding=sharding)


def pull_back(d_logits, hidden, head, tile):
    """(d hidden, d head [d, V]) from d_logits(start, size), the loss gradient at a tile of logits(hidden, head).

    d hidden accumulates over the tiles in float32; every column of d head is written once.
    """

    def step(carry, start, size):
        d_hidden, d_head = carry
        w = columns(head, start, size)
        dz = d_logits(start, size).astype(hidden.dtype)
        dz = dz.reshape(*hidden.shape[:-1], -1)  # [..., size], or [..., P * size]
        d_hidden += product("...v,dv->...d", dz, gathered(w, "fsdp"), like=hidden)
        d_columns = product("...d,...v->dv", hidden, dz, like=w).astype(head.dtype)
        d_columns = d_columns.reshape(*head.shape[:-1], size)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_columns, start, axis=-1)

    zeros = jnp.zeros_like(hidden, dtype=jnp.float32), jnp.zeros_like(head)
    d_hidden, d_head = sweep(step, zeros, head.shape[-1], tile)
    return d_hidden.astype(hidden.dtype), d_head.reshape(head.shape[0], -1)


# ---- Kullback-Leibler divergence -----------------------------------------------------------------------------------


class Divergence(NamedTuple):
    teacher: LogSum
    student: LogSum
    gap: jax.Array  # float32 [...], sum of exp(z_teacher - top) (z_teacher - z_student)


def divergence(z_teacher, z_student):
    teacher, exp = log_sum(z_teacher)
    return Divergence(teacher, log_sum(z_student)[0], jnp.sum(exp * (z_teacher - z_student), axis=-1))


def merge_divergences(a: Divergence, b: Divergence):
    teacher, scale_a, scale_b = merge_log_sums(a.teacher, b.teacher)
    return Divergence(teacher, merge_log_sums(a.student, b.student)[0], scale_a * a.gap + scale_b * b.gap)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def linear_kl(teacher_hidden, teacher_head, student_hidden, head, weights, tile):
    return _linear_kl_forward(teacher_hidden, teacher_head, student_hidden, head, weights, tile)[0]


def _linear_kl_forward(teacher_hidden, teacher_head, student_hidden, head, weights, tile):
    teacher_head, head = in_pieces(teacher_head, like=head), in_pieces(head)

    def measure(start, size):
        return divergence(
            tile_logits(teacher_hidden, teacher_head, start, size), tile_logits(student_hidden, head, start, size)
        )

    t, s, gap = merge_tiles(measure, merge_divergences, head, tile)
    # E_teacher[z_teacher - z_student] less the difference of the log-sum-exps, large parts first.
    kl = gap / t.mass - (t.top - s.top) - (jnp.log(t.mass) - jnp.log(s.mass))
    saved = teacher_hidden, teacher_head, student_hidden, head, weights, t.value(), s.value()
    return jnp.sum(weights * kl), saved


def _linear_kl_backward(tile, saved, g):
    teacher_hidden, teacher_head, student_hidden, head, weights, teacher_total, student_total = saved

    def d_logits(start, size):
        p = jnp.exp(tile_logits(teacher_hidden, teacher_head, start, size) - over_columns(teacher_total, head))
        q = jnp.exp(tile_logits(student_hidden, head, start, size) - over_columns(student_total, head))
        return over_columns(g * weights, head) * (q - p)

    d_hidden, d_head = pull_back(d_logits, student_hidden, head, tile)
    return None, None, d_hidden, d_head, None


linear_kl.defvjp(_linear_kl_forward, _linear_kl_backward)


# ---- negative log-likelihood ---------------------------------------------------------------------------------------


class Likelihood(NamedTuple):
    total: LogSum
    picked: jax.Array  # float32 [...], the logit of the target, 0 before its tile


def merge_likelihoods(a: Likelihood, b: Likelihood):
    return Likelihood(merge_log_sums(a.total, b.total)[0], a.picked + b.picked)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_nll(hidden, head, targets, weights, tile):
    return _linear_nll_forward(hidden, head, targets, weights, tile)[0]


def _linear_nll_forward(hidden, head, targets, weights, tile):
    head = in_pieces(head)

    def measure(start, size):
        z = tile_logits(hidden, head, start, size)
        is_target = tokens(head, start, size) == over_columns(targets, head)
        return Likelihood(log_sum(z)[0], jnp.sum(jnp.where(is_target, z, 0), axis=-1))

    total, picked = merge_tiles(measure, merge_likelihoods, head, tile)
    nll = jnp.log(total.mass) + (total.top - picked)
    return jnp.sum(weights * nll), (hidden, head, targets, weights, total.value())


def _linear_nll_backward(tile, saved, g):
    hidden, head, targets, weights, total = saved

    def d_logits(start, size):
        q = jnp.exp(tile_logits(hidden, head, start, size) - over_columns(total, head))
        is_target = tokens(head, start, size) == over_columns(targets, head)
        return over_columns(g * weights, head) * (q - is_target)

    d_hidden, d_head = pull_back(d_logits, hidden, head, tile)
    return d_hidden, d_head, None, None


linear_nll.defvjp(_linear_nll_forward, _linear_nll_backward)
