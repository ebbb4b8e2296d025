"""Model FLOPs: against sums done by hand, against the visibility rule, and against what the compiler counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import TINY

from cdlm_jax.models.transformer import Transformer
from cdlm_jax.training import denoising, distill
from cdlm_jax.training.distill import DistillConfig
from cdlm_jax.training.flops import RowShape, decode_flops, distill_flops, pretrain_flops
from cdlm_jax.training.pretrain import PretrainConfig
from cdlm_jax.visibility import packed, visible_end

ROWS = 4
ROW = RowShape(prompt_length=6, gen_length=8, block_size=4)


def test_pairs_are_those_of_the_visibility_rule():
    assert ROW.block_causal_pairs == int(visible_end(jnp.array([6]), 14, 4).sum())
    layout = packed(jnp.array([6]), 14, 8, 4)
    assert ROW.packed_pairs == int(layout.visible_end.sum() + (layout.own.end - layout.own.start).sum())
    assert ROW.causal_pairs == sum(range(15)) and ROW.bidirectional_pairs == 196


# TINY: d 16, 2 layers, keys of 8, mlp 24, vocabulary 40; a row has 14 slots, 8 of them in the response.
KERNELS = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) * 2 * 14
ADAPTERS = 2 * 3 * (32 + 2 * 24 + 32 + 3 * 40) * 2 * 14  # rank 3: in + out of every layer
ATTENTION = 2 * 4 * 16 * (6 * 6 + 4 * 10 + 4 * 14)  # the prompt sees 6, the blocks 10 and 14
FULL_ATTENTION = 2 * 4 * 16 * 14 * 14
VOCABULARY = 2 * 8 * 16 * 40


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora_rank": 0}, (3 + 2 * 2) * (KERNELS + ATTENTION) + (4 + 4) * VOCABULARY),
        (
            {"lora_rank": 3},
            3 * (KERNELS + ADAPTERS + ATTENTION) + 2 * (KERNELS + 2 * ADAPTERS + 2 * ATTENTION) + 6 * VOCABULARY,
        ),
        (
            {"lora_rank": 0, "teacher": "online"},
            7 * (KERNELS + ATTENTION) + 8 * VOCABULARY + KERNELS + FULL_ATTENTION,
        ),
    ],
)
def test_distillation(options, expected):
    config = DistillConfig(steps=1, batch_size=ROWS, **options)
    assert distill_flops(TINY, config, ROW) == ROWS * expected
    assert distill_flops(TINY, config, ROW, rematerialized=True) == ROWS * (expected + 4 * VOCABULARY)
    again = distill_flops(TINY, dataclasses.replace(config, remat=True), ROW, rematerialized=True)
    forward = KERNELS + ATTENTION + (ADAPTERS if config.lora_rank else 0)
    assert again == ROWS * (expected + 4 * VOCABULARY + 2 * forward)


def test_packed_distillation():
    config = DistillConfig(steps=1, batch_size=ROWS, lora_rank=0, mode="packed", consistency_scope="same_block")
    long = KERNELS * 22 // 14 + ATTENTION + 2 * 4 * 16 * (4 * 10 + 4 * 14)  # 8 slots more; blocks that see 10 and 14
    assert distill_flops(TINY, config, ROW) == ROWS * (4 * long + 3 * (KERNELS + ATTENTION) + 8 * VOCABULARY)


def test_a_forward_of_a_decoder():
    found = decode_flops(TINY, queries=4, keys=14, predicted=4)
    assert found == KERNELS * 4 // 14 + 2 * 4 * 16 * 4 * 14 + VOCABULARY // 2


def test_pretraining():
    config = PretrainConfig(steps=1, batch_size=ROWS)
    assert pretrain_flops(TINY, config, ROW) == ROWS * 3 * (KERNELS + FULL_ATTENTION + VOCABULARY)
    causal = dataclasses.replace(TINY, mask_token_id=None, logit_alignment="shifted", family="qwen2")
    attention = 2 * 4 * 16 * 14 * 15 // 2
    assert pretrain_flops(causal, config, ROW) == ROWS * 3 * (KERNELS + attention + VOCABULARY)


def compiled(loss_fn, trainable, frozen, names) -> float:
    """FLOPs of a gradient, as the compiler counts them. It counts a loop's body once: one layer, one tile."""
    shapes = {name: jax.ShapeDtypeStruct((ROWS, ROW.gen_length), jnp.int32) for name in ("tokens", "order", "answer")}
    shapes["prompt"] = jax.ShapeDtypeStruct((ROWS, ROW.prompt_length), jnp.int32)
    shapes["prompt_length"] = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    shapes["hidden"] = jax.ShapeDtypeStruct((ROWS, ROW.gen_length, WIDE.hidden_size), jnp.float32)
    keys = jax.random.split(jax.random.key(0), ROWS)
    gradient = jax.jit(jax.grad(lambda *arguments: loss_fn(*arguments)[0]))
    batch = {name: shapes[name] for name in names}
    lowered = gradient.lower(trainable, frozen, batch, keys, jnp.int32(0))
    quick = {"xla_backend_optimization_level": 0}  # of LLVM: what is counted stays the same
    return lowered.compile(quick).cost_analysis()["flops"]


WIDE = dataclasses.replace(TINY, num_layers=1, hidden_size=128, mlp_size=256, vocab_size=256)


@pytest.mark.slow
def test_the_compiled_objective_does_little_more():
    """Beyond the count are one more look at the vocabulary for each loss, and whatever is no matrix product."""
    config = DistillConfig(steps=1, batch_size=ROWS, lora_rank=4)
    model = Transformer(WIDE, rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = distill.make_student(model, config, jax.random.key(0))
    names = ("prompt", "prompt_length", "tokens", "order", "hidden", "answer")
    found = compiled(distill.make_loss(graphdef, config, ROW.block_size), trainable, frozen, names)
    assert 1 <= found / distill_flops(WIDE, config, ROW) < 1.15


def test_the_compiled_pretraining_does_little_more():
    config = PretrainConfig(steps=1, batch_size=ROWS)
    graphdef, trainable, rest = nnx.split(Transformer(WIDE, rngs=nnx.Rngs(0)), nnx.Param, ...)
    found = compiled(denoising.make_loss(graphdef, config), trainable, rest, ("prompt", "prompt_length", "answer"))
    assert 1 <= found / pretrain_flops(WIDE, config, ROW) < 1.15
