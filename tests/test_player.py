"""Playback: every frame shows exactly what its forward knew."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.player import FILLER, MASK, frames, play, visible

PIECES = ["6", "+", "1", "=", "7", "", "", ""]
ORDER = [0, 0, 1, 2, 2, 3, -1, -1]


def played(*args, terminal: bool, width: int = 80, **kwargs) -> str:
    out = io.StringIO()
    color = "truecolor" if terminal else None
    console = Console(file=out, force_terminal=terminal, width=width, color_system=color)
    play(*args, console=console, delay=0, **kwargs)
    return out.getvalue()


def test_frames_follow_the_order():
    first, second, third, last = frames(PIECES, ORDER, block_size=4)
    assert [status for _, status in first.cells] == ["fresh"] * 2 + ["masked"] * 6
    assert [text for text, _ in first.cells] == ["6", "+"] + [MASK] * 6
    assert (second.forward, second.forwards, second.tokens, second.block) == (2, 4, 3, (0, 4))
    assert third.cells[:6] == [
        ("6", "old"),
        ("+", "old"),
        ("1", "old"),
        ("=", "fresh"),
        ("7", "fresh"),
        (MASK, "masked"),
    ]
    assert last.cells[4:] == [("7", "old"), (FILLER, "fresh"), (FILLER, "filler"), (FILLER, "filler")]
    assert (last.tokens, last.block) == (5, (4, 8))


def test_a_forward_that_only_commits_stays_in_its_block():
    story = list(frames(["a", "b"], np.array([0, 2]), block_size=1, forwards=4))
    assert [frame.block for frame in story] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [frame.tokens for frame in story] == [1, 1, 2, 2]


@given(st.data())
def test_each_position_is_fresh_once_and_never_lost(data):
    length = data.draw(st.integers(1, 24))
    order = data.draw(st.lists(st.integers(-1, 9), min_size=length, max_size=length))
    pieces = data.draw(st.lists(st.sampled_from(["", "a", "bc", "\n"]), min_size=length, max_size=length))
    story = list(frames(pieces, order, block_size=data.draw(st.integers(1, 30)), forwards=10))
    assert [frame.forward for frame in story] == list(range(1, 11))
    for position, (piece, forward) in enumerate(zip(pieces, order, strict=True)):
        statuses = [frame.cells[position][1] for frame in story]
        if forward < 0:
            assert statuses == ["masked"] * 9 + ["filler"]
        else:
            assert statuses == ["masked"] * forward + ["fresh"] + ["old" if piece else "filler"] * (9 - forward)
        assert {frame.cells[position][0] for frame in story if frame.cells[position][1] == "old"} <= {visible(piece)}
    assert story[-1].tokens == sum(at >= 0 and piece != "" for at, piece in zip(order, pieces, strict=True))


def test_a_log_gets_one_plain_line_per_forward():
    assert played("6+1=", PIECES, ORDER, block_size=4, label="CDLM", terminal=False).splitlines() == [
        "CDLM  6+1=",
        "forward 1  6+▒▒▒▒▒▒",
        "forward 2  6+1▒▒▒▒▒",
        "forward 3  6+1=7▒▒▒",
        "forward 4  6+1=7···",
    ]


def test_log_lines_are_never_wrapped():
    text = played("p", ["word "] * 64, range(64), block_size=64, label="x", terminal=False, width=40)
    assert len(text.splitlines()) == 1 + 64
    assert text.splitlines()[8] == "forward  8  " + "word " * 8 + MASK * 56


def test_a_terminal_gets_an_animation():
    text = played("6+1=", PIECES, ORDER, block_size=4, label="CDLM", terminal=True)
    for k, tokens in enumerate((2, 3, 5, 5), start=1):
        assert f"\x1b[2mforward \x1b[0m{k}\x1b[2m of 4   \x1b[0m{tokens}\x1b[2m tokens" in text
    assert "\x1b[1;4;30;102m6\x1b[0m" in text  # fresh, in the current block
    assert "\x1b[2;4m" not in text.split("forward")[1]  # masks of the current block are not dim ...
    assert f"\x1b[4;36m{MASK}" in text and f"\x1b[2m{MASK}" in text  # ... those of later blocks are
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_the_animation_folds_at_the_width_not_at_words():
    pieces = ["數學", " and", " words", "\n"] * 6  # 15 terminal cells, six times
    out = Console(file=io.StringIO(), force_terminal=True, width=26, record=True, color_system=None)
    play("p", pieces, [0] * 24, block_size=24, label="x", console=out, delay=0)
    answer = out.export_text().splitlines()[-4:]
    assert "".join(answer) == "".join(map(visible, pieces))
    assert [cell_len(line) for line in answer] == [26, 26, 25, 13]  # a wide character is not split


def test_nothing_shown_is_markup_or_control_code():
    hostile = ["\x1b[31m", "[bold]", "a\nb", "\t", "\u202e", "\xa0"]
    text = played("[red]\x1b]0;x\x07\nline", hostile, [0] * 6, block_size=6, label="[link]\x1b", terminal=False)
    assert text == "[link]�  [red]�]0;x�\nline\nforward 1  �[31m[bold]a↵b⇥� \n"


def test_bad_input_is_refused():
    for arguments, message in (
        ({"pieces": ["a"], "finalized_at": [0, 1], "block_size": 1}, "one finalized_at per piece"),
        ({"pieces": [], "finalized_at": [], "block_size": 1}, "one finalized_at per piece"),
        ({"pieces": ["a"], "finalized_at": [0], "block_size": 0}, "block_size must be at least 1, got 0"),
        ({"pieces": ["a"], "finalized_at": [3], "block_size": 1, "forwards": 3}, "forwards 3 is too few"),
    ):
        with pytest.raises(InputError, match=message):
            list(frames(**arguments))
