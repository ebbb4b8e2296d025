"""The programs of a recipe's stages on arrays that are not there: what `recipe` runs, lowered for a mesh of devices.

Each is the one that runs: the train step of `training.distill`, the teacher's decoder of `trajectories.collect`, the
student's of `decoding.cdlm`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding import cdlm
from cdlm_jax.mesh import sharding
from cdlm_jax.models.hf import abstract
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.recipes.recipe import Recipe, distill_step
from cdlm_jax.training import distill as distillation
from cdlm_jax.training.batches import FIELDS
from cdlm_jax.training.flops import decode_flops, distill_flops
from cdlm_jax.training.optimizer import make_optimizer
from cdlm_jax.training.step import TrainState
from cdlm_jax.trajectories.collect import trajectories
from cdlm_jax.trajectories.store import schema

# Of the student, where the confidence threshold decides: CDLM's Dream finalizes 2.2 to 2.4 tokens.
TOKENS_PER_FORWARD = 2.3


class Stage(NamedTuple):
    """A program and its arguments, without the memory.

    arguments: what lives in memory for it, by name. forwards: how often a loop runs whose length depends on data.
    tokens: response tokens that one run makes, or learns from. analytic: FLOPs that it needs, over all devices.
    """

    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Any]
    forwards: int
    tokens: int
    analytic: float


def stage(name: str, recipe: Recipe) -> Stage:
    """A stage of the recipe (`distill`, `collect`, `generate`) on the current mesh."""
    if name not in STAGES:
        raise InputError(f"unknown stage {name!r}, known: {', '.join(STAGES)}")
    if recipe.architecture is None:
        raise InputError("planning needs config.architecture, the teacher's sizes")
    return STAGES[name](recipe, recipe.architecture)


def teacher(recipe: Recipe, model_config: ModelConfig) -> Transformer:
    """The recipe's model as shapes, where its parameters lie on the current mesh."""
    model = abstract(model_config, recipe.dtype or "float32")
    leaves = zip(jax.tree.leaves(model), sharding.parameter_shardings(model), strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(model), [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x, where in leaves]
    )


def row_array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    sharding.check_rows(shape[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), sharding.spec("rows")))


def _distill(recipe: Recipe, model: ModelConfig) -> Stage:
    config, rows, length = recipe.distill, recipe.distill.batch_size, recipe.gen_length
    optimizer = make_optimizer(config.optimizer, config.steps)
    graphdef: nnx.GraphDef | None = None

    def start(teacher: Transformer):
        nonlocal graphdef
        graphdef, trainable, frozen = distillation.make_student(teacher, config, jax.random.key(recipe.seed))
        return TrainState.create(trainable, optimizer, ema=config.ema_decay > 0), frozen

    state, frozen = jax.eval_shape(start, teacher(recipe, model))
    assert graphdef is not None  # set by tracing `start`
    stored = schema(recipe.prompt_length, length, model.hidden_size)
    batch = {name: row_array((rows, *stored[name][0]), stored[name][1]) for name in FIELDS}
    return Stage(
        lower=partial(distill_step(recipe, graphdef, optimizer).lower, state, frozen, batch),
        arguments={
            "parameters": (state.trainable, frozen),
            "optimizer": (state.step, state.opt_state, state.ema),
            "inputs": batch,
        },
        forwards=1,
        tokens=rows * length,
        analytic=distill_flops(model, config, recipe.row, rematerialized=True),
    )


def _collect(recipe: Recipe, model: ModelConfig) -> Stage:
    rows, length, block = recipe.collect.batch_size, recipe.gen_length, recipe.block_size
    decode = partial(trajectories, gen_length=length, block_size=block, temperature=max(recipe.collect.temperatures))
    arguments: dict[str, Any] = {"parameters": teacher(recipe, model), "inputs": _prompts(recipe, rows)}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = row_array(keys.shape, keys.dtype)
    each = decode_flops(model, queries=recipe.row.length, keys=recipe.row.length, predicted=block)
    return Stage(
        lower=lambda: jax.jit(decode).lower(arguments["parameters"], *arguments["inputs"], keys=keys),
        arguments=arguments,
        forwards=length,
        tokens=rows * length,
        analytic=rows * length * each,
    )


def _generate(recipe: Recipe, model: ModelConfig) -> Stage:
    rows, length, block = recipe.collect.batch_size, recipe.gen_length, recipe.block_size
    config = cdlm.Config(gen_length=length, block_size=block)
    arguments: dict[str, Any] = {"parameters": teacher(recipe, model), "inputs": _prompts(recipe, rows)}
    forwards = round(length / TOKENS_PER_FORWARD)
    prompt, context = recipe.prompt_length, recipe.row.length
    prefill = decode_flops(model, queries=prompt, keys=context, predicted=0)
    each = decode_flops(model, queries=block, keys=context, predicted=block)
    return Stage(
        lower=lambda: jax.jit(partial(cdlm.generate, config=config)).lower(
            arguments["parameters"], *arguments["inputs"]
        ),
        arguments=arguments,
        forwards=forwards,
        tokens=rows * length,
        analytic=rows * (prefill + forwards * each),
    )


def _prompts(recipe: Recipe, rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return row_array((rows, recipe.prompt_length), jnp.int32), row_array((rows,), jnp.int32)


STAGES = {"distill": _distill, "collect": _collect, "generate": _generate}
