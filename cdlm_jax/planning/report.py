"""A plan: what one device holds, computes and sends in a stage of a recipe, and how long that takes at least."""

import dataclasses
import math
import re
import time
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.chips import GIB
from cdlm_jax.planning.cost import Collective, cost
from cdlm_jax.planning.stages import stage
from cdlm_jax.planning.topology import Topology
from cdlm_jax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage on a machine. Everything is of one device, unless said otherwise.

    rows: of one forward pass, over all devices. tokens: response tokens of one run (a training step; the decode of a
    batch), over all devices.
    memory: bytes by what they hold; peak: of all of it, None if the compiler gave up; hbm: what there is.
    flops, bytes: of one run, loops multiplied out; sent: bytes by axes of the mesh and kind of collective.
    analytic: FLOPs that the work needs.
    seconds: what computing, memory and network take at least, each alone at its full speed.
    """

    topology: str
    chip: str
    devices: int
    stage: str
    mesh: dict[str, int]
    rows: int
    tokens: int
    memory: dict[str, int]
    peak: int | None
    hbm: int
    flops: float = math.nan
    bytes: float = math.nan
    sent: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    analytic: float
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.hbm

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def tokens_per_second(self) -> float:
        """The ceiling, over all devices: as if everything overlapped."""
        return self.tokens / self.seconds[self.bound] if self.seconds else math.nan

    @property
    def ratio(self) -> float:
        """FLOPs of the compiled program over those that the work needs."""
        return self.flops / self.analytic

    def json(self) -> dict:
        values = dataclasses.asdict(self)
        derived = {"fits": self.fits, "tokens_per_second": self.tokens_per_second, "flops_over_analytic": self.ratio}
        if not self.seconds:  # JSON has no nan
            values.update(flops=None, bytes=None)
            derived = {"fits": False}
        return values | derived


def plan(recipe: Recipe, topology: Topology, name: str) -> Plan:
    """Compile a stage for a machine. InputError where the mesh does not suit the model, the batch or the machine."""
    return compiled(recipe, topology, name)[0]


def compiled(recipe: Recipe, topology: Topology, name: str) -> tuple[Plan, str]:
    """The plan, and the text of the compiled program; "" where the compiler ran out of the device's memory."""
    mesh = sharding.make_mesh(recipe.mesh, topology.devices)
    with jax.set_mesh(mesh):
        chosen = stage(name, recipe)
        accumulate = recipe.distill.accumulate if name == "distill" else 1
        rows = (recipe.distill if name == "distill" else recipe.collect).batch_size // accumulate
        held = {what: _held(values) for what, values in chosen.arguments.items()}
        begin = time.perf_counter()
        common: dict[str, Any] = {
            "topology": topology.name,
            "chip": topology.chip.name,
            "devices": len(topology.devices),
            "stage": name,
            "mesh": dict(mesh.shape),
            "rows": rows,
            "tokens": chosen.tokens,
            "hbm": topology.chip.hbm_bytes,
            "analytic": chosen.analytic / len(topology.devices),
        }
        lowered = chosen.lower()
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = time.perf_counter() - begin
            return Plan(**common, memory=held, peak=_wanted(str(error)), compile_seconds=seconds), ""
        seconds = time.perf_counter() - begin
    memory = _memory(executable.memory_analysis(), held)
    text = executable.as_text() or ""
    work = cost(text, lambda loop: chosen.forwards)
    sent = by_axes(work.collectives, mesh)
    total_sent = sum(size for kinds in sent.values() for size in kinds.values())
    found = Plan(
        **common,
        memory=memory,
        peak=sum(memory.values()),
        flops=work.flops,
        bytes=work.bytes,
        sent=sent,
        seconds={
            "compute": work.flops / topology.chip.flops,
            "memory": work.bytes / topology.chip.bandwidth,
            "network": total_sent / topology.network,
        },
        compile_seconds=seconds,
    )
    return found, text


def _held(values) -> int:
    """Bytes of arrays on one device; what has no sharding is whole on each."""
    leaves = jax.tree.leaves(values)
    shapes = [x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves]
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def _memory(stats, held: dict[str, int]) -> dict[str, int]:
    """What the compiled program holds at its peak: its arguments, by name, and what it adds to them."""
    rest = stats.argument_size_in_bytes - sum(held.values())  # padding, and arguments without a name
    return held | {
        "padding": max(rest, 0),
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }


def _wanted(message: str) -> int | None:
    """The memory that the compiler would have needed, if it says so."""
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    return round(float(found[1]) * 1024 ** "_KMGT".index(found[2])) if found else None


def by_axes(collectives: list[Collective], mesh: Mesh) -> dict[str, dict[str, float]]:
    """Bytes that a device sends, by the axes of the mesh along which it does, and by kind."""
    names, shape = list(mesh.shape), tuple(mesh.shape.values())
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kind, groups, size in collectives:
        places = [np.array(np.unravel_index(group, shape)) for group in groups if group]  # each [axes, devices]
        used = [name for axis, name in enumerate(names) if any(np.ptp(at[axis]) for at in places)]
        if size:
            found["+".join(used) or "none"][kind] += size
    return {axes: dict(kinds) for axes, kinds in found.items()}


# ---- in words ------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> Table:
    """One plan for a terminal."""
    shape = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    grid = Table(title=f"{plan.stage} on {plan.topology}: {plan.devices} devices ({plan.chip}), {shape}")
    grid.add_column("per device")
    grid.add_column("", justify="right")
    for name, size in plan.memory.items():
        grid.add_row(name, gib(size))
    peak = "more than the compiler can place" if plan.peak is None else gib(plan.peak)
    grid.add_row("peak", f"{peak} of {gib(plan.hbm)}: {'fits' if plan.fits else 'DOES NOT FIT'}", end_section=True)
    if plan.seconds:
        grid.add_row("FLOPs", f"{plan.flops:.3g}, {plan.ratio:.2f} x the analytic {plan.analytic:.3g}")
        grid.add_row("memory traffic", gib(plan.bytes))
        for axes, kinds in plan.sent.items():
            for kind, sent in kinds.items():
                grid.add_row(f"sent over {axes}, {kind}", gib(sent))
        grid.add_section()
        for name, seconds in plan.seconds.items():
            grid.add_row(f"{name} bound", f"{seconds:.3g} s" + (" (longest)" if name == plan.bound else ""))
        grid.add_row("response tokens/s, all devices, at most", f"{plan.tokens_per_second:,.0f}")
    grid.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    return grid


def ranking(plans: list[Plan]) -> Table:
    """Those that fit, the fastest first; then the others."""
    grid = Table(title="mesh shapes and batches, the highest ceiling first")
    for name in ("mesh (data x fsdp x tensor)", "rows per pass", "peak", "fits", "bound by", "seconds", "tokens/s"):
        grid.add_column(name, justify="right")
    for each in ranked(plans):
        peak = "-" if each.peak is None else gib(each.peak)
        known = (
            (each.bound, f"{each.seconds[each.bound]:.3g}", f"{each.tokens_per_second:,.0f}") if each.seconds else ()
        )
        shape = " x ".join(map(str, each.mesh.values()))
        grid.add_row(shape, str(each.rows), peak, "yes" if each.fits else "no", *known)
    return grid


def ranked(plans: list[Plan]) -> list[Plan]:
    return sorted(plans, key=lambda each: (not each.fits, -each.tokens_per_second if each.seconds else 0))


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"
