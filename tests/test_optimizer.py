"""The optimizers against optax's own on single matrices, with schedule and clipping written out."""

import dataclasses
import math
import re
from collections import Counter

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.models import lora
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.training.optimizer import OptimizerConfig, make_optimizer

STEPS = 12
NO_CLIP = 1e9
MODEL = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=12,
    rope_theta=100.0,
    norm_eps=1e-5,
    qkv_bias=True,
    mask_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    max_length=16,
)
STACKED_MATRIX = re.compile(rf"layers\.({'|'.join(lora.TARGETS)})\.(kernel|adapter\.[ab])\b")


def plain_schedule(peak, warmup, steps):
    """Linear from 0 to the peak at `warmup`, then half a cosine down to 0 at `steps`."""
    rise = [peak * n / warmup for n in range(warmup)]
    fall = [peak * (1 + math.cos(math.pi * n / (steps - warmup))) / 2 for n in range(steps - warmup)]
    return rise + fall


def as_schedule(values):
    table = np.array(values, np.float32)
    return lambda count: jax.numpy.asarray(table)[count]


def trajectory(optimizer, params, gradients):
    """Parameters after every update."""

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, seen = optimizer.init(params), []
    for grads in gradients:
        params, state = update(params, state, grads)
        seen.append(jax.device_get(params))
    return seen


def random_gradients(params, count, seed=0):
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(count)]


@pytest.mark.parametrize(("steps", "fraction", "warmup"), [(20, 0.25, 5), (20, 0.0, 1), (3, 0.05, 1), (40, 0.05, 2)])
def test_schedule(steps, fraction, warmup):
    """Under a constant gradient, Adam without decay moves by exactly the learning rate."""
    config = OptimizerConfig(learning_rate=0.1, warmup_fraction=fraction, weight_decay=0.0, clip=NO_CLIP)
    path = trajectory(make_optimizer(config, steps), np.float32(0), [np.float32(1)] * steps)
    rates = -np.diff([0.0, *path])
    np.testing.assert_allclose(rates, plain_schedule(0.1, warmup, steps), atol=2e-6)


def test_adamw_is_that_of_optax():
    config = OptimizerConfig(learning_rate=0.1, warmup_fraction=0.25, weight_decay=0.3, b1=0.8, b2=0.9, clip=NO_CLIP)
    params = {"matrix": np.ones((2, 3, 4), np.float32), "vector": np.ones(5, np.float32)}
    gradients = random_gradients(params, STEPS)
    expected = optax.adamw(as_schedule(plain_schedule(0.1, 3, STEPS)), b1=0.8, b2=0.9, weight_decay=0.3)
    got = trajectory(make_optimizer(config, STEPS), params, gradients)
    for a, b in zip(got, trajectory(expected, params, gradients), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def named(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_muon_takes_the_matrices_of_layers_only(kind):
    """It keeps one moment per parameter, Adam two: embedding, head, norms and biases are Adam's."""
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    wanted = nnx.Param
    if kind == "lora":
        model, wanted = lora.attach(model, rank=3, alpha=3.0, key=jax.random.key(1)), lora.LoRAParam
    trainable = nnx.split(model, wanted, ...)[1]
    state = named(jax.eval_shape(make_optimizer(OptimizerConfig(name="muon"), STEPS).init, trainable))
    moments = {name: sum(kept.endswith(name) for kept in state) for name in named(trainable)}
    assert moments == {name: 1 if STACKED_MATRIX.search(name) else 2 for name in moments}
    # 7 kernels beside embedding, head, 3 norms and 3 biases; or two factors for each kernel
    assert Counter(moments.values()) == ({1: 7, 2: 8} if kind == "full" else {1: 14})


def test_muon_is_that_of_optax_on_each_layer():
    """On the matrix of each layer it is optax's Muon of that one matrix; on the rest, optax's Adam."""
    config = OptimizerConfig(
        name="muon", learning_rate=0.1, adam_ratio=0.5, warmup_fraction=0.25, weight_decay=0.2, clip=NO_CLIP
    )
    params = {name: np.ones(shape, np.float32) for name, shape in (("stack", (2, 4, 6)), ("embed", (5, 4)))}
    gradients = random_gradients(params, 4)
    got = trajectory(make_optimizer(config, STEPS), params, gradients)[-1]

    rates = plain_schedule(0.1, 3, STEPS)
    muon = optax.contrib.muon(as_schedule(rates), weight_decay=0.2)
    for layer in range(2):
        expected = trajectory(muon, params["stack"][layer], [grads["stack"][layer] for grads in gradients])[-1]
        np.testing.assert_allclose(got["stack"][layer], expected, atol=1e-5)
        assert np.abs(expected - 1).max() > 0.05
    adam = optax.adamw(as_schedule(np.multiply(0.5, rates)), b1=0.9, b2=0.95, weight_decay=0.0, nesterov=True)
    expected = trajectory(adam, params["embed"], [grads["embed"] for grads in gradients])[-1]
    np.testing.assert_allclose(got["embed"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipping_is_by_the_norm_of_all_gradients(name):
    params = {"stack": np.ones((2, 3, 3), np.float32), "vector": np.ones(4, np.float32)}
    # Adam and Muon ignore a common factor, so the gradients of the two steps must be clipped by different ones.
    small, large = random_gradients(params, 2)
    small = jax.tree.map(lambda x: np.float32(0.01) * x, small)
    norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(large)))
    assert norm > 2
    clipped = jax.tree.map(lambda x: (0.5 / norm * x).astype(np.float32), large)
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_fraction=0.25, clip=0.5)
    got = trajectory(make_optimizer(config, STEPS), params, [small, large, small])
    unclipped = make_optimizer(dataclasses.replace(config, clip=NO_CLIP), STEPS)
    expected = trajectory(unclipped, params, [small, clipped, small])
    other = trajectory(unclipped, params, [small, large, small])
    for leaf, want, wrong in zip(*(jax.tree.leaves(x[-1]) for x in (got, expected, other)), strict=True):
        np.testing.assert_allclose(leaf, want, atol=1e-5)
        assert np.abs(leaf - wrong).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "optimizer.name 'sgd' is unknown, allowed: adamw, muon"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate must be positive, got nan"),
        ({"warmup_fraction": 1.0}, r"optimizer.warmup_fraction must be in \[0, 1\), got 1.0"),
        ({"warmup_fraction": -0.1}, r"optimizer.warmup_fraction must be in \[0, 1\), got -0.1"),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**changes)
