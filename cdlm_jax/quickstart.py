"""The whole of CDLM in minutes: teacher, trajectories, student, and an honest report on held-out problems."""

import dataclasses
import json
import time
from functools import partial

from rich.console import Console

from cdlm_jax import recipe as stages
from cdlm_jax.config import InputError
from cdlm_jax.decoding.unmask import Threshold
from cdlm_jax.evaluation.harness import (
    Answer,
    Decode,
    Score,
    answers,
    by_group,
    heldout_problems,
    problem_cases,
    request,
    spread,
    timings,
)
from cdlm_jax.evaluation.order_plot import Order, plot_order
from cdlm_jax.evaluation.player import play
from cdlm_jax.evaluation.plots import plot_accuracy
from cdlm_jax.evaluation.report import MethodResult, markdown, table, task_table
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.recipe import Recipe, student_decoder, teacher_decoder

TEACHER = "teacher, 1 token per step"
STUDENT = "CDLM, tau 0.9"
LATENCY_PROBLEMS = 16


def quickstart(recipe: Recipe, *, from_scratch: bool, console: Console) -> None:
    """Run every stage and print the report; tables, plots and answers are kept under `work/report`."""
    if recipe.heldout_per_task == 0:
        raise InputError("config.heldout_per_task must be at least 1 for a report, got 0")
    if from_scratch:  # another teacher, so another folder than the shipped one's trajectories
        recipe = dataclasses.replace(recipe, work=str(recipe.folder / "from_scratch"))
    console.print(f"everything is written under {recipe.folder}")
    seconds: dict[str, float] = {}

    def timed(name: str, stage, *arguments):
        begin = time.perf_counter()
        result = stage(*arguments)
        seconds[name] = time.perf_counter() - begin
        return result

    if from_scratch:
        console.rule("1  train the teacher: masked denoising, full attention")
        timed("teacher", stages.pretrain, recipe)
        recipe = dataclasses.replace(recipe, teacher=str(recipe.folder / "teacher"))
    else:
        console.rule("1  teacher: the bidirectional diffusion model shipped with the package")
    teacher = ModelFolder.load(recipe.teacher)
    console.rule("2  collect its trajectories: one token per step, final hidden rows kept")
    timed("trajectories", stages.collect, recipe)
    console.rule("3  distill a block-causal student")
    student = timed("student", stages.distill, recipe)
    console.rule("4  held-out problems")
    results, (prompt, answer) = timed("report", report, recipe, teacher, student, console)
    console.rule("5  one answer, block by block")
    play(
        prompt,
        answer.pieces,
        answer.finalized_at,
        block_size=answer.block_size,
        label=answer.label,
        console=console,
        forwards=answer.forwards,
    )
    summary = {"seconds": seconds, "results": [dataclasses.asdict(result) for result in results]}
    (recipe.folder / "report" / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"{spent}; {sum(seconds.values()):.0f} s in all")
    console.print(f"student: {recipe.folder / 'student'}   tables and plots: {recipe.folder / 'report'}")
    console.print(f"try it: cdlm generate --model={recipe.folder / 'student'} --task=chain --show_steps")


def report(
    recipe: Recipe, teacher: ModelFolder, student: ModelFolder, console: Console
) -> tuple[list[MethodResult], tuple[str, Order]]:
    """Measure every method on the same held-out problems; print the tables, write the plots.

    Returns the results, and one prompt with the order in which the student answered it.
    """
    encoder = teacher.encoder(recipe.prompt_length, recipe.gen_length)
    cases = problem_cases(encoder.tokenizer, heldout_problems(list(recipe.tasks), recipe.heldout_per_task))
    width, config = recipe.prompt_length, teacher.model.config

    def evaluate(decode: Decode) -> list[Answer]:
        return list(answers(decode, config, encoder.tokenizer, cases, batch_size=64, width=width))

    def student_at(tau: float) -> Decode:
        return partial(student_decoder(recipe, tau), student.model)

    # The truncated teacher gets the student's own budget of forwards, in whole steps per block.
    blocks = recipe.gen_length // recipe.block_size
    answered = {STUDENT: evaluate(student_at(0.9))}
    budget = Score.of(answered[STUDENT]).forwards
    steps = blocks * min(recipe.block_size // 2, max(1, round(budget / blocks)))
    methods: dict[str, tuple[str, Decode]] = {
        TEACHER: ("teacher", partial(teacher_decoder(recipe), teacher.model)),
        f"teacher, {2 * steps} steps": ("teacher", partial(teacher_decoder(recipe, steps=2 * steps), teacher.model)),
        f"teacher, {steps} steps": ("teacher", partial(teacher_decoder(recipe, steps=steps), teacher.model)),
        "teacher, threshold 0.9": ("", partial(teacher_decoder(recipe, unmask=Threshold(0.9)), teacher.model)),
        "untrained student, tau 0.9": ("", partial(student_decoder(recipe, 0.9), teacher.model)),
        "CDLM, tau 0.95": ("CDLM", student_at(0.95)),
        STUDENT: ("CDLM", student_at(0.9)),
        "CDLM, tau 0.7": ("CDLM", student_at(0.7)),
    }
    with console.status("latency, one sequence at a time"):
        timed = cases[:: max(1, len(cases) // LATENCY_PROBLEMS)]
        requests = [request([case], width, config.pad_token_id) for case in timed]
        seconds = timings({name: decode for name, (_, decode) in methods.items()}, requests)
    results = []
    for name, (series, decode) in methods.items():
        if name not in answered:
            with console.status(f"{name}: {len(cases)} problems"):
                answered[name] = evaluate(decode)
        found = answered[name]
        score = Score.of(found)
        median, low, high = (1000 * value for value in spread(seconds[name].calls))
        results.append(
            MethodResult(
                name=name,
                accuracy=score.accuracy,
                problems=len(cases),
                forwards=score.forwards,
                tokens_per_forward=score.tokens_per_forward,
                latency_ms=median,
                latency_spread=(low, high),
                per_task={name: score.accuracy for name, score in by_group(found).items()},
                series=series,
            )
        )
    folder = recipe.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    console.print(table(results, TEACHER))
    console.print(task_table(results))
    (folder / "results.md").write_text(markdown(results, TEACHER))
    plot_accuracy(results, folder / "accuracy.png", "Held-out accuracy against forward passes")
    orders = [Order.of(name, answered[name][0], encoder.tokenizer, recipe.block_size) for name in (TEACHER, STUDENT)]
    prompt = cases[0].text
    plot_order(orders, folder / "order.png", f"When each token of the answer to {prompt} was finalized")
    return results, (prompt, orders[-1])
