"""Problems as token rows: encoding, a weighted mixture of tasks, and Grain batches of them for pre-training."""

import dataclasses

import grain
import numpy as np

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
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

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, tasks.Problem]:
        """The task's name and the problem."""
        rng = np.random.default_rng([self.seed, int(index)])
        chances = np.array(list(self.weights.values()), float)
        name = list(self.weights)[rng.choice(len(chances), p=chances / chances.sum())]
        return name, tasks.get(name).problem(self.split, int(rng.integers(2**40)))


def problem_batches(mixture: ProblemMixture, encoder: Encoder, batch_size: int) -> grain.IterDataset:
    """Batches {prompt [rows, P_max], prompt_length [rows], answer [rows, L]}; its iterator's state can be saved."""

    def encode(named: tuple[str, tasks.Problem]) -> dict[str, np.ndarray]:
        prompt, prompt_length = encoder.prompt(named[1].prompt)
        return {"prompt": prompt, "prompt_length": prompt_length, "answer": encoder.answer(named[1].answer)}

    dataset = grain.MapDataset.source(mixture).map(encode).batch(batch_size, drop_remainder=True)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
