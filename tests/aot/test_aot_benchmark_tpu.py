"""What the kernels' benchmark runs on a TPU compiles for one: the kernels with searched tiles, and the libraries'."""

import sys
from pathlib import Path

import jax
import pytest
from aot.chips import compiled, mesh

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # where `python benchmarks/kernels.py` looks

import block_attention_cases


@pytest.mark.slow
@pytest.mark.parametrize("model", block_attention_cases.MODELS)
def test_the_block_step_compiles_in_every_way(model):
    case = block_attention_cases.step_case(
        "tpu", model, next(step for step in block_attention_cases.STEPS if step.tuned)
    )
    arguments = jax.eval_shape(case.make)
    ways = [(call, jax.eval_shape(prepare, *arguments)) for call, prepare in case.others.values()]
    ways.append((case.tuning.call(case.tuning.candidates()[0]), arguments))
    kernels = []
    for call, given in ways:
        specs = (jax.P(),) * len(given)
        with jax.set_mesh(mesh("v5e")):
            alone = jax.shard_map(call, in_specs=specs, out_specs=jax.P(), check_vma=False)
            kernels.append(compiled(alone, *given).as_text().count('custom_call_target="tpu_custom_call"'))
    assert kernels == [0, 1, 1, 1, 1]  # XLA, paged, ragged paged, splash, ours
