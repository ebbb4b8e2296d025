"""What a comparison of decoders shows: tables for the terminal and for Markdown, and two plots."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from rich.table import Table
from rich.text import Text

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.player import FILLER, visible

INK, GREY, GRID = "#222222", "#767676", "#E6E6E6"
# Okabe & Ito's and Tol's colour-blind-safe sets, those dark enough for text.
COLORS = ("#D55E00", "#0072B2", "#117733", "#882255", "#807A00", "#332288")
MARKERS = ("o", "s", "D", "^", "v", "P")
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))  # best first
DPI = 150


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One decoder on one set of problems.

    accuracy: 0..1; forwards: mean per sequence; latency_ms: median of one sequence alone (batch 1), milliseconds, and
    its spread (low, high); per_task: accuracy 0..1 by task; series: results of one series (one decoder, its knob
    turned) share a colour and are joined by a line.
    """

    name: str
    accuracy: float
    problems: int
    forwards: float
    tokens_per_forward: float
    latency_ms: float
    latency_spread: tuple[float, float] | None = None
    per_task: dict[str, float] | None = None
    note: str = ""
    series: str = ""

    def __post_init__(self):
        if not 0 <= self.accuracy <= 1:
            raise InputError(f"accuracy of {self.name!r} must be in 0..1, got {self.accuracy}")
        for name in ("problems", "forwards", "latency_ms"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} of {self.name!r} must be positive, got {getattr(self, name)}")


# ---- tables --------------------------------------------------------------------------------------------------------


def table(results: Sequence[MethodResult], baseline: str) -> Table:
    """One row per method. Speed-up is the latency of the method named `baseline` over the row's own."""
    grid = _rich(*_comparison(results, baseline))
    grid.caption = Text(_caption(results, baseline))
    return grid


def task_table(results: Sequence[MethodResult]) -> Table | None:
    """Accuracy by task, one row per method; None if no result has `per_task`."""
    content = _tasks(results)
    return content and _rich(*content)


def markdown(results: Sequence[MethodResult], baseline: str) -> str:
    """The content of `table`, and of `task_table` if there is one, as Markdown."""
    parts = [_markdown(*_comparison(results, baseline)), _caption(results, baseline) + "\n"]
    if content := _tasks(results):
        parts.append(_markdown(*content))
    return "\n".join(parts)


def _comparison(results: Sequence[MethodResult], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows, formatted."""
    latencies = {result.name: result.latency_ms for result in results}
    if baseline not in latencies:
        raise InputError(f"baseline {baseline!r} is not among the methods: {', '.join(latencies) or 'none given'}")
    header = ["method", "accuracy", "forwards", "tokens/forward", "latency", "speed-up"]
    rows = [
        [
            result.name,
            f"{100 * result.accuracy:.1f} %",
            f"{result.forwards:.2f}",
            f"{result.tokens_per_forward:.2f}",
            _latency(result),
            f"{latencies[baseline] / result.latency_ms:.1f}x",
        ]
        for result in results
    ]
    if any(result.note for result in results):
        header.append("note")
        rows = [[*row, result.note] for row, result in zip(rows, results, strict=True)]
    return header, rows


def _caption(results: Sequence[MethodResult], baseline: str) -> str:
    counts = sorted({result.problems for result in results})
    problems = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{problems} problems; latency of one sequence alone (median); speed-up against {baseline}"


def _tasks(results: Sequence[MethodResult]) -> tuple[list[str], list[list[str]]] | None:
    tasks = list(dict.fromkeys(task for result in results for task in result.per_task or {}))
    if not tasks:
        return None
    rows = []
    for result in results:
        accuracy = result.per_task or {}
        rows.append([result.name, *(f"{100 * accuracy[task]:.1f} %" if task in accuracy else "" for task in tasks)])
    return ["method", *tasks], rows


def _latency(result: MethodResult) -> str:
    digits = 2 if result.latency_ms < 10 else 1 if result.latency_ms < 100 else 0
    spread = "" if result.latency_spread is None else " ({:.{d}f}-{:.{d}f})".format(*result.latency_spread, d=digits)
    return f"{result.latency_ms:.{digits}f} ms{spread}"


def _rich(header: list[str], rows: list[list[str]]) -> Table:
    grid = Table(header_style="bold")
    for name in header:
        grid.add_column(Text(name), justify="left" if name in ("method", "note") else "right")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---" if name in ("method", "note") else "---:" for name in header]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, rule, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


# ---- accuracy against forwards -------------------------------------------------------------------------------------


def plot_accuracy(results: Sequence[MethodResult], path: str | Path, title: str) -> None:
    """Accuracy against forwards per sequence (log scale) as a PNG: a labelled point per method, a line per series."""
    if not results:
        raise InputError("nothing to plot: no results were given")
    figure = Figure(figsize=(8, 4.8), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    groups: dict[str, list[MethodResult]] = {}
    for result in results:
        groups.setdefault(result.series or result.name, []).append(result)
    labels = []
    for index, group in enumerate(groups.values()):
        group = sorted(group, key=lambda result: result.forwards)
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        x, y = [result.forwards for result in group], [100 * result.accuracy for result in group]
        axes.plot(x, y, color=color, marker=marker, markersize=7, linewidth=1.6, markeredgecolor="white", zorder=3)
        labels += [(result.name, at, color) for result, *at in zip(group, x, y, strict=True)]
    _accuracy_axes(axes, results, title)
    canvas.draw()  # settles the layout, which the labels' places depend on
    _place_labels(axes, labels, canvas.get_renderer())
    figure.savefig(path, format="png", dpi=DPI)


def _accuracy_axes(axes: Axes, results: Sequence[MethodResult], title: str) -> None:
    forwards, accuracy = [r.forwards for r in results], [100 * r.accuracy for r in results]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(forwards) / 1.6, max(forwards) * 1.6)
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = min(accuracy), max(accuracy)
    room = max(0.15 * (high - low), (5 - (high - low)) / 2)  # never zoom in on noise: at least 5 points are shown
    axes.set_ylim(low - room, high + room)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low - room, high + room)
    axes.set_yticks([tick for tick in ticks if low - room <= tick <= min(100, high + room)])
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=GREY)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=GREY)
    axes.set_xlabel("forwards per answer (log scale)", fontsize=10, color=INK)
    axes.set_ylabel("accuracy", fontsize=10, color=INK)
    axes.set_title(title, fontsize=12, color=INK, loc="left", weight="bold", pad=12, parse_math=False)


def _place_labels(axes: Axes, labels: list[tuple[str, list[float], str]], renderer) -> None:
    """Write (text, (x, y), colour) beside its point, where it covers least of points, lines and earlier labels."""
    points = axes.transData.transform([at for _, at, _ in labels])
    marks = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    for line in axes.lines:
        marks += _along(axes.transData.transform(line.get_xydata()))
    inside, scale = axes.get_window_extent(renderer), axes.figure.dpi / 72
    written = []
    for (text, at, color), point in zip(labels, points, strict=True):
        note = axes.annotate(text, at, (0, 0), textcoords="offset points", fontsize=9, color=color, parse_math=False)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        best = (math.inf,)
        for distance, (x, y) in product((9, 20, 34, 50, 70), DIRECTIONS):
            place = {
                "position": (distance * x, distance * y),
                "horizontalalignment": "left" if x > 0 else "right" if x < 0 else "center",
                "verticalalignment": "center" if y == 0 else "bottom" if y > 0 else "top",
            }
            note.set(**place)
            box = note.get_window_extent(renderer)
            leader = _along([point, point + scale * distance * np.array((x, y))])
            covered = sum(_overlap(box, other) for other in marks + written)
            covered += sum(_overlap(piece, other) for piece in leader for other in written)
            covered += 10 * (box.width * box.height - _overlap(box, inside))
            if covered + distance < best[0]:
                best = covered + distance, box, leader, place, distance
            if not covered:
                break
        _, box, leader, place, distance = best
        note.set(**place)
        written.append(box.padded(6))
        if distance > 9:  # too far to be read as the point's own: lead the eye
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.7}
            axes.annotate("", at, place["position"], textcoords="offset points", arrowprops=line)
            marks += leader


def _along(corners: Sequence[np.ndarray]) -> list[Bbox]:
    """Small boxes that cover the line through the corners (pixels)."""
    boxes = []
    for start, end in pairwise(corners):
        steps = int(np.hypot(*(end - start)) / 8) + 1
        boxes += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in np.linspace(start, end, steps + 1)]
    return boxes


def _overlap(a: Bbox, b: Bbox) -> float:
    """Common area in pixels."""
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else common.width * common.height


# ---- the order of finalization -------------------------------------------------------------------------------------

# Inches, the unit of the whole drawing.
PAGE, MARGIN, TITLE, HEADER, SAMPLE_GAP = 11.5, 0.3, 0.36, 0.36, 0.12
CELL_HEIGHT, WIDEST_CELL, CHARACTER, ROW_GAP = 0.27, 0.27, 0.085, 0.09
MOST_COLUMNS, LONGEST_PIECE = 64, 6
FONT = font_manager.FontProperties(family="DejaVu Sans Mono", size=9)  # comes with matplotlib
ORDER_COLORS = colormaps["YlGnBu_r"]


class Order(NamedTuple):
    """One decoded answer: pieces [L] display text per token ("" for EOS); the rest as in DecodeResult."""

    label: str
    pieces: Sequence[str]
    finalized_at: Sequence[int]
    forwards: int
    block_size: int


def plot_order(samples: Sequence[Order | tuple], path: str | Path, title: str) -> None:
    """The forward that finalized each position, as a PNG: samples below each other, a cell per position.

    Colour is the forward; faint cells hold EOS, empty ones were never decoded; dark lines are block boundaries.
    """
    samples = [_checked(Order(*sample)) for sample in samples]
    if not samples:
        raise InputError("nothing to plot: no samples were given")
    grids = [_grid(sample) for sample in samples]
    width = 2 * MARGIN + max(6, *(columns * cell for columns, _, cell in grids))
    heights = [HEADER + rows * (CELL_HEIGHT + ROW_GAP) + SAMPLE_GAP for _, rows, _ in grids]
    height = 2 * MARGIN + TITLE + sum(heights) - SAMPLE_GAP - ROW_GAP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(MARGIN, MARGIN, title, fontsize=12, weight="bold", color=INK, va="top", parse_math=False)
    top = MARGIN + TITLE
    for sample, (columns, _, cell), used in zip(samples, grids, heights, strict=True):
        _draw_header(axes, sample, top, width - MARGIN)
        _draw_cells(axes, sample, top + HEADER, columns, cell)
        top += used
    figure.savefig(path, format="png", dpi=DPI)


def _checked(sample: Order) -> Order:
    label, pieces, finalized_at, forwards, block_size = sample
    finalized_at = np.asarray(finalized_at).tolist()
    if not len(pieces) or len(pieces) != len(finalized_at):
        raise InputError(
            f"{label!r} needs one finalized_at per piece, got {len(finalized_at)} for {len(pieces)} pieces"
        )
    if block_size < 1:
        raise InputError(f"{label!r} needs a block_size of at least 1, got {block_size}")
    if forwards < max(0, *finalized_at) + 1:
        raise InputError(
            f"{label!r} has {forwards} forwards, but a position finalized in number {max(finalized_at) + 1}"
        )
    return sample._replace(finalized_at=finalized_at)


def _grid(sample: Order) -> tuple[int, int, float]:
    """(columns, rows, cell width): whole blocks in a row, else equal parts of one; cells fit the longest piece."""
    block, room = sample.block_size, PAGE - 2 * MARGIN
    characters = min(max(len(visible(piece)) for piece in sample.pieces), LONGEST_PIECE)
    needed = CHARACTER * (characters + 1)
    most = min(int(room / needed), MOST_COLUMNS)
    columns = most // block * block if block <= most else math.ceil(block / math.ceil(block / most))
    columns = min(columns, len(sample.pieces))
    cell = max(min(room / columns, WIDEST_CELL), needed)
    return columns, math.ceil(len(sample.pieces) / columns), cell


def _color(forward: int, forwards: int) -> np.ndarray:
    """RGB of a forward, the first one dark; the palest end of the map is left out."""
    return np.array(ORDER_COLORS(0.1 + 0.75 * forward / max(forwards - 1, 1))[:3])


def _draw_header(axes: Axes, sample: Order, top: float, right: float) -> None:
    middle = top + 0.13
    style = {"va": "center", "parse_math": False}
    plural = "" if sample.forwards == 1 else "s"
    axes.text(MARGIN, middle, f"{sample.label}: {sample.forwards} forward{plural}", fontsize=10.5, color=INK, **style)
    bar = np.array([[_color(forward, sample.forwards) for forward in range(sample.forwards)]])  # [1, forwards, rgb]
    axes.text(right - 0.23, middle, f"{sample.forwards}", fontsize=8.5, color=GREY, ha="left", **style)
    axes.imshow(bar, extent=(right - 1.9, right - 0.3, middle + 0.06, middle - 0.06), aspect="auto")
    axes.text(right - 1.97, middle, "forward 1", fontsize=8.5, color=GREY, ha="right", **style)


def _draw_cells(axes: Axes, sample: Order, top: float, columns: int, cell: float) -> None:
    for position, (piece, forward) in enumerate(zip(sample.pieces, sample.finalized_at, strict=True)):
        row, column = divmod(position, columns)
        x, y = MARGIN + column * cell, top + row * (CELL_HEIGHT + ROW_GAP)
        if position and position % sample.block_size == 0:
            axes.plot((x, x), (y - 0.035, y + CELL_HEIGHT + 0.035), color=INK, linewidth=1.6, solid_capstyle="butt")
        if forward < 0:
            axes.add_patch(Rectangle((x, y), cell, CELL_HEIGHT, facecolor="white", edgecolor=GRID, linewidth=0.8))
            continue
        face = _color(forward, sample.forwards)
        face = face if piece else 0.25 * face + 0.75
        axes.add_patch(Rectangle((x, y), cell, CELL_HEIGHT, facecolor=face, edgecolor="white", linewidth=0.8))
        ink = GREY if not piece else INK if face @ (0.299, 0.587, 0.114) > 0.55 else "white"
        axes.text(
            x + cell / 2,
            y + CELL_HEIGHT / 2,
            _drawable(piece),
            color=ink,
            ha="center",
            va="center_baseline",
            fontproperties=FONT,
            parse_math=False,
        )


def _drawable(piece: str) -> str:
    """What fits a cell, in characters that the font has."""
    text = visible(piece).strip() if piece else FILLER
    text = text if len(text) <= LONGEST_PIECE else text[: LONGEST_PIECE - 1] + "…"
    known = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    return "".join(c if ord(c) in known else "□" for c in text)
