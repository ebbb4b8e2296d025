"""Answers of any model folder, as they come: new ones, and those that a file has already."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.answer_file import AnswerFile
from cdlm_jax.evaluation.harness import Answer, Case, answers
from cdlm_jax.mesh import preemption
from cdlm_jax.mesh.distributed import Agreement
from cdlm_jax.models.hf import fingerprint
from cdlm_jax.models.model_folder import ModelFolder


@dataclasses.dataclass(frozen=True)
class Refused:
    """A prompt that cannot be answered, and why. tags: as a Case's."""

    error: str
    tags: Mapping[str, Any]


Item = Case | Refused


def answer_all(
    folder: ModelFolder, cases: Sequence[Case], options: Options, batch_size: int, start: int = 0
) -> Iterator[Answer]:
    """Decode with resolved options, in order, from case number `start` on."""
    decode, config = partial(options.bind(), folder.model), folder.model.config
    return answers(decode, config, folder.tokenizer, cases, batch_size=batch_size, seed=options.seed, start=start)


def answer_kept(
    folder: ModelFolder, items: Sequence[Item], options: Options, batch_size: int, file: AnswerFile | None
) -> Iterator[Answer]:
    """The answer of every case, in order: those that the file has, then new ones, which it is given as they come.

    Preempted between two answers, in all processes at the same one, if SIGTERM came (`preemption.noticed`). Those that
    do not write the file have the new answers only.
    """
    done, records = (0, []) if file is None else file.take(len(items))
    for item, kept in zip(items[:done], records, strict=False):
        if isinstance(item, Case):
            yield _answer(item, kept)
    cases = [item for item in items if isinstance(item, Case)]
    start = sum(isinstance(item, Case) for item in items[:done])
    new, stops = answer_all(folder, cases, options, batch_size, start), Agreement()
    for item in items[done:]:
        if stops(preemption.received()):
            raise preemption.Preempted
        found = next(new) if isinstance(item, Case) else item
        if file is not None:
            file.write(record(found))
        if isinstance(found, Answer):
            yield found


def record(found: Answer | Refused) -> dict[str, Any]:
    """An answer, or why there is none, as one JSON object."""
    if isinstance(found, Refused):
        return {**found.tags, "error": found.error}
    values = {
        **found.case.tags,
        "prompt": found.case.text,
        "prompt_ids": list(found.case.ids),
        "response": found.text,
        "extracted": found.extracted,
        "correct": found.correct,
        "tokens": found.tokens.tolist(),
        "finalized_at": found.finalized_at.tolist(),
        "length": found.length,
        "forwards": found.forwards,
    }
    return {name: value for name, value in values.items() if value is not None}


def _answer(case: Case, kept: dict[str, Any]) -> Answer:
    """The answer that a record was made from. InputError if it is not one of ours."""
    try:
        tokens, finalized_at = (np.asarray(kept[name], np.int32) for name in ("tokens", "finalized_at"))
        text, correct, extracted = (kept.get(name) for name in ("response", "correct", "extracted"))
        return Answer(case, tokens, finalized_at, kept["length"], kept["forwards"], text, correct, extracted)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the kept answer to {case.text!r:.80} was changed by hand: {error!r}") from error


def settings(folder: ModelFolder, items: Sequence[Item], options: Options) -> dict[str, Any]:
    """What the answers are a function of, by name. The batch size and the mesh have no part in it."""
    return asked(folder, items) | {"options": options.given()}


def asked(folder: ModelFolder, items: Sequence[Item]) -> dict[str, Any]:
    """Who is asked what: fingerprints of the model, its tokenizer, and the prompts."""
    prompts = [
        [*map(int, item.ids), item.text, item.group, dict(item.tags)] if isinstance(item, Case) else record(item)
        for item in items
    ]
    return {
        "model": fingerprint(folder.model),
        "tokenizer": None if folder.tokenizer is None else folder.tokenizer.fingerprint(),
        "prompts": {"count": len(items), "digest": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]},
    }
