"""Answering prompts with any model folder: texts, token ids, a task's problems, or a file of them."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.distributed import is_main
from cdlm_jax.evaluation.harness import Answer, Case, answers, heldout_problems, problem_cases
from cdlm_jax.evaluation.player import play
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.tokenizers import Tokenizer

NO_TOKENIZER = "this model folder has no tokenizer; give --prompt_ids, or prompt_ids in the input file"


def record(answer: Answer) -> dict[str, Any]:
    """An answer as one JSON object."""
    values = {
        "prompt": answer.case.text,
        "prompt_ids": list(answer.case.ids),
        "response": answer.text,
        "tokens": answer.tokens.tolist(),
        "length": answer.length,
        "forwards": answer.forwards,
        "correct": answer.correct,
    }
    return {name: value for name, value in values.items() if value is not None}


# ---- prompts -------------------------------------------------------------------------------------------------------


def text_case(tokenizer: Tokenizer | None, text: str, *, chat: bool) -> Case:
    """`chat` wraps the text as a user's message in the folder's chat template, where it has one."""
    if tokenizer is None:
        raise InputError(NO_TOKENIZER)
    wrap = chat and tokenizer.chat_template is not None
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}]) if wrap else text
    return Case(tokenizer.encode(rendered), text)


def task_cases(folder: ModelFolder, name: str, count: int) -> list[Case]:
    """The first held-out problems of a task."""
    if folder.tokenizer is None:
        raise InputError(NO_TOKENIZER)
    return problem_cases(folder.tokenizer, heldout_problems([name], count))


def file_cases(tokenizer: Tokenizer | None, path: Path, *, chat: bool) -> list[Case]:
    """JSON lines, each {"prompt": text} or {"prompt_ids": [token ids]}."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number}: not JSON ({error})") from error
        match row:
            case {"prompt_ids": [*ids]} if all(type(i) is int for i in ids):
                cases.append(Case(ids))
            case {"prompt": str(text)}:
                cases.append(text_case(tokenizer, text, chat=chat))
            case _:
                expected = '{"prompt": text} or {"prompt_ids": [integers]}'
                raise InputError(f"{path} line {number}: expected {expected}, got {line:.80}")
    if not cases:
        raise InputError(f"{path} holds no prompts")
    return cases


# ---- answers -------------------------------------------------------------------------------------------------------


def answer_all(folder: ModelFolder, cases: Sequence[Case], options: Options, batch_size: int) -> Iterator[Answer]:
    """Decode with resolved options, in order."""
    decode = partial(options.bind(), folder.model)
    return answers(decode, folder.model.config, folder.tokenizer, cases, batch_size=batch_size, seed=options.seed)


def show_steps(folder: ModelFolder, answer: Answer, options: Options, console: Console) -> None:
    """Play the refinement of one answer in the terminal."""
    tokenizer = folder.tokenizer
    pieces = [f"{token} " if tokenizer is None else tokenizer.id_to_token(token) for token in answer.tokens.tolist()]
    pieces = [piece if place < answer.length else "" for place, piece in enumerate(pieces)]
    play(
        answer.case.text or " ".join(map(str, answer.case.ids)),
        pieces,
        answer.finalized_at,
        block_size=options.block_size,
        label=options.decoder + (f", block size {options.block_size}" if options.block_size else ""),
        console=console,
        forwards=answer.forwards,
    )


def write_answers(path: Path, found: Sequence[Answer]) -> None:
    """JSON lines; the file appears whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record(answer)) + "\n" for answer in found), encoding="utf-8")
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
    cases: Sequence[Case],
    options: Options,
    *,
    batch_size: int,
    output: Path | None,
    steps_shown: bool,
    console: Console,
) -> None:
    """Answer all cases: print each (or play its refinement), and write `output` if given."""
    found = []
    if output is not None and is_main():
        _check_writable(output)
    for answer in answer_all(folder, cases, options, batch_size):
        found.append(answer)
        if steps_shown:
            show_steps(folder, answer, options, console)
        elif output is None:
            _print(answer, console)
    if output is not None and is_main():
        write_answers(output, found)
        console.print(f"{len(found)} answers written to {output}")


def _print(answer: Answer, console: Console) -> None:
    prompt = answer.case.text or " ".join(map(str, answer.case.ids))
    text = answer.text if answer.text is not None else " ".join(map(str, answer.tokens[: answer.length].tolist()))
    verdict = {None: "", True: "  [green]right[/]", False: "  [red]wrong[/]"}[answer.correct]
    console.print(f"[dim]{escape(prompt)}[/] {escape(text)}", soft_wrap=True, highlight=False)
    console.print(
        f"[dim]  {answer.length} tokens, {answer.forwards} forwards[/]{verdict}", soft_wrap=True, highlight=False
    )
