"""Sorting numbers: `42,7,93,18<` -> `7,18,42,93`."""

import random
import re

from cdlm_jax.tasks.base import Problem, Task

_PROMPT = re.compile(r"(?:0|[1-9][0-9]?)(?:,(?:0|[1-9][0-9]?)){1,6}<")


class Sort(Task):
    """Four to seven numbers of 0..99, repeats allowed, into rising order."""

    name = "sort"
    characters = "0123456789,<"

    def sample(self, rng: random.Random, split: str) -> Problem:
        numbers = [rng.randrange(100) for _ in range(rng.randint(4, 7))]
        return self.from_prompt(",".join(map(str, numbers)) + "<")

    def from_prompt(self, prompt: str) -> Problem:
        if not _PROMPT.fullmatch(prompt):
            raise self.malformed(prompt, "2 to 7 numbers of 0..99 separated by commas, then '<', as 42,7,93,18<")
        return Problem(prompt, ",".join(sorted(prompt[:-1].split(","), key=int)))

    def key(self, problem: Problem) -> str:
        return problem.answer

    def score(self, problem: Problem, response: str) -> bool:
        """There is one right text: the numbers in rising order."""
        return response == problem.answer
