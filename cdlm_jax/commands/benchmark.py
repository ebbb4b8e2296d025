"""`cdlm benchmark`."""

from absl import flags

from cdlm_jax.commands.common import console, define_code_execution, define_config, define_output, warn_of_gaps
from cdlm_jax.config import build

SUMMARY = "compare every decoder on the same weights, problems and machine"


def define(values: flags.FlagValues) -> None:
    define_config(values, "benchmark.py")
    flags.DEFINE_list("methods", None, "In place of config.methods, comma-separated.", flag_values=values)
    flags.DEFINE_list("task", None, "In place of config.tasks, comma-separated.", flag_values=values)
    flags.DEFINE_list("data", None, "In place of config.data: files of real problems.", flag_values=values)
    define_output(values)
    define_code_execution(values)


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.recipes.benchmark import BenchmarkConfig, benchmark

    settings = values.config.to_dict()
    for name, flag in (("methods", "methods"), ("tasks", "task"), ("data", "data")):
        if values[flag].value is not None:
            settings[name] = tuple(values[flag].value)
    settings["allow_code_execution"] |= values.allow_code_execution
    config = build(BenchmarkConfig, settings, "config")
    if config.allow_code_execution:
        warn_of_gaps()
    benchmark(config, console(), values.output)
