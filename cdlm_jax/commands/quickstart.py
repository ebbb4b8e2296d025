"""`cdlm quickstart`."""

from absl import flags

from cdlm_jax.commands.common import console, recipe
from cdlm_jax.commands.configs import define_config
from cdlm_jax.commands.groups import Group

SUMMARY = "shipped teacher -> trajectories -> student -> held-out report, on this machine"


def define(values: flags.FlagValues) -> None:
    define_config(values, "tiny:quick")
    Group(values, "recipe").switch("from_scratch", False, "Train the teacher too.")


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.recipes.quickstart import quickstart

    quickstart(recipe(values), from_scratch=values.from_scratch, console=console())
