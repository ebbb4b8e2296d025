"""Masked-denoising pre-training: mask ratios, the loss against a NumPy float64 twin, a short run that learns."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_vocab import log_softmax
from tiny import TINY

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.tasks.mixture import ProblemMixture
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.training import causal
from cdlm_jax.training.batches import problem_batches
from cdlm_jax.training.denoising import make_loss
from cdlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cdlm_jax.training.pretrain import NoiseSchedule, PretrainConfig
from cdlm_jax.training.step import TrainState, make_train_step

ROWS, PROMPT_MAX, LENGTH = 4, 6, 8
ALIGNMENTS = ("same_position", "shifted")
CONFIG = dataclasses.replace(TINY, vocab_size=24, qkv_bias=True)


def random_model(alignment, **changes):
    """A model of which every leaf, norms and biases included, is random, and whose predictions are not flat."""
    model = Transformer(dataclasses.replace(CONFIG, logit_alignment=alignment, **changes), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), model)


def random_prompts(rng):
    """Ragged prompts: what follows each one's end is arbitrary."""
    return {
        "prompt": rng.integers(3, CONFIG.vocab_size, (ROWS, PROMPT_MAX), dtype=np.int32),
        "prompt_length": np.array([PROMPT_MAX, 1, 4, 3], np.int32),
    }


# ---- a plain forward -----------------------------------------------------------------------------------------------

wide = partial(np.asarray, dtype=np.float64)


def plain_response_hidden(model, prompt, response, block_size=None):
    """Hidden rows float64 [L, d] that predict the response of one row without padding, every part written out.

    The prompt is one group and so is each block; a position sees its own group and those before it. Without a block
    size everything sees everything.
    """
    config, layers, tokens = model.config, model.layers, [*prompt, *response]
    blocks = [0 if block_size is None else 1 + i // block_size for i in range(len(response))]
    group = np.array([0] * len(prompt) + blocks)
    sees = group[:, None] >= group[None, :]
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(len(tokens))[:, None, None] * frequencies

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * wide(weight)

    def linear(part, layer, x):
        kernel = wide(part.kernel[...])[layer]
        if part.adapter is not None:
            kernel = kernel + part.adapter.scale * wide(part.adapter.a[...])[layer] @ wide(part.adapter.b[...])[layer]
        return x @ kernel + (0 if part.bias is None else wide(part.bias[...])[layer])

    def rotated(x):  # [S, heads, D]
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = wide(model.embed[...])[tokens]
    for layer in range(config.num_layers):
        normed = norm(x, layers.attention_norm.weight[...][layer])
        q, k, v = (linear(part, layer, normed) for part in (layers.q, layers.k, layers.v))
        q, k, v = (part.reshape(len(tokens), -1, config.head_dim) for part in (q, k, v))
        k, v = (np.repeat(part, config.num_heads // config.num_kv_heads, axis=1) for part in (rotated(k), v))
        scores = np.einsum("ihd,jhd->hij", rotated(q), k) / np.sqrt(config.head_dim)
        attention = np.exp(log_softmax(np.where(sees, scores, -np.inf)))
        x = x + linear(layers.out, layer, np.einsum("hij,jhd->ihd", attention, v).reshape(len(tokens), -1))
        normed = norm(x, layers.mlp_norm.weight[...][layer])
        gate = linear(layers.gate, layer, normed)
        x = x + linear(layers.down, layer, gate / (1 + np.exp(-gate)) * linear(layers.up, layer, normed))
    first = len(prompt) - (config.logit_alignment == "shifted")
    return norm(x, model.final_norm.weight[...])[first : first + len(response)]


def plain_masked_denoising(model, batch, masked, t, block_size=None, filler_weight=1.0):
    """Mean over rows of 1 / (t L) times the sum over masked positions of -log q(answer).

    EOS tokens after the first one count as `filler_weight` of a position.
    """
    total = 0.0
    for row, length in enumerate(batch["prompt_length"]):
        answer, hidden_there = batch["answer"][row].tolist(), masked[row].tolist()
        state = [CONFIG.mask_token_id if m else token for token, m in zip(answer, hidden_there, strict=True)]
        hidden = plain_response_hidden(model, batch["prompt"][row, :length].tolist(), state, block_size)
        log_q = log_softmax(hidden @ wide(model.head))
        first = [*answer, CONFIG.eos_token_id].index(CONFIG.eos_token_id)
        weight = [filler_weight if i > first else 1.0 for i in range(LENGTH)]
        nll = sum(-weight[i] * log_q[i, answer[i]] for i in range(LENGTH) if hidden_there[i])
        total += nll / (t[row] * sum(weight)) / ROWS
    return total


# ---- mask ratios ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.6])
def test_ratios_cover_the_range_evenly(progress):
    """t_max grows from first_t_max to 1 until `curriculum`, and every batch has one t in each of `rows` equal parts."""
    schedule, rows = NoiseSchedule(curriculum=0.25, first_t_max=0.4, min_t=1e-6), 16
    t_max = {0.0: 0.4, 0.1: 0.64, 0.25: 1.0, 0.6: 1.0}[progress]
    batches = [wide(schedule.ratios(jax.random.key(seed), rows, progress)) for seed in range(4)]
    for t in batches:
        assert sorted(np.floor(t / t_max * rows - 1e-5).astype(int)) == list(range(rows))
        assert t.max() <= t_max + 1e-6
    assert len({t.tobytes() for t in batches}) == 4
    assert len({np.argsort(t).tobytes() for t in batches}) == 4  # which row has which part is random


def test_ratios_are_bounded_below():
    t = NoiseSchedule(curriculum=0.5, first_t_max=0.1, min_t=0.05).ratios(jax.random.key(0), 64, 0.0)
    assert t.dtype == jnp.float32
    assert (t == np.float32(0.05)).sum() == 32 and t.min() == np.float32(0.05)


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alignment", "weighting", "filler_weight"),
    [("same_position", "likelihood", 1.0), ("shifted", "likelihood", 1.0), ("shifted", "uniform", 0.25)],
)
def test_the_loss_is_that_of_a_float64_twin(alignment, weighting, filler_weight):
    model, rng = random_model(alignment), np.random.default_rng(0)
    batch = random_prompts(rng) | {"answer": rng.integers(2, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)}
    batch["answer"][:, LENGTH // 2] = CONFIG.eos_token_id
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    noise, steps = NoiseSchedule(curriculum=0.5, first_t_max=0.9, weighting=weighting), 10
    config = PretrainConfig(steps=steps, noise=noise, filler_weight=filler_weight)
    keys = jax.random.split(jax.random.key(4), ROWS)
    loss, metrics = jax.jit(make_loss(graphdef, config))(trainable, rest, batch, keys, jnp.int32(2))

    t_key, mask_key = jax.random.split(keys[0])
    t = wide(noise.ratios(t_key, ROWS, 2 / steps))
    masked = np.asarray(jax.random.uniform(mask_key, (ROWS, LENGTH))) < t[:, None]
    assert 5 < masked.sum() < ROWS * LENGTH - 5
    divisor = t if weighting == "likelihood" else np.full(ROWS, 0.5)
    expected = plain_masked_denoising(model, batch, masked, divisor, filler_weight=filler_weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == {}


def test_the_causal_loss_is_the_mean_over_each_answer():
    """Next-token prediction: a token is scored by the row before it, which sees nothing later; filler is not scored."""
    rng = np.random.default_rng(1)
    config = dataclasses.replace(CONFIG, family="llama", logit_alignment="shifted", mask_token_id=None)
    model = Transformer(config, rngs=nnx.Rngs(0))
    batch = random_prompts(rng) | {"answer": rng.integers(3, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)}
    batch["answer"][1:, 2:] = CONFIG.eos_token_id  # the first answer has no EOS
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    loss, _ = jax.jit(causal.make_loss(graphdef))(trainable, rest, batch, None, jnp.int32(0))
    forward = jax.jit(lambda tokens: model.unembed(model(tokens, visible_end=jnp.arange(1, tokens.size + 1)[None])))
    expected = []
    for row, length in enumerate(batch["prompt_length"]):
        tokens, counted = [*batch["prompt"][row, :length], *batch["answer"][row]], LENGTH if row == 0 else 3
        nll = []
        for i in range(length, length + counted):  # one prefix at a time, then filler: its last row predicts the next
            prefix = np.zeros((1, PROMPT_MAX + LENGTH), np.int32)
            prefix[0, :i] = tokens[:i]
            nll.append(-log_softmax(wide(forward(prefix)))[0, i - 1, tokens[i]])
        expected.append(np.mean(nll))
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_thirty_steps_learn_an_easy_task(optimizer):
    """The answers' common characters and their end: the loss on other problems must fall far below its start."""
    tokenizer, steps = Tokenizer.characters(tasks.CHARACTERS), 30
    eos, mask = tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<mask>")
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "rope_theta": 100.0}
    ids = {"mask_token_id": mask, "eos_token_id": eos, "pad_token_id": eos}
    model = Transformer(dataclasses.replace(CONFIG, **sizes, **ids), rngs=nnx.Rngs(0))
    encoder = Encoder(tokenizer, model.config, 23, 24)

    def batches(split):
        return iter(problem_batches(ProblemMixture({"sort": 1.0}, split, 32 * steps, seed=0), encoder, 32))

    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(name=optimizer, learning_rate=1e-2, weight_decay=0.0), steps)
    loss_fn = make_loss(graphdef, PretrainConfig(steps=steps))
    step = make_train_step(loss_fn, optimizer, seed=0, ema_decay=0.9)
    heldout = next(batches("heldout"))

    def measure(parameters):
        """The loss that the last step would meet, so that masks are the same and the curriculum is over."""
        state = TrainState.create(jax.tree.map(jnp.copy, parameters), optimizer, ema=True)
        last = TrainState(jnp.int32(steps - 1), state.trainable, state.opt_state, state.ema)
        return float(step(last, rest, heldout)[1]["loss"])

    before = measure(trainable)
    state = TrainState.create(trainable, optimizer, ema=True)
    for batch in batches("train"):
        state, _ = step(state, rest, batch)
    assert state.step == steps
    assert measure(state.trainable) < 0.6 * before
    assert measure(state.ema) < 0.75 * before


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (NoiseSchedule, {"curriculum": 0.0}, r"noise.curriculum must be in \(0, 1\], got 0.0"),
        (NoiseSchedule, {"first_t_max": 1.5}, r"noise.first_t_max must be in \(0, 1\], got 1.5"),
        (NoiseSchedule, {"min_t": float("nan")}, r"noise.min_t must be in \(0, 1\], got nan"),
        (PretrainConfig, {"steps": 1, "batch_size": 0}, "pretrain.batch_size must be at least 1, got 0"),
        (PretrainConfig, {"steps": 1, "ema_decay": 1.0}, r"pretrain.ema_decay must be in \[0, 1\), got 1.0"),
        (PretrainConfig, {"steps": 1, "filler_weight": -0.5}, r"pretrain.filler_weight must be in \[0, 1\], got -0.5"),
        (NoiseSchedule, {"weighting": "elbo"}, "noise.weighting must be likelihood or uniform, got 'elbo'"),
        (PretrainConfig, {"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_unusable_settings_are_refused(make, changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)
