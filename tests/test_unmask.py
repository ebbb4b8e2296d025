"""The unmask policies against their definitions, written out position by position."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import again, examples
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.config import InputError
from cdlm_jax.decoding.unmask import (
    Allowance,
    EntropyBudget,
    Factor,
    FirstThen,
    Margin,
    Quota,
    Threshold,
    Timesteps,
)
from cdlm_jax.kernels.vocab import Confidence

# ---- the definitions -----------------------------------------------------------------------------------------------


def decide(policy, row: Confidence, masked, step: int) -> tuple[set[int], float]:
    """One row of a block: (positions finalized, how far the nearest comparison was from going the other way)."""
    places = [i for i, open_ in enumerate(masked) if open_]
    if not places:
        return set(), math.inf
    match policy:
        case Threshold(tau, inclusive):
            return above(row.probability, tau, places, inclusive)
        case Margin(gap):
            return above(row.margin, gap, places)
        case Factor(factor):
            return by_factor(row.probability, factor, places)
        case EntropyBudget(budget):
            return within_budget(row.entropy, budget, places)
        case Quota(steps):
            return leading(falling(row.probability, places), row.probability, deal(len(masked), steps)[step])
        case Timesteps(steps, eps):
            surest = falling([-e for e in row.entropy], places)
            return leading(surest, row.entropy, int(np.float32(len(places)) * share_of(step, steps, eps)))
        case Allowance(steps, tau):
            return from_an_allowance(row.probability, len(masked), steps, tau, step, places)
        case FirstThen() if step == 0:
            return {0} & set(places), math.inf
        case FirstThen(rest):
            return decide(rest, row, masked, step)
    raise AssertionError(policy)


def falling(score, places):
    """Places by falling score, the lowest place first among equals."""
    return sorted(places, key=lambda i: (-score[i], i))


def leading(order, score, count):
    """The first `count` of an order; in doubt by the gap to the first left out."""
    taken, left = order[:count], order[count:]
    return set(taken), abs(score[taken[-1]] - score[left[0]]) if taken and left else math.inf


def above(score, bar, places, inclusive=False):
    taken = {i for i in places if score[i] > bar or inclusive and score[i] == bar}
    doubt = min(abs(score[i] - bar) for i in places)
    if taken:
        return taken, doubt
    taken, gap = leading(falling(score, places), score, 1)
    return taken, min(doubt, gap)


def by_factor(score, factor, places):
    """tests/golden/README.md: c_1 always passes, c_j passes a bar of 1 - f / (j + 1); only the last failing: all n."""
    order, count, doubt = falling(score, places), 1, math.inf
    for j in range(2, len(order) + 1):
        over = score[order[j - 1]] - (1 - factor / (j + 1))
        doubt = min(doubt, abs(over))
        if over < 0:
            break
        count = j
    if count == len(order) - 1:
        count = len(order)
    taken, gap = leading(order, score, count)
    return taken, min(doubt, gap)


def within_budget(entropy, budget, places):
    """As many of the surest as have, all but the largest, a total entropy within the budget."""
    order, count, doubt = falling([-e for e in entropy], places), 1, math.inf
    for k in range(2, len(order) + 1):
        spent = sum(entropy[i] for i in order[: k - 1])
        doubt = min(doubt, abs(spent - budget))
        if spent > budget:
            break
        count = k
    taken, gap = leading(order, entropy, count)
    return taken, min(doubt, gap)


def share_of(step, steps, eps):
    """Dream: the share of masked positions revealed between the times before and after a step; at last all."""
    times = np.linspace(1, eps, steps + 1, dtype=np.float32)
    return np.float32(1) if step == steps - 1 else 1 - times[step + 1] / times[step]


def from_an_allowance(score, size, steps, tau, step, places):
    """Of the best places, as many as have been dealt and not used: those that reach tau, and the best of all."""
    dealt = size // steps * min(step + 1, steps)
    unused = max(dealt - (size - len(places)), 0)
    order = falling(score, places)
    looked_at, gap = leading(order, score, unused)
    taken = {i for i in looked_at if score[i] >= tau or i == order[0]}
    return taken, min([gap, *(abs(score[i] - tau) for i in looked_at)])


def deal(size, steps):
    """Positions dealt to the steps of a block one by one, like cards: how many each step gets."""
    steps = size if steps is None else steps
    return [sum(card % steps == step for card in range(size)) for step in range(steps)]


# ---- tests ---------------------------------------------------------------------------------------------------------

POLICIES = [
    *(Threshold(tau) for tau in (0.0, 0.5, 0.875, 1.0)),
    *(Margin(gap) for gap in (0.0, 0.5, 1.0)),
    *(Factor(factor) for factor in (0.25, 0.75, 1.0, 3.0)),
    *(EntropyBudget(budget) for budget in (0.0, 0.5, 1.5)),
    *(Quota(steps) for steps in (None, 1, 2, 3, 6, 9)),
    *(Threshold(tau, inclusive=True) for tau in (0.0, 0.5, 1.0)),
    *(Timesteps(steps) for steps in (1, 4, 6)),
    Timesteps(4, eps=0.5),
    *(Allowance(steps, tau) for steps, tau in ((1, 0.5), (2, 0.0), (3, 0.5), (6, 0.875), (6, 1.0))),
    *(FirstThen(rest) for rest in (Threshold(0.5, inclusive=True), Timesteps(4))),
]
AT_LEAST_ONE = [policy for policy in POLICIES if isinstance(policy, (Threshold, Margin, Factor, EntropyBudget))]
ROWS, SIZE = 16, 6
LLADA_SCHEDULES, DREAM_SCHEDULES = (
    dict(np.load(GOLDEN / family / "schedule_counts.npz")) for family in ("llada", "dream")
)


def grid(rng):
    """[ROWS, SIZE] of eighths in [0, 1]: ties and values equal to the bar abound, and all arithmetic is exact."""
    return (rng.integers(0, 9, (ROWS, SIZE)) / 8).astype(np.float32)


def candidates_of(rng):
    return Confidence(rng.integers(0, 50, (ROWS, SIZE), np.int32), grid(rng), grid(rng), grid(rng))


def chosen(policy, probability=(), *, margin=(), entropy=(), masked=None):
    """The positions that a policy finalizes in one row, at the first step of its block."""
    masked = [True] * max(map(len, (probability, margin, entropy))) if masked is None else masked

    def rows(values, dtype):  # padded with filled positions to the one shape that is compiled
        return jnp.tile(jnp.array([*values, *[0] * (SIZE - len(values))], dtype), (ROWS, 1))

    tokens = rows([], jnp.int32)
    candidates = Confidence(tokens, *(rows(values, jnp.float32) for values in (probability, margin, entropy)))
    select = policy(candidates, rows(masked, bool), tokens[:, 0])
    assert (select == select[0]).all()
    return np.flatnonzero(select[0]).tolist()


def steps_of(policy):
    """Steps that make a difference to it."""
    if isinstance(policy, FirstThen):
        return max(2, steps_of(policy.rest))
    steps = getattr(policy, "steps", 1) or SIZE
    return steps + 1 if isinstance(policy, Allowance) else steps


@again
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_definition(policy):
    compiled = jax.jit(lambda candidates, masked, step: policy(candidates, masked, step))

    @examples(5, 15)
    @given(st.integers(0, 2**31), st.sampled_from([0.2, 0.6, 1.0]))
    def check(seed, density):
        rng = np.random.default_rng(seed)
        candidates, masked = candidates_of(rng), rng.uniform(size=(ROWS, SIZE)) < density
        step = rng.integers(0, steps_of(policy), ROWS, np.int32)
        select = np.asarray(compiled(candidates, masked, step))
        assert select.shape == masked.shape and select.dtype == bool
        for row in range(ROWS):
            one = Confidence(*(np.asarray(values[row], np.float64) for values in candidates))
            expected, _ = decide(policy, one, masked[row], step[row])
            assert set(np.flatnonzero(select[row]).tolist()) == expected, (one, masked[row], step[row])

    check()


@pytest.mark.parametrize("policy", AT_LEAST_ONE, ids=str)
def test_at_least_one_and_never_a_filled_position(policy):
    rng = np.random.default_rng(0)
    masked = np.stack([rng.permutation(SIZE) < count % (SIZE + 1) for count in range(ROWS)])
    select = np.asarray(policy(candidates_of(rng), masked, jnp.zeros(ROWS, jnp.int32)))
    assert not (select & ~masked).any()
    np.testing.assert_array_equal(select.any(axis=1), masked.any(axis=1))


@pytest.mark.parametrize(
    "policy",
    [
        *(Threshold(1.0), Threshold(1.0, inclusive=True), Margin(1.0), Factor(0.01), EntropyBudget(0.0), Quota(None)),
        *(Timesteps(2, eps=0.5), Allowance(1, 1.0)),
    ],
    ids=str,
)
def test_ties_go_to_the_lowest_position(policy):
    masked = [False, True, True, False, True, True]
    one_each = {"probability": [0.5] * 6, "margin": [0.5] * 6, "entropy": [0.5] * 6}
    assert chosen(policy, masked=masked, **one_each) == [1]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_scores_that_are_not_numbers_still_end_a_block(policy):
    nothing = np.full((ROWS, SIZE), np.nan, np.float32)
    candidates = Confidence(np.zeros((ROWS, SIZE), np.int32), nothing, nothing, nothing)
    masked, step = np.ones((ROWS, SIZE), bool), np.zeros(ROWS, np.int32)
    for _ in range(SIZE):
        masked &= ~np.asarray(policy(candidates, masked, step))
        step += 1
    assert not masked.any()


def test_threshold_is_strict():
    assert chosen(Threshold(0.5), [0.5, 0.25, 0.75, 0.5]) == [2]
    assert chosen(Threshold(0.5), [0.25, 0.5, 0.5, 0.375]) == [1]
    assert chosen(Margin(0.25), margin=[0.25, 0.5, 0.0]) == [1]


def test_an_inclusive_threshold_is_not():
    assert chosen(Threshold(0.5, inclusive=True), [0.5, 0.25, 0.75, 0.5]) == [0, 2, 3]
    assert chosen(Threshold(1.0, inclusive=True), [0.5, 0.75]) == [1]


def test_a_filled_position_is_no_candidate_however_sure():
    assert chosen(Threshold(0.5), [1.0, 0.25, 0.125], masked=[False, True, True]) == [1]
    assert chosen(Factor(1.0), [1.0, 1.0, 0.25], masked=[False, False, True]) == [2]


def test_factor_keeps_the_trap_of_upstream():
    """When only the last confidence fails its bar, it is taken all the same (tests/golden/README.md)."""
    assert chosen(Factor(1.0), [0.9, 0.8, 0.1, 0.1]) == [0, 1]
    assert chosen(Factor(1.0), [0.9, 0.8, 0.8, 0.1]) == [0, 1, 2, 3]
    assert chosen(Factor(1.0), [0.9, 0.1]) == [0, 1]
    assert chosen(Factor(1.0), [0.1, 0.1, 0.1]) == [0]


def test_entropy_budget_leaves_out_the_largest():
    assert chosen(EntropyBudget(0.5), entropy=[2.0, 0.25, 0.25, 3.0]) == [0, 1, 2]
    assert chosen(EntropyBudget(0.375), entropy=[2.0, 0.25, 0.25, 3.0]) == [1, 2]
    assert chosen(EntropyBudget(0.0), entropy=[0.0, 0.0, 1.0, 1.0]) == [0, 1, 2]


def run_of(policy, size, steps, entropy):
    """Positions that a policy takes at each step of a block of `size`, which is then full."""
    masked, counts = np.ones((1, size), bool), []
    candidates = Confidence(*np.random.default_rng(size).uniform(size=(4, 1, size)).astype(np.float32))
    policy = jax.jit(policy)
    for step in range(steps):
        select = np.asarray(policy(candidates, masked, np.array([step], np.int32)))
        counts.append(int(select.sum()))
        score = -candidates.entropy if entropy else candidates.probability
        assert select.sum() == 0 or masked.sum() == select.sum() or score[select].min() > score[masked & ~select].max()
        masked &= ~select
    assert not masked.any()
    return counts


@pytest.mark.parametrize("name", sorted(LLADA_SCHEDULES))
def test_golden_schedule(name):
    """LLaDA's get_num_transfer_tokens: n positions of a block over its steps."""
    size, steps = map(int, re.fullmatch(r"n(\d+)_steps(\d+)_counts", name).groups())
    counts = run_of(Quota(steps), size, steps, entropy=False)
    assert counts == LLADA_SCHEDULES[name].tolist() == deal(size, steps)


@pytest.mark.parametrize("name", sorted(name for name in DREAM_SCHEDULES if name.endswith("_counts")))
def test_golden_schedule_of_dream(name):
    """Its float32 timesteps, but for their last bits, and exactly the tokens that they make."""
    size, steps, eps = re.fullmatch(r"n(\d+)_steps(\d+)_eps(.+)_counts", name).groups()
    size, steps, schedule = int(size), int(steps), Timesteps(int(steps), float(eps))
    times = DREAM_SCHEDULES[name.replace("_counts", "_timesteps")]
    shares = np.asarray(schedule.share(jnp.arange(steps)))
    assert times.dtype == shares.dtype == np.float32
    np.testing.assert_allclose(shares, np.append(1 - times[1:-1] / times[:-2], 1), rtol=0, atol=2**-22)
    assert run_of(schedule, size, steps, entropy=True) == DREAM_SCHEDULES[name].tolist()


def test_as_many_timesteps_as_positions():
    """The trap of upstream's `_sample`: a forward that finalizes nothing, and at last one that finalizes two."""
    assert run_of(Timesteps(6), 6, 6, entropy=True) == [0, 1, 1, 1, 1, 2]


def test_an_allowance_carries_over():
    """What a step looks at and leaves is looked at by the next, and beyond the last step if need be."""
    assert run_of(Allowance(3, 0.0), 6, 3, entropy=False) == [2, 2, 2]
    assert run_of(Allowance(3, 1.0), 6, 6, entropy=False) == [1] * 6
    assert chosen(Allowance(3, 0.5), [0.75, 0.875, 0.625, 0.5, 0.25, 0.125]) == [0, 1]
    assert chosen(Allowance(3, 0.8125), [0.75, 0.875, 0.625, 0.5, 0.25, 0.125]) == [1]
    assert chosen(Allowance(1, 0.5), [0.75, 0.875, 0.625, 0.5, 0.25, 0.125]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "policy",
    [
        *(Threshold(0.5), Margin(0.5), Factor(0.5), EntropyBudget(0.5), Quota(2)),
        *(Timesteps(2), Allowance(2, 0.5), FirstThen(Quota(2))),
    ],
    ids=str,
)
def test_policies_are_frozen_values(policy):
    field = dataclasses.fields(policy)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, field.name, 1)
    same = dataclasses.replace(policy)
    assert same == policy and hash(same) == hash(policy)
    assert dataclasses.replace(policy, **{field.name: 1}) != policy


@pytest.mark.parametrize(
    "make, bad, message",
    [
        *((Allowance, (bad, 0.5), f"steps must be a positive integer, got {bad}") for bad in (0, 2.5)),
        *((Allowance, (2, bad), rf"tau must be in \[0, 1\], got {bad}") for bad in (1.5, math.nan)),
        *((Timesteps, bad, f"steps must be a positive integer, got {bad}") for bad in (0, -3, 2.5)),
        *((Timesteps, (4, bad), rf"eps must be in \(0, 1\), got {bad}") for bad in (0, 1, -0.1, math.nan)),
        *((Threshold, bad, rf"tau must be in \[0, 1\], got {bad}") for bad in (-0.1, 1.5, math.nan)),
        *((Margin, bad, rf"gap must be in \[0, 1\], got {bad}") for bad in (-0.1, 1.5, math.nan)),
        *((Factor, bad, f"factor must be positive, got {bad}") for bad in (0, -1.0, math.nan)),
        *((EntropyBudget, bad, f"budget must not be negative, got {bad}") for bad in (-0.5, math.nan)),
        *((Quota, bad, f"steps must be a positive integer, got {bad}") for bad in (0, -3, 2.5)),
    ],
)
def test_bad_arguments_are_refused(make, bad, message):
    with pytest.raises(InputError, match=f"^{make.__name__}: {message}$"):
        make(*bad) if isinstance(bad, tuple) else make(bad)
