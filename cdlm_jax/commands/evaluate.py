"""`cdlm evaluate`."""

from absl import flags

from cdlm_jax.commands.common import console, define_code_execution, define_model, model, warn_of_gaps
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
    define_code_execution(values)


def run(values: flags.FlagValues) -> None:
    from cdlm_jax.evaluation import problems
    from cdlm_jax.evaluation.answers import answer_all
    from cdlm_jax.evaluation.harness import by_group
    from cdlm_jax.evaluation.report import score_table
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
            allow_code_execution=values.allow_code_execution,
        )
        found = answer_all(folder, cases, options, values.batch_size)
        scores = by_group(list(track(found, "answers", len(cases))))
    console().print(score_table(scores).rich())
