"""Scoring a model folder on problems with verifiable answers: held-out ones of tasks, and files of real data."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cdlm_jax.evaluation.harness import NamedProblem, heldout_problems
from cdlm_jax.generate import Options, answers, problem_requests
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.tasks import real_data


def problem_groups(names: Sequence[str], count: int, files: Sequence[Path]) -> dict[str, list[NamedProblem]]:
    """Held-out problems of the named tasks, and the problems of files of real data, each group under its name."""
    groups = {name: heldout_problems([name], count) for name in names}
    for path in files:
        task, problems = real_data.load(path)
        groups[path.name] = [(task.name, problem) for problem in problems]
    return groups


def score(folder: ModelFolder, groups: dict[str, list[NamedProblem]], options: Options, batch_size: int) -> Table:
    """Accuracy and forwards of every group. `options` must be resolved."""
    table = Table("problems", "number", "accuracy", "forwards", "tokens/forward", header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, group in groups.items():
        found = list(answers(folder, problem_requests(folder.tokenizer, group), options, batch_size))
        forwards = sum(answer.forwards for answer in found)
        table.add_row(
            name,
            str(len(found)),
            f"{100 * sum(answer.correct for answer in found) / len(found):.1f} %",
            f"{forwards / len(found):.2f}",
            f"{sum(answer.length for answer in found) / forwards:.2f}",
        )
    return table
