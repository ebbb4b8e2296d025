"""The train step on a linear toy problem: the update, accumulation, the average of parameters, donation, randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdlm_jax.training.step import TrainState, make_train_step

ROWS, WIDTH, RATE = 8, 3, 0.1


def loss_fn(trainable, frozen, batch, keys, step):
    """Squared error of a line, on inputs that each row's key disturbs."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    error = (batch["x"] + noise) @ trainable["w"] + frozen - batch["y"]
    return jnp.mean(error**2), {"absolute": jnp.mean(jnp.abs(error)), "step": step.astype(jnp.float32)}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=ROWS), jnp.float32),
    }


def start(optimizer, *, ema=False, dtype=jnp.float32):
    return TrainState.create({"w": jnp.arange(1, WIDTH + 1, dtype=dtype)}, optimizer, ema=ema)


FROZEN = np.float32(0.5)
SGD = optax.sgd(RATE)


def test_an_update_written_out():
    state, metrics = make_train_step(loss_fn, SGD, seed=3)(start(SGD), FROZEN, batch())
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), ROWS)
    noise = np.array([jax.random.normal(key, (WIDTH,)) for key in keys], np.float64)
    x, y, w = np.asarray(batch()["x"]) + noise, np.asarray(batch()["y"]), np.arange(1.0, WIDTH + 1)
    error = x @ w + 0.5 - y
    gradient = 2 * x.T @ error / ROWS
    np.testing.assert_allclose(state.trainable["w"], w - RATE * gradient, rtol=1e-5)
    expected = {
        "loss": np.mean(error**2),
        "absolute": np.mean(np.abs(error)),
        "grad_norm": np.sqrt(np.sum(gradient**2)),
        "step": 0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert (metrics[name].shape, metrics[name].dtype) == ((), jnp.float32), name
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert state.step == 1 and state.ema is None and state.evaluated is state.trainable


@pytest.mark.parametrize("accumulate", [2, 4, ROWS])
def test_accumulated_parts_are_one_batch(accumulate):
    whole = make_train_step(loss_fn, SGD, seed=3)(start(SGD), FROZEN, batch())
    parts = make_train_step(loss_fn, SGD, seed=3, accumulate=accumulate)(start(SGD), FROZEN, batch())
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


def test_the_average_of_parameters():
    """Each update moves it by 1 - min(decay, (1 + n) / (10 + n)) towards the new parameters."""
    decay = 0.3
    step, state = make_train_step(loss_fn, SGD, seed=3, ema_decay=decay), start(SGD, ema=True)
    average = np.array(state.trainable["w"], np.float64)
    np.testing.assert_array_equal(state.ema["w"], average)
    for n in range(6):
        state, _ = step(state, FROZEN, batch(n))
        share = min(decay, (1 + n) / (10 + n))
        average = share * average + (1 - share) * np.asarray(state.trainable["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
    assert decay < (1 + 5) / (10 + 5)  # both sides of the minimum were seen
    np.testing.assert_array_equal(state.evaluated["w"], state.ema["w"])
    assert np.abs(state.ema["w"] - state.trainable["w"]).max() > 1e-3


def test_the_average_of_bfloat16_parameters_is_float32():
    """At 1 - decay below 2^-8 a bfloat16 average would stand still; what is evaluated has the parameters' own dtype."""
    step, state = make_train_step(loss_fn, SGD, seed=3, ema_decay=0.9), start(SGD, ema=True, dtype=jnp.bfloat16)
    state, _ = step(state, FROZEN, batch())
    assert state.trainable["w"].dtype == state.evaluated["w"].dtype == jnp.bfloat16
    assert state.ema["w"].dtype == jnp.float32
    assert (state.ema["w"] != state.evaluated["w"]).any()


def test_randomness_is_a_function_of_seed_and_step():
    steps = {seed: make_train_step(loss_fn, SGD, seed=seed) for seed in (3, 4)}

    def loss_of(seed, number):
        """Of equal data and parameters: only the noise differs."""
        state = start(SGD)
        state = TrainState(jnp.int32(number), state.trainable, state.opt_state, None)
        return float(steps[seed](state, FROZEN, batch())[1]["loss"])

    draws = [(seed, number) for seed in (3, 4) for number in (0, 1)]
    losses = [loss_of(*draw) for draw in draws]
    assert len(set(losses)) == 4
    assert [loss_of(*draw) for draw in draws] == losses


def test_the_state_is_donated_and_nothing_else():
    optimizer = optax.adam(RATE)
    state, frozen, given = start(optimizer, ema=True), jnp.asarray(FROZEN), batch()
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)  # no buffer is given twice
    new, _ = make_train_step(loss_fn, optimizer, seed=3, ema_decay=0.9)(state, frozen, given)
    assert all(leaf.is_deleted() for leaf in (state.trainable["w"], state.ema["w"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, given, new)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_keeps_shapes_and_dtypes(dtype, accumulate):
    """Otherwise the second step compiles again, and a restored state is not the one that was saved."""
    optimizer = optax.adamw(RATE)
    state = start(optimizer, ema=True, dtype=dtype)
    step = make_train_step(loss_fn, optimizer, seed=3, accumulate=accumulate, ema_decay=0.9)
    new, _ = jax.eval_shape(step, state, FROZEN, batch())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for (path, before), after in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(new), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype), jax.tree_util.keystr(path)
