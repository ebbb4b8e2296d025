"""Reads Dream's public 4x4 Sudoku and Countdown-3 files as problems of `sudoku4` and `countdown3`.

One JSON object a line: `input` and `output`, both text. Sudoku: four lines of four digits, 0 for an empty cell.
Countdown: `15,44,79,50` (the last number is the target) and `44-15=29,79-29=50`.
"""

import json
import re
from pathlib import Path

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.files import MAX_DATA, read_text
from cdlm_jax.tasks.base import Problem, Task

_SUDOKU = re.compile(r"[0-9]{4}(\n[0-9]{4}){3}")
_COUNTDOWN = re.compile(r"([0-9]+,[0-9]+,[0-9]+),([0-9]+)")


def load(path: str | Path) -> tuple[Task, list[Problem]]:
    """The task of a file and its problems, in file order, with the file's own answers.

    Raises InputError (file name and line number) on a row that is malformed, that is of another task than the first
    row, or whose answer is wrong.
    """
    path = Path(path)
    name, problems = None, []
    for number, line in enumerate(read_text(path, MAX_DATA).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row_name, problem = _parse(line)
            if name not in (None, row_name):
                raise InputError(f"a {row_name} row in a file that began with {name} rows")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        name = row_name
        problems.append(problem)
    if name is None:
        raise InputError(f"{path} holds no problems")
    return tasks.get(name), problems


def _parse(line: str) -> tuple[str, Problem]:
    """One row -> (task name, problem)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("input", "output")):
        raise InputError("expected an object with the texts 'input' and 'output'")
    source, answer = row["input"], row["output"]
    if _SUDOKU.fullmatch(source):
        name, problem = "sudoku4", Problem(source.replace("\n", "") + ":", answer.replace("\n", ""))
    elif countdown := _COUNTDOWN.fullmatch(source):
        name, problem = "countdown3", Problem(f"{countdown[1]}>{countdown[2]}", answer)
    else:
        raise InputError(f"input {source!r} is neither a 4x4 Sudoku nor three numbers and a target")
    if not tasks.get(name).score(problem, problem.answer):
        raise InputError(f"output {answer!r} does not solve input {source!r}")
    return name, problem
