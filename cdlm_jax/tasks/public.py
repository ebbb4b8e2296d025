"""What a public benchmark is: problems from a file, prompts for chat and for plain models, and scoring.

Unlike a `Task` of `base.py` it makes no problems of its own. Its attributes say which published harness it follows.
"""

import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cdlm_jax.config import InputError
from cdlm_jax.files import MAX_DATA, read_bytes
from cdlm_jax.tasks.base import Problem
from cdlm_jax.text.chat import Messages

P = TypeVar("P", bound=Problem)  # what a benchmark knows of a problem


@dataclass(frozen=True)
class Program:
    """Code to run against tests.

    code: Python source from a model: hostile. tests: statements that raise if the code is wrong, and setup: what they
    need to run; both are trusted. names: what the tests take from the code.
    """

    code: str
    tests: tuple[str, ...]
    names: tuple[str, ...]
    setup: str = ""


class Benchmark(ABC, Generic[P]):
    """One public benchmark in one setting.

    source: whose setting this is. template: what the user says, with {prompt}. opening: how the model's answer in a
    chat begins (it is part of the prompt). shots: worked examples before the question. extraction: how the answer is
    found in a response, in words. stop: where an answer ends, if the model goes on by itself.
    """

    name: str
    source: str
    template: str
    extraction: str
    opening: str = ""
    shots: int = 0
    stop: tuple[str, ...] = ()

    @abstractmethod
    def extract(self, problem: P, response: str) -> str | None:
        """The part of a response that is judged (`extraction` says which), None if it has none."""

    @abstractmethod
    def problems(self, path: str | Path | None = None) -> list[P]:
        """The test split, from a file or, without one, from where the benchmark is installed. InputError if neither."""

    def question(self, problem: P) -> str:
        """What the user says."""
        return self.template.replace("{prompt}", problem.prompt)

    def examples(self) -> Sequence[tuple[str, str]]:
        """(question, answer) of each shot."""
        return ()

    def prefill(self, problem: P) -> str:
        """How the model's answer in a chat begins; the response goes on from there."""
        return self.opening.replace("{prompt}", problem.prompt)

    def messages(self, problem: P) -> Messages:
        """The chat up to the model's turn, the shots as earlier turns."""
        turns = []
        for question, answer in self.examples():
            turns += [("user", question), ("assistant", answer)]
        turns.append(("user", self.question(problem)))
        return [{"role": role, "content": content} for role, content in turns]

    def prompt(self, problem: P) -> str:
        """The same for a model without a chat template, with the delimiters of lm-evaluation-harness."""
        shots = [f"{question} {answer}" for question, answer in self.examples()]
        return "\n\n".join([*shots, self.question(problem)])

    def text(
        self,
        problem: P,
        chat_template: Callable[[Messages], str] | None = None,
        quote: Callable[[str], str] = str,
    ) -> str:
        """What the model reads. chat_template: `Tokenizer.apply_chat_template`, for a model that has one; quote:
        `Tokenizer.quote`, for what no template writes."""
        if chat_template is None:
            return quote(self.prompt(problem))
        return chat_template(self.messages(problem)) + quote(self.prefill(problem))


class ScoredBenchmark(Benchmark[Problem]):
    """Its answers are checked by rules."""

    @abstractmethod
    def score(self, problem: Problem, response: str) -> bool:
        """True if `response` (the text before the first EOS) is right. Never raises on odd text."""


class CodeBenchmark(Benchmark[P]):
    """Its answers are programs, which `evaluation.code_sandbox` runs."""

    def extract(self, problem: P, response: str) -> str:
        return self.program(problem, response).code

    @abstractmethod
    def program(self, problem: P, response: str) -> Program:
        """The code in `response` (the text before the first EOS), with the tests. Never raises on odd text."""


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the `stop` texts."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def read_rows(path: str | Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(place for messages, object) of a .json list or .jsonl file, also gzipped. InputError names what is broken."""
    path = Path(path)
    data = read_bytes(path, MAX_DATA)
    try:
        text = (_unzipped(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if text.lstrip().startswith("["):
        rows = [(f"{path}, entry {number}", row) for number, row in enumerate(_parse(text, str(path)), 1)]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(place, _parse(line, place)) for place, line in lines]
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: expected an object, got {row!r:.80}")
    if not rows:
        raise InputError(f"{path} holds no problems")
    return rows


def _unzipped(data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        content = file.read(MAX_DATA + 1)
    if len(content) > MAX_DATA:
        raise OSError(f"unpacked it has more than {MAX_DATA:,} bytes")
    return content


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({error})") from error


def field(row: Mapping[str, Any], place: str, *names: str, kind: type = str, default: Any = None) -> Any:
    """The first of the fields that the row has. InputError if there is none and no default, or of another type."""
    for name in names:
        if name in row:
            if not isinstance(row[name], kind):
                raise InputError(f"{place}: {name} must be {kind.__name__}, got {row[name]!r:.80}")
            return row[name]
    if default is None:
        raise InputError(f"{place}: no {' or '.join(names)}; the fields are {', '.join(map(str, row)) or 'none'}")
    return default
