"""Reads Dream's public 4x4 Sudoku and Countdown files as problems of `sudoku4` and `countdown3`, `countdown4` ...

One JSON object a line: `input` and `output`, both text. Sudoku: four lines of four digits, 0 for an empty cell.
Countdown: `15,44,79,50` (3 to 9 numbers, then the target) and `44-15=29,79-29=50`.
"""

import json
import re
from pathlib import Path

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.files import MAX_DATA, read_text
from cdlm_jax.tasks.base import Problem, Puzzle
from cdlm_jax.tasks.countdown import Countdown

_SUDOKU = re.compile(r"[0-9]{4}(\n[0-9]{4}){3}")
_COUNTDOWN = re.compile(r"([0-9]+(?:,[0-9]+){2,8}),([0-9]+)")


def load(path: str | Path) -> tuple[Puzzle, list[Problem]]:
    """Whose problems a file holds, and them, in file order, with the file's own answers.

    Raises InputError (file name and line number) on a row that is malformed, that is of another puzzle than the first
    row, or whose answer is wrong.
    """
    path = Path(path)
    puzzle, problems = None, []
    for number, line in enumerate(read_text(path, MAX_DATA).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found, problem = _parse(line)
            if puzzle is not None and found.name != puzzle.name:
                raise InputError(f"a {found.name} row in a file that began with {puzzle.name} rows")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        puzzle = puzzle or found
        problems.append(problem)
    if puzzle is None:
        raise InputError(f"{path} holds no problems")
    return puzzle, problems


def _parse(line: str) -> tuple[Puzzle, Problem]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("input", "output")):
        raise InputError("expected an object with the texts 'input' and 'output'")
    source, answer = row["input"], row["output"]
    if _SUDOKU.fullmatch(source):
        puzzle: Puzzle = tasks.get("sudoku4")
        problem = Problem(source.replace("\n", "") + ":", answer.replace("\n", ""))
    elif countdown := _COUNTDOWN.fullmatch(source):
        puzzle = _countdown(countdown[1].count(",") + 1)
        problem = Problem(f"{countdown[1]}>{countdown[2]}", answer)
    else:
        raise InputError(f"input {source!r} is neither a 4x4 Sudoku nor 3 to 9 numbers and a target")
    if not puzzle.score(problem, problem.answer):
        raise InputError(f"output {answer!r} does not solve input {source!r}")
    return puzzle, problem


def _countdown(numbers: int) -> Puzzle:
    return tasks.get("countdown3") if numbers == 3 else Countdown(numbers)
