"""The three losses against their formulas written out in NumPy float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cdlm_jax.config import InputError
from cdlm_jax.training.losses import (
    DREAM,
    LLADA,
    LossWeights,
    answer_share,
    consistency_loss,
    distillation_loss,
    masked_denoising_loss,
)
from cdlm_jax.trajectories.states import SCOPES, masked_response, sample_states

ROWS, LENGTH, BLOCK, WIDTH, VOCAB, MASK = 5, 8, 4, 6, 37, 36


def draw(seed=0):
    """teacher, target, student [rows, L, d], head [d, V] in float32."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(3, ROWS, LENGTH, WIDTH)).astype(np.float32)
    return *hidden, rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)


@cache
def draw_states(scope, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MASK, (ROWS, LENGTH), dtype=np.int32)
    order = np.stack([np.concatenate([rng.permutation(BLOCK), BLOCK + rng.permutation(BLOCK)]) for _ in range(ROWS)])
    keys = jax.random.split(jax.random.key(seed), ROWS)
    return sample_states(tokens, order, keys, block_size=BLOCK, mask_token_id=MASK, scope=scope)


def log_probabilities(hidden, head):
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def mean_divergence(teacher, student, head, sets, teacher_head):
    log_p, log_q = log_probabilities(teacher, teacher_head), log_probabilities(student, head)
    total = 0.0
    for row in range(ROWS):
        positions = np.flatnonzero(sets[row])
        kl = [np.sum(np.exp(log_p[row, i]) * (log_p[row, i] - log_q[row, i])) for i in positions]
        total += np.mean(kl) if len(kl) else 0.0
    return total / ROWS


def plain_divergence(teacher, student, head, sets, teacher_head):
    """The same in jnp, to differentiate."""
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32) @ teacher_head))
    log_q = jax.nn.log_softmax(student @ head)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.mean(jnp.sum(kl * sets, axis=1) / jnp.maximum(jnp.sum(sets, axis=1), 1))


def assert_same_gradients(loss, plain, *arguments):
    got, want = (jax.jit(jax.grad(f, tuple(range(len(arguments)))))(*arguments) for f in (loss, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distillation(scope, dtype):
    teacher, other, student, head = draw()
    teacher, newly = jnp.asarray(teacher, dtype), draw_states(scope).newly
    teacher_head = head + other[0, 0, :, None]  # a head that training has moved away from
    for frozen in (None, teacher_head):
        rebuilt = head if frozen is None else frozen
        got = distillation_loss(teacher, student, head, newly, teacher_head=frozen)
        np.testing.assert_allclose(got, mean_divergence(teacher, student, head, newly, rebuilt), rtol=1e-5)
        assert_same_gradients(
            lambda s, h, frozen=frozen: distillation_loss(teacher, s, h, newly, teacher_head=frozen),
            lambda s, h, rebuilt=rebuilt: plain_divergence(teacher, s, h, newly, rebuilt),
            student,
            head,
        )


@pytest.mark.parametrize("scope", SCOPES)
def test_consistency(scope):
    _, target, student, head = draw(1)
    remaining = draw_states(scope, 2).remaining
    assert 0 < np.sum(np.any(remaining, axis=1)) < ROWS  # some rows have an empty S
    got = consistency_loss(target, student, head, remaining)
    np.testing.assert_allclose(got, mean_divergence(target, student, head, remaining, head), rtol=1e-5)
    assert_same_gradients(
        lambda s, h: consistency_loss(target, s, h, remaining),
        lambda s, h: plain_divergence(target, s, h, remaining, jax.lax.stop_gradient(h)),
        student,
        head,
    )
    assert not np.any(jax.grad(consistency_loss)(target, student, head, remaining))


def test_empty_sets_contribute_nothing():
    _, target, student, head = draw()
    nothing = np.zeros((ROWS, LENGTH), bool)
    value, gradients = jax.value_and_grad(consistency_loss, (1, 2))(target, student, head, nothing)
    assert value == 0 and not any(np.any(g) for g in gradients)
    one_row = nothing.copy()
    one_row[2, 3] = True
    got = consistency_loss(target, student, head, one_row)
    np.testing.assert_allclose(got, mean_divergence(target, student, head, one_row, head), rtol=1e-5)


def test_masked_denoising():
    _, _, hidden, head = draw(2)
    targets = np.random.default_rng(2).integers(0, MASK, (ROWS, LENGTH), dtype=np.int32)
    _, masked, t = masked_response(targets, jax.random.split(jax.random.key(2), ROWS), mask_token_id=MASK)
    masked = masked.at[0].set(False)  # a small t can mask nothing

    log_q = log_probabilities(hidden, head)
    rows = [
        -sum(log_q[r, i, targets[r, i]] for i in np.flatnonzero(masked[r])) / (float(t[r]) * LENGTH)
        for r in range(ROWS)
    ]
    np.testing.assert_allclose(masked_denoising_loss(hidden, head, targets, masked, t), np.mean(rows), rtol=1e-5)

    def plain(hidden, head):
        picked = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], axis=-1)[..., 0]
        return jnp.mean(-jnp.sum(picked * masked, axis=1) / (t * LENGTH))

    assert_same_gradients(lambda h, w: masked_denoising_loss(h, w, targets, masked, t), plain, hidden, head)


def test_an_answer_is_averaged_over_its_own_tokens():
    answer = jnp.array([[5, 6, 0, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [1, 0, 7, 0, 0]])
    np.testing.assert_allclose(
        answer_share(answer, 0, 0.25),
        [
            [2 / 7, 2 / 7, 2 / 7, 0.5 / 7, 0.5 / 7],
            [1 / 2, 0.5 / 4, 0.5 / 4, 0.5 / 4, 0.5 / 4],
            [1 / 5] * 5,
            [4 / 11, 4 / 11, 1 / 11, 1 / 11, 1 / 11],  # what follows the first EOS is filler, whatever it is
        ],
    )
    np.testing.assert_allclose(answer_share(answer, 0, 1.0), np.full((4, 5), 1 / 5))
    np.testing.assert_allclose(answer_share(answer, 0, 0.0).sum(axis=1), 1)
    _, _, hidden, head = draw(2)
    targets = np.zeros((ROWS, LENGTH), np.int32)
    masked, t = np.ones((ROWS, LENGTH), bool), np.ones(ROWS, np.float32)
    first_only = masked_denoising_loss(hidden, head, targets, masked, t, share=answer_share(targets, 0, 0.0))
    np.testing.assert_allclose(first_only, -log_probabilities(hidden, head)[:, 0, 0].mean(), rtol=1e-5)


def test_equal_micro_batches_average_to_the_batch():
    teacher, target, student, head = (np.repeat(a, 2, axis=0) if a.ndim == 3 else a for a in draw())
    states = [np.repeat(a, 2, axis=0) for a in draw_states("later_blocks")]
    newly, remaining = states[2], states[3]
    t = np.linspace(0.1, 1, 2 * ROWS, dtype=np.float32)
    targets = states[1] % MASK

    def losses(rows):
        return (
            distillation_loss(teacher[rows], student[rows], head, newly[rows]),
            consistency_loss(target[rows], student[rows], head, remaining[rows]),
            masked_denoising_loss(student[rows], head, targets[rows], newly[rows], t[rows]),
        )

    halves = [losses(slice(0, ROWS)), losses(slice(ROWS, 2 * ROWS))]
    np.testing.assert_allclose(np.mean(halves, axis=0), losses(slice(None)), rtol=1e-6)


def test_loss_weights():
    assert (DREAM.distill, DREAM.consistency, DREAM.dlm) == (1.0, 0.5, 0.01)
    assert (LLADA.distill, LLADA.consistency, LLADA.dlm) == (1.0, 0.5, 0.1)
    assert LossWeights(distill=0, consistency=0, dlm=1).dlm == 1
    for bad in ((-1, 0, 1), (0, 0, 0), (float("nan"), 1, 1), (float("inf"), 1, 1)):
        with pytest.raises(InputError, match="finite, not negative, and not all zero"):
            LossWeights(**dict(zip(("distill", "consistency", "dlm"), bad, strict=True)))
