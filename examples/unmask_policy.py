"""A new unmask policy: which masked positions a forward finalizes is one small frozen object.

    python examples/unmask_policy.py          # half a minute on two CPU cores, most of it compiling

`LeftToRight` takes sure positions only as far as the first unsure one, as people write. It needs no registration: any
hashable object with this call does, in every decoder that has an `unmask` field.
"""

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from cdlm_jax import ModelFolder, tasks
from cdlm_jax.decoding import cdlm
from cdlm_jax.decoding.unmask import Threshold


@dataclasses.dataclass(frozen=True)
class LeftToRight:
    """The leading masked positions whose top probability is above `tau`, and always the first."""

    tau: float = 0.9

    def __call__(self, candidates, masked, step):
        """candidates: [rows, B] arrays; masked: bool [rows, B]; step: int32 [rows]. Returns bool [rows, B]."""
        unsure = masked & (candidates.probability <= self.tau)
        before = jnp.cumsum(unsure, axis=1) - unsure  # unsure positions to the left
        first = jnp.cumsum(masked, axis=1) == 1
        return masked & ((~unsure & (before == 0)) | first)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=32)
    flags = parser.parse_args(argv)

    folder = ModelFolder.load("shipped/student")
    encoder = folder.encoder(prompt_length=23, gen_length=48)
    task = tasks.get("sudoku4")
    problems = [task.problem("heldout", i) for i in range(flags.problems)]
    prompts, lengths = encoder.prompts([problem.prompt for problem in problems])
    for policy in (Threshold(0.9), LeftToRight(0.9)):
        config = cdlm.Config(gen_length=48, block_size=16, unmask=policy)
        decode = jax.jit(partial(cdlm.generate, config=config))
        result = jax.device_get(decode(folder.model, prompts, lengths))
        answers = [encoder.response(tokens) for tokens in result.tokens]
        right = sum(task.score(p, a) for p, a in zip(problems, answers, strict=True))
        print(f"{policy}: {right} of {len(problems)} right in {result.forwards.mean():.2f} forwards")


if __name__ == "__main__":
    main()
