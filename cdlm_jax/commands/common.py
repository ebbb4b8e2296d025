"""Flags that several commands share, and what they stand for."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cdlm_jax.config import build
from cdlm_jax.mesh import preemption

# ---- config files --------------------------------------------------------------------------------------------------


def define_config(values: flags.FlagValues, name: str, variant: str = "full") -> None:
    path = f"{_config_path(name)}:{variant}".rstrip(":")
    config_flags.DEFINE_config_file("config", path, "Recipe to run.", flag_values=values)


def _config_path(name: str) -> str:
    """A recipe of this project: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).parent.parent
    inside, beside = package / "configs" / name, package.parent / "configs" / name
    return str(inside if inside.exists() else beside)


def recipe(values: flags.FlagValues):
    """The Recipe of --config."""
    from cdlm_jax.recipes.recipe import Recipe

    return build(Recipe, values.config, "config")


# ---- processes -----------------------------------------------------------------------------------------------------


def define_processes(values: flags.FlagValues) -> None:
    cluster = "Join the processes of Cloud TPU, Slurm, Open MPI or Kubernetes."
    flags.DEFINE_bool("distributed", False, cluster, flag_values=values)
    flags.DEFINE_string("coordinator", None, "Or these three: host:port of process 0,", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "their number,", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "and which one this is.", lower_bound=0, flag_values=values)


def join(values: flags.FlagValues) -> None:
    """Become one of several processes, if so asked."""
    from cdlm_jax.mesh import distributed

    cluster = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    if values.distributed or any(value is not None for value in cluster.values()):
        distributed.initialize(**cluster)


# ---- a model and how it is decoded -----------------------------------------------------------------------------------


def define_model(values: flags.FlagValues) -> None:
    define_processes(values)
    text, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    shipped = "in the package: shipped (the teacher), shipped/student, shipped/autoregressive"
    text("model", "shipped", f"Model folder; {shipped}.", flag_values=values)
    text("decoder", None, "cdlm, naive, dream, fast_dllm, dllm_cache or autoregressive.", flag_values=values)
    number("gen_length", None, "Response tokens.", lower_bound=1, flag_values=values)
    number("block_size", None, "Tokens per block.", lower_bound=1, flag_values=values)
    real("threshold", None, "Finalize every token surer than this.", flag_values=values)
    number("steps", None, "Forwards in all (naive, dream, fast_dllm, dllm_cache).", lower_bound=1, flag_values=values)
    real("factor", None, "Fast-dLLM's factor rule.", flag_values=values)
    text("cache", None, "Of fast_dllm: none, prefix or dual.", flag_values=values)
    text("remasking", None, "Of naive: low_confidence or random.", flag_values=values)
    real("cfg_scale", None, "Of naive: classifier-free guidance.", flag_values=values)
    text("algorithm", None, "Of dream: origin, maskgit_plus, topk_margin or entropy.", flag_values=values)
    real("alg_temp", None, "Of dream: above 0, positions are drawn.", flag_values=values)
    number("prompt_interval", None, "Of dllm_cache: K_p.", lower_bound=1, flag_values=values)
    number("response_interval", None, "Of dllm_cache: K_r.", lower_bound=1, flag_values=values)
    real("update_ratio", None, "Of dllm_cache: rho.", flag_values=values)
    real("temperature", 0.0, "0 is greedy.", flag_values=values)
    real("top_p", None, "Of dream and autoregressive: nucleus sampling.", flag_values=values)
    number("top_k", None, "Of dream and autoregressive: the k most probable.", lower_bound=1, flag_values=values)
    number("seed", 0, "Of sampling.", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    number("batch_size", 16, "Prompts decoded together.", lower_bound=1, flag_values=values)
    text("mesh", None, "data x fsdp x tensor of the devices, such as 1x4x2 [1x-1x1: fsdp].", flag_values=values)
    text("dtype", None, "float32 or bfloat16 [as stored].", flag_values=values)


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
        options = Options(**{field.name: values[field.name].value for field in fields(Options)})
        yield folder, options.resolve(folder.metadata, causal=folder.model.config.causal)


# ---- answers ---------------------------------------------------------------------------------------------------------


def define_output(values: flags.FlagValues) -> None:
    text = "Keep the answers here, as JSON lines; the same command continues an interrupted file."
    flags.DEFINE_string("output", None, text, flag_values=values)


def say_where(file, answers: int, console) -> None:
    """Where the answers are, if they are kept."""
    if file is not None:
        done = "were there already in" if file.complete else "written to"
        console.print(f"{answers} answers {done} {file.path}", soft_wrap=True, highlight=False)


# ---- programs that a model writes, and the terminal ------------------------------------------------------------------


def define_code_execution(values: flags.FlagValues) -> None:
    text = "Run the programs that the model writes for humaneval and mbpp, in a sandbox."
    flags.DEFINE_bool("allow_code_execution", False, text, flag_values=values)


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

    return Console(quiet=not is_main())
