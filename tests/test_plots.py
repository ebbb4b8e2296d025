"""Plots show every number, legibly."""

import struct
from fractions import Fraction
from itertools import combinations
from unittest import mock

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_metrics import LLADA_8B, TINY, llada, measured, score
from test_report import MANY, TEACHER, result

from cdlm_jax.config import InputError
from cdlm_jax.evaluation import plots
from cdlm_jax.evaluation.metrics import decoding_work, overall, series_aup


def drawn(plot, *args, **kwargs) -> Figure:
    """The Figure that would have been saved."""
    with mock.patch.object(Figure, "savefig", autospec=True) as save:
        plot(*args, **kwargs)
    return save.call_args.args[0]


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def boxes(figure: Figure, texts) -> list:
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


def assert_apart(figure: Figure, texts) -> None:
    """No two texts overlap, and all are on the page."""
    found = boxes(figure, texts)
    assert found and not any(plots._overlap(a, b) for a, b in combinations(found, 2))
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in found)


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text().strip(plots.FIGURE_SPACE) for legend in figure.legends for text in legend.get_texts()]


# ---- accuracy against forwards -------------------------------------------------------------------------------------


def test_every_method_has_its_point_and_a_series_one_line():
    axes = drawn(plots.plot_accuracy, MANY, "-", "title").axes[0]
    lines = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
    points = sorted(point for line in lines for point in line)
    assert points == sorted((s.forwards, 100 * s.accuracy) for s in (overall(r.scores.values()) for r in MANY))
    assert points[-1] == pytest.approx((48, 99))  # the teacher: all its groups as one
    assert sorted(len(line) for line in lines) == [1, 1, 3, 4]
    assert all(line == sorted(line) for line in lines)
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    "results",
    [MANY, MANY[::-1], [TEACHER], [result(f"method {i}", 0.99 + i / 10000, 4 + i / 50, 9) for i in range(6)]],
    ids=["usual", "reversed", "one", "crowded"],
)
def test_labels_are_whole_and_do_not_overlap(results):
    figure = drawn(plots.plot_accuracy, results, "-", "title")
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    labels = boxes(figure, axes.texts)
    page = axes.get_window_extent(renderer)
    assert len(labels) == len(results)
    assert not any(plots._overlap(a, b) for a, b in combinations(labels, 2))
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in labels)


# ---- benchmark -----------------------------------------------------------------------------------------------------

GROUPS = [
    "chain",
    "sudoku4",
    "sort",
    "countdown3",
    "spell_backward",
    "chain_sum",
    "cd3_test.jsonl",
    "sudoku_a",
    "b",
    "c",
]
SPEEDS = {
    "naive": {"1 token per step": 0.6, "24 steps": 1.2, "12 steps": 2.4, "6 steps": 4.8},
    "dream": {"entropy": 0.6},
    "dLLM-Cache": {"50/7": 0.6},
    "Fast-dLLM none": {"tau 0.95": 4.5, "tau 0.9": 5.5, "tau 0.7": 6.5},
    "Fast-dLLM dual": {"tau 0.95": 4.7, "tau 0.9": 5.6, "tau 0.7": 6.2},
    "autoregressive": {"": 1.0},
    "CDLM": {"tau 0.95": 6.3, "tau 0.9": 7.0, "tau 0.7": 8.6, "tau 0.5": 10.2},
}


def benchmark(groups: int):
    """Many methods; the more tokens per forward, the less accurate, and the first setting of each was swept."""
    for series, settings in SPEEDS.items():
        for place, (setting, speed) in enumerate(settings.items()):
            milliseconds = 90 / speed
            rates = {size: 1000 * 28 / milliseconds * size**0.6 for size in (1, 2, 4, 8, 16)}
            yield measured(
                f"{series}, {setting}",
                {name: score(0.99 - 0.03 * g - 0.01 * speed, speed) for g, name in enumerate(GROUPS[:groups])},
                series,
                settings={"decoder": "autoregressive" if series == "autoregressive" else "other"},
                latency_ms=(milliseconds, 0.9 * milliseconds, 1.2 * milliseconds),
                throughput={} if place else {size: (r, 0.9 * r, 1.1 * r) for size, r in rates.items()},
            )


FULL = list(benchmark(9))


@pytest.mark.parametrize("groups", [1, 2, 3, 9, 10])
def test_tradeoff_has_a_panel_per_group_and_a_line_per_series(groups):
    results = list(benchmark(groups))[::-1]
    figure = drawn(plots.plot_tradeoff, results, "-")
    assert [axes.get_title(loc="left") for axes in figure.axes] == GROUPS[:groups]
    for axes, group in zip(figure.axes, GROUPS, strict=False):
        lines = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
        assert sorted(point for line in lines for point in line) == sorted(
            (r.scores[group].tokens_per_forward, 100 * r.scores[group].accuracy) for r in results
        )
        assert sorted(map(len, lines)) == sorted(map(len, SPEEDS.values()))
        assert all(line == sorted(line) for line in lines)
        assert axes.get_xscale() == "log" and axes.get_xlim() == (0.5, 16)
        low, high = axes.get_ylim()
        assert all(low < y < high for line in lines for _, y in line)


def test_tradeoff_legend_is_the_mean_aup_outside_the_panels():
    figure = drawn(plots.plot_tradeoff, FULL, "-")
    means = {name: np.mean([series_aup(FULL, group)[name] for group in GROUPS[:9]]) for name in SPEEDS}
    assert legend_texts(figure) == [f"{mean:.1f}  {name}" for name, mean in means.items()]
    legend = figure.legends[0]
    assert legend.get_title().get_text() == "AUP, mean over the panels"
    figure.canvas.draw()
    inside = legend.get_window_extent()
    assert not any(plots._overlap(inside, axes.get_window_extent()) for axes in figure.axes)
    colors = [to_hex(handle.get_color()) for handle in legend.legend_handles]
    assert len(set(colors)) == len(SPEEDS)
    assert [to_hex(line.get_color()) for line in figure.axes[0].lines] == colors
    alone = drawn(plots.plot_tradeoff, list(benchmark(1)), "-").legends[0]
    assert alone.get_title().get_text() == "AUP"


def test_titles_of_panels_do_not_run_into_each_other():
    names = [f"a_file_with_a_very_long_name_{i}.jsonl" for i in range(9)]
    figure = drawn(plots.plot_tradeoff, [measured("x", {name: score(0.5, 2) for name in names})], "-")
    figure.canvas.draw()
    titles = [axes._left_title for axes in figure.axes]
    assert [title.get_text()[-7:] for title in titles] == [f"{i}.jsonl" for i in range(9)]
    assert_apart(figure, titles)


def test_nothing_right_and_no_tokens_can_still_be_drawn():
    figure = drawn(plots.plot_tradeoff, [measured("x", {"chain": score(0.0, 2)})], "-")
    low, high = figure.axes[0].get_ylim()
    assert low < 0 < high and min(figure.axes[0].get_yticks()) == 0
    silent = measured("x", {"chain": type(score(0, 1))(10, 0.0, 5.0, 0.0, 0.0)})
    assert drawn(plots.plot_tradeoff, [silent], "-").axes[0].get_xlim() == (0.5, 2)


def test_latency_is_a_bar_per_method_with_whiskers():
    figure = drawn(plots.plot_latency, FULL, "-")
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [r.latency_ms[0] for r in FULL]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r.name for r in FULL]
    whiskers = [tuple(segment[:, 0]) for segment in axes.collections[0].get_segments()]
    assert whiskers == [pytest.approx(r.latency_ms[1:]) for r in FULL]
    assert [text.get_text() for text in axes.texts][:2] == ["150 ms", "75.0 ms"]
    low, high = axes.get_ylim()
    assert low > high  # the first on top
    figure.canvas.draw()
    assert_apart(figure, [*axes.texts, *axes.get_yticklabels()])


def test_latency_is_logarithmic_only_over_a_wide_range():
    near, far = (
        [measured("a", {}, latency_ms=(1.0, 1.0, 1.0)), measured("b", {}, latency_ms=(x, x, x))] for x in (19, 21)
    )
    axes = drawn(plots.plot_latency, near, "-").axes[0]
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0 and "log" not in axes.get_xlabel()
    axes = drawn(plots.plot_latency, far, "-").axes[0]
    assert axes.get_xscale() == "log" and 0 < axes.get_xlim()[0] < 1 and "log scale" in axes.get_xlabel()


def test_throughput_is_a_line_per_method_and_autoregressive_is_dashed():
    figure = drawn(plots.plot_throughput, FULL, "-")
    axes = figure.axes[0]
    swept = sorted((r for r in FULL if r.throughput), key=lambda r: -r.throughput[16][0])
    assert legend_texts(figure) == [r.name for r in swept]
    lines = [container.lines[0] for container in axes.containers]
    assert [list(line.get_ydata()) for line in lines] == [[r.throughput[n][0] for n in (1, 2, 4, 8, 16)] for r in swept]
    assert [line.get_linestyle() for line in lines] == ["--" if r.series == "autoregressive" else "-" for r in swept]
    segments = axes.containers[0].lines[2][0].get_segments()
    assert [tuple(segment[:, 1]) for segment in segments] == [
        pytest.approx(swept[0].throughput[n][1:]) for n in (1, 2, 4, 8, 16)
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    assert axes.get_yscale() == "log"
    alike = drawn(plots.plot_throughput, [r for r in FULL if r.series in ("naive", "dream")], "-").axes[0]
    assert alike.get_yscale() == "linear" and alike.get_ylim()[0] == 0


def test_a_series_has_one_colour_in_all_plots():
    bars = drawn(plots.plot_latency, FULL, "-").axes[0].patches
    by_series = {r.series: to_hex(bar.get_facecolor()) for r, bar in zip(FULL, bars, strict=True)}
    containers = drawn(plots.plot_throughput, FULL, "-").axes[0].containers
    swept = sorted((r for r in FULL if r.throughput), key=lambda r: -r.throughput[16][0])
    assert [to_hex(container.lines[0].get_color()) for container in containers] == [by_series[r.series] for r in swept]


def test_every_series_looks_different():
    looks = plots._looks(f"series {i}" for i in range(70)).values()
    assert len({(look["color"], look["marker"]) for look in looks}) == 70


@pytest.mark.parametrize("least, most", [(0.05, 10.0), (0.3, 6.0), (1.0, 2.0)])
def test_powers_of_two_have_room(least, most):
    """A few ticks whatever the range, the first and the last at its ends; below 1 they are fractions."""
    axes = Figure().add_subplot()
    plots._powers_of_two(axes, [least, most])
    ticks, labels = axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()]
    assert 2 <= len(ticks) <= plots.MOST_TICKS and axes.get_xlim() == (ticks[0], ticks[-1])
    assert ticks[0] <= least and most <= ticks[-1]
    assert [float(Fraction(label)) for label in labels] == list(ticks)


def test_roofline_points_lie_on_the_roofs():
    figure = drawn(plots.plot_roofline, llada(LLADA_8B), "-")
    axes, roofs = figure.axes[0], plots.ROOFS
    for line, peak in zip(axes.lines, roofs, strict=False):
        assert line.get_xydata()[1] == pytest.approx((peak.ridge, 100))
        x, y = line.get_xydata()[0]
        assert y == pytest.approx(100 * x * peak.bandwidth / peak.flops)
    points = axes.lines[len(roofs) :]
    works = [decoding_work(llada(LLADA_8B), context=768, block_size=32, rows=rows) for rows in plots.BATCHES]
    intensities = [work[name].intensity for name in works[0] for work in works]
    assert [line.get_xdata()[0] for line in points] == pytest.approx(intensities)
    for line in points:
        x = line.get_xdata()[0]
        assert sorted(line.get_ydata()) == pytest.approx(sorted(100 * min(1, x / peak.ridge) for peak in roofs))
    assert legend_texts(figure)[:3] == ["naive: 440.1", "block of 32: 31.0", "autoregressive: 1.0"]
    assert legend_texts(figure)[3:] == [f"{chip.name}: {chip.ridge:.0f}" for chip in roofs]
    assert [text.get_text() for text in axes.texts[-5:]] == ["1", "2", "4", "8", "16"]  # autoregressive: all have room


@pytest.mark.parametrize("shape", [(llada(LLADA_8B), 768, 32), (TINY, 80, 16)])
def test_roofline_texts_do_not_collide(shape):
    config, context, block = shape
    figure = drawn(plots.plot_roofline, config, "-", context=context, block_size=block, itemsize=4, device="cpu")
    figure.canvas.draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    assert_apart(figure, [*figure.axes[0].texts, *texts, figure._supxlabel, figure.axes[0]._left_title])


def test_measured_points_appear_only_where_a_peak_is_known():
    reached = {"CDLM, $x$": (31.0, 0.02 * 989.4e12)}

    def stars(**kwargs):
        figure = drawn(plots.plot_roofline, TINY, "-", **kwargs)
        found = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() == "*"]
        return found, figure.get_supxlabel().split("\n")[1], [text.get_text() for text in figure.axes[0].texts]

    found, caption, texts = stars(device="NVIDIA H100 80GB HBM3", measured=reached)
    assert np.allclose(found, [(31.0, 2.0)]) and texts[-1] == "CDLM, $x$"
    assert caption == "stars: measured on NVIDIA H100 80GB HBM3"
    assert stars(device="cpu", measured=reached)[:2] == (
        [],
        "measured points: none, no peak is known here for the device 'cpu'",
    )
    assert stars(device="NVIDIA H200")[:2] == stars(measured=reached)[:2] == ([], "measured points: none")


def test_nothing_to_plot_is_refused():
    untimed = [measured("x", {"chain": score(0.5, 2)})]
    for plot, results, message in (
        (plots.plot_tradeoff, [], "no results to compare"),
        (plots.plot_latency, untimed, "no method has a latency"),
        (plots.plot_throughput, untimed, "no method has a throughput"),
    ):
        with pytest.raises(InputError, match=message):
            plot(results, "never-written.png")
    with pytest.raises(InputError, match="'y' was scored on sort, but 'x' on chain"):
        plots.plot_tradeoff([*untimed, measured("y", {"sort": score(0.5, 2)})], "never-written.png")
    with pytest.raises(InputError, match="no results to compare"):
        plots.plot_accuracy([], "never-written.png", "t")


def test_plots_are_written_as_png(tmp_path):
    plots.plot_accuracy(MANY, tmp_path / "accuracy.png", "title")
    assert png_size(tmp_path / "accuracy.png") == (1200, 720)
    plots.plot_tradeoff(FULL, tmp_path / "tradeoff.png")
    assert png_size(tmp_path / "tradeoff.png") == (1650, 1191)
    plots.plot_latency(FULL, str(tmp_path / "latency.png"))
    assert png_size(tmp_path / "latency.png")[0] == 1350
    plots.plot_throughput(FULL, tmp_path / "throughput.png")
    assert png_size(tmp_path / "throughput.png") == (1290, 720)
    plots.plot_roofline(TINY, tmp_path / "roofline.png")
    assert png_size(tmp_path / "roofline.png") == (1440, 840)
