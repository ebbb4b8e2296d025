"""Problems as token rows: encoding, where they come from (tasks, or a file), and Grain batches for pre-training."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Protocol

import grain
import numpy as np

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.distributed import own_rows
from cdlm_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Token rows of fixed size: prompts right-padded to `prompt_length`, answers EOS-padded to `gen_length`."""

    tokenizer: Tokenizer
    model: ModelConfig
    prompt_length: int
    gen_length: int

    def prompt(self, text: str) -> tuple[np.ndarray, np.int32]:
        """[prompt_length] int32 and its true length. InputError if it is empty or too long."""
        ids = self.tokenizer.encode(text)
        if not 1 <= len(ids) <= self.prompt_length:
            raise InputError(f"prompt {text!r} has {len(ids)} tokens, allowed: 1 to {self.prompt_length}")
        return _pad(ids, self.prompt_length, self.model.pad_token_id), np.int32(len(ids))

    def prompts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """[rows, prompt_length] and [rows] int32."""
        rows, lengths = zip(*map(self.prompt, texts), strict=True)
        return np.stack(rows), np.stack(lengths)

    def answer(self, text: str) -> np.ndarray:
        """[gen_length] int32; longer answers are cut."""
        return _pad(self.tokenizer.encode(text)[: self.gen_length], self.gen_length, self.model.eos_token_id)

    def response(self, tokens: np.ndarray) -> str:
        """The text of response tokens [L] before the first EOS."""
        ids = tokens.tolist()
        eos = self.model.eos_token_id
        return self.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)


def _pad(ids: list[int], length: int, pad: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)), constant_values=pad)


class Problems(Protocol):
    """Random access to (name, problem). names: every name that occurs; source: where they come from, in words, which
    together with `seed` determines each."""

    names: tuple[str, ...]
    source: str
    seed: int

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
    """Prompts with worked answers from a file of JSON lines, {"prompt": text, "answer": text} ("question" will do).

    Where the tokenizer has a chat template, both are put into it: the prompt as the user's turn, the answer as the
    assistant's, with the end of the turn. Prompts of more than `prompt_length` tokens are left out, as in the paper;
    `total` counts them too. InputError names the line that is not such an object, and refuses a template that does more
    than append turns.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, prompt_length: int, seed: int):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompts of {path}: {error}") from error
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        everything = [_templated(_parsed(line, f"{path}, line {number}"), tokenizer) for number, line in lines]
        self._problems = [one for one in everything if 1 <= len(tokenizer.encode(one.prompt)) <= prompt_length]
        self.total = len(everything)
        self.seed = seed
        self.names = (Path(path).stem,)
        self.source = f"{Path(path).name} {hashlib.blake2b(repr(everything).encode(), digest_size=8).hexdigest()}"

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> tuple[str, tasks.Problem]:
        return self.names[0], self._problems[index]


def _parsed(line: str, place: str) -> tasks.Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error})") from error
    texts = (row.get("prompt", row.get("question")), row.get("answer")) if isinstance(row, dict) else ()
    if len(texts) != 2 or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f'{place}: expected {{"prompt": text, "answer": text}}, got {line[:80]!r}')
    return tasks.Problem(*texts)


def _templated(problem: tasks.Problem, tokenizer: Tokenizer) -> tasks.Problem:
    if tokenizer.chat_template is None:
        return problem
    turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.answer}]
    prompt = tokenizer.apply_chat_template(turns[:1])
    both = tokenizer.apply_chat_template(turns, add_generation_prompt=False)
    if both == tokenizer.apply_chat_template(turns):  # it opens the next turn whether asked to or not
        both = both.removesuffix(tokenizer.apply_chat_template([]))
    if not both.startswith(prompt):
        raise InputError("the chat template writes a prompt in another way once it is answered: prompts cannot use it")
    return tasks.Problem(prompt, both.removeprefix(prompt).rstrip())


def problem_batches(mixture: ProblemMixture, encoder: Encoder, batch_size: int) -> grain.IterDataset:
    """Batches {prompt [own rows, P_max], prompt_length [own rows], answer [own rows, L]} of this process's rows of
    `batch_size`, in the mixture's order; the iterator's state can be saved."""
    mine = own_rows(batch_size)

    def encode(indices: np.ndarray) -> dict[str, np.ndarray]:
        problems = [mixture[index][1] for index in indices[mine]]
        prompt, prompt_length = encoder.prompts([problem.prompt for problem in problems])
        answer = np.stack([encoder.answer(problem.answer) for problem in problems])
        return {"prompt": prompt, "prompt_length": prompt_length, "answer": answer}

    batches = grain.MapDataset.range(len(mixture)).batch(batch_size, drop_remainder=True).map(encode)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
