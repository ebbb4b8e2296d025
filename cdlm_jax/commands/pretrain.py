"""`cdlm pretrain`."""

from functools import partial

from cdlm_jax.commands.stages import define_training, run_stage

SUMMARY = "train a tiny bidirectional teacher, or a causal model to compare with"

define = define_training
run = partial(run_stage, "pretrain")
