"""Run by test_sharding in a process of its own, since the number of devices is fixed when JAX starts:

python mesh_cases.py '{"2x2x2": ["cdlm", "dream"]}'  ->  JSON: mesh -> case -> largest difference from one device
"""

import dataclasses
import json
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tiny import TINY

from cdlm_jax.config import ModelConfig
from cdlm_jax.decoding import autoregressive, cdlm, dllm_cache, dream, fast_dllm, naive
from cdlm_jax.decoding.unmask import Threshold
from cdlm_jax.evaluation.likelihood import is_greedy, log_likelihood
from cdlm_jax.mesh import sharding
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.training import causal, denoising, distill
from cdlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cdlm_jax.training.pretrain import PretrainConfig
from cdlm_jax.training.step import TrainState, make_train_step
from cdlm_jax.trajectories.collect import trajectories

ROWS, PROMPT, LENGTH, BLOCK = 16, 6, 8, 4
CONFIG = dataclasses.replace(TINY, hidden_size=32, num_heads=8, mlp_size=64, qkv_bias=True)
SHIFTED = dataclasses.replace(CONFIG, logit_alignment="shifted")
CAUSAL = dataclasses.replace(SHIFTED, family="qwen2", mask_token_id=None)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def random_model(config: ModelConfig) -> Transformer:
    """A model of which every leaf, norms and biases included, is random."""
    model = Transformer(config, rngs=nnx.Rngs(3))
    keys = iter(jax.random.split(jax.random.key(4), len(jax.tree.leaves(model))))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), model)


def batch_of(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = partial(rng.integers, 3, config.vocab_size, dtype=np.int32)
    blocks = [np.stack([start + rng.permutation(BLOCK) for _ in range(ROWS)]) for start in range(0, LENGTH, BLOCK)]
    return {
        "prompt": ids((ROWS, PROMPT)),
        "prompt_length": rng.integers(1, PROMPT + 1, ROWS, dtype=np.int32),
        "tokens": ids((ROWS, LENGTH)),
        "order": np.concatenate(blocks, axis=1).astype(np.int32),
        "hidden": rng.normal(size=(ROWS, LENGTH, config.hidden_size)).astype(np.float32),
        "answer": ids((ROWS, LENGTH)),
        "answer_length": rng.integers(1, LENGTH + 1, ROWS, dtype=np.int32),
    }


# ---- cases: each is made for a model's config and returns a pytree of arrays ----------------------------------------


def forward(model, batch):
    @jax.jit
    def run(model, tokens):
        hidden = model(tokens)
        return hidden, model.unembed(hidden)

    return run(model, batch["prompt"])


def decoded(decoder, model, batch, *, key=True, **options):
    config = decoder.Config(gen_length=LENGTH, **options)
    key = jax.random.key(7) if key else None
    return decoder.generate(model, batch["prompt"], batch["prompt_length"], config, key)


def collected(model, batch):
    keys = jax.random.split(jax.random.key(5), ROWS)
    sizes = {"gen_length": LENGTH, "block_size": BLOCK, "temperature": 0.5}
    return trajectories(model, batch["prompt"], batch["prompt_length"], keys=keys, **sizes)


def scored(model, batch):
    """In words of lm_eval: loglikelihood and is_greedy."""
    answers = batch["prompt"], batch["prompt_length"], batch["answer"], batch["answer_length"]
    options = {"cfg_scale": 0.5, "block_size": BLOCK}
    return log_likelihood(model, *answers, jax.random.key(6), samples=3, **options), is_greedy(
        model, *answers, **options
    )


def distilled(model, batch, **options):
    config = distill.DistillConfig(steps=2, batch_size=ROWS, **options)
    graphdef, trainable, frozen = distill.make_student(model, config, jax.random.key(1))
    if config.lora_rank:  # fresh adapters add nothing, and b hides the gradient of a
        trainable = jax.tree.map(lambda x: x + 0.02, trainable)
    return updated(distill.make_loss(graphdef, config, BLOCK), trainable, frozen, batch, config.accumulate)


def pretrained(model, batch):
    graphdef, trainable, frozen = nnx.split(model, nnx.Param, ...)
    trainable = jax.tree.map(jnp.array, trainable)
    loss_fn = (
        causal.make_loss(graphdef) if model.config.causal else denoising.make_loss(graphdef, PretrainConfig(steps=2))
    )
    return updated(loss_fn, trainable, frozen, batch)


def updated(loss_fn, trainable, frozen, batch, accumulate=1):
    """After each of two updates: losses, parameters, and the momentum, which is the gradient at first.

    By SGD: an optimizer that scales each entry makes as much of a gradient's rounding as of the gradient.
    """
    optimizer = optax.sgd(1e-3, momentum=0.9)
    state = TrainState.create(trainable, optimizer, ema=True)
    train_step = make_train_step(loss_fn, optimizer, seed=3, accumulate=accumulate, ema_decay=0.9)
    steps = []
    for _ in range(2):
        laid_out = jax.tree.map(jax.typeof, state)
        state, metrics = train_step(state, frozen, batch)
        assert jax.tree.map(jax.typeof, state) == laid_out  # or the next step would compile again
        steps.append(jax.device_get((metrics, state)))  # the state itself is donated
    return steps


def optimized(model, batch, name):
    """An update of a whole model by a gradient that is as large as the weights."""
    params = nnx.state(model, nnx.Param)
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=1e-2), 1)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.map(jax.typeof, (updates, after)) == jax.tree.map(jax.typeof, (params, state))
    return updates, after


CASES = {
    "forward": (CONFIG, forward),
    "tied": (TIED, forward),
    "cdlm": (CONFIG, partial(decoded, cdlm, block_size=BLOCK, unmask=Threshold(0.1), key=False)),
    "cdlm, shifted, sampled, separate commits": (
        SHIFTED,
        partial(decoded, cdlm, block_size=BLOCK, unmask=Threshold(0.1), temperature=0.7, merge_commit=False),
    ),
    "naive": (CONFIG, partial(decoded, naive, block_size=BLOCK, key=False, cfg_scale=0.5)),
    "naive, random": (
        CONFIG,
        partial(
            decoded,
            naive,
            block_size=BLOCK,
            remasking="random",
            temperature=0.5,
            logits_eos_inf=True,
            confidence_eos_eot_inf=True,
        ),
    ),
    "dream": (SHIFTED, partial(decoded, dream, steps=5, alg_temp=0.1, temperature=0.5, top_p=0.9, top_k=9)),
    "dream, greedy": (SHIFTED, partial(decoded, dream, steps=5, key=False)),
    "fast_dllm": (CONFIG, partial(decoded, fast_dllm, block_size=BLOCK, factor=1.0, key=False)),
    "fast_dllm, prefix": (SHIFTED, partial(decoded, fast_dllm, block_size=BLOCK, cache="prefix", key=False)),
    "fast_dllm, dual": (
        CONFIG,
        partial(decoded, fast_dllm, block_size=BLOCK, cache="dual", threshold=0.1, key=False),
    ),
    "dllm_cache": (
        CONFIG,
        partial(decoded, dllm_cache, block_size=BLOCK, prompt_interval=4, response_interval=2, key=False),
    ),
    "autoregressive": (CAUSAL, partial(decoded, autoregressive, key=False)),
    "autoregressive, sampled": (CAUSAL, partial(decoded, autoregressive, temperature=0.7)),
    "collected": (CONFIG, collected),
    "scored": (SHIFTED, scored),
    "distilled, LoRA": (CONFIG, partial(distilled, lora_rank=2, accumulate=2)),
    "distilled, online": (SHIFTED, partial(distilled, lora_rank=0, teacher="online", remat=True)),
    "distilled, packed": (
        SHIFTED,
        partial(distilled, lora_rank=2, accumulate=2, remat=True, mode="packed", consistency_scope="same_block"),
    ),
    "pretrained": (TIED, pretrained),
    "pretrained, causal": (CAUSAL, pretrained),
    "optimized, AdamW": (CONFIG, partial(optimized, name="adamw")),
    "optimized, Muon": (CONFIG, partial(optimized, name="muon")),
}


def difference(one, other) -> float:
    """The largest of all arrays, in units of an array's largest value where that exceeds 1; integers must be equal."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype.kind != "f":
            worst = max(worst, 0.0 if (a == b).all() else math.inf)
        elif a.size:
            worst = max(worst, float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b)))))
    return worst


def main(plan: dict[str, list[str]]) -> None:
    cases = {name: CASES[name] for name in dict.fromkeys(name for names in plan.values() for name in names)}
    configs = {config: random_model(config) for config, _ in cases.values()}
    expected = {name: jax.device_get(run(configs[config], batch_of(config))) for name, (config, run) in cases.items()}
    found = {}
    for mesh, names in plan.items():
        data, fsdp, tensor = map(int, mesh.split("x"))
        with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))):
            models = {config: sharding.shard(model) for config, model in configs.items()}
            found[mesh] = {
                name: difference(jax.device_get(run(models[config], sharding.place(batch_of(config)))), expected[name])
                for name, (config, run) in cases.items()
                if name in names
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
