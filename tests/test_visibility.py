"""The visibility rule against its definition by groups, and the property that makes a cache exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.visibility import dense_mask, row_end, visible_end, visible_end_at

few = examples(20, 60)
ROWS, LENGTH = 3, 20  # one shape: only contents are drawn, so that nothing is compiled twice
lengths = st.lists(st.integers(1, LENGTH), min_size=ROWS, max_size=ROWS)
block_sizes = st.integers(1, 7)


def sees(prompt_length, seq_len, block_size):
    """bool [seq_len, seq_len] from the groups: the prompt is group 0, response block b is group b + 1."""
    group = [0 if i < prompt_length else (i - prompt_length) // block_size + 1 for i in range(seq_len)]
    return np.array([[group[query] >= group[key] for key in range(seq_len)] for query in range(seq_len)])


@few
@given(lengths, block_sizes)
def test_the_rule_is_the_order_of_the_groups(prompts, block_size):
    mask = dense_mask(visible_end(jnp.array(prompts), LENGTH, block_size), LENGTH)
    expected = np.stack([sees(prompt, LENGTH, block_size) for prompt in prompts])
    np.testing.assert_array_equal(mask, expected)


@few
@given(lengths, block_sizes)
def test_what_is_seen_never_sees_more(prompts, block_size):
    """visible_end(j) <= visible_end(i) for every j that i sees: nothing later can leak through j, at any depth."""
    for end in np.asarray(visible_end(jnp.array(prompts), LENGTH, block_size)):
        for i in range(LENGTH):
            assert end[i] > i
            assert all(end[j] <= end[i] for j in range(min(end[i], LENGTH)))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_golden_block_causal_mask(family, golden):
    case = golden(f"{family}/block_causal")
    length = case.arrays["input_ids"].shape[1]
    end = visible_end(jnp.array([case.args["prompt_length"]]), length, case.args["block_length"])
    np.testing.assert_array_equal(dense_mask(end, length)[0], case.arrays["attend"].astype(bool))


def test_a_teacher_sees_everything():
    end = visible_end(jnp.array([3, 5]), 8, None)
    assert end.dtype == jnp.int32
    np.testing.assert_array_equal(end, np.full((2, 8), 8))
    assert dense_mask(end, 8).all()


def test_a_teacher_on_ragged_rows_sees_no_padding():
    end = row_end(jnp.array([1, 3]), 4, 9)
    assert end.dtype == jnp.int32
    np.testing.assert_array_equal(dense_mask(end, 9), [[[key < last for key in range(9)]] * 9 for last in (5, 7)])


@few
@given(lengths, block_sizes, st.integers(0, 2**31))
def test_any_positions(prompts, block_size, seed):
    positions = np.random.default_rng(seed).integers(0, LENGTH, (ROWS, 5))
    whole = visible_end(jnp.array(prompts), LENGTH, block_size)
    part = visible_end_at(jnp.array(positions), jnp.array(prompts), block_size)
    assert part.dtype == whole.dtype == jnp.int32
    np.testing.assert_array_equal(part, np.take_along_axis(np.asarray(whole), positions, axis=1))


def test_left_padding_is_hidden():
    end = visible_end(jnp.array([4, 4]), 6, 2)
    mask = np.asarray(dense_mask(end, 6, valid_start=jnp.array([0, 3])))
    np.testing.assert_array_equal(mask[0], sees(4, 6, 2))
    assert not mask[1, :, :3].any()
    np.testing.assert_array_equal(mask[1, :, 3:], sees(4, 6, 2)[:, 3:])


def test_more_or_fewer_keys_than_queries():
    end = visible_end(jnp.array([3]), 9, 2)
    wide = np.asarray(dense_mask(end[:, 3:5], 12))
    assert wide.shape == (1, 2, 12)
    np.testing.assert_array_equal(wide[0], [[key < 5 for key in range(12)]] * 2)


def test_under_jit_lengths_are_data():
    rule = jax.jit(visible_end, static_argnums=(1, 2))
    for prompts in ([2, 5], [1, 7]):
        np.testing.assert_array_equal(rule(jnp.array(prompts), 10, 3), visible_end(jnp.array(prompts), 10, 3))
    assert rule._cache_size() == 1
