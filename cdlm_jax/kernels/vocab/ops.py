"""The three functions, as walks over the vocabulary that an engine (the module `xla` or `tpu`) makes."""

from functools import partial, reduce

import jax
import jax.numpy as jnp

from cdlm_jax.kernels.vocab.noise import Seeds
from cdlm_jax.kernels.vocab.reference import Confidence
from cdlm_jax.kernels.vocab.statistics import (
    Rows,
    divergence,
    likelihood,
    merge_divergences,
    merge_likelihoods,
    merge_peaks,
    peak,
    read_divergence,
    read_likelihood,
    read_peak,
)


def per_row(tree):
    """[...] -> [..., 1]"""
    return jax.tree.map(lambda x: x[..., None], tree)


def confidence(engine, hidden, head, forbidden, temperature, seeds: Seeds | None, tile) -> Confidence:
    def measure(z, ids, seeds):
        barred = reduce(jnp.logical_or, (ids == token for token in forbidden)) if forbidden else None
        return peak(*z, ids, barred, temperature, seeds)

    rows = Rows((hidden,), extra=per_row(seeds))
    found = read_peak(engine.statistics(measure, merge_peaks, rows, (head,), tile))
    return jax.tree.map(lambda x: x[..., 0], found)


# ---- Kullback-Leibler divergence -----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def linear_kl(engine, teacher_hidden, teacher_head, student_hidden, head, weights, tile):
    return _kl_forward(engine, teacher_hidden, teacher_head, student_hidden, head, weights, tile)[0]


def _kl_forward(engine, teacher_hidden, teacher_head, student_hidden, head, weights, tile):
    rows, heads = Rows((student_hidden, teacher_hidden), per_row(weights)), (head, teacher_head)
    found = engine.statistics(lambda z, ids, _: divergence(*reversed(z)), merge_divergences, rows, heads, tile)
    totals = found.student.value(), found.teacher.value()
    return jnp.sum(rows.weights * read_divergence(found)), (rows, heads, totals)


def _kl_backward(engine, tile, saved, g):
    rows, heads, totals = saved

    def d_logits(z, ids, extra):
        scale, *totals = extra
        q, p = (jnp.exp(each - total) for each, total in zip(z, totals, strict=True))
        return scale * (q - p)

    rows = rows._replace(extra=(g * rows.weights, *totals))
    return None, None, *engine.pull_back(d_logits, rows, heads, tile), None


linear_kl.defvjp(_kl_forward, _kl_backward)


# ---- negative log-likelihood ---------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def linear_nll(engine, hidden, head, targets, weights, tile):
    return _nll_forward(engine, hidden, head, targets, weights, tile)[0]


def _nll_forward(engine, hidden, head, targets, weights, tile):
    rows = Rows((hidden,), per_row(weights), per_row(targets))
    found = engine.statistics(
        lambda z, ids, targets: likelihood(*z, ids, targets), merge_likelihoods, rows, (head,), tile
    )
    return jnp.sum(rows.weights * read_likelihood(found)), (rows, head, found.sum.value())


def _nll_backward(engine, tile, saved, g):
    rows, head, total = saved

    def d_logits(z, ids, extra):
        scale, total, targets = extra
        return scale * (jnp.exp(z[0] - total) - (ids == targets))

    rows = rows._replace(extra=(g * rows.weights, total, rows.extra))
    return *engine.pull_back(d_logits, rows, (head,), tile), None, None


linear_nll.defvjp(_nll_forward, _nll_backward)
