"""Plays a generation in the terminal: which positions each forward finalized, block by block."""

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cdlm_jax.config import InputError

Status = Literal["masked", "fresh", "old", "filler"]
MASK, FILLER = "▒", "·"
STYLES = {"masked": "dim", "fresh": "bold black on bright_green", "old": "", "filler": "dim"}
CURRENT = {"masked": "cyan"}  # in the current block, which is underlined
_SYMBOLS = {"\n": "↵", "\r": "↵", "\t": "⇥"}


class Frame(NamedTuple):
    """The response right after one forward.

    forward: counted from 1; forwards: how many there are; block: positions [start, stop) of the current block;
    tokens: finalized so far, EOS not counted; cells: per position what to show (one line, safe to print) and why.
    `masked` is still to come, `fresh` finalized by this forward, `old` by an earlier one; `filler` is EOS or was never
    decoded.
    """

    forward: int
    forwards: int
    block: tuple[int, int]
    tokens: int
    cells: list[tuple[str, Status]]


def visible(piece: str) -> str:
    """The piece on one line: line breaks, tabs and control characters (a model may emit any) as symbols."""

    def symbol(c: str) -> str:
        return _SYMBOLS.get(c, " " if c.isspace() else "\N{REPLACEMENT CHARACTER}")

    return "".join(c if c.isprintable() else symbol(c) for c in piece)


def frames(
    pieces: Sequence[str], finalized_at: Sequence[int], *, block_size: int | None = None, forwards: int | None = None
) -> Iterator[Frame]:
    """One Frame per forward.

    pieces: [L] display text per token, "" for EOS; finalized_at: [L] as in DecodeResult (from 0, -1 never).
    block_size: None is a decoder without blocks; forwards: as in DecodeResult, None ends at the last forward that
        finalized something.
    """
    at = np.asarray(finalized_at)
    if at.shape != (len(pieces),) or not at.size:
        raise InputError(f"need one finalized_at per piece, got shape {at.shape} for {len(pieces)} pieces")
    block_size = len(pieces) if block_size is None else block_size
    if block_size < 1:
        raise InputError(f"block_size must be at least 1, got {block_size}")
    needed = max(int(at.max()), 0) + 1
    forwards = needed if forwards is None else forwards
    if forwards < needed:
        raise InputError(f"forwards {forwards} is too few: a position was finalized in forward {needed}")

    shown = [visible(piece) or FILLER for piece in pieces]
    is_text = np.array([piece != "" for piece in pieces])
    start = 0
    for forward in range(forwards):
        fresh = at == forward
        if fresh.any():  # a forward that only commits finalizes nothing: it stays in its block
            start = int(fresh.argmax()) // block_size * block_size
        known = (at >= 0) & (at <= forward)
        last = forward == forwards - 1
        cells: list[tuple[str, Status]] = []
        for i, text in enumerate(shown):
            if not known[i]:
                cells.append((FILLER, "filler") if last else (MASK, "masked"))
            elif fresh[i]:
                cells.append((text, "fresh"))
            else:
                cells.append((text, "old" if is_text[i] else "filler"))
        block = (start, min(start + block_size, len(pieces)))
        yield Frame(forward + 1, forwards, block, int((known & is_text).sum()), cells)


def play(
    prompt: str,
    pieces: Sequence[str],
    finalized_at: Sequence[int],
    *,
    block_size: int | None = None,
    label: str,
    console: Console,
    delay: float = 0.15,
    forwards: int | None = None,
) -> None:
    """Show a generation forward by forward: animated in a terminal (`delay` seconds a frame), else one line a forward.

    The other arguments are those of `frames`. Nothing in prompt, pieces or label is taken as markup or control code.
    """
    story = list(frames(pieces, finalized_at, block_size=block_size, forwards=forwards))
    shown_prompt = "\n".join(visible(line) for line in prompt.split("\n"))
    console.print(Text.assemble((visible(label), "bold"), "  ", shown_prompt), soft_wrap=True)
    if not console.is_terminal:
        digits = len(str(len(story)))
        for frame in story:
            answer = "".join(text for text, _ in frame.cells)
            console.print(Text(f"forward {frame.forward:{digits}}  {answer}"), soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        for frame in story:
            live.update(_draw(frame, console.width), refresh=True)
            time.sleep(delay)


def _draw(frame: Frame, width: int) -> Group:
    """A header and the response, folded at the console's width: words must not jump between lines as they appear."""
    header = Text.assemble(("forward ", "dim"), f"{frame.forward}", (f" of {frame.forwards}   ", "dim"))
    header.append(f"{frame.tokens}").append(" token" + "s" * (frame.tokens != 1), "dim")
    answer = Text()
    for i, (text, status) in enumerate(frame.cells):
        current = frame.block[0] <= i < frame.block[1]
        answer.append(text, f"underline {CURRENT.get(status, STYLES[status])}" if current else STYLES[status])
    ends = list(accumulate(len(line) for line in chop_cells(answer.plain, width)))
    return Group(header, *answer.divide(ends[:-1]))
