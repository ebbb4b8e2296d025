"""Countdown: `15,44,79>50` -> `44-15=29,79-29=50`, judged for any number of numbers, made with three.

Format, ranges, mix of operators and order of operands follow Dream's public test file dream_cd3_test.jsonl.
"""

import random
import re
from functools import cache
from importlib import resources
from itertools import permutations

from cdlm_jax.tasks.base import Problem, Puzzle, Task

LARGEST = 99
TARGETS = (22, 96)
# How often each pair of operators occurs in the 1,000 worked answers of the test file.
_OPERATOR_PAIRS = {
    "--": 288, "+-": 226, "-+": 174, "-*": 62, "/+": 48, "/-": 40, "*-": 39, "++": 35,
    "-/": 23, "*/": 19, "+/": 17, "*+": 16, "/*": 8, "//": 4, "+*": 1,
}  # fmt: skip
_NUMBER = r"[1-9][0-9]?"


def apply(a: int, operator: str, b: int) -> int | None:
    """a operator b, or None where the result is negative or not a whole number."""
    match operator:
        case "+":
            return a + b
        case "*":
            return a * b
        case "-":
            return a - b if a >= b else None
        case _:
            return a // b if b and a % b == 0 else None


def _finish(rng: random.Random, value: int, operator: str, target: int) -> tuple[int, str] | None:
    """A third number that leads from `value` to `target`, and that step as text; None if the drawn form has none."""
    match operator:
        case "+":
            third = target - value
            step = f"{third}+{value}={target}"
        case "*":
            third = target // value if target % value == 0 else 0
            step = f"{third}*{value}={target}"
        case _ if rng.random() < 0.5:  # third - value or third / value
            third = target + value if operator == "-" else target * value
            step = f"{third}{operator}{value}={target}"
        case _:
            third = value - target if operator == "-" else value // target if value % target == 0 else 0
            step = f"{value}{operator}{third}={target}"
    return (third, step) if 1 <= third <= LARGEST else None


@cache
def _pairs(operator: str) -> tuple[tuple[int, int, int], ...]:
    """All (a, b, result) with a operator b = result > 0."""
    numbers = range(1, LARGEST + 1)
    return tuple((a, b, value) for a in numbers for b in numbers if (value := apply(a, operator, b)))


@cache
def _in_test_file() -> frozenset[str]:
    text = resources.files("cdlm_jax.tasks").joinpath("countdown3_heldout.txt").read_text()
    return frozenset(text.split())


class Countdown(Puzzle):
    """Reach the target with + - * / from so many numbers of 1..99, each used once; steps are whole, none negative."""

    def __init__(self, numbers: int):
        self.name, self.numbers = f"countdown{numbers}", numbers
        self._prompt = re.compile(rf"{_NUMBER}(,{_NUMBER}){{{numbers - 1}}}>{_NUMBER}")
        # The largest value on the way to the target is a product of all numbers but one, two digits each.
        value = rf"(0|[1-9][0-9]{{0,{2 * numbers - 3}}})"
        self._equation = re.compile(rf"{value}([-+*/]){value}={value}")

    def score(self, problem: Problem, response: str) -> bool:
        """True equations, one fewer than numbers; each consumes two available numbers and adds its result; the target
        is what remains."""
        available, target = self._parse(problem.prompt)
        equations = response.split(",")
        if len(equations) != self.numbers - 1:
            return False
        for equation in equations:
            parts = self._equation.fullmatch(equation)
            if parts is None:
                return False
            a, b, result = int(parts[1]), int(parts[3]), int(parts[4])
            for used in (a, b):
                if used not in available:
                    return False
                available.remove(used)
            if apply(a, parts[2], b) != result:
                return False
            available.append(result)
        return available == [target]

    def _parse(self, prompt: str) -> tuple[list[int], int]:
        if self._prompt.fullmatch(prompt) is None:
            raise self.malformed(prompt, f"{self.numbers} numbers and a target of 1..99, written as 15,44,79>50")
        numbers, _, target = prompt.partition(">")
        return [int(number) for number in numbers.split(",")], int(target)


class Countdown3(Countdown, Task):
    """Countdown with three numbers: its problems are made here, and none has the numbers of Dream's test file."""

    name = "countdown3"
    characters = "0123456789+-*/=,>"

    def __init__(self):
        super().__init__(3)

    def sample(self, rng: random.Random, split: str) -> Problem:
        (pair,) = rng.choices(tuple(_OPERATOR_PAIRS), tuple(_OPERATOR_PAIRS.values()))
        first, second = pair[0], pair[1]
        found = None
        while found is None:
            a, b, value = rng.choice(_pairs(first))
            target = rng.randint(*TARGETS)
            found = _finish(rng, value, second, target)
        third, step = found
        numbers = [a, b] if first in "+*" or rng.random() < 0.5 else [b, a]
        numbers.append(third)
        if rng.random() < 0.2:  # in most rows of the test file the first two numbers are combined first
            rng.shuffle(numbers)
        if first in "+*" and numbers.index(a) > numbers.index(b):
            a, b = b, a  # sums and products are written in the order of the prompt
        return Problem(f"{','.join(map(str, numbers))}>{target}", f"{a}{first}{b}={value},{step}")

    def from_prompt(self, prompt: str) -> Problem:
        numbers, target = self._parse(prompt)
        for a, b, c in permutations(numbers):
            for first in "+-*/":
                if not (value := apply(a, first, b)):
                    continue
                for left, right in ((c, value), (value, c)):
                    for second in "+-*/":
                        if apply(left, second, right) == target:
                            return Problem(prompt, f"{a}{first}{b}={value},{left}{second}{right}={target}")
        raise self.malformed(prompt, "solvable")

    def key(self, problem: Problem) -> str:
        """The three numbers in rising order, whatever the target."""
        numbers, _ = self._parse(problem.prompt)
        return ",".join(map(str, sorted(numbers)))

    def is_heldout(self, key: str) -> bool:
        return key in _in_test_file() or super().is_heldout(key)
