"""Flags that several commands share, and what they stand for."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from cdlm_jax.commands.groups import Group
from cdlm_jax.config import build
from cdlm_jax.mesh import preemption

# ---- a recipe ------------------------------------------------------------------------------------------------------


def recipe(values: flags.FlagValues):
    """The Recipe of --config."""
    from cdlm_jax.recipes.recipe import Recipe

    return build(Recipe, values.config, "config")


# ---- processes -----------------------------------------------------------------------------------------------------


def define_processes(values: flags.FlagValues) -> None:
    machine = Group(values, "machine")
    machine.switch("distributed", False, "Join the processes of Cloud TPU, Slurm, Open MPI or Kubernetes.")
    machine.text("coordinator", None, "Or these three: host:port of process 0,")
    machine.number("num_processes", None, "their number,")
    machine.number("process_id", None, "and which one this is.", least=0)


def join(values: flags.FlagValues) -> None:
    """Become one of several processes, if so asked."""
    from cdlm_jax.mesh import distributed

    cluster = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    if values.distributed or any(value is not None for value in cluster.values()):
        distributed.initialize(**cluster)


# ---- a model and how it is decoded -----------------------------------------------------------------------------------


def define_model(values: flags.FlagValues) -> None:
    folder = Group(values, "model")
    folder.text("model", "shipped", "A folder, or shipped, shipped/student, shipped/autoregressive.")
    folder.text("dtype", None, "float32 or bfloat16 [as stored].")
    decoding = Group(values, "decoding")
    decoding.text("decoder", None, "cdlm, naive, dream, fast_dllm, dllm_cache, autoregressive [the folder's].")
    decoding.number("gen_length", None, "Response tokens [as the folder says].")
    decoding.number("block_size", None, "Tokens per block [as the folder says].")
    decoding.real("threshold", None, "Finalize every token surer than this [the folder's, cdlm 0.9, else one a step].")
    decoding.real("temperature", 0.0, "0 is greedy.")
    decoding.number("seed", 0, "Of sampling.", least=0, most=2**32 - 1)
    _define_decoders(values)
    machine = Group(values, "machine")
    machine.number("batch_size", 16, "Prompts decoded together.")
    machine.text("mesh", None, "data x fsdp x tensor of the devices, such as 1x4x2 [1x-1x1: fsdp].")
    define_processes(values)


def _define_decoders(values: flags.FlagValues) -> None:
    """Options that not every decoder has: None takes the default of its `Config`."""
    several = Group(values, "of several decoders")
    several.number("steps", None, "Forwards in all: naive, dream, fast_dllm, dllm_cache [one per token].")
    several.real("top_p", None, "Nucleus sampling: dream, autoregressive.")
    several.number("top_k", None, "Only the k most probable tokens: dream, autoregressive.")
    naive = Group(values, "of naive")
    naive.text("remasking", None, "low_confidence or random [low_confidence].")
    naive.real("cfg_scale", None, "Classifier-free guidance [0].")
    dream = Group(values, "of dream")
    dream.text("algorithm", None, "origin, maskgit_plus, topk_margin or entropy [entropy].")
    dream.real("alg_temp", None, "Above 0, positions are drawn [0].")
    fast_dllm = Group(values, "of fast_dllm")
    fast_dllm.real("factor", None, "The factor rule, in place of --threshold.")
    fast_dllm.text("cache", None, "none, prefix or dual [none].")
    dllm_cache = Group(values, "of dllm_cache")
    dllm_cache.number("prompt_interval", None, "Forwards between refreshes of the prompt, K_p [50].")
    dllm_cache.number("response_interval", None, "Of the response, K_r [7].")
    dllm_cache.real("update_ratio", None, "Share of the response refreshed in between, rho [0.25].")


@contextlib.contextmanager
def model(values: flags.FlagValues) -> Iterator[tuple]:
    """(model folder, resolved options of its decoder), on the mesh of the flags."""
    from dataclasses import fields

    import jax

    from cdlm_jax.decoding.options import Options
    from cdlm_jax.mesh.sharding import MeshConfig, make_mesh
    from cdlm_jax.models.model_folder import ModelFolder

    mesh = MeshConfig() if values.mesh is None else MeshConfig.parse(values.mesh)
    join(values)
    # Alone, a process stops at once; several that keep their answers stop where they agree to.
    together = jax.process_count() > 1 and "output" in values and values.output is not None
    told = preemption.noticed() if together else contextlib.nullcontext()
    with told, jax.set_mesh(make_mesh(mesh)):
        folder = ModelFolder.load(values.model, dtype=values.dtype)
        chosen: dict[str, Any] = {field.name: values[field.name].value for field in fields(Options)}
        options = Options(**chosen)
        yield folder, options.resolve(folder.metadata, causal=folder.model.config.causal)


# ---- answers ---------------------------------------------------------------------------------------------------------


def define_output(values: flags.FlagValues) -> None:
    Group(values, "output").text("output", None, "Keep the answers here, as JSON lines; the same command continues it.")


def say_where(file, answers: int, console) -> None:
    """Where the answers are, if they are kept."""
    if file is not None:
        done = "were there already in" if file.complete else "written to"
        console.print(f"{answers} answers {done} {file.path}", soft_wrap=True, highlight=False, markup=False)


# ---- programs that a model writes, and the terminal ------------------------------------------------------------------


def define_code_execution(values: flags.FlagValues) -> None:
    problems = Group(values, "problems")
    problems.switch("allow_code_execution", False, "Run what the model writes for humaneval and mbpp, in a sandbox.")


def warn_of_gaps() -> None:
    """Says which layers hold programs that a model writes, and what they could do all the same."""
    from cdlm_jax.evaluation.code_sandbox import isolation
    from cdlm_jax.mesh.distributed import is_main

    if is_main():
        print(isolation(), file=sys.stderr)


def console():
    """Of the first process; the others are silent."""
    from rich.console import Console

    from cdlm_jax.mesh.distributed import is_main

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # cli.py ends such a program; rich would exit with a status of its own

    return Terminal(quiet=not is_main())
