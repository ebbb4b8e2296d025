"""Packed distillation against the plain form: what a block sees, its hidden rows, every loss and its gradient."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from test_denoising import ALIGNMENTS, CONFIG, LENGTH, PROMPT_MAX, ROWS, random_model
from test_distill import BLOCK, config_of, moved, random_batch

from cdlm_jax.config import InputError
from cdlm_jax.decoding.common import append_response, predicting_rows
from cdlm_jax.training import distill, packed
from cdlm_jax.training.distill import DistillConfig, make_loss, make_student
from cdlm_jax.trajectories.states import state_at
from cdlm_jax.visibility import dense_mask, visible_end
from cdlm_jax.visibility import packed as packed_layout

few = examples(5, 25)
lengths = st.lists(st.integers(1, PROMPT_MAX), min_size=ROWS, max_size=ROWS)
block_sizes = st.sampled_from([1, 2, 4, 8])  # of LENGTH = 8
MASK = CONFIG.mask_token_id


# ---- what a packed row sees ----------------------------------------------------------------------------------------


@few
@given(lengths, block_sizes)
def test_a_noisy_block_sees_the_prompt_the_clean_blocks_before_it_and_itself(prompts, block_size):
    clean = PROMPT_MAX + LENGTH
    positions, end, own = packed_layout(jnp.array(prompts), clean, LENGTH, block_size)
    mask = np.asarray(dense_mask(end, clean + LENGTH, own=own))
    plain = np.asarray(dense_mask(visible_end(jnp.array(prompts), clean, block_size), clean))
    assert positions.dtype == end.dtype == own.start.dtype == own.end.dtype == jnp.int32
    for row, prompt in enumerate(prompts):
        real = prompt + LENGTH  # what follows up to `clean` is padding
        np.testing.assert_array_equal(mask[row, :real, :clean], plain[row, :real])
        assert not mask[row, :clean, clean:].any()
        assert not mask[row, clean:, real:clean].any()
        np.testing.assert_array_equal(positions[row], [*range(clean), *range(prompt, real)])
        for i in range(LENGTH):
            start = i - i % block_size
            seen = {*range(prompt + start), *range(clean + start, clean + start + block_size)}
            assert {*np.flatnonzero(mask[row, clean + i])} == seen


def test_left_padding_is_hidden_from_packed_rows():
    _, end, own = packed_layout(jnp.array([4]), 8, 4, 2)
    mask = np.asarray(dense_mask(end, 12, valid_start=jnp.array([3]), own=own))
    assert not mask[..., :3].any() and mask[0, 8, 8]
    np.testing.assert_array_equal(mask[..., 3:], np.asarray(dense_mask(end, 12, own=own))[..., 3:])


# ---- hidden rows ---------------------------------------------------------------------------------------------------

MODELS = {alignment: random_model(alignment) for alignment in ALIGNMENTS}
block_hidden = jax.jit(packed.block_hidden)


@partial(jax.jit, static_argnames=("block_size", "alignment"))
def plain_hidden(model, prompt, prompt_length, response, block_size, alignment):
    tokens = append_response(prompt, prompt_length, response)
    hidden = model(tokens, visible_end=visible_end(prompt_length, tokens.shape[1], block_size))
    return predicting_rows(hidden, prompt_length, LENGTH, alignment)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@few
@given(lengths, st.sampled_from([2, 8]), st.integers(0, 2**31))
def test_a_block_has_the_hidden_rows_of_the_plain_form_at_its_state(alignment, prompts, block_size, seed):
    rng, model, prompts = np.random.default_rng(seed), MODELS[alignment], np.array(prompts, np.int32)
    ids = partial(rng.integers, 2, CONFIG.vocab_size, dtype=np.int32)
    prompt, clean = ids((ROWS, PROMPT_MAX)), ids((ROWS, LENGTH))
    noisy = np.where(rng.random((ROWS, LENGTH)) < rng.random((ROWS, 1)), MASK, clean)
    blocks = LENGTH // block_size
    found = block_hidden(model, prompt, prompts, clean, packed.split(noisy, block_size))
    found = np.asarray(found).reshape(ROWS, blocks, block_size, -1)
    for block in range(blocks):
        here = slice(block * block_size, (block + 1) * block_size)
        state = np.full_like(clean, MASK)
        state[:, : here.start], state[:, here] = clean[:, : here.start], noisy[:, here]
        expected = plain_hidden(model, prompt, prompts, state, block_size, alignment)
        np.testing.assert_allclose(found[:, block], expected[:, here], atol=2e-5, rtol=1e-5)


# ---- states --------------------------------------------------------------------------------------------------------


def steps_of(state):
    """The steps in its own block, [rows, blocks], of the states of every block."""
    return np.sum(np.asarray(state) != MASK, axis=1).reshape(ROWS, -1)


block_states = jax.jit(partial(packed.block_states, block_size=BLOCK, mask_token_id=MASK))
one_state = jax.jit(partial(state_at, block_size=BLOCK, mask_token_id=MASK))


def test_each_block_has_a_state_of_its_own():
    batch = random_batch()
    drawn = set()
    for seed in range(60):
        keys = jax.random.split(jax.random.key(seed), ROWS)
        states = block_states(batch["tokens"], batch["order"], keys)
        first, later = steps_of(states.tokens), steps_of(states.completed)
        for block in range(LENGTH // BLOCK):
            start, here = block * BLOCK, slice(block * BLOCK, (block + 1) * BLOCK)
            expected = one_state(batch["tokens"], batch["order"], start + first[:, block], start + later[:, block])
            for ours, theirs in zip(states, expected, strict=True):
                ours = np.asarray(ours).reshape(ROWS, -1, BLOCK)[:, block]
                np.testing.assert_array_equal(ours, np.asarray(theirs)[:, here])
        drawn |= {tuple(pair) for pair in first.tolist()}
    assert drawn == {(a, b) for a in range(BLOCK) for b in range(BLOCK)}  # the blocks' steps are independent


# ---- losses --------------------------------------------------------------------------------------------------------


quickly_compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("alignment", "rank", "remat"),
    [("shifted", 0, True), pytest.param("same_position", 3, False, marks=pytest.mark.slow)],
)
def test_losses_and_gradient_are_the_means_of_the_plain_form_over_the_blocks(alignment, rank, remat):
    options = {"consistency_scope": "same_block", "lora_rank": rank}
    batch, keys = random_batch(), jax.random.split(jax.random.key(8), ROWS)
    graphdef, trainable, frozen = make_student(random_model(alignment), config_of(**options), jax.random.key(1))
    trainable = moved(trainable)
    config = config_of(**options, mode="packed", remat=remat)
    loss_fn = quickly_compiled(jax.value_and_grad(make_loss(graphdef, config, BLOCK), has_aux=True))
    (loss, metrics), gradient = loss_fn(trainable, frozen, batch, keys, 0)

    @quickly_compiled
    def plain(step, later):
        def sample_states(tokens, order, keys, *, block_size, mask_token_id, scope):
            return state_at(tokens, order, step, later, block_size=block_size, mask_token_id=mask_token_id)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "sample_states", sample_states)
            plain_fn = make_loss(graphdef, config_of(**options), BLOCK)
            return jax.value_and_grad(plain_fn, has_aux=True)(trainable, frozen, batch, keys, 0)

    state_keys = jax.vmap(jax.random.split)(keys)[:, 0]
    states = packed.block_states(batch["tokens"], batch["order"], state_keys, block_size=BLOCK, mask_token_id=MASK)
    blocks, steps = range(LENGTH // BLOCK), zip(steps_of(states.tokens).T, steps_of(states.completed).T, strict=True)
    of_blocks = [plain(b * BLOCK + first, b * BLOCK + later) for b, (first, later) in zip(blocks, steps, strict=True)]
    (expected_loss, expected), expected_gradient = jax.tree.map(lambda *values: sum(values) / len(blocks), *of_blocks)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert metrics.keys() == expected.keys() == {"distill", "consistency", "dlm", "agreement"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
        assert value > 1e-3 or name == "agreement"
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-5 * np.abs(theirs).max())

    # Stored and student rows meet position for position: of a teacher that is the student nothing is left to learn.
    student = nnx.merge(graphdef, trainable, frozen.student)
    hidden = block_hidden(student, batch["prompt"], batch["prompt_length"], batch["tokens"], states.tokens)
    itself = batch | {"hidden": np.asarray(hidden).reshape(ROWS, LENGTH, -1)}
    (_, metrics), _ = loss_fn(trainable, dataclasses.replace(frozen, teacher_head=student.head), itself, keys, 0)
    assert abs(metrics["distill"]) < 1e-5


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "dense"}, "distill.mode must be plain or packed, got 'dense'"),
        ({"mode": "packed"}, r"distill.consistency_scope same_block \(.*\), got offline and later_blocks$"),
        (
            {"mode": "packed", "consistency_scope": "same_block", "teacher": "online"},
            r"packed needs distill.teacher offline and .*, got online and same_block$",
        ),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as error:
        DistillConfig(steps=1, **changes)
    assert "\n" not in str(error.value)
