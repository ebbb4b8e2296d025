"""Answering prompts with any model folder: texts, token ids, a task's problems, or a file of them."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding import cdlm, naive
from cdlm_jax.decoding.progress import DecodeResult
from cdlm_jax.decoding.unmask import Threshold
from cdlm_jax.evaluation.harness import NamedProblem, heldout_problems
from cdlm_jax.evaluation.player import play
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to decode. None takes what the model folder says (`ModelFolder.metadata`), else the default in brackets.

    decoder: cdlm for a block-causal student, naive for a bidirectional teacher [naive]; gen_length [256]; block_size
    [32]; threshold: confidence above which tokens are finalized together [cdlm: 0.9, naive: one token per step];
    steps: of the naive decoder.
    """

    decoder: Literal["cdlm", "naive"] | None = None
    gen_length: int | None = None
    block_size: int | None = None
    threshold: float | None = None
    steps: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def resolve(self, metadata: dict[str, Any]) -> "Options":
        for name in ("gen_length", "block_size"):
            size = metadata.get(name, 1)
            if type(size) is not int or size < 1:
                raise InputError(f"config.json: cdlm.{name} must be a positive integer, got {size!r}")
        role = metadata.get("role", "teacher")
        if role not in ("teacher", "student"):
            raise InputError(f"config.json: cdlm.role must be teacher or student, got {role!r}")
        return dataclasses.replace(
            self,
            decoder=self.decoder or ("cdlm" if role == "student" else "naive"),
            gen_length=self.gen_length or metadata.get("gen_length", 256),
            block_size=self.block_size or metadata.get("block_size", 32),
        )

    def bind(self) -> Callable:
        """generate(model, prompts, prompt_lengths, key) -> DecodeResult, from resolved options."""
        shape = {"gen_length": self.gen_length, "block_size": self.block_size, "temperature": self.temperature}
        policy = None if self.threshold is None else Threshold(self.threshold)
        if self.decoder == "cdlm":
            if self.steps is not None:
                raise InputError("steps belong to the naive decoder; give the cdlm decoder a threshold")
            generate, config = cdlm.generate, cdlm.Config(**shape, unmask=policy or Threshold())
        elif self.decoder == "naive":
            generate, config = naive.generate, naive.Config(**shape, steps=self.steps, unmask=policy)
        else:
            raise InputError(f"decoder must be cdlm or naive, got {self.decoder!r}")
        return lambda model, prompts, lengths, key: generate(model, prompts, lengths, config, key)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt as token ids, with what there is to show and to score it by."""

    ids: list[int]
    text: str | None = None
    problem: tuple[str, tasks.Problem] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """tokens, finalized_at: [gen_length]; text and correct are None without a tokenizer, or a problem."""

    request: Request
    tokens: np.ndarray
    finalized_at: np.ndarray
    length: int
    forwards: int
    text: str | None
    correct: bool | None

    def record(self) -> dict[str, Any]:
        """As one JSON object."""
        values = {
            "prompt": self.request.text,
            "prompt_ids": self.request.ids,
            "response": self.text,
            "tokens": self.tokens.tolist(),
            "length": self.length,
            "forwards": self.forwards,
            "correct": self.correct,
        }
        return {name: value for name, value in values.items() if value is not None}


# ---- requests ------------------------------------------------------------------------------------------------------


def text_request(tokenizer: Tokenizer | None, text: str, *, chat: bool) -> Request:
    """`chat` wraps the text as a user's message in the folder's chat template, where it has one."""
    if tokenizer is None:
        raise InputError("this model folder has no tokenizer; give --prompt_ids, or prompt_ids in the input file")
    wrap = chat and tokenizer.chat_template is not None
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}]) if wrap else text
    return Request(tokenizer.encode(rendered), text)


def task_requests(tokenizer: Tokenizer | None, name: str, count: int) -> list[Request]:
    """The first held-out problems of a task."""
    return problem_requests(tokenizer, heldout_problems([name], count))


def problem_requests(tokenizer: Tokenizer | None, problems: Sequence[NamedProblem]) -> list[Request]:
    return [
        dataclasses.replace(text_request(tokenizer, problem.prompt, chat=False), problem=(name, problem))
        for name, problem in problems
    ]


def file_requests(tokenizer: Tokenizer | None, path: Path, *, chat: bool) -> list[Request]:
    """JSON lines, each {"prompt": text} or {"prompt_ids": [token ids]}."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number}: not JSON ({error})") from error
        match row:
            case {"prompt_ids": [*ids]} if all(type(i) is int for i in ids):
                requests.append(Request(ids))
            case {"prompt": str(text)}:
                requests.append(text_request(tokenizer, text, chat=chat))
            case _:
                expected = '{"prompt": text} or {"prompt_ids": [integers]}'
                raise InputError(f"{path} line {number}: expected {expected}, got {line:.80}")
    if not requests:
        raise InputError(f"{path} holds no prompts")
    return requests


# ---- answers -------------------------------------------------------------------------------------------------------


def answers(folder: ModelFolder, requests: Sequence[Request], options: Options, batch_size: int) -> Iterator[Answer]:
    """Decode in batches of equal shape, in order. `options` must be resolved."""
    config, generate = folder.model.config, options.bind()
    for number, request in enumerate(requests):
        _check_ids(request.ids, config, number)
    width = max(len(request.ids) for request in requests)
    key = jax.random.key(options.seed)
    rows = min(batch_size, len(requests))
    for start in range(0, len(requests), rows):
        batch = list(requests[start : start + rows])
        padded = batch + batch[-1:] * (rows - len(batch))
        prompts = [request.ids + [config.pad_token_id] * (width - len(request.ids)) for request in padded]
        lengths = [len(request.ids) for request in padded]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(rows))
        result = jax.device_get(
            generate(folder.model, jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32), keys)
        )
        for row, request in enumerate(batch):
            yield _answer(folder.tokenizer, request, result, row)


def _check_ids(ids: list[int], config: ModelConfig, number: int) -> None:
    """Everything about a prompt that decoding would refuse, before any batch is decoded."""
    if not ids:
        raise InputError(f"prompt {number} is empty")
    if bad := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise InputError(f"prompt {number} holds token {bad[0]}, outside the vocabulary 0..{config.vocab_size - 1}")
    if config.mask_token_id in ids:
        place = ids.index(config.mask_token_id)
        raise InputError(f"prompt {number} holds the mask token {config.mask_token_id} at position {place}")


def _answer(tokenizer: Tokenizer | None, request: Request, result: DecodeResult, row: int) -> Answer:
    tokens, length = result.tokens[row], int(result.lengths[row])
    text = None if tokenizer is None else tokenizer.decode(tokens[:length].tolist())
    correct = None
    if request.problem is not None and text is not None:
        name, problem = request.problem
        correct = tasks.get(name).score(problem, text)
    return Answer(request, tokens, result.finalized_at[row], length, int(result.forwards[row]), text, correct)


def show_steps(folder: ModelFolder, answer: Answer, options: Options, console: Console) -> None:
    """Play the refinement of one answer in the terminal."""
    tokenizer = folder.tokenizer
    pieces = [f"{token} " if tokenizer is None else tokenizer.id_to_token(token) for token in answer.tokens.tolist()]
    pieces = [piece if place < answer.length else "" for place, piece in enumerate(pieces)]
    play(
        answer.request.text or " ".join(map(str, answer.request.ids)),
        pieces,
        answer.finalized_at,
        block_size=options.block_size,
        label=f"{options.decoder}, block size {options.block_size}",
        console=console,
        forwards=answer.forwards,
    )


def write_answers(path: Path, found: Sequence[Answer]) -> None:
    """JSON lines; the file appears whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(answer.record()) + "\n" for answer in found), encoding="utf-8")
    partial.replace(path)


def _check_writable(path: Path) -> None:
    """Refuse an output path before any work is spent on it; what is there now stays until the answers are."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    probe = path.with_name(path.name + ".partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def run(
    folder: ModelFolder,
    requests: Sequence[Request],
    options: Options,
    *,
    batch_size: int,
    output: Path | None,
    steps_shown: bool,
    console: Console,
) -> None:
    """Answer all requests: print each (or play its refinement), and write `output` if given."""
    found = []
    if output is not None:
        _check_writable(output)
    for answer in answers(folder, requests, options, batch_size):
        found.append(answer)
        if steps_shown:
            show_steps(folder, answer, options, console)
        elif output is None:
            _print(answer, console)
    if output is not None:
        write_answers(output, found)
        console.print(f"{len(found)} answers written to {output}")


def _print(answer: Answer, console: Console) -> None:
    prompt = answer.request.text or " ".join(map(str, answer.request.ids))
    text = answer.text if answer.text is not None else " ".join(map(str, answer.tokens[: answer.length].tolist()))
    verdict = {None: "", True: "  [green]right[/]", False: "  [red]wrong[/]"}[answer.correct]
    console.print(f"[dim]{escape(prompt)}[/] {escape(text)}", soft_wrap=True, highlight=False)
    console.print(
        f"[dim]  {answer.length} tokens, {answer.forwards} forwards[/]{verdict}", soft_wrap=True, highlight=False
    )
