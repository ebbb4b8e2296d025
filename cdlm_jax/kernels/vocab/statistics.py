"""What a tile of logits says of its rows, and how two tiles' statistics merge into those of both.

Softmax statistics are kept relative to a running maximum and merged tile by tile (online softmax, Milakov and
Gimelshein, arXiv 1805.02867). z is [..., size], ids int32 the tokens of its columns; every statistic is [..., 1]. The
XLA implementation and the TPU kernels are these formulas.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cdlm_jax.kernels.vocab.noise import Seeds, gumbel
from cdlm_jax.kernels.vocab.reference import Confidence

LEAST = -1e30  # below any logit, and finite, since maxima are subtracted from each other
NO_TOKEN = 2**31 - 1  # the id of a column that does not exist


class Rows(NamedTuple):
    """What is known of each row."""

    hidden: tuple[jax.Array, ...]  # [..., d], one for each head
    weights: jax.Array | None = None  # float32 [..., 1]
    extra: tuple | Seeds | None = None  # a pytree of [..., 1] arrays

    def used(self) -> "Rows":
        """Rows of weight 0 are zeroed, so that nothing in them can overflow into a sum (0 * inf is nan)."""
        if self.weights is None:
            return self
        return self._replace(hidden=tuple(jnp.where(self.weights != 0, x, jnp.zeros((), x.dtype)) for x in self.hidden))


def statistics_shapes(measure, rows: Rows):
    """Of rows [n, k]."""
    z = tuple(jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32) for x in rows.hidden)
    return jax.eval_shape(measure, z, jax.ShapeDtypeStruct((1, 1), jnp.int32), rows.extra)


def nothing(shapes):
    """Statistics of no columns at all, of these shapes."""
    start = {"top": LEAST, "first": -jnp.inf, "second": -jnp.inf, "score": -jnp.inf}
    return jax.tree.map_with_path(lambda path, x: jnp.full_like(x, start.get(path[-1].name, 0)), shapes)


def total(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def largest(x):
    return jnp.max(x, axis=-1, keepdims=True)


def argmax(x, ids):
    """(the lowest of the ids where x is largest, x there)."""
    top = largest(x)
    return jnp.min(jnp.where(x < top, jnp.iinfo(jnp.int32).max, ids), axis=-1, keepdims=True), top


# ---- log-sum-exp ---------------------------------------------------------------------------------------------------


class LogSum(NamedTuple):
    top: jax.Array  # float32, the largest logit so far
    mass: jax.Array  # float32, sum of exp(z - top)

    def value(self):
        return self.top + jnp.log(self.mass)


def log_sum(z):
    """(LogSum, exp(z - top))."""
    top = largest(z)
    exp = jnp.exp(z - top)
    return LogSum(top, total(exp)), exp


def merge_log_sums(a: LogSum, b: LogSum):
    """(merged, scale_a, scale_b); a sum weighted with exp(z - a.top) joins the merged one times scale_a."""
    top = jnp.maximum(a.top, b.top)
    scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return LogSum(top, scale_a * a.mass + scale_b * b.mass), scale_a, scale_b


# ---- confidence ----------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    token: jax.Array  # int32, the allowed id with the largest score, z / temperature + noise
    score: jax.Array  # float32
    logit: jax.Array  # float32, z of that id


class Peak(NamedTuple):
    sum: LogSum
    token: jax.Array  # int32, the allowed id with the largest logit
    first: jax.Array  # float32, that logit
    second: jax.Array  # float32, the second largest allowed logit, equal to the first when tied
    moment: jax.Array  # float32, sum of (z - top) exp(z - top)
    draw: Draw | None  # at temperature > 0


def peak(z, ids, barred, temperature, seeds: Seeds | None):
    """barred: bool, where an id cannot be the answer; None if all can. seeds: of [..., 1] arrays."""
    sum, exp = log_sum(z)
    moment = total((z - sum.top) * exp)
    allowed = z if barred is None else jnp.where(barred, -jnp.inf, z)
    token, first = argmax(allowed, ids)
    second = largest(jnp.where(ids == token, -jnp.inf, allowed))
    draw = None
    if temperature > 0 and seeds is not None:
        drawn, score = argmax(allowed / temperature + gumbel(seeds, ids), ids)
        draw = Draw(drawn, score, largest(jnp.where(ids == drawn, z, -jnp.inf)))
    return Peak(sum, token, first, second, moment, draw)


def peaks(z, ids, barred, temperature, seeds: Seeds | None):
    """The peak of each column by itself, [..., size]."""
    allowed = z if barred is None else jnp.where(barred, -jnp.inf, z)
    draw = Draw(ids, allowed / temperature + gumbel(seeds, ids), z) if temperature > 0 and seeds is not None else None
    return Peak(LogSum(z, jnp.ones_like(z)), ids, allowed, jnp.full_like(z, -jnp.inf), jnp.zeros_like(z), draw)


def together(peak: Peak):
    """The peak of all parts, in any order, that [..., parts] arrays tell of."""
    (top, mass), tokens, first, second, moment, draw = peak
    sum = LogSum(largest(top), total(jnp.exp(top - largest(top)) * mass))
    moment = total(jnp.exp(top - sum.top) * (moment + (top - sum.top) * mass))
    token, best = argmax(first, tokens)
    second = largest(jnp.where(tokens == token, second, first))
    if draw is not None:
        drawn, score = argmax(draw.score, draw.token)
        draw = Draw(drawn, score, largest(jnp.where(draw.token == drawn, draw.logit, -jnp.inf)))
    return Peak(sum, token, best, second, moment, draw)


def merge_peaks(a: Peak, b: Peak):
    """All ids of a are below those of b, so a wins ties."""
    sum, scale_a, scale_b = merge_log_sums(a.sum, b.sum)
    draw = None
    if a.draw is not None and b.draw is not None:
        wins = a.draw.score >= b.draw.score
        draw = jax.tree.map(lambda x, y: jnp.where(wins, x, y), a.draw, b.draw)
    return Peak(
        sum,
        token=jnp.where(a.first >= b.first, a.token, b.token),
        first=jnp.maximum(a.first, b.first),
        second=jnp.maximum(jnp.minimum(a.first, b.first), jnp.maximum(a.second, b.second)),
        # The deviations of each part were taken from its own maximum: move them to the common one.
        moment=scale_a * (a.moment + (a.sum.top - sum.top) * a.sum.mass)
        + scale_b * (b.moment + (b.sum.top - sum.top) * b.sum.mass),
        draw=draw,
    )


def read_peak(peak: Peak) -> Confidence:
    (top, mass), token, first, second, moment, draw = peak
    best = jnp.exp(first - top)
    return Confidence(
        token=token if draw is None else draw.token,
        probability=(best if draw is None else jnp.exp(draw.logit - top)) / mass,
        margin=(best - jnp.exp(second - top)) / mass,
        entropy=jnp.log(mass) - moment / mass,
    )


# ---- Kullback-Leibler divergence -----------------------------------------------------------------------------------


class Divergence(NamedTuple):
    student: LogSum
    teacher: LogSum
    gap: jax.Array  # float32, sum of exp(z_teacher - top) (z_teacher - z_student)


def divergence(z_student, z_teacher):
    teacher, exp = log_sum(z_teacher)
    return Divergence(log_sum(z_student)[0], teacher, total(exp * (z_teacher - z_student)))


def merge_divergences(a: Divergence, b: Divergence):
    teacher, scale_a, scale_b = merge_log_sums(a.teacher, b.teacher)
    return Divergence(merge_log_sums(a.student, b.student)[0], teacher, scale_a * a.gap + scale_b * b.gap)


def read_divergence(divergence: Divergence):
    """KL(teacher || student) in nats."""
    s, t, gap = divergence
    # E_teacher[z_teacher - z_student] less the difference of the log-sum-exps, large parts first.
    return gap / t.mass - (t.top - s.top) - (jnp.log(t.mass) - jnp.log(s.mass))


# ---- negative log-likelihood ---------------------------------------------------------------------------------------


class Likelihood(NamedTuple):
    sum: LogSum
    picked: jax.Array  # float32, the logit of the target, 0 before its tile


def likelihood(z, ids, targets):
    return Likelihood(log_sum(z)[0], total(jnp.where(ids == targets, z, 0)))


def merge_likelihoods(a: Likelihood, b: Likelihood):
    return Likelihood(merge_log_sums(a.sum, b.sum)[0], a.picked + b.picked)


def read_likelihood(likelihood: Likelihood):
    """-log probability of the target in nats."""
    (top, mass), picked = likelihood
    return jnp.log(mass) + (top - picked)
