"""Chain arithmetic with worked steps: `6+1-2+3=` -> `6+1=7;7-2=5;5+3=8;#8`."""

import random
import re

from cdlm_jax.tasks.base import Problem, Task

MAX_OPERANDS = 7
_PROMPT = re.compile(rf"[0-9](?:[+-][0-9]){{1,{MAX_OPERANDS - 1}}}=")
_FINAL = re.compile(r"[^#]*#([0-9])")


class Chain(Task):
    """Four to seven digits added and subtracted; every running value stays within 0..9."""

    name = "chain"
    characters = "0123456789+-=;#"

    def sample(self, rng: random.Random, split: str) -> Problem:
        value = rng.randrange(10)
        prompt = str(value)
        for _ in range(rng.randint(3, MAX_OPERANDS - 1)):
            # The next value is any other digit; that fixes the operator and its operand, which is 1..9.
            following = rng.choice([v for v in range(10) if v != value])
            prompt += f"{following - value:+d}"
            value = following
        return self.from_prompt(prompt + "=")

    def from_prompt(self, prompt: str) -> Problem:
        if not _PROMPT.fullmatch(prompt):
            raise self.malformed(prompt, f"2 to {MAX_OPERANDS} single digits joined by + and -, then '=', as 6+1-2+3=")
        value, steps = int(prompt[0]), ""
        for operator, operand in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
            result = value + int(operator + operand)
            if not 0 <= result <= 9:
                raise self.malformed(prompt, f"within 0..9 at every step: {value}{operator}{operand} is {result}")
            steps += f"{value}{operator}{operand}={result};"
            value = result
        return Problem(prompt, f"{steps}#{value}")

    def key(self, problem: Problem) -> str:
        return problem.prompt

    def extract(self, problem: Problem, response: str) -> str | None:
        final = _FINAL.fullmatch(response)
        return None if final is None else final[1]

    def score(self, problem: Problem, response: str) -> bool:
        """The digit after the only `#`, with nothing behind it, is the value of the chain. The steps are not judged."""
        return self.extract(problem, response) == problem.answer[-1]
