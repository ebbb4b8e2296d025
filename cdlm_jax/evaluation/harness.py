"""Evaluation: decode problems with any decoder, score the answers, count forwards, measure latency."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cdlm_jax import tasks
from cdlm_jax.data import Encoder
from cdlm_jax.decoding.progress import DecodeResult

# decode(prompts [rows, P_max], prompt_lengths [rows]) -> DecodeResult: a decoder with model, config and key bound.
Decode = Callable[[jax.Array, jax.Array], DecodeResult]
NamedProblem = tuple[str, tasks.Problem]  # (task name, problem)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One decoder on a list of problems; arrays over problems, in their order.

    responses: decoded text before the first EOS; correct: bool [n]; forwards, lengths: [n] as in DecodeResult.
    """

    problems: Sequence[NamedProblem]
    responses: list[str]
    correct: np.ndarray
    forwards: np.ndarray
    lengths: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def mean_forwards(self) -> float:
        return float(self.forwards.mean())

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens before the first EOS over forwards, both summed over the problems (TPF)."""
        return float(self.lengths.sum() / self.forwards.sum())

    @property
    def per_task(self) -> dict[str, float]:
        names = np.array([name for name, _ in self.problems])
        return {str(name): float(self.correct[names == name].mean()) for name in dict.fromkeys(names.tolist())}


def heldout_problems(names: Sequence[str], per_task: int) -> list[NamedProblem]:
    """The first `per_task` held-out problems of each task."""
    return [(name, tasks.get(name).problem("heldout", index)) for name in names for index in range(per_task)]


def evaluate(decode: Decode, encoder: Encoder, problems: Sequence[NamedProblem], batch_size: int) -> Evaluation:
    """Decode and score all problems, `batch_size` at a time (the last batch is filled up: one program serves all)."""
    results = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts, lengths = encoder.prompts([problem.prompt for _, problem in batch])
        rows = np.minimum(np.arange(batch_size), len(batch) - 1)
        result = jax.device_get(decode(jnp.asarray(prompts[rows]), jnp.asarray(lengths[rows])))
        results.append(result)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(problems)], *results)
    responses = [encoder.response(tokens) for tokens in joined.tokens]
    scored = zip(problems, responses, strict=True)
    correct = np.array([tasks.get(name).score(problem, response) for (name, problem), response in scored])
    return Evaluation(problems, responses, correct, joined.forwards, joined.lengths)


def latencies(
    decoders: dict[str, Decode], encoder: Encoder, problems: Sequence[NamedProblem]
) -> dict[str, list[float]]:
    """Batch-1 seconds per problem of every decoder, compile excluded.

    The decoders take turns problem by problem, so that a drifting machine hurts all alike.
    """
    encoded = [encoder.prompts([problem.prompt]) for _, problem in problems]
    requests = [(jnp.asarray(prompts), jnp.asarray(lengths)) for prompts, lengths in encoded]
    for decode in decoders.values():
        jax.block_until_ready(decode(*requests[0]))  # compile
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for request in requests:
        for name, decode in decoders.items():
            begin = time.perf_counter()
            jax.block_until_ready(decode(*request))
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    low, high = np.percentile(values, [10, 90])
    return statistics.median(values), float(low), float(high)
