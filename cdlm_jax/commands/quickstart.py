"""`cdlm quickstart`."""

from absl import flags

from cdlm_jax.commands.common import console, define_config, recipe

SUMMARY = "shipped teacher -> trajectories -> student -> held-out report, on this machine"


def define(values: flags.FlagValues) -> None:
    define_config(values, "tiny.py", "quick")
    flags.DEFINE_bool("from_scratch", False, "Train the teacher too.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.recipes.quickstart import quickstart

    quickstart(recipe(values), from_scratch=values.from_scratch, console=console())
