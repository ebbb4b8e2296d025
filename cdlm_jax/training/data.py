"""Batches of encoded problems, made on the fly, as Grain datasets (deterministic, random access, resumable)."""

import dataclasses

import grain
import numpy as np

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns problems into fixed-size token rows: prompts right-padded to `prompt_length`, answers EOS-padded to `gen_length`."""

    tokenizer: Tokenizer
    model: ModelConfig
    prompt_length: int
    gen_length: int

    def prompt(self, text: str) -> tuple[np.ndarray, np.int32]:
        """[prompt_length] int32 and its true length."""
        ids = self.tokenizer.encode(text)
        if not 1 <= len(ids) <= self.prompt_length:
            raise InputError(f"prompt {text!r} has {len(ids)} tokens, allowed: 1 to {self.prompt_length}")
        return self._pad(ids, self.prompt_length, self.model.pad_token_id), np.int32(len(ids))

    def answer(self, text: str) -> np.ndarray:
        """[gen_length] int32; longer answers are cut."""
        return self._pad(self.tokenizer.encode(text)[: self.gen_length], self.gen_length, self.model.eos_token_id)

    def __call__(self, problem: tasks.Problem) -> dict[str, np.ndarray]:
        prompt, prompt_length = self.prompt(problem.prompt)
        return {"prompt": prompt, "prompt_length": prompt_length, "answer": self.answer(problem.answer)}

    @staticmethod
    def _pad(ids: list[int], length: int, pad: int) -> np.ndarray:
        return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)), constant_values=pad)


@dataclasses.dataclass(frozen=True)
class ProblemMixture:
    """Random-access source of `length` problems; each index draws its task by weight. Equal seeds give equal problems."""

    weights: dict[str, float]
    split: str
    length: int
    seed: int

    def __post_init__(self):
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise InputError(f"task weights must be non-negative and not all zero, got {dict(self.weights)}")
        for name in self.weights:
            tasks.get(name)  # an unknown task, or one whose package is missing, is named now

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, tasks.Problem]:
        rng = np.random.default_rng([self.seed, int(index)])
        chances = np.array(list(self.weights.values()), float)
        name = list(self.weights)[rng.choice(len(chances), p=chances / chances.sum())]
        return name, tasks.get(name).problem(self.split, int(rng.integers(2**40)))


def problem_batches(mixture: ProblemMixture, encoder: Encoder, batch_size: int) -> grain.IterDataset:
    """Batches {prompt [rows, P_max], prompt_length [rows], answer [rows, L]}; its iterator's state can be saved."""
    dataset = grain.MapDataset.source(mixture).map(lambda named: encoder(named[1])).batch(batch_size, drop_remainder=True)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
