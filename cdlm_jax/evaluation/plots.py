"""Plots of a comparison of decoders, all in one style: what is gained, what it costs, and what the hardware allows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.evaluation.metrics import Measured, decoding_work, groups_of, overall, series_aup, series_points
from cdlm_jax.evaluation.report import milliseconds
from cdlm_jax.mesh import chips

INK, GREY, GRID = "#222222", "#767676", "#E6E6E6"
# From Okabe & Ito's and Tol's colour-blind-safe sets, first those dark enough for text. 10 colours and 7 markers make
# 70 different pairs.
COLORS = ("#D55E00", "#0072B2", "#117733", "#882255", "#807A00", "#332288", "#44AA99", "#56B4E9", "#EE3377", "#8C564B")
MARKERS = ("o", "s", "D", "^", "v", "<", ">")
ROOFS = [chip for chip in chips.CHIPS if chip.name in ("A100 80GB", "H100", "H200", "TPU v5e", "TPU v6e")]
ROOFS.sort(key=lambda chip: chip.ridge)
DASHES = ("solid", "dashed", "dashdot", "dotted", (0, (8, 3)))
DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))  # best first
DPI = 150
HALO = withStroke(linewidth=2.5, foreground="white")
FIGURE_SPACE = "\u2007"  # as wide as a digit
WIDE_RANGE = 20  # largest over smallest value, from which on a scale is logarithmic
MOST_TICKS = 6  # of a panel's x axis: more would run into each other
BATCHES = (1, 2, 4, 8, 16)

# ---- style ---------------------------------------------------------------------------------------------------------


def _page(width: float, height: float) -> Figure:
    """An empty page, in inches, that makes room for whatever stands on it."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, x: str, y: str) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=GREY)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=GREY)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)


def _title(axes: Axes, text: str, size: float = 12) -> None:
    axes.set_title(text, fontsize=size, color=INK, loc="left", weight="bold", pad=12, parse_math=False)


def _short(text: str, longest: int = 28) -> str:
    """Cut in the middle: names of files differ at their ends."""
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-longest // 2 :]}"


def _percent_axis(axes: Axes, accuracy: Sequence[float]) -> None:
    low, high = min(accuracy), max(accuracy)
    room = max(0.15 * (high - low), (5 - (high - low)) / 2)  # never zoom in on noise: at least 5 points are shown
    axes.set_ylim(low - room, high + room)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low - room, high + room)
    axes.set_yticks([tick for tick in ticks if max(0, low - room) <= tick <= min(100, high + room)])
    axes.yaxis.set_major_formatter("{x:g} %")


def _log_axis(axis: Axis) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # type: ignore[attr-defined]  # not in the stubs
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())


def _powers_of_two(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic x axis over the values, which begins and ends at a tick."""
    exponents = [math.log2(value) for value in values if value > 0] or [0]
    first, last = math.floor(min(exponents) - 0.1), math.ceil(max(exponents) + 0.1)
    every = math.ceil((last - first) / (MOST_TICKS - 1))
    last += -(last - first) % every
    axes.set_xlim(2.0**first, 2.0**last)
    axes.set_xscale("log", base=2)
    at = range(first, last + 1, every)
    axes.set_xticks([2.0**e for e in at], [f"{2**e}" if e >= 0 else f"1/{2**-e}" for e in at])


def _legend(figure: Figure, handles: Sequence[Line2D], title: str, place: str = "upper") -> None:
    """On the right, outside the axes."""
    style: dict[str, Any] = {"loc": f"outside right {place}", "frameon": False, "fontsize": 9, "handlelength": 2.6}
    legend = figure.legend(handles=handles, title=title, **style)
    legend.set_alignment("left")
    legend.get_title().set(fontsize=9, color=GREY)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _looks(series: Iterable[str]) -> dict[str, dict]:
    """Colour and marker of each series, the same in every plot of the same results."""
    names = dict.fromkeys(series)
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], **edge}
        for i, name in enumerate(names)
    }


# ---- accuracy against forwards -------------------------------------------------------------------------------------


def plot_accuracy(results: Sequence[Measured], path: str | Path, title: str) -> None:
    """Accuracy against forwards per answer (log scale) as a PNG: a labelled point per method, a line per series."""
    groups_of(results)  # refuses what cannot be compared
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for result in results:
        score = overall(result.scores.values())
        lines.setdefault(result.series, []).append((score.forwards, 100 * score.accuracy, result.name))
    figure = _page(8, 4.8)
    axes = figure.add_subplot()
    looks, labels = _looks(lines), []
    for series, points in lines.items():
        points.sort()
        forwards, accuracy, _ = zip(*points, strict=True)
        axes.plot(forwards, accuracy, markersize=7, linewidth=1.6, zorder=3, **looks[series])
        labels += [(name, (x, y), looks[series]["color"]) for x, y, name in points]
    forwards, accuracy, _ = zip(*chain(*lines.values()), strict=True)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(forwards) / 1.6, max(forwards) * 1.6)
    axes.xaxis.set_major_formatter("{x:g}")
    _percent_axis(axes, accuracy)
    _style(axes, "forwards per answer (log scale)", "accuracy")
    _title(axes, title)
    figure.canvas.draw()  # settles the layout, which the labels' places depend on
    _place_labels(axes, labels, figure.canvas.get_renderer())  # type: ignore[attr-defined]  # Agg's
    figure.savefig(path, format="png", dpi=DPI)


def _place_labels(axes: Axes, labels: list[tuple[str, tuple[float, float], str]], renderer) -> None:
    """Write (text, (x, y), colour) beside its point, where it covers least of points, lines and earlier labels."""
    points = axes.transData.transform([at for _, at, _ in labels])
    marks = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    for line in axes.lines:
        marks += _along([*axes.transData.transform(line.get_xydata())])
    inside, scale = axes.get_window_extent(renderer), axes.figure.dpi / 72
    written: list[Bbox] = []
    for (text, at, color), point in zip(labels, points, strict=True):
        note = axes.annotate(text, at, (0, 0), textcoords="offset points", fontsize=9, color=color, parse_math=False)
        note.set_path_effects([HALO])
        best, least = None, math.inf
        for distance, (x, y) in product((9, 20, 34, 50, 70), DIRECTIONS):
            place: dict[str, Any] = {
                "position": (distance * x, distance * y),
                "horizontalalignment": "left" if x > 0 else "right" if x < 0 else "center",
                "verticalalignment": "center" if y == 0 else "bottom" if y > 0 else "top",
            }
            note.set(**place)
            box = note.get_window_extent(renderer)
            leader = _along([point, point + scale * distance * np.array((x, y))])
            covered = math.fsum(_overlap(box, other) for other in marks + written)
            covered += math.fsum(_overlap(piece, other) for piece in leader for other in written)
            covered += 10 * (box.width * box.height - _overlap(box, inside))
            if covered + distance < least:
                best, least = (box, leader, place, distance), covered + distance
            if not covered:
                break
        assert best is not None  # some place is always better than none
        box, leader, place, distance = best
        note.set(**place)
        written.append(box.padded(6))
        if distance > 9:  # too far to be read as the point's own: lead the eye
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.7}
            axes.annotate("", at, place["position"], textcoords="offset points", arrowprops=arrow)
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


# ---- benchmark -----------------------------------------------------------------------------------------------------


def plot_tradeoff(results: Sequence[Measured], path: str | Path) -> None:
    """Accuracy against tokens per forward as a PNG: a panel per problem group, a line per series, AUP in the legend."""
    groups = groups_of(results)
    looks = _looks(result.series for result in results)
    columns = math.ceil(math.sqrt(len(groups)))
    rows = math.ceil(len(groups) / columns)
    panel = 4.4 if columns == 1 else 2.8
    figure = _page(panel * columns + 2.6, 0.85 * panel * rows + 0.8)
    figure.set_layout_engine("constrained", h_pad=0.1)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes, group in zip(panels, groups, strict=False):
        points = series_points(results, group)
        for series, line in points.items():
            axes.plot(*zip(*line, strict=True), markersize=6.5, linewidth=1.4, **looks[series])
        _percent_axis(axes, [accuracy for line in points.values() for _, accuracy in line])
        _powers_of_two(axes, (r.scores[g].tokens_per_forward for r in results for g in groups))  # the same in all
        _style(axes, "", "")
        _title(axes, _short(group), 10)
    figure.supxlabel("tokens per forward (log scale)", fontsize=10, color=INK)
    figure.supylabel("accuracy", fontsize=10, color=INK)
    scores = [series_aup(results, group) for group in groups]
    means = {series: sum(score[series] for score in scores) / len(scores) for series in looks}
    handles = [
        Line2D([], [], label=f"{means[series]:.1f}".rjust(5, FIGURE_SPACE) + f"  {series}", **look)
        for series, look in looks.items()
    ]
    _legend(figure, handles, "AUP" if len(groups) == 1 else "AUP, mean over the panels")
    figure.savefig(path, format="png", dpi=DPI)


def plot_latency(results: Sequence[Measured], path: str | Path) -> None:
    """Latency of one sequence alone as a PNG: a bar per method, whiskers from the 10th to the 90th percentile."""
    looks = _looks(result.series for result in results)
    timed = [result for result in results if result.latency_ms]
    if not timed:
        raise InputError("nothing to plot: no method has a latency")
    median, low, high = np.array([result.latency_ms for result in timed]).T
    logarithmic = bool(median.max() / median.min() > WIDE_RANGE)
    figure = _page(9, 1.1 + 0.26 * len(timed))
    axes = figure.add_subplot()
    places = np.arange(len(timed))
    axes.barh(places, median, height=0.64, color=[looks[result.series]["color"] for result in timed], zorder=2)
    whiskers: dict[str, Any] = {"fmt": "none", "ecolor": INK, "elinewidth": 1, "capsize": 2.5, "zorder": 3}
    axes.errorbar(median, places, xerr=(median - low, high - median), **whiskers)
    for at in zip(high, places, median, strict=True):
        note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": INK, "va": "center"}
        axes.annotate(milliseconds(at[2]), at[:2], (5, 0), **note)
    if logarithmic:
        _log_axis(axes.xaxis)
        axes.set_xlim(low.min() / 1.5, high.max() * (high.max() / low.min()) ** 0.12)
    else:
        axes.set_xlim(0, high.max() * 1.12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(places, [result.name for result in timed], parse_math=False)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    _style(axes, f"milliseconds{' (log scale)' * logarithmic}, median and 10th to 90th percentile", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    _title(axes, "Latency of one sequence alone")
    figure.savefig(path, format="png", dpi=DPI)


def plot_throughput(results: Sequence[Measured], path: str | Path) -> None:
    """Tokens per second against batch size as a PNG: a line per method, bars from the 10th to the 90th percentile.

    Dashed is the autoregressive decoder.
    """
    looks = _looks(result.series for result in results)
    timed = [result for result in results if result.throughput]
    if not timed:
        raise InputError("nothing to plot: no method has a throughput")
    timed.sort(key=lambda result: -result.throughput[max(result.throughput)][0])  # the legend in the order of the lines
    sizes = sorted({size for result in timed for size in result.throughput})
    figure = _page(8.6, 4.8)
    axes = figure.add_subplot()
    handles = []
    for result in timed:
        x = sorted(result.throughput)
        median, low, high = np.array([result.throughput[size] for size in x]).T
        look = looks[result.series] | {"markersize": 6.5, "linewidth": 1.6}
        look["linestyle"] = "--" if result.settings.get("decoder") == "autoregressive" else "-"
        axes.errorbar(x, median, yerr=(median - low, high - median), elinewidth=1, capsize=2, **look)
        handles.append(Line2D([], [], label=result.name, **look))
    rates = [spread[0] for result in timed for spread in result.throughput.values()]
    logarithmic = min(rates) > 0 and max(rates) / min(rates) > WIDE_RANGE
    if logarithmic:
        _log_axis(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    axes.set_xticks(sizes, map(str, sizes))
    _style(axes, "batch size", f"tokens before the first EOS per second{' (log scale)' * logarithmic}")
    _title(axes, "Throughput")
    _legend(figure, handles, "")
    figure.savefig(path, format="png", dpi=DPI)


def plot_roofline(
    config: ModelConfig,
    path: str | Path,
    *,
    context: int = 768,
    block_size: int = 32,
    itemsize: int = 2,
    device: str = "",
    measured: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """What share of a device's peak each way to decode can reach, against arithmetic intensity, as a PNG.

    context: prompt and response; itemsize: bytes of a stored value (defaults: the paper's shapes, bfloat16).
    measured: name -> (FLOPs per byte, FLOP/s reached) on `device` (`jax.Device.device_kind`), drawn as stars where its
    peak is known (`cdlm_jax.mesh.chips`).
    """
    ways: dict[str, list[float]] = {}
    for rows in BATCHES:
        sizes = {"context": context, "block_size": block_size, "rows": rows, "itemsize": itemsize}
        for name, work in decoding_work(config, **sizes).items():
            ways.setdefault(name, []).append(work.intensity)
    looks = _looks(ways)
    figure = _page(9.6, 5.6)
    axes = figure.add_subplot()
    span = [x for intensities in ways.values() for x in intensities] + [chip.ridge for chip in ROOFS]
    roofs = _draw_roofs(axes, min(span) / 1.7, max(span) * 1.7)
    for (name, intensities), side in zip(ways.items(), (1, -1, 1), strict=True):
        _draw_way(axes, intensities, looks[name], side)
    chip = chips.find(device)
    stars = "measured points: none"
    if chip and measured:
        stars = f"stars: measured on {device}"
        _draw_stars(axes, {name: (x, 100 * flops / chip.flops) for name, (x, flops) in measured.items()})
    elif device and not chip:
        stars += f", no peak is known here for the device {device!r}"
    _style(axes, "FLOPs per byte moved (log scale)", "attainable share of the peak FLOP/s (log scale)")
    _title(axes, f"What memory allows: {config.num_layers} layers of width {config.hidden_size}")
    caption = f"numbers: batch size; context {context}, {itemsize} bytes a value; roofs: data sheets, dense bfloat16"
    style: dict[str, Any] = {"fontsize": 8.5, "color": GREY, "x": 0.01, "ha": "left", "parse_math": False}
    figure.supxlabel(f"{caption}\n{stars}", **style)
    handles = [Line2D([], [], label=f"{name}: {line[0]:.1f}", **looks[name]) for name, line in ways.items()]
    _legend(figure, handles, "FLOPs per byte at batch 1")
    _legend(figure, roofs, "roofs: FLOPs per byte at the ridge", "center")
    figure.savefig(path, format="png", dpi=DPI)


def _draw_roofs(axes: Axes, left: float, right: float) -> list[Line2D]:
    """One line per device, first the one that reaches its peak first."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(10, numticks=9))
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.yaxis.set_minor_locator(NullLocator())
    roofs = []
    for chip, dashes in zip(ROOFS, DASHES, strict=True):
        x = [left, chip.ridge, right]
        style: dict[str, Any] = {"color": GREY, "linewidth": 1.1, "linestyle": dashes, "zorder": 2}
        label = f"{chip.name}: {chip.ridge:.0f}"
        roofs += axes.plot(x, [100 * chip.attainable(at) for at in x], label=label, **style)
    return roofs


def _draw_stars(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    for name, at in points.items():
        axes.plot(*at, marker="*", markersize=12, color=INK, linestyle="", zorder=4)
        note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": INK, "path_effects": [HALO]}
        axes.annotate(name, at, (7, 0), parse_math=False, **note)


def _draw_way(axes: Axes, intensities: Sequence[float], look: dict, side: int) -> None:
    """A point on every roof for each batch size, which is written above (side 1) or below (-1) where there is room."""
    written = 0.0
    for rows, x in zip(BATCHES, intensities, strict=True):
        reach = sorted(100 * chip.attainable(x) for chip in ROOFS)
        axes.plot([x] * len(reach), reach, markersize=5, linewidth=0.8, zorder=3, **look)
        if x > 1.2 * written:
            note: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": look["color"]}
            at = (x, reach[-1]) if side > 0 else (x, reach[0])
            axes.annotate(str(rows), at, (0, 6 * side), fontsize=8, va="bottom" if side > 0 else "top", **note)
            written = x
