"""Whether a run fits a machine that is not there, and what bounds it: the real programs, compiled ahead of time."""

import json
from pathlib import Path

from rich.console import Console

from cdlm_jax.planning import report
from cdlm_jax.planning.sweep import sweep
from cdlm_jax.planning.topology import load
from cdlm_jax.recipes.recipe import Recipe


def run(recipe: Recipe, topology: str, stage: str, *, sweeps: bool, output: Path | None, console: Console) -> None:
    """Plan a stage of the recipe on a machine, print what was found, write it to `output` as a JSON list.

    With `sweeps`, plan it on other meshes and with other batches too, and rank them. Raises InputError for unknown
    names, a missing compiler, and what no mesh of the machine can run.
    """
    machine = load(topology)
    if sweeps:
        plans = []
        for each in sweep(recipe, machine, stage):
            plans.append(each)
            verdict = "fits" if each.fits else "does not fit"
            console.print(f"mesh {tuple(each.mesh.values())}, {each.rows} rows: {verdict}")
        plans = report.ranked(plans)
        console.print(report.ranking(plans))
    else:
        plans = [report.plan(recipe, machine, stage)]
        console.print(report.table(plans[0]))
    if output is not None:
        output.write_text(json.dumps([each.json() for each in plans], indent=2) + "\n")
        console.print(f"wrote {output}")
