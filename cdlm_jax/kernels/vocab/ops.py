"""The public functions, as walks over the vocabulary that an engine (of `xla`, `tpu` or `gpu`) makes."""

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
    read_divergence,
    read_likelihood,
    read_peak,
)


def per_row(tree):
    """[...] -> [..., 1]"""
    return jax.tree.map(lambda x: x[..., None], tree)


def confidence(engine, hidden, head, forbidden, temperature, seeds: Seeds | None) -> Confidence:
    def measure(z, ids, seeds):
        barred = reduce(jnp.logical_or, (ids == token for token in forbidden)) if forbidden else None
        return engine.peak(*z, ids, barred, temperature, seeds)

    rows = Rows((hidden,), extra=per_row(seeds))
    found = read_peak(engine.statistics(measure, merge_peaks, rows, (head,)))
    return jax.tree.map(lambda x: x[..., 0], found)


# ---- Kullback-Leibler divergence -----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_kl(engine, student_hidden, teacher_hidden, heads, weights):
    """heads: the student's and the teacher's, or one that is both."""
    return _kl_forward(engine, student_hidden, teacher_hidden, heads, weights)[0]


def _kl_forward(engine, student_hidden, teacher_hidden, heads, weights):
    rows = Rows((student_hidden, teacher_hidden), per_row(weights))
    found = engine.statistics(lambda z, ids, _: divergence(*z), merge_divergences, rows, heads)
    totals = found.student.value(), found.teacher.value()
    return jnp.sum(rows.weights * read_divergence(found)), (rows, heads, totals)


def _kl_backward(engine, saved, g):
    rows, heads, totals = saved

    def d_logits(z, ids, extra):
        scale, *totals = extra
        q, p = (jnp.exp(each - total) for each, total in zip(z, totals, strict=True))
        return scale * (q - p)

    rows = rows._replace(extra=(g * rows.weights, *totals))
    d_hidden, d_head = engine.pull_back(d_logits, rows, heads)
    return d_hidden, None, (d_head, *(None for _ in heads[1:])), None


linear_kl.defvjp(_kl_forward, _kl_backward)


# ---- negative log-likelihood ---------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_nll(engine, hidden, head, targets, weights):
    return _nll_forward(engine, hidden, head, targets, weights)[0]


def nll(engine, hidden, head, targets):
    """[...] of each row by itself; not differentiable."""
    found = read_likelihood(_likelihoods(engine, Rows((hidden,), extra=per_row(targets)), head))
    return found[..., 0]


def _likelihoods(engine, rows: Rows, head):
    return engine.statistics(lambda z, ids, targets: likelihood(z[0], ids, targets), merge_likelihoods, rows, (head,))


def _nll_forward(engine, hidden, head, targets, weights):
    rows = Rows((hidden,), per_row(weights), per_row(targets))
    found = _likelihoods(engine, rows, head)
    return jnp.sum(rows.weights * read_likelihood(found)), (rows, head, found.sum.value())


def _nll_backward(engine, saved, g):
    rows, head, total = saved

    def d_logits(z, ids, extra):
        scale, total, targets = extra
        return scale * (jnp.exp(z[0] - total) - (ids == targets))

    rows = rows._replace(extra=(g * rows.weights, total, rows.extra))
    return *engine.pull_back(d_logits, rows, (head,)), None, None


linear_nll.defvjp(_nll_forward, _nll_backward)
