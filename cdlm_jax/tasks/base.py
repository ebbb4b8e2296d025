"""What a task is: problems made from (split, index), worked answers, scoring, and the rule that parts the splits."""

import hashlib
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from cdlm_jax.config import InputError

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Problem:
    """A prompt and one worked answer to train on; other responses may be right too (ask `Task.score`)."""

    prompt: str
    answer: str


class Puzzle(ABC):
    """One kind of problem with answers that rules can check, wherever its problems come from."""

    name: str

    @abstractmethod
    def score(self, problem: Problem, response: str) -> bool:
        """True if `response` (the decoded text before the first EOS) solves the problem. Never raises on odd text."""

    def extract(self, problem: Problem, response: str) -> str | None:
        """The part of a response that `score` judges: all of it, or the answer at its end; None if it has none."""
        return response

    def malformed(self, prompt: str, expected: str) -> InputError:
        return InputError(f"{self.name}: prompt {prompt!r} is not {expected}")


class Task(Puzzle):
    """A puzzle that makes problems of its own, to train on. One character is one token."""

    characters: str  # every character that a prompt or a worked answer may hold

    @abstractmethod
    def sample(self, rng: random.Random, split: str) -> Problem:
        """A random problem. `split` is a hint that saves rejections; `problem` checks the split itself."""

    @abstractmethod
    def from_prompt(self, prompt: str) -> Problem:
        """The problem that a user typed, with a worked answer. Raises InputError if malformed or unsolvable."""

    @abstractmethod
    def key(self, problem: Problem) -> str:
        """What must not be shared between the splits: problems with equal keys fall into the same split."""

    def is_heldout(self, key: str) -> bool:
        """Every eighth key, chosen by a hash that is the same on every machine and Python."""
        digest = hashlib.blake2b(f"{self.name}:{key}".encode(), digest_size=8).digest()
        return digest[0] % 8 == 0

    def problem(self, split: str, index: int) -> Problem:
        """The `index`-th problem (any integer >= 0) of "train" or "heldout": the same on every call and machine."""
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}")
        if index < 0:
            raise InputError(f"problem index is {index}; it must be 0 or more")
        rng = random.Random(f"{self.name} {split} {index}")
        while True:
            problem = self.sample(rng, split)
            if split_of(self, problem) == split:
                return problem


def split_of(task: Task, problem: Problem) -> str:
    """The only split, "train" or "heldout", in which `problem` may occur."""
    return "heldout" if task.is_heldout(task.key(problem)) else "train"
