"""`cdlm distill`."""

from functools import partial

from cdlm_jax.commands.stages import define_training, run_stage

SUMMARY = "train a block-causal student on trajectories"

define = define_training
run = partial(run_stage, "distill")
