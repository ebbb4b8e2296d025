"""States rebuilt from (tokens, order) against a plain replay of the trajectory, step by step."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.config import InputError
from cdlm_jax.trajectories.states import SCOPES, masked_response, sample_states, state_at

MASK = 99


def trajectory(rng, blocks, block_size):
    """(tokens [L], order [L]) of a random teacher: one token per step, blocks left to right."""
    order = [start + rng.permutation(block_size) for start in range(0, blocks * block_size, block_size)]
    return rng.integers(0, 50, blocks * block_size, dtype=np.int32), np.concatenate(order).astype(np.int32)


def replay(tokens, order):
    """Every state as the decoder would have seen it: a list of L + 1 lists."""
    position_of_step = {step: position for position, step in enumerate(order.tolist())}
    state, states = [MASK] * len(tokens), []
    for step in range(len(tokens)):
        states.append(list(state))
        state[position_of_step[step]] = int(tokens[position_of_step[step]])
    return [*states, state]


def expect(states, k, later, last):
    """(y, y*, U, S), S within positions before `last`."""
    y, y_star = states[k], states[later]
    newly = [a == MASK and b != MASK for a, b in zip(y, y_star, strict=True)]
    return y, y_star, newly, [token == MASK and i < last for i, token in enumerate(y_star)]


def assert_rows(got, expected):
    for array, want in zip(got, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(array, np.array(want))


sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
few = examples(5, 15)
rebuild_states = jax.jit(partial(state_at, mask_token_id=MASK), static_argnames="block_size")
sample = jax.jit(partial(sample_states, mask_token_id=MASK), static_argnames=("block_size", "scope"))
mask_response = jax.jit(partial(masked_response, mask_token_id=MASK))


@few
@given(sizes)
def test_every_state_replays(size):
    blocks, block_size, seed = size
    tokens, order = trajectory(np.random.default_rng(seed), blocks, block_size)
    length, states = len(tokens), replay(tokens, order)
    ends = [(k // block_size + 1) * block_size for k in range(length)]

    def rebuild(steps, later=None):
        batch = [np.tile(a, (len(steps), 1)) for a in (tokens, order)]
        later = None if later is None else np.array(later)
        return rebuild_states(*batch, np.array(steps), later, block_size=block_size)

    got = rebuild(range(length))
    assert got.tokens.dtype == got.completed.dtype == jnp.int32
    assert_rows(got, [expect(states, k, ends[k], length) for k in range(length)])
    pairs = [(k, later) for k in range(length) for later in range(k + 1, ends[k] + 1)]
    assert_rows(rebuild(*zip(*pairs, strict=True)), [expect(states, k, later, ends[k]) for k, later in pairs])


@few
@given(sizes, st.sampled_from(SCOPES))
def test_sampled_states_are_states_of_the_replay(size, scope):
    blocks, block_size, seed = size
    rng = np.random.default_rng(seed)
    rows = [trajectory(rng, blocks, block_size) for _ in range(4)]
    tokens, order = map(np.stack, zip(*rows, strict=True))
    keys = jax.random.split(jax.random.key(seed), 4)
    got = sample(tokens, order, keys, block_size=block_size, scope=scope)
    steps, later_steps = ((state != MASK).sum(1).tolist() for state in (got.tokens, got.completed))
    expected = []
    for row, k, later in zip(rows, steps, later_steps, strict=True):
        end = (k // block_size + 1) * block_size
        assert later == end if scope == "later_blocks" else k < later <= end
        expected.append(expect(replay(*row), k, later, len(row[0]) if scope == "later_blocks" else end))
    assert_rows(got, expected)


def sample_many(scope, rows=20_000, blocks=3, block_size=4):
    tokens, order = trajectory(np.random.default_rng(0), blocks, block_size)
    batch = [np.tile(a, (rows, 1)) for a in (tokens, order)]
    keys = jax.random.split(jax.random.key(1), rows)
    got = sample(*batch, keys, block_size=block_size, scope=scope)
    return [np.asarray((state != MASK).sum(1)) for state in (got.tokens, got.completed)]


@pytest.mark.parametrize("scope", SCOPES)
def test_steps_are_uniform_over_the_non_final_states(scope):
    steps, _ = sample_many(scope)
    counts = np.bincount(steps, minlength=12)
    assert len(counts) == 12
    deviation = 6 * np.sqrt(20_000 / 12 * 11 / 12)
    np.testing.assert_allclose(counts, 20_000 / 12, atol=deviation)


def test_later_steps_are_uniform_over_the_rest_of_the_block():
    counts = Counter(zip(*(steps.tolist() for steps in sample_many("same_block")), strict=True))
    for k in range(12):
        later = range(k + 1, (k // 4 + 1) * 4 + 1)
        got = [counts[k, step] for step in later]
        np.testing.assert_allclose(got, sum(got) / len(later), atol=6 * np.sqrt(sum(got) / len(later)) + 1e-9)
    assert len(counts) == 3 * (4 + 3 + 2 + 1)


def test_rows_depend_on_their_own_key_alone():
    rng = np.random.default_rng(3)
    tokens, order = map(np.stack, zip(*(trajectory(rng, 3, 4) for _ in range(6)), strict=True))
    keys = jax.random.split(jax.random.key(2), 6)

    def both(rows):
        states = sample(tokens[rows], order[rows], keys[rows], block_size=4)
        return *states, *mask_response(tokens[rows], keys[rows])

    whole = both(slice(None))
    for array, *halves in zip(whole, both(slice(0, 3)), both(slice(3, 6)), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(halves))


def test_jit_compiles_it():
    tokens, order = (a[None] for a in trajectory(np.random.default_rng(0), 2, 4))
    keys = jax.random.split(jax.random.key(0), 1)
    for scope in SCOPES:
        plain = sample_states(tokens, order, keys, block_size=4, mask_token_id=MASK, scope=scope)
        for a, b in zip(sample(tokens, order, keys, block_size=4, scope=scope), plain, strict=True):
            np.testing.assert_array_equal(a, b)


def test_masked_response():
    rows, length = 4000, 16
    targets = np.random.default_rng(0).integers(0, 50, (rows, length), dtype=np.int32)
    tokens, masked, t = mask_response(targets, jax.random.split(jax.random.key(0), rows))
    np.testing.assert_array_equal(tokens, np.where(masked, MASK, targets))
    assert tokens.dtype == jnp.int32 and masked.dtype == bool and t.dtype == jnp.float32
    assert float(t.min()) >= 1e-3 and float(t.max()) <= 1
    np.testing.assert_allclose(np.histogram(t, bins=10, range=(0, 1))[0], rows / 10, atol=6 * np.sqrt(rows / 10))
    # The masked share of a row has mean t and variance t (1 - t) / length.
    share, t = np.mean(masked, axis=1), np.asarray(t, np.float64)
    assert abs(np.mean(share - t)) < 6 * np.sqrt(1 / 6 / length / rows)
    assert np.mean((share - t) ** 2) == pytest.approx(np.mean(t * (1 - t)) / length, rel=0.1)


def test_bad_arguments_are_refused():
    tokens, order = (a[None] for a in trajectory(np.random.default_rng(0), 2, 4))
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(InputError, match="scope 'block' is unknown; allowed: later_blocks, same_block"):
        sample_states(tokens, order, keys, block_size=4, mask_token_id=MASK, scope="block")
    for block_size in (0, 3):
        with pytest.raises(InputError, match=f"8 response positions are not a multiple of block_size {block_size}"):
            sample_states(tokens, order, keys, block_size=block_size, mask_token_id=MASK)
