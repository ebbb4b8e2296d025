"""Answers of any model folder, and the file they are kept in."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import Answer, Case, answers
from cdlm_jax.models.model_folder import ModelFolder


def answer_all(folder: ModelFolder, cases: Sequence[Case], options: Options, batch_size: int) -> Iterator[Answer]:
    """Decode with resolved options, in order."""
    decode = partial(options.bind(), folder.model)
    return answers(decode, folder.model.config, folder.tokenizer, cases, batch_size=batch_size, seed=options.seed)


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


def write_answers(path: Path, found: Sequence[Answer]) -> None:
    """JSON lines; the file appears whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record(answer)) + "\n" for answer in found), encoding="utf-8")
    partial.replace(path)


def check_writable(path: Path) -> None:
    """Refuse an output path before any work is spent on it; what is there now stays until the answers are."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    probe = path.with_name(path.name + ".partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
