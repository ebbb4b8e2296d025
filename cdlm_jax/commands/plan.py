"""`cdlm plan`."""

from pathlib import Path

from absl import flags

from cdlm_jax.commands.common import console, recipe
from cdlm_jax.commands.configs import define_config
from cdlm_jax.commands.groups import Group
from cdlm_jax.config import InputError

SUMMARY = "compile a stage for a TPU slice or GPUs that are not here: does it fit, what bounds it"


def define(values: flags.FlagValues) -> None:
    define_config(values, "dream_7b")
    stage = Group(values, "recipe")
    stage.text("stage", "distill", "distill, collect or generate.")
    stage.text("topology", None, "A TPU slice or GPUs, such as v5e:4x4 or h100:8.")
    stage.switch("sweep", False, "Try other meshes and batches, rank those that fit.")
    Group(values, "output").text("output", None, "Write the figures here as JSON.")


def run(values: flags.FlagValues) -> None:
    if values.topology is None:
        raise InputError("give --topology, such as v5e:4x4 or h100:8")
    output = None if values.output is None else Path(values.output)
    from cdlm_jax import planning

    settings = recipe(values)
    planning.run(settings, values.topology, values.stage, sweeps=values.sweep, output=output, console=console())
