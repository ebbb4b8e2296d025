"""`cdlm collect`."""

from functools import partial

from cdlm_jax.commands.stages import define_stage, run_stage

SUMMARY = "decode prompts with a teacher, keep its trajectories"

define = define_stage
run = partial(run_stage, "collect")
