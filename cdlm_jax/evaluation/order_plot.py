"""The order of finalization as a picture: which forward filled each position of an answer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.harness import Answer
from cdlm_jax.evaluation.player import FILLER, visible
from cdlm_jax.evaluation.plots import DPI, GREY, GRID, INK
from cdlm_jax.text.tokenizers import Tokenizer

# Inches, the unit of the whole drawing.
PAGE, MARGIN, TITLE, HEADER, SAMPLE_GAP = 11.5, 0.3, 0.36, 0.36, 0.12
CELL_HEIGHT, WIDEST_CELL, CHARACTER, ROW_GAP = 0.27, 0.27, 0.085, 0.09
MOST_COLUMNS, LONGEST_PIECE = 64, 6
FONT = font_manager.FontProperties(family="DejaVu Sans Mono", size=9)  # comes with matplotlib
ORDER_COLORS = colormaps["YlGnBu_r"]


class Order(NamedTuple):
    """One decoded answer: pieces [L] display text per token ("" for EOS); the rest as in DecodeResult.

    block_size: None is a decoder without blocks.
    """

    label: str
    pieces: Sequence[str]
    finalized_at: Sequence[int]
    forwards: int
    block_size: int | None = None

    @classmethod
    def of(cls, label: str, answer: Answer, tokenizer: Tokenizer, block_size: int | None) -> "Order":
        shown = [tokenizer.id_to_token(token) for token in answer.tokens[: answer.length].tolist()]
        pieces = shown + [""] * (len(answer.tokens) - len(shown))
        return cls(label, pieces, answer.finalized_at.tolist(), answer.forwards, block_size)


def plot_order(samples: Sequence[Order | tuple], path: str | Path, title: str) -> None:
    """The forward that finalized each position, as a PNG: samples below each other, a cell per position.

    Colour is the forward; faint cells hold EOS, empty ones were never decoded; dark lines are block boundaries.
    """
    checked = [_checked(Order(*sample)) for sample in samples]
    if not checked:
        raise InputError("nothing to plot: no samples were given")
    grids = [_grid(sample, block) for sample, block in checked]
    width = 2 * MARGIN + max(6, *(columns * cell for columns, _, cell in grids))
    heights = [HEADER + rows * (CELL_HEIGHT + ROW_GAP) + SAMPLE_GAP for _, rows, _ in grids]
    height = 2 * MARGIN + TITLE + sum(heights) - SAMPLE_GAP - ROW_GAP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(MARGIN, MARGIN, title, fontsize=12, weight="bold", color=INK, va="top", parse_math=False)
    top = MARGIN + TITLE
    for (sample, block), (columns, _, cell), used in zip(checked, grids, heights, strict=True):
        _draw_header(axes, sample, top, width - MARGIN)
        _draw_cells(axes, sample, block, top + HEADER, columns, cell)
        top += used
    figure.savefig(path, format="png", dpi=DPI)


def _checked(sample: Order) -> tuple[Order, int]:
    """With plain numbers, and its block size: the whole response where there are no blocks."""
    label, pieces, finalized_at, forwards, block_size = sample
    finalized_at = np.asarray(finalized_at).tolist()
    if not len(pieces) or len(pieces) != len(finalized_at):
        raise InputError(
            f"{label!r} needs one finalized_at per piece, got {len(finalized_at)} for {len(pieces)} pieces"
        )
    block_size = len(pieces) if block_size is None else block_size  # then the response is one
    if block_size < 1:
        raise InputError(f"{label!r} needs a block_size of at least 1, got {block_size}")
    if forwards < max(0, *finalized_at) + 1:
        raise InputError(
            f"{label!r} has {forwards} forwards, but a position finalized in number {max(finalized_at) + 1}"
        )
    return sample._replace(finalized_at=finalized_at), block_size


def _grid(sample: Order, block: int) -> tuple[int, int, float]:
    """(columns, rows, cell width): whole blocks in a row, else equal parts of one; cells fit the longest piece."""
    room = PAGE - 2 * MARGIN
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
    style: dict[str, Any] = {"va": "center", "parse_math": False}
    plural = "" if sample.forwards == 1 else "s"
    axes.text(MARGIN, middle, f"{sample.label}: {sample.forwards} forward{plural}", fontsize=10.5, color=INK, **style)
    bar = np.array([[_color(forward, sample.forwards) for forward in range(sample.forwards)]])  # [1, forwards, rgb]
    axes.text(right - 0.23, middle, f"{sample.forwards}", fontsize=8.5, color=GREY, ha="left", **style)
    axes.imshow(bar, extent=(right - 1.9, right - 0.3, middle + 0.06, middle - 0.06), aspect="auto")
    axes.text(right - 1.97, middle, "forward 1", fontsize=8.5, color=GREY, ha="right", **style)


def _draw_cells(axes: Axes, sample: Order, block: int, top: float, columns: int, cell: float) -> None:
    for position, (piece, forward) in enumerate(zip(sample.pieces, sample.finalized_at, strict=True)):
        row, column = divmod(position, columns)
        x, y = MARGIN + column * cell, top + row * (CELL_HEIGHT + ROW_GAP)
        if position and position % block == 0:
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
