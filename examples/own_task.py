"""A task of one's own, from a file of prompts to a student: write prompts, collect, distill, generate.

    python examples/own_task.py               # two minutes on two CPU cores

The file holds JSON lines with a prompt and a worked answer. Here they are sums of four digits, which the shipped
teacher can do; with your own teacher and prompts the calls are the same. On a pod: `cdlm collect`, `cdlm distill`.
"""

import argparse
import json
import random
import tempfile
from functools import partial
from pathlib import Path

import jax

from cdlm_jax import ModelFolder
from cdlm_jax.decoding import cdlm
from cdlm_jax.mesh.sharding import make_mesh
from cdlm_jax.recipes.recipe import Recipe, collect, distill
from cdlm_jax.training.distill import DistillConfig
from cdlm_jax.training.optimizer import OptimizerConfig
from cdlm_jax.trajectories.collect import CollectConfig


def problem(rng: random.Random) -> dict[str, str]:
    """`3+4-2+1=` with its worked answer `3+4=7;7-2=5;5+1=6;#6`; every number has one digit."""
    values = [rng.randint(1, 9)]
    for _ in range(3):
        values.append(rng.choice([value for value in range(10) if value != values[-1]]))
    steps = [f"{after - before:+d}" for before, after in zip(values, values[1:], strict=False)]
    worked = [f"{before}{step}={after}" for before, step, after in zip(values, steps, values[1:], strict=False)]
    return {"prompt": f"{values[0]}{''.join(steps)}=", "answer": f"{';'.join(worked)};#{values[-1]}"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path, help="where to write [a temporary folder]")
    flags = parser.parse_args(argv)
    work = flags.work or Path(tempfile.mkdtemp(prefix="own_task_"))
    work.mkdir(parents=True, exist_ok=True)

    rng = random.Random(0)
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(problem(rng)) + "\n" for _ in range(flags.prompts)))

    recipe = Recipe(
        work=str(work),
        teacher="shipped",
        prompts=str(prompts),
        prompt_length=23,
        gen_length=48,
        block_size=16,
        heldout_per_task=0,  # a file of prompts has no verifier
        collect=CollectConfig(num_prompts=flags.prompts, temperatures=(0.0,), batch_size=32),
        distill=DistillConfig(
            steps=flags.steps,
            batch_size=16,
            lora_rank=0,
            optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, weight_decay=0.0),
        ),
    )
    with jax.set_mesh(make_mesh(recipe.mesh)):
        collect(recipe)  # continues where it was interrupted, as `distill` does
        distill(recipe)

    student = ModelFolder.load(work / "student")
    encoder = student.encoder(recipe.prompt_length, recipe.gen_length)
    asked = [problem(rng) for _ in range(8)]
    config = cdlm.Config(gen_length=recipe.gen_length, block_size=recipe.block_size)
    decode = jax.jit(partial(cdlm.generate, config=config))
    result = jax.device_get(decode(student.model, *encoder.prompts([row["prompt"] for row in asked])))
    for row, tokens, forwards in zip(asked, result.tokens, result.forwards, strict=True):
        print(f"{row['prompt']}  {encoder.response(tokens)}   {forwards} forwards")
    print(f"everything is under {work}; next: cdlm generate --model={work / 'student'} --prompt='1+2+3-4='")


if __name__ == "__main__":
    main()
