"""`cdlm plan`."""

from pathlib import Path

from absl import flags

from cdlm_jax.commands.common import console, define_config, recipe
from cdlm_jax.config import InputError

SUMMARY = "compile a stage for a TPU slice or GPUs that are not here: does it fit, what bounds it"


def define(values: flags.FlagValues) -> None:
    define_config(values, "dream_7b.py", "")
    text = flags.DEFINE_string
    text("topology", None, "A TPU slice or GPUs, such as v5e:4x4 or h100:8.", flag_values=values)
    text("stage", "distill", "distill, collect or generate.", flag_values=values)
    flags.DEFINE_bool("sweep", False, "Try other meshes and batches, rank those that fit.", flag_values=values)
    text("output", None, "Write the figures here as JSON.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    if values.topology is None:
        raise InputError("give --topology, such as v5e:4x4 or h100:8")
    output = None if values.output is None else Path(values.output)
    from cdlm_jax import planning

    settings = recipe(values)
    planning.run(settings, values.topology, values.stage, sweeps=values.sweep, output=output, console=console())
