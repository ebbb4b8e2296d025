"""What a user asks, as cases to answer: a text, a task's problems, or a file of prompts."""

import json
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.harness import Case, heldout_problems, problem_cases
from cdlm_jax.files import MAX_DATA, read_text
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.text.tokenizers import Tokenizer

NO_TOKENIZER = "this model folder has no tokenizer; give --prompt_ids, or prompt_ids in the input file"


def text_case(tokenizer: Tokenizer | None, text: str, *, chat: bool) -> Case:
    """`chat` wraps the text as a user's message in the folder's chat template, where it has one."""
    if tokenizer is None:
        raise InputError(NO_TOKENIZER)
    wrap = chat and tokenizer.chat_template is not None
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}]) if wrap else tokenizer.quote(text)
    return Case(tokenizer.encode(rendered), text)


def task_cases(folder: ModelFolder, name: str, count: int) -> list[Case]:
    """The first held-out problems of a task."""
    if folder.tokenizer is None:
        raise InputError(NO_TOKENIZER)
    return problem_cases(folder.tokenizer, heldout_problems([name], count))


def file_cases(tokenizer: Tokenizer | None, path: Path, *, chat: bool) -> list[Case]:
    """JSON lines, each {"prompt": text} or {"prompt_ids": [token ids]}."""
    cases = []
    for number, line in enumerate(read_text(path, MAX_DATA).split("\n"), 1):
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
