"""The picture of an answer's order: a cell per position, coloured by the forward that finalized it."""

import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from test_plots import drawn, png_size

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.order_plot import Order, plot_order


def cells(figure):
    """Face colours of all cells, in order of position, and the texts on the page."""
    axes = figure.axes[0]
    return [p.get_facecolor()[:3] for p in axes.patches if isinstance(p, Rectangle)], [t.get_text() for t in axes.texts]


def test_colour_is_the_forward():
    faces, texts = cells(drawn(plot_order, [("CDLM", list("ab$c") + ["", ""], [0, 1, 0, 1, 1, -1], 2, 3)], "-", "t"))
    assert faces[0] == faces[2] != faces[1] == faces[3]
    assert sum(faces[4]) > sum(faces[3])  # EOS is faint
    assert faces[5] == (1, 1, 1)  # never decoded
    assert texts[0] == "t" and texts[1] == "CDLM: 2 forwards" and texts[-5:] == ["a", "b", "$", "c", "·"]


@pytest.mark.parametrize(("block", "rows"), [(32, 4), (64, 4), (48, 6), (256, 4), (1, 4)])
def test_long_answers_wrap_at_blocks(block, rows):
    sample = Order("teacher", ["x"] * 256, range(256), 256, block)
    axes = drawn(plot_order, [sample, sample], "-", "t").axes[0]
    assert len(axes.patches) == 512
    first = axes.patches[:256]
    assert len({patch.get_y() for patch in first}) == rows
    assert len(axes.lines) == 2 * ((256 - 1) // block)
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    assert all(p.get_x() >= 0 and p.get_x() + p.get_width() <= width for p in axes.patches)
    assert all(p.get_y() >= 0 and p.get_y() + p.get_height() <= height for p in axes.patches)


def test_long_pieces_fit_their_cells():
    pieces = [" naturally", "\n", "數學", "$x$", " a", "WWWWWW"]
    figure = drawn(plot_order, [("x", pieces, [0, 1, 2, 3, 4, 5], 6, 6)], "-", "t")
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    texts = axes.texts[-6:]
    assert [text.get_text() for text in texts] == ["natur…", "↵", "□□", "$x$", "a", "WWWWWW"]
    for text, cell in zip(texts, axes.patches, strict=True):
        inside, box = text.get_window_extent(renderer), cell.get_window_extent(renderer)
        assert box.x0 < inside.x0 and inside.x1 < box.x1


def test_bad_samples_are_refused():
    for sample, message in (
        (("x", ["a"], [0, 1], 2, 1), "one finalized_at per piece, got 2 for 1"),
        (("x", [], [], 1, 1), "one finalized_at per piece, got 0 for 0"),
        (("x", ["a"], [0], 1, 0), "block_size of at least 1, got 0"),
        (("x", ["a"], [4], 4, 1), "has 4 forwards, but a position finalized in number 5"),
    ):
        with pytest.raises(InputError, match=message):
            plot_order([sample], "never-written.png", "t")
    with pytest.raises(InputError, match="nothing to plot"):
        plot_order([], "never-written.png", "t")


def test_the_plot_is_written_as_png(tmp_path):
    plot_order([("x", ["a"] * 48, range(48), 48, 16)] * 2, str(tmp_path / "order.png"), "title")
    width, height = png_size(tmp_path / "order.png")
    assert width > 1500 and height < width / 3


def test_plotting_leaves_matplotlib_as_it_was():
    program = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from cdlm_jax.evaluation.order_plot import plot_order\n"
        "import io; plot_order([('x', ['a'], [0], 1, 1)], io.BytesIO(), 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
