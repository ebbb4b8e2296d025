"""Tables say what was measured; plots show every method and every position, legibly."""

import dataclasses
import io
import json
import struct
import subprocess
import sys
from itertools import combinations

import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from cdlm_jax.config import InputError
from cdlm_jax.evaluation import report
from cdlm_jax.evaluation.report import MethodResult, Order


def result(name, accuracy, forwards, latency, **more) -> MethodResult:
    return MethodResult(
        name=name,
        accuracy=accuracy,
        problems=512,
        forwards=forwards,
        tokens_per_forward=28.3 / forwards,
        latency_ms=latency,
        **more,
    )


TEACHER = result("teacher", 0.99, 48, 151.2, series="teacher", latency_spread=(144.4, 166.0))
STUDENT = result("CDLM, tau 0.9", 0.986, 4.03, 7.5, series="CDLM", note="a|b", per_task={"chain": 1.0, "sort": 0.5})
MANY = [
    TEACHER,
    result("teacher, 24 forwards", 0.975, 24, 75, series="teacher"),
    result("teacher, 12 forwards", 0.84, 12, 38, series="teacher"),
    result("teacher, 6 forwards", 0.55, 6, 19.4, series="teacher"),
    result("teacher, threshold 0.9", 0.988, 4.03, 13.2),
    result("untrained student, tau 0.9", 0.83, 5.2, 10),
    result("CDLM, tau 0.95", 0.99, 4.5, 8.1, series="CDLM"),
    STUDENT,
    result("CDLM, tau 0.7", 0.969, 3.3, 6.3, series="CDLM"),
]


def printed(table) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


@pytest.fixture
def figure(monkeypatch):
    """figure(plot, ...) -> the Figure that would have been saved."""
    saved = []
    monkeypatch.setattr(report.Figure, "savefig", lambda self, *_, **__: saved.append(self))

    def draw(plot, *args):
        plot(*args)
        return saved.pop()

    return draw


# ---- tables --------------------------------------------------------------------------------------------------------


def test_markdown_in_full():
    assert report.markdown([TEACHER, STUDENT], "teacher") == (
        "| method | accuracy | forwards | tokens/forward | latency | speed-up | note |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |\n"
        "| teacher | 99.0 % | 48.00 | 0.59 | 151 ms (144-166) | 1.0x |  |\n"
        "| CDLM, tau 0.9 | 98.6 % | 4.03 | 7.02 | 7.50 ms | 20.2x | a\\|b |\n"
        "\n"
        "512 problems; latency of one sequence alone (median); speed-up against teacher\n"
        "\n"
        "| method | chain | sort |\n"
        "| --- | ---: | ---: |\n"
        "| teacher |  |  |\n"
        "| CDLM, tau 0.9 | 100.0 % | 50.0 % |\n"
    )


def test_the_terminal_table_says_the_same():
    lines = printed(report.table(MANY, "teacher")).splitlines()
    content = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    expected = report.markdown(MANY, "teacher").replace("\\|", "\0").splitlines()[2 : 2 + len(MANY)]
    assert content == [[cell.strip().replace("\0", "|") for cell in line.split("|")[1:-1]] for line in expected]
    assert "speed-up against teacher" in lines[-1]


def test_the_note_column_and_the_task_table_appear_only_if_filled():
    assert "note" not in report.markdown([TEACHER], "teacher")
    assert report.task_table([TEACHER]) is None
    assert "50.0 %" in printed(report.task_table([TEACHER, STUDENT]))


def test_names_are_not_markup():
    odd = dataclasses.replace(TEACHER, name="[bold]x[/]")
    assert "[bold]x[/]" in printed(report.table([odd], odd.name))


def test_results_go_to_json():
    assert json.loads(json.dumps(dataclasses.asdict(STUDENT)))["per_task"] == {"chain": 1.0, "sort": 0.5}


def test_bad_results_are_refused():
    with pytest.raises(InputError, match="baseline 'nobody' is not among the methods: teacher, CDLM, tau 0.9"):
        report.table([TEACHER, STUDENT], "nobody")
    with pytest.raises(InputError, match=r"accuracy of 'teacher' must be in 0..1, got 99"):
        dataclasses.replace(TEACHER, accuracy=99)
    with pytest.raises(InputError, match="latency_ms of 'teacher' must be positive, got 0"):
        dataclasses.replace(TEACHER, latency_ms=0)


# ---- accuracy against forwards -------------------------------------------------------------------------------------


def test_every_method_has_its_point_and_a_series_one_line(figure):
    axes = figure(report.plot_accuracy, MANY, "-", "title").axes[0]
    drawn = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
    assert sorted(point for line in drawn for point in line) == sorted((r.forwards, 100 * r.accuracy) for r in MANY)
    assert sorted(len(line) for line in drawn) == [1, 1, 3, 4]
    assert all(line == sorted(line) for line in drawn)
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    "results",
    [MANY, MANY[::-1], [TEACHER], [result(f"method {i}", 0.99 + i / 10000, 4 + i / 50, 9) for i in range(6)]],
    ids=["usual", "reversed", "one", "crowded"],
)
def test_labels_are_whole_and_do_not_overlap(figure, results):
    drawn = figure(report.plot_accuracy, results, "-", "title")
    axes, renderer = drawn.axes[0], drawn.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    page = axes.get_window_extent(renderer)
    assert len(boxes) == len(results)
    assert not any(report._overlap(a, b) for a, b in combinations(boxes, 2))
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)


# ---- the order of finalization -------------------------------------------------------------------------------------


def cells(drawn):
    """Face colours of all cells, in order of position, and the texts on the page."""
    axes = drawn.axes[0]
    return [p.get_facecolor()[:3] for p in axes.patches if isinstance(p, Rectangle)], [t.get_text() for t in axes.texts]


def test_colour_is_the_forward(figure):
    faces, texts = cells(
        figure(report.plot_order, [("CDLM", list("ab$c") + ["", ""], [0, 1, 0, 1, 1, -1], 2, 3)], "-", "t")
    )
    assert faces[0] == faces[2] != faces[1] == faces[3]
    assert sum(faces[4]) > sum(faces[3])  # EOS is faint
    assert faces[5] == (1, 1, 1)  # never decoded
    assert texts[0] == "t" and texts[1] == "CDLM: 2 forwards" and texts[-5:] == ["a", "b", "$", "c", "·"]


@pytest.mark.parametrize(("block", "rows"), [(32, 4), (64, 4), (48, 6), (256, 4), (1, 4)])
def test_long_answers_wrap_at_blocks(figure, block, rows):
    sample = Order("teacher", ["x"] * 256, range(256), 256, block)
    axes = figure(report.plot_order, [sample, sample], "-", "t").axes[0]
    assert len(axes.patches) == 512
    first = axes.patches[:256]
    assert len({patch.get_y() for patch in first}) == rows
    assert len(axes.lines) == 2 * ((256 - 1) // block)
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    assert all(p.get_x() >= 0 and p.get_x() + p.get_width() <= width for p in axes.patches)
    assert all(p.get_y() >= 0 and p.get_y() + p.get_height() <= height for p in axes.patches)


def test_long_pieces_fit_their_cells(figure):
    pieces = [" naturally", "\n", "數學", "$x$", " a", "WWWWWW"]
    drawn = figure(report.plot_order, [("x", pieces, [0, 1, 2, 3, 4, 5], 6, 6)], "-", "t")
    axes, renderer = drawn.axes[0], report.FigureCanvasAgg(drawn).get_renderer()
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
            report.plot_order([sample], "never-written.png", "t")
    for plot in (report.plot_order, report.plot_accuracy):
        with pytest.raises(InputError, match="nothing to plot"):
            plot([], "never-written.png", "t")


# ---- files ---------------------------------------------------------------------------------------------------------


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_plots_are_written_as_png(tmp_path):
    report.plot_accuracy(MANY, tmp_path / "accuracy.png", "title")
    assert png_size(tmp_path / "accuracy.png") == (1200, 720)
    report.plot_order([("x", ["a"] * 48, range(48), 48, 16)] * 2, str(tmp_path / "order.png"), "title")
    width, height = png_size(tmp_path / "order.png")
    assert width > 1500 and height < width / 3


def test_plotting_leaves_matplotlib_as_it_was():
    program = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from cdlm_jax.evaluation.report import plot_order\n"
        "import io; plot_order([('x', ['a'], [0], 1, 1)], io.BytesIO(), 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
