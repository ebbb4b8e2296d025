"""Where a run's problems come from: a mixture of tasks, or a file of prompts with answers."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.files import MAX_DATA, read_text
from cdlm_jax.text import chat
from cdlm_jax.text.tokenizers import Tokenizer


class Problems(Protocol):
    """Random access to (name, problem). names: every name that occurs; source: where they come from, in words, which
    together with `seed` determines each."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...

    @property
    def seed(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, tasks.Problem]: ...


@dataclasses.dataclass(frozen=True)
class ProblemMixture:
    """Random access to `length` problems; each index draws its task by weight. Equal seeds give equal problems."""

    weights: dict[str, float]
    split: str
    length: int
    seed: int

    def __post_init__(self):
        if not self.weights or min(self.weights.values()) < 0 or not 0 < sum(self.weights.values()) < np.inf:
            raise InputError(f"task weights must be finite, not negative and not all zero, got {dict(self.weights)}")
        for name in self.weights:
            tasks.get(name)  # an unknown task, or one whose package is missing, is named now

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @property
    def source(self) -> str:
        return " ".join(f"{name}:{weight:g}" for name, weight in self.weights.items()) + f" ({self.split})"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, tasks.Problem]:
        """The task's name and the problem."""
        rng = np.random.default_rng([self.seed, int(index)])
        chances = np.array(list(self.weights.values()), float)
        name = list(self.weights)[rng.choice(len(chances), p=chances / chances.sum())]
        return name, tasks.get(name).problem(self.split, int(rng.integers(2**40)))


class PromptFile:
    """Prompts with worked answers from a file of JSON lines, {"prompt": text, "answer": text} ("question" will do),
    or chats, {"messages": [{"role": ..., "content": ...}, ...]}, whose last turn is the answer to all before it.

    Where the tokenizer has a chat template, both are put into it: the prompt as the user's turn, the answer as the
    assistant's, with the end of the turn. Prompts of more than `prompt_length` tokens are left out, as in the paper;
    `total` counts them too. InputError names the line that is not such an object, and refuses a template that does more
    than append turns.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, prompt_length: int, seed: int):
        text = read_text(path, MAX_DATA)
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        everything = [_problem(line, f"{path}, line {number}", tokenizer) for number, line in lines]
        self._problems = [one for one in everything if 1 <= len(tokenizer.encode(one.prompt)) <= prompt_length]
        self.total = len(everything)
        self.seed = seed
        self.names = (Path(path).stem,)
        self.source = f"{Path(path).name} {hashlib.blake2b(repr(everything).encode(), digest_size=8).hexdigest()}"

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> tuple[str, tasks.Problem]:
        return self.names[0], self._problems[index]


def _problem(line: str, place: str, tokenizer: Tokenizer) -> tasks.Problem:
    """InputError says at which place."""
    try:
        return _parsed(line, tokenizer)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _parsed(line: str, tokenizer: Tokenizer) -> tasks.Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error
    row = row if isinstance(row, dict) else {}
    if "messages" in row:
        if double := sorted(row.keys() & {"prompt", "question", "answer"}):
            raise InputError(f"messages hold the prompt and the answer, got {double[0]} too")
        return _templated(chat.checked(row["messages"], last="assistant", tokenizer=tokenizer), tokenizer)
    prompt, answer = row.get("prompt", row.get("question")), row.get("answer")
    if not (isinstance(prompt, str) and prompt and isinstance(answer, str) and answer):
        raise InputError(f'expected {{"prompt": text, "answer": text}} or {{"messages": [...]}}, got {line[:80]!r}')
    if tokenizer.chat_template is None:
        return tasks.Problem(tokenizer.quote(prompt), tokenizer.quote(answer))
    return _templated([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenizer)


def _templated(turns: chat.Messages, tokenizer: Tokenizer) -> tasks.Problem:
    """The last turn as the answer to those before it, as `Tokenizer.encode` takes both: what the file spells is text,
    what the template adds is special."""
    prompt = tokenizer.apply_chat_template(turns[:-1])
    both = tokenizer.apply_chat_template(turns, add_generation_prompt=False)
    if both == tokenizer.apply_chat_template(turns):  # it opens the next turn whether asked to or not
        both = both.removesuffix(tokenizer.apply_chat_template([]))
    if not both.startswith(prompt):
        raise InputError("the chat template writes a prompt in another way once it is answered: prompts cannot use it")
    return tasks.Problem(prompt, both.removeprefix(prompt).rstrip())
