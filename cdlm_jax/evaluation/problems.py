"""Scoring a model folder: held-out problems of tasks, files of real puzzles, and public benchmarks."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.evaluation import code_sandbox
from cdlm_jax.evaluation.harness import Case, heldout_problems, problem_cases
from cdlm_jax.evaluation.prompts import Reader
from cdlm_jax.tasks import real_data
from cdlm_jax.tasks.public import CodeBenchmark
from cdlm_jax.text.tokenizers import Tokenizer

PER_TASK = 512


def cases(
    tokenizer: Tokenizer | None,
    names: Sequence[str],
    files: Sequence[str],
    *,
    count: int | None = None,
    chat: bool = True,
    system: str | None = None,
    allow_code_execution: bool = False,
) -> list[Case]:
    """What to answer, counted by task or by file.

    names: tasks, whose first `count` held-out problems are taken (None: 512), and public benchmarks (None: all; so of
        files).
    files: Sudoku or Countdown as `path`; a benchmark's as `name=path`, or as `path` if it is alone.
    chat: put benchmark questions into the folder's chat template, where it has one; system: its system message.
    """
    if tokenizer is None:
        raise InputError("this model folder has no tokenizer, so it cannot read problems")
    reader = Reader(tokenizer, chat, system)
    if unknown := [name for name in names if name not in (*tasks.NAMES, *tasks.BENCHMARKS)]:
        known = f"tasks are {', '.join(tasks.NAMES)}; benchmarks are {', '.join(tasks.BENCHMARKS)}"
        raise InputError(f"unknown task {unknown[0]!r}; {known}")
    names = list(dict.fromkeys(names))  # named twice is asked for once
    benchmarks = [name for name in names if name in tasks.BENCHMARKS]
    paths, puzzles = _assigned(files, benchmarks, alone=len(names) == 1)
    found = problem_cases(tokenizer, heldout_problems([n for n in names if n in tasks.NAMES], count or PER_TASK))
    for path in puzzles:
        puzzle, problems = real_data.load(path)
        found += [
            Case(
                ids=tokenizer.encode(problem.prompt),
                text=problem.prompt,
                check=partial(puzzle.score, problem),
                extract=partial(puzzle.extract, problem),
                group=Path(path).name,
            )
            for problem in problems[:count]
        ]
    for name in benchmarks:
        found += _benchmark_cases(reader, name, paths.get(name), count, allow_code_execution)
    return found


def _assigned(files: Sequence[str], benchmarks: Sequence[str], *, alone: bool) -> tuple[dict[str, str], list[str]]:
    """(path by benchmark, paths of puzzles)."""
    if alone and benchmarks and len(files) == 1 and not files[0].startswith(f"{benchmarks[0]}="):
        return {benchmarks[0]: files[0]}, []
    named = [file.partition("=") for file in files]
    paths = {name: path for name, equals, path in named if equals and name in benchmarks}
    return paths, [file for file, (name, _, _) in zip(files, named, strict=True) if name not in paths]


def _benchmark_cases(
    reader: Reader, name: str, path: str | None, count: int | None, allow_code_execution: bool
) -> list[Case]:
    benchmark = tasks.benchmark_named(name)
    if isinstance(benchmark, CodeBenchmark) and not allow_code_execution:
        raise InputError(f"{name} runs programs that the model writes; --allow_code_execution allows it, in a sandbox")
    score = partial(code_sandbox.score, benchmark) if isinstance(benchmark, CodeBenchmark) else benchmark.score
    tokenizer, template = reader.known, reader.rendered if reader.has_template else None
    return [
        Case(
            ids=tokenizer.encode(benchmark.text(problem, template, tokenizer.quote)),
            text=problem.prompt,
            check=partial(score, problem),
            extract=partial(benchmark.extract, problem),
            group=name,
        )
        for problem in benchmark.problems(path)[:count]
    ]
