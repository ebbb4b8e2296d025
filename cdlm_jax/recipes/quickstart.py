"""The whole of CDLM in minutes: teacher, trajectories, student, and an honest report on held-out problems."""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import (
    Answer,
    Decode,
    Score,
    answers,
    heldout_problems,
    problem_cases,
    request,
    timings,
)
from cdlm_jax.evaluation.metrics import Measured
from cdlm_jax.evaluation.order_plot import Order, plot_order
from cdlm_jax.evaluation.player import play
from cdlm_jax.evaluation.plots import plot_accuracy
from cdlm_jax.evaluation.report import accuracy_table, comparison_table
from cdlm_jax.mesh.progress import track
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.recipes import recipe as stages
from cdlm_jax.recipes.recipe import Recipe

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
    program = sys.argv[0] if Path(sys.argv[0]).name == "cdlm" else "cdlm"  # .venv/bin/cdlm, where that was called
    console.print(f"try it: {program} generate --model={recipe.folder / 'student'} --task=chain --show_steps")


def report(
    recipe: Recipe, teacher: ModelFolder, student: ModelFolder, console: Console
) -> tuple[list[Measured], tuple[str, Order]]:
    """Measure every method on the same held-out problems; print the tables, write the plots.

    Returns the results, and one prompt with the order in which the student answered it.
    """
    encoder = teacher.encoder(recipe.prompt_length, recipe.gen_length)
    cases = problem_cases(encoder.tokenizer, heldout_problems(list(recipe.tasks), recipe.heldout_per_task))
    width, config = recipe.prompt_length, teacher.model.config

    def evaluate(name: str, decode: Decode) -> list[Answer]:
        found = answers(decode, config, encoder.tokenizer, cases, batch_size=64, width=width)
        return list(track(found, f"{name:32}", len(cases), console=console))

    sizes: dict[str, Any] = {"gen_length": recipe.gen_length, "block_size": recipe.block_size}
    naive, cdlm = (partial(Options, decoder=decoder, **sizes) for decoder in ("naive", "cdlm"))
    # The truncated teacher gets the student's own budget of forwards, in whole steps per block.
    blocks = recipe.gen_length // recipe.block_size
    answered = {STUDENT: evaluate(STUDENT, partial(cdlm(threshold=0.9).bind(), student.model))}
    budget = Score.of(answered[STUDENT]).forwards
    steps = blocks * min(recipe.block_size // 2, max(1, round(budget / blocks)))
    methods = [  # name, series, model, how it decodes
        (TEACHER, "teacher", teacher.model, naive()),
        (f"teacher, {2 * steps} steps", "teacher", teacher.model, naive(steps=2 * steps)),
        (f"teacher, {steps} steps", "teacher", teacher.model, naive(steps=steps)),
        ("teacher, threshold 0.9", "teacher, threshold", teacher.model, naive(threshold=0.9)),
        ("untrained student, tau 0.9", "untrained student", teacher.model, cdlm(threshold=0.9)),
        ("CDLM, tau 0.95", "CDLM", student.model, cdlm(threshold=0.95)),
        (STUDENT, "CDLM", student.model, cdlm(threshold=0.9)),
        ("CDLM, tau 0.7", "CDLM", student.model, cdlm(threshold=0.7)),
    ]
    decoders = {name: partial(options.bind(), model) for name, _, model, options in methods}
    timed = cases[:: max(1, len(cases) // LATENCY_PROBLEMS)]
    requests = [request([case], width, config.pad_token_id) for case in timed]
    calls = {name: [partial(decode, *one) for one in requests] for name, decode in decoders.items()}
    timing = timings(calls, label="latency, one sequence at a time", console=console)
    results = []
    for name, series, _, options in methods:
        if name not in answered:
            answered[name] = evaluate(name, decoders[name])
        results.append(Measured.of(name, series, options, answered[name], timing[name]))
    folder = recipe.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    sheets = [comparison_table(results, None, TEACHER), accuracy_table(results)]
    for sheet in sheets:
        console.print(sheet.rich())
    (folder / "results.md").write_text("\n".join(sheet.markdown() for sheet in sheets))
    plot_accuracy(results, folder / "accuracy.png", "Held-out accuracy against forward passes")
    orders = [Order.of(name, answered[name][0], encoder.tokenizer, recipe.block_size) for name in (TEACHER, STUDENT)]
    prompt = cases[0].text or ""
    plot_order(orders, folder / "order.png", f"When each token of the answer to {prompt} was finalized")
    return results, (prompt, orders[-1])
