"""The sampler inside research code of one's own: one jitted function that decodes a ragged batch and measures it.

    python examples/jitted_sampling.py        # half a minute on two CPU cores, most of it compiling

A decoder's `generate` is a pure function of the model and the prompts, so it goes into `jax.jit` with whatever is
computed from its result. The configuration is frozen and hashable: a static argument.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from cdlm_jax import ModelFolder, tasks
from cdlm_jax.decoding import cdlm
from cdlm_jax.decoding.unmask import Threshold


@partial(jax.jit, static_argnames="config")
def measured(model, prompts, prompt_lengths, config):
    """(DecodeResult, tokens per forward [rows], how many tokens each forward finalized [rows, gen_length])."""
    result = cdlm.generate(model, prompts, prompt_lengths, config)
    forwards = jnp.arange(config.gen_length)
    finalized = (result.finalized_at[:, :, None] == forwards).sum(axis=1)
    return result, result.lengths / result.forwards, finalized


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.5, 0.9, 0.99])
    flags = parser.parse_args(argv)

    folder = ModelFolder.load("shipped/student")
    encoder = folder.encoder(prompt_length=23, gen_length=48)
    problems = [tasks.get("chain").problem("heldout", i) for i in range(flags.problems)]
    prompts, lengths = encoder.prompts([problem.prompt for problem in problems])  # right-padded, of any lengths

    print("  tau  right  tokens/forward  tokens of the first forwards")
    for tau in flags.taus:
        config = cdlm.Config(gen_length=48, block_size=16, unmask=Threshold(tau))
        result, speed, finalized = jax.device_get(measured(folder.model, prompts, lengths, config))
        answers = [encoder.response(tokens) for tokens in result.tokens]
        right = sum(tasks.get("chain").score(p, a) for p, a in zip(problems, answers, strict=True))
        first = " ".join(f"{count:4.1f}" for count in finalized.mean(axis=0)[:5])
        print(f"{tau:5.2f}  {right:2}/{len(problems)}  {speed.mean():14.2f}  {first}")


if __name__ == "__main__":
    main()
