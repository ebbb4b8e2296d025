"""What a user asks, as cases to answer: a text, a task's problems, or a file of prompts."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding.common import check_ids
from cdlm_jax.evaluation.answers import Item, Refused
from cdlm_jax.evaluation.harness import Case, heldout_problems, problem_cases
from cdlm_jax.files import MAX_DATA, read_bytes
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.text.chat import Messages, checked, with_system
from cdlm_jax.text.tokenizers import Tokenizer

NO_TOKENIZER = "this model folder has no tokenizer; give --prompt_ids, or prompt_ids in the input file"
KINDS = ("prompt", "prompt_ids", "messages")  # of which a line of a file has one
EXPECTED = '{"prompt": text}, {"prompt_ids": [integers]} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns what a user asks into cases.

    chat: texts are put into the folder's chat template, where it has one; system: the message that such a chat begins
    with, unless it has its own.
    """

    tokenizer: Tokenizer | None
    chat: bool = True
    system: str | None = None

    def __post_init__(self):
        if self.system is not None and not self.has_template:
            raise InputError("--system needs a chat template; this model folder has none, or --nochat leaves it out")

    @property
    def known(self) -> Tokenizer:
        """The tokenizer. InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(NO_TOKENIZER)
        return self.tokenizer

    @property
    def has_template(self) -> bool:
        return self.chat and self.tokenizer is not None and self.tokenizer.chat_template is not None

    def text(self, text: str) -> Case:
        """A user's message."""
        wrapped = self.rendered([{"role": "user", "content": text}]) if self.has_template else self.known.quote(text)
        return Case(self.known.encode(wrapped), text)

    def messages(self, messages: Any) -> Case:
        """A chat, shown by its last message, which is the user's."""
        turns = checked(messages, last="user", tokenizer=self.tokenizer)
        if not self.chat:
            raise InputError("messages need the chat template, which --nochat leaves out")
        return Case(self.known.encode(self.rendered(turns)), turns[-1]["content"])

    def rendered(self, turns: Messages) -> str:
        """The text of a chat, up to the model's turn."""
        return self.known.apply_chat_template(with_system(turns, self.system))


def task_cases(folder: ModelFolder, name: str, count: int) -> list[Case]:
    """The first held-out problems of a task."""
    if folder.tokenizer is None:
        raise InputError(NO_TOKENIZER)
    return problem_cases(folder.tokenizer, heldout_problems([name], count))


def file_items(reader: Reader, model: ModelConfig, path: Path, gen_length: int) -> list[Item]:
    """JSON lines, each EXPECTED and perhaps with an "id", which the answer carries with the line's number.

    A line that cannot be answered (`gen_length` tokens included) becomes Refused, which says why. InputError: the file
    cannot be read, or has nothing but blank lines.
    """
    lines = read_bytes(path, MAX_DATA).split(b"\n")
    items = [_item(reader, model, line, number, gen_length) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"{path} holds no prompts")
    return items


def complaints(path: Path, items: list[Item]) -> Iterator[str]:
    """One line for each prompt of the file that cannot be answered."""
    return (f"{path} line {item.tags['line']}: {item.error}" for item in items if isinstance(item, Refused))


def _item(reader: Reader, model: ModelConfig, line: bytes, number: int, gen_length: int) -> Item:
    tags: dict[str, Any] = {"line": number}
    try:
        row = _row(line)
        tags |= {"id": row["id"]} if "id" in row else {}
        case = _case(reader, row)
        check_ids(model, number, case.ids)
        if len(case.ids) + gen_length > model.max_length:
            sizes = f"{len(case.ids)} tokens and {gen_length} of the answer"
            raise InputError(f"prompt of {sizes} exceeds the model's {model.max_length} positions")
        return dataclasses.replace(case, tags=tags)
    except InputError as error:
        return Refused(str(error), tags)


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"expected {EXPECTED}, got {_shown(row)}")
    return row


def _case(reader: Reader, row: dict[str, Any]) -> Case:
    if unknown := sorted(row.keys() - {*KINDS, "id"}):
        raise InputError(f"unknown key {unknown[0]!r:.80}, allowed: {', '.join(KINDS)}, id")
    match {name: value for name, value in row.items() if name != "id"}:
        case {"prompt_ids": [*ids], **more} if all(type(i) is int for i in ids) and not more:
            return Case(ids)
        case {"prompt": "", **more} if not more:  # a chat template would make something of it
            raise InputError("the prompt is empty")
        case {"prompt": str(text), **more} if not more:
            return reader.text(text)
        case {"messages": messages, **more} if not more:
            return reader.messages(messages)
    raise InputError(f"expected {EXPECTED}, got {_shown(row)}")


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.80}"
