"""`cdlm evaluate`."""

from functools import partial

from absl import flags

from cdlm_jax.commands.common import (
    console,
    define_code_execution,
    define_model,
    define_output,
    model,
    say_where,
    warn_of_gaps,
)
from cdlm_jax.commands.groups import Group
from cdlm_jax.config import InputError

SUMMARY = "score a model folder on problems with verifiable answers"


def define(values: flags.FlagValues) -> None:
    define_model(values)
    problems = Group(values, "problems")
    problems.items("task", "Tasks and public benchmarks (gsm8k ...).")
    problems.number("num", None, "Problems of each [512 of a task, all of a benchmark].")
    problems.items("data", "Files: 4x4 Sudoku, Countdown, or name=path of a benchmark.")
    problems.switch("chat", True, "Use the folder's chat template for benchmarks, if it has one.")
    problems.text("system", None, "System message of the chat template, for benchmarks.")
    define_output(values)
    define_code_execution(values)


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.evaluation import answers, problems
    from cdlm_jax.evaluation.answer_file import answer_file
    from cdlm_jax.evaluation.harness import by_group
    from cdlm_jax.evaluation.report import score_table
    from cdlm_jax.mesh.distributed import is_main
    from cdlm_jax.mesh.progress import track

    if not values.task and not values.data:
        raise InputError("give --task=names, --data=files, or both")
    with model(values) as (folder, options):
        if values.allow_code_execution:
            warn_of_gaps()
        cases = problems.cases(
            folder.tokenizer,
            values.task or [],
            values.data or [],
            count=values.num,
            chat=values.chat,
            system=values.system,
            allow_code_execution=values.allow_code_execution,
        )
        settings = partial(answers.settings, folder, cases, options)
        with answer_file(values.output, len(cases), settings) as file:
            kept = answers.answer_kept(folder, cases, options, values.batch_size, file)
            new = file is None or not file.complete
            found = list(track(kept, "answers", len(cases)) if new else kept)
    terminal = console()
    say_where(file, len(cases), terminal)
    if is_main():
        terminal.print(score_table(by_group(found)).rich())
