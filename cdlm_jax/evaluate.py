"""Scoring a model folder on problems with verifiable answers: held-out ones of tasks, and files of real data."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import Case, Score, by_group, heldout_problems, problem_cases
from cdlm_jax.generate import answer_all
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.tasks import real_data
from cdlm_jax.tokenizers import Tokenizer


def cases(tokenizer: Tokenizer | None, names: Sequence[str], count: int, files: Sequence[Path]) -> list[Case]:
    """Held-out problems of the named tasks, and the problems of files of real data, counted under the file's name."""
    if tokenizer is None:
        raise InputError("this model folder has no tokenizer, so it cannot read problems")
    found = problem_cases(tokenizer, heldout_problems(names, count))
    for path in files:
        task, problems = real_data.load(path)
        found += problem_cases(tokenizer, [(task.name, problem) for problem in problems], group=path.name)
    return found


def score(folder: ModelFolder, cases: Sequence[Case], options: Options, batch_size: int) -> dict[str, Score]:
    """The score of every group of cases. `options` must be resolved."""
    return by_group(list(answer_all(folder, cases, options, batch_size)))


def table(scores: dict[str, Score]) -> Table:
    """One row per group."""
    grid = Table("problems", "number", "accuracy", "forwards", "tokens/forward", header_style="bold")
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, score in scores.items():
        accuracy, forwards = f"{100 * score.accuracy:.1f} %", f"{score.forwards:.2f}"
        grid.add_row(name, str(score.problems), accuracy, forwards, f"{score.tokens_per_forward:.2f}")
    return grid
