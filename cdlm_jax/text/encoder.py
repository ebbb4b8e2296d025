"""Texts as token rows of fixed size: what a model folder's prompts and answers become."""

import dataclasses

import numpy as np

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.text.tokenizers import Tokenizer


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
