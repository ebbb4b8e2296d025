"""Scoring a model folder: held-out problems of tasks, files of real puzzles, and public benchmarks."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.evaluation import code_sandbox
from cdlm_jax.evaluation.harness import Case, heldout_problems, problem_cases
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
    allow_code_execution: bool = False,
) -> list[Case]:
    """What to answer, counted by task or by file.

    names: tasks, whose first `count` held-out problems are taken (None: 512), and public benchmarks (None: all; so of
        files).
    files: Sudoku or Countdown-3 as `path`; a benchmark's as `name=path`, or as `path` if it is alone.
    chat: put benchmark questions into the folder's chat template, where it has one.
    """
    if tokenizer is None:
        raise InputError("this model folder has no tokenizer, so it cannot read problems")
    if unknown := [name for name in names if name not in (*tasks.NAMES, *tasks.BENCHMARKS)]:
        known = f"tasks are {', '.join(tasks.NAMES)}; benchmarks are {', '.join(tasks.BENCHMARKS)}"
        raise InputError(f"unknown task {unknown[0]!r}; {known}")
    names = list(dict.fromkeys(names))  # named twice is asked for once
    benchmarks = [name for name in names if name in tasks.BENCHMARKS]
    paths, puzzles = _assigned(files, benchmarks, alone=len(names) == 1)
    found = problem_cases(tokenizer, heldout_problems([n for n in names if n in tasks.NAMES], count or PER_TASK))
    for path in puzzles:
        task, problems = real_data.load(path)
        found += problem_cases(tokenizer, [(task.name, problem) for problem in problems[:count]], group=Path(path).name)
    for name in benchmarks:
        found += _benchmark_cases(tokenizer, name, paths.get(name), count, chat, allow_code_execution)
    return found


def _assigned(files: Sequence[str], benchmarks: Sequence[str], *, alone: bool) -> tuple[dict[str, str], list[str]]:
    """(path by benchmark, paths of puzzles)."""
    if alone and benchmarks and len(files) == 1 and not files[0].startswith(f"{benchmarks[0]}="):
        return {benchmarks[0]: files[0]}, []
    named = [file.partition("=") for file in files]
    paths = {name: path for name, equals, path in named if equals and name in benchmarks}
    return paths, [file for file, (name, _, _) in zip(files, named, strict=True) if name not in paths]


def _benchmark_cases(
    tokenizer: Tokenizer, name: str, path: str | None, count: int | None, chat: bool, allow_code_execution: bool
) -> list[Case]:
    benchmark = tasks.benchmark_named(name)
    check = benchmark.score if not isinstance(benchmark, CodeBenchmark) else partial(code_sandbox.score, benchmark)
    if isinstance(benchmark, CodeBenchmark) and not allow_code_execution:
        raise InputError(f"{name} runs programs that the model writes; --allow_code_execution allows it, in a sandbox")
    template = tokenizer.apply_chat_template if chat and tokenizer.chat_template is not None else None
    return [
        Case(
            ids=tokenizer.encode(benchmark.text(problem, template, tokenizer.quote)),
            text=problem.prompt,
            check=partial(check, problem),
            group=name,
        )
        for problem in benchmark.problems(path)[:count]
    ]
