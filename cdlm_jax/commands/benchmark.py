"""`cdlm benchmark`."""

from absl import flags

from cdlm_jax.commands.common import console, define_code_execution, define_output, warn_of_gaps
from cdlm_jax.commands.configs import define_config
from cdlm_jax.commands.groups import Group
from cdlm_jax.config import build

SUMMARY = "compare every decoder on the same weights, problems and machine"


def define(values: flags.FlagValues) -> None:
    define_config(values, "benchmark")
    Group(values, "recipe").items("methods", "In place of config.methods.")
    problems = Group(values, "problems")
    problems.items("task", "In place of config.tasks.")
    problems.items("data", "In place of config.data: files of real problems.")
    define_output(values)
    define_code_execution(values)


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.recipes.benchmark import BenchmarkConfig, benchmark

    settings = values.config.to_dict()
    for name, flag in (("methods", "methods"), ("tasks", "task"), ("data", "data")):
        if (given := values[flag].value) is not None:
            settings[name] = tuple(given)
    settings["allow_code_execution"] |= values.allow_code_execution
    config = build(BenchmarkConfig, settings, "config")
    if config.allow_code_execution:
        warn_of_gaps()
    benchmark(config, console(), values.output)
