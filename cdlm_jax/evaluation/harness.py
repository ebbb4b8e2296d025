"""Evaluation: decode prompts with any decoder, score the answers, count forwards, measure time."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding.common import check_ids
from cdlm_jax.decoding.progress import DecodeResult
from cdlm_jax.mesh.distributed import fetch, place_whole
from cdlm_jax.mesh.progress import progress
from cdlm_jax.mesh.sharding import whole_batch
from cdlm_jax.text.tokenizers import Tokenizer

# decode(prompts [rows, P_max], prompt_lengths [rows], keys [rows]) -> DecodeResult: model and config bound.
Decode = Callable[[jax.Array, jax.Array, jax.Array], DecodeResult]
NamedProblem = tuple[str, tasks.Problem]  # (task name, problem)


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt to answer. ids: its tokens; text: as shown; check: whether a response (its text before the first EOS)
    is right, None where nobody knows; extract: the part of it that is judged; group: what it is counted under; tags:
    what its record says besides the answer."""

    ids: Sequence[int]
    text: str | None = None
    check: Callable[[str], bool] | None = None
    group: str = ""
    extract: Callable[[str], str | None] | None = None
    tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    """tokens, finalized_at: [gen_length]; length: tokens before the first EOS; text, correct, extracted: None without a
    tokenizer, or a check."""

    case: Case
    tokens: np.ndarray
    finalized_at: np.ndarray
    length: int
    forwards: int
    text: str | None
    correct: bool | None
    extracted: str | None = None


def heldout_problems(names: Sequence[str], per_task: int) -> list[NamedProblem]:
    """The first `per_task` held-out problems of each task."""
    return [(name, tasks.get(name).problem("heldout", index)) for name in names for index in range(per_task)]


def problem_cases(tokenizer: Tokenizer, problems: Sequence[NamedProblem]) -> list[Case]:
    """Problems as cases, each counted under its task's name."""
    return [
        Case(
            ids=tokenizer.encode(problem.prompt),
            text=problem.prompt,
            check=partial(tasks.get(name).score, problem),
            extract=partial(tasks.get(name).extract, problem),
            group=name,
        )
        for name, problem in problems
    ]


def answers(
    decode: Decode,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    cases: Sequence[Case],
    *,
    batch_size: int,
    width: int | None = None,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Answer]:
    """Answer the cases from number `start` on in order, in batches of one shape (the last is filled up): one program
    serves all. The batches are those of all cases, so that an answer has the same neighbours whatever `start` is.

    width: tokens to pad prompts to, by default the longest prompt's. A sample depends on the seed and the case's place.
    """
    for number, case in enumerate(cases):  # refused before any is decoded
        check_ids(config, number, case.ids)
    width = width or max(len(case.ids) for case in cases)
    rows = whole_batch(min(batch_size, len(cases)))
    for first in range(start - start % rows, len(cases), rows):
        batch = cases[first : first + rows]
        result = fetch(decode(*padded(batch, rows, width, config.pad_token_id), _keys(seed, first, rows)))
        for row, case in enumerate(batch):
            if first + row < start:
                continue
            yield _answer(case, tokenizer, result, row)


def padded(cases: Sequence[Case], rows: int, width: int, pad: int) -> tuple[jax.Array, jax.Array]:
    """prompts [rows, width] right-padded and prompt_lengths [rows], the last case repeated to fill the rows."""
    filled = [*cases, *[cases[-1]] * (rows - len(cases))]
    if longest := max((case for case in filled if len(case.ids) > width), key=lambda case: len(case.ids), default=None):
        raise InputError(f"prompt {longest.text!r:.80} has {len(longest.ids)} tokens, allowed: 1 to {width}")
    prompts = [[*case.ids, *[pad] * (width - len(case.ids))] for case in filled]
    return place_whole((np.asarray(prompts, np.int32), np.asarray([len(case.ids) for case in filled], np.int32)))


def _keys(seed: int, start: int, rows: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), start + jnp.arange(rows))


def _answer(case: Case, tokenizer: Tokenizer | None, result: DecodeResult, row: int) -> Answer:
    tokens, finalized_at = np.asarray(result.tokens[row]), np.asarray(result.finalized_at[row])
    length = int(result.lengths[row])
    text = None if tokenizer is None else tokenizer.decode(tokens[:length].tolist())
    correct = None if text is None or case.check is None else case.check(text)
    extracted = None if text is None or case.extract is None else case.extract(text)
    return Answer(case, tokens, finalized_at, length, int(result.forwards[row]), text, correct, extracted)


@dataclasses.dataclass(frozen=True)
class Score:
    """Answers summed up. accuracy: 0..1; forwards, tokens (before the first EOS): means per answer;
    tokens_per_forward: generated tokens over forwards, both summed (TPF)."""

    problems: int
    accuracy: float
    forwards: float
    tokens: float
    tokens_per_forward: float

    @classmethod
    def of(cls, found: Sequence[Answer]) -> "Score":
        forwards, tokens = (np.array([getattr(answer, name) for answer in found]) for name in ("forwards", "length"))
        accuracy = np.mean([answer.correct for answer in found])
        per_forward = tokens.sum() / forwards.sum()
        return cls(len(found), *map(float, (accuracy, forwards.mean(), tokens.mean(), per_forward)))


def by_group(found: Sequence[Answer]) -> dict[str, Score]:
    """The score of every group, in order of appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in found:
        groups.setdefault(answer.case.group, []).append(answer)
    return {name: Score.of(group) for name, group in groups.items()}


# ---- time ----------------------------------------------------------------------------------------------------------


Spread = tuple[float, float, float]  # median, 10th and 90th percentile


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one decoder: compile (first call less a later one), and of every measured call."""

    compile: float
    calls: list[float]


def timings(
    calls: Mapping[str, Sequence[Callable[[], DecodeResult]]],
    repetitions: int = 1,
    *,
    label: str = "latency",
    console: Console | None = None,
) -> dict[str, Timing]:
    """Every decoder's calls (as many for each), `repetitions` times, compile excluded; shown under `label`.

    The decoders take turns call by call, so that a drifting machine hurts all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    total = 2 * len(calls) + repetitions * sum(map(len, calls.values()))
    with progress(label, total, transient=True, console=console) as bar:

        def timed(call: Callable[[], DecodeResult]) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(call())
            spent = time.perf_counter() - begin
            bar.advance()
            return spent

        first, second = ({name: timed(own[0]) for name, own in calls.items()} for _ in range(2))
        for _ in range(repetitions):
            for turn in zip(*calls.values(), strict=True):
                for name, call in zip(calls, turn, strict=True):
                    seconds[name].append(timed(call))
    return {name: Timing(max(0.0, first[name] - second[name]), seconds[name]) for name in calls}


def request(cases: Sequence[Case], width: int, pad: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a decoder takes for these cases in one batch."""
    return (*padded(cases, len(cases), width, pad), _keys(seed, 0, len(cases)))


def spread(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return float(median), float(low), float(high)
