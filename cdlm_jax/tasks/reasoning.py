"""Tasks whose items and verifiers come from the `reasoning-gym` package (the optional extra `reasoning`).

Each prompt is a compact rendering of the package's question; the package's own `score_answer` judges the response.
"""

import random
import re
from abc import abstractmethod

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem, Task


class ReasoningTask(Task):
    """A reasoning-gym data set: item i is made by the package from its own seed i."""

    settings: dict[str, int]
    prompt_form: re.Pattern[str]
    example: str

    def __init__(self):
        try:
            import reasoning_gym
        except ImportError as error:
            raise InputError(
                f'task {self.name} needs the reasoning-gym package: pip install "cdlm_jax[reasoning]", or drop the task'
            ) from error
        self.dataset = reasoning_gym.create_dataset(self.name, seed=0, **self.settings)

    def sample(self, rng: random.Random, split: str) -> Problem:
        while True:  # a few words of the package have capitals or digits; they are not rendered
            item = self.dataset[rng.getrandbits(48)]
            prompt = self.render(item)
            if self.prompt_form.fullmatch(prompt):
                return Problem(prompt, item["answer"])

    def from_prompt(self, prompt: str) -> Problem:
        if not self.prompt_form.fullmatch(prompt):
            raise self.malformed(prompt, self.example)
        return Problem(prompt, self.solve(prompt))

    def score(self, problem: Problem, response: str) -> bool:
        return self.dataset.score_answer(response, {"answer": problem.answer}) == 1.0

    @abstractmethod
    def render(self, item: dict) -> str:
        """Our prompt for an item of the package."""

    @abstractmethod
    def solve(self, prompt: str) -> str:
        """The answer to a well-formed prompt."""


class SpellBackward(ReasoningTask):
    """`planet~` -> `tenalp`."""

    name = "spell_backward"
    characters = "abcdefghijklmnopqrstuvwxyz~"
    settings = {"min_word_len": 3, "max_word_len": 8}
    prompt_form = re.compile(r"[a-z]{3,8}~")
    example = "a word of 3 to 8 lower-case letters, then '~', as planet~"

    def render(self, item: dict) -> str:
        return item["metadata"]["word"] + "~"

    def solve(self, prompt: str) -> str:
        return prompt[-2::-1]

    def key(self, problem: Problem) -> str:
        return problem.prompt[:-1]


class ChainSum(ReasoningTask):
    """`12+34?` -> `46`. The package's verifier compares numbers: it also takes `046` and `46.0`."""

    name = "chain_sum"
    characters = "0123456789+-?"
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    prompt_form = re.compile(r"(0|[1-9][0-9]?)([+-])(0|[1-9][0-9]?)\?")
    example = "two numbers of 0..99 joined by + or -, then '?', as 12+34?"

    def render(self, item: dict) -> str:
        return item["metadata"]["expression"].replace(" ", "") + "?"

    def solve(self, prompt: str) -> str:
        a, operator, b = self._parts(prompt)
        return str(int(a) + int(operator + b))

    def key(self, problem: Problem) -> str:
        """The expression; a sum in the order small + large, so that 12+34 and 34+12 share a split."""
        a, operator, b = self._parts(problem.prompt)
        return f"{a}-{b}" if operator == "-" else f"{min(a, b, key=int)}+{max(a, b, key=int)}"

    def _parts(self, prompt: str) -> tuple[str, str, str]:
        """(first number, + or -, second number)"""
        found = self.prompt_form.fullmatch(prompt)
        assert found is not None, f"{prompt!r} was accepted as a prompt"
        a, operator, b = found.groups()
        return a, operator, b
