"""`cdlm generate`."""

import contextlib
import sys
from functools import partial
from pathlib import Path

from absl import flags

from cdlm_jax.commands import INCOMPLETE
from cdlm_jax.commands.common import console, define_model, define_output, model, say_where
from cdlm_jax.commands.groups import Group
from cdlm_jax.config import InputError

SUMMARY = "answer prompts with a model folder"


def define(values: flags.FlagValues) -> None:
    define_model(values)
    prompts = Group(values, "prompts")
    prompts.text("prompt", None, "Text to answer.")
    prompts.items("prompt_ids", "Or: token ids to answer.")
    prompts.text("task", None, "Or: held-out problems of this task.")
    prompts.number("num", 4, "How many of them.")
    prompts.text("input", None, "Or: JSON lines of prompt, prompt_ids or messages, and perhaps an id.")
    prompts.switch("strict", False, "Answer nothing if a line of --input cannot be answered.")
    prompts.switch("chat", True, "Use the folder's chat template for text, if it has one.")
    prompts.text("system", None, "System message of the chat template.")
    define_output(values)
    Group(values, "output").switch("show_steps", False, "Play the refinement of each answer.")


def run(values: flags.FlagValues) -> int:
    from cdlm_jax.evaluation import answers
    from cdlm_jax.evaluation.answer_file import answer_file
    from cdlm_jax.mesh.progress import track

    sources = [name for name in ("prompt", "prompt_ids", "task", "input") if values[name].value is not None]
    if len(sources) != 1:
        got = ", ".join(sources) or "none"
        raise InputError(f"give exactly one of --prompt, --prompt_ids, --task, --input; got {got}")
    with model(values) as (folder, options):
        terminal = console()  # which asks JAX who this process is, once it has joined the others
        items = _items(values, sources[0], folder, options)
        refused = sum(isinstance(item, answers.Refused) for item in items)
        settings = partial(answers.settings, folder, items, options)
        with answer_file(values.output, len(items), settings) as file:
            found = answers.answer_kept(folder, items, options, values.batch_size, file)
            if file is not None and not file.complete and not values.show_steps:
                found = track(found, "answers", len(items) - refused)
            for answer in found:
                if values.show_steps:
                    show_steps(folder, answer, options, terminal)
                elif file is None:
                    _print(answer, terminal)
    say_where(file, len(items) - refused, terminal)
    if refused:
        _say(f"{refused} of {len(items)} lines were not answered")
    return INCOMPLETE if refused else 0


def _items(values: flags.FlagValues, source: str, folder, options) -> list:
    """What to answer, and the lines that cannot be, which are reported."""
    from cdlm_jax.evaluation import prompts
    from cdlm_jax.evaluation.harness import Case

    reader = prompts.Reader(folder.tokenizer, values.chat, values.system)
    match source:
        case "prompt":
            return [reader.text(values.prompt)]
        case "prompt_ids":
            return [Case(_integers("prompt_ids", values.prompt_ids))]
        case "task":
            return prompts.task_cases(folder, values.task, values.num)
    path = Path(values.input)
    items = prompts.file_items(reader, folder.model.config, path, options.gen_length)
    for complaint in prompts.complaints(path, items):
        if values.strict:
            raise InputError(complaint)
        _say(complaint)
    return items


def _say(line: str) -> None:
    from cdlm_jax.mesh.distributed import is_main

    if is_main():
        print(f"cdlm generate: {line}", file=sys.stderr)


def _integers(name: str, items: list[str]) -> list[int]:
    with contextlib.suppress(ValueError):
        return [int(item) for item in items]
    raise InputError(f"--{name} takes comma-separated integers, got {','.join(items)!r}")


def show_steps(folder, answer, options, console) -> None:
    """Play the refinement of one answer in the terminal."""
    from cdlm_jax.evaluation.player import play

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


def _print(answer, console) -> None:
    from rich.markup import escape

    prompt = answer.case.text or " ".join(map(str, answer.case.ids))
    text = answer.text if answer.text is not None else " ".join(map(str, answer.tokens[: answer.length].tolist()))
    verdict = {None: "", True: "  [green]right[/]", False: "  [red]wrong[/]"}[answer.correct]
    console.print(f"[dim]{escape(prompt)}[/] {escape(text)}", soft_wrap=True, highlight=False)
    console.print(
        f"[dim]  {answer.length} tokens, {answer.forwards} forwards[/]{verdict}", soft_wrap=True, highlight=False
    )
