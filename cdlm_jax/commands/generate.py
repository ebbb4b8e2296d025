"""`cdlm generate`."""

import contextlib
from pathlib import Path

from absl import flags

from cdlm_jax.commands.common import console, define_model, model
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
    prompts.text("input", None, 'Or: a file of JSON lines, {"prompt": text} or {"prompt_ids": [...]}.')
    prompts.switch("chat", True, "Use the folder's chat template for text, if it has one.")
    output = Group(values, "output")
    output.text("output", None, "Write answers here as JSON lines.")
    output.switch("show_steps", False, "Play the refinement of each answer.")


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.evaluation import prompts
    from cdlm_jax.evaluation.answers import answer_all, check_writable, write_answers
    from cdlm_jax.evaluation.harness import Case
    from cdlm_jax.mesh.distributed import is_main
    from cdlm_jax.mesh.progress import track

    sources = [name for name in ("prompt", "prompt_ids", "task", "input") if values[name].value is not None]
    if len(sources) != 1:
        got = ", ".join(sources) or "none"
        raise InputError(f"give exactly one of --prompt, --prompt_ids, --task, --input; got {got}")
    output = None if values.output is None else Path(values.output)
    terminal = console()
    with model(values) as (folder, options):
        match sources[0]:
            case "prompt":
                cases = [prompts.text_case(folder.tokenizer, values.prompt, chat=values.chat)]
            case "prompt_ids":
                cases = [Case(_integers("prompt_ids", values.prompt_ids))]
            case "task":
                cases = prompts.task_cases(folder, values.task, values.num)
            case "input":
                cases = prompts.file_cases(folder.tokenizer, Path(values.input), chat=values.chat)
        if output is not None and is_main():
            check_writable(output)
        found = []
        answers = answer_all(folder, cases, options, values.batch_size)
        if output is not None and not values.show_steps:
            answers = track(answers, "answers", len(cases))
        for answer in answers:
            found.append(answer)
            if values.show_steps:
                show_steps(folder, answer, options, terminal)
            elif output is None:
                _print(answer, terminal)
        if output is not None and is_main():
            write_answers(output, found)
            terminal.print(f"{len(found)} answers written to {output}")


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
