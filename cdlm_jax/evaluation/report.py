"""What a comparison of decoders shows: tables for the terminal and for Markdown."""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.harness import Score, Spread
from cdlm_jax.evaluation.metrics import Measured, groups_of, overall, series_aup

QUALITY = ("accuracy", "forwards", "tokens/forward")
WORDS = ("method", "series", "problems")  # columns of text; numbers are aligned to the right


class Sheet(NamedTuple):
    """A table before it is drawn: every cell is formatted."""

    header: list[str]
    rows: list[list[str]]
    title: str = ""
    caption: str = ""

    def rich(self) -> Table:
        grid = Table(header_style="bold", title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        grid.title = Text(self.title, "bold") if self.title else None
        grid.caption = Text(self.caption) if self.caption else None
        for name in self.header:
            grid.add_column(
                Text(name.replace("/", "/\n")), justify="left" if name in WORDS else "right", overflow="fold"
            )
        for row in self.rows:
            grid.add_row(*map(Text, row))
        return grid

    def markdown(self) -> str:
        rule = ["---" if name in WORDS else "---:" for name in self.header]
        cells = [[cell.replace("|", r"\|") for cell in row] for row in (self.header, rule, *self.rows)]
        parts = ["".join(f"| {' | '.join(row)} |\n" for row in cells)]
        if self.title:
            parts.insert(0, f"### {self.title}\n")
        if self.caption:
            parts.append(f"{self.caption}\n")
        return "\n".join(parts)


# ---- tables --------------------------------------------------------------------------------------------------------


def benchmark_tables(results: Sequence[Measured], baseline: str) -> list[Table]:
    """For the terminal: all groups as one, accuracy and AUP by group, throughput."""
    return [sheet.rich() for sheet in _summary(results, baseline)]


def benchmark_markdown(results: Sequence[Measured], baseline: str) -> str:
    """The tables of `benchmark_tables`, and the full one of every group."""
    groups = groups_of(results)
    single = [comparison_table(results, group, baseline) for group in groups] if len(groups) > 1 else []
    return "\n".join(sheet.markdown() for sheet in (*_summary(results, baseline), *single))


def _summary(results: Sequence[Measured], baseline: str) -> list[Sheet]:
    sheets = [comparison_table(results, None, baseline), accuracy_table(results), aup_table(results)]
    return [*sheets, throughput_table(results)] if any(result.throughput for result in results) else sheets


def comparison_table(results: Sequence[Measured], group: str | None, baseline: str) -> Sheet:
    """One row per method on a problem group, None: on all (accuracy is their macro mean). The times are of all groups.

    Speed-up is the latency of the method named `baseline` over the row's own. A column that nobody fills is left out;
    so is the length of an answer where no tokens per second were measured.
    """
    groups = groups_of(results)
    if group not in (None, *groups):
        raise InputError(f"group {group!r} is not among those measured: {', '.join(groups)}")
    scores = [overall(r.scores.values()) if group is None else r.scores[group] for r in results]
    reference = _named(results, baseline).latency_ms
    rated = any(result.throughput for result in results)
    header = ["method", *QUALITY, "tokens", "latency", "speed-up", "tokens/s"]
    rows = [
        [
            result.name,
            *_quality(score),
            f"{score.tokens:.1f}" if rated else "",
            milliseconds(result.latency_ms[0], result.latency_ms[1:]) if result.latency_ms else "",
            f"{reference[0] / result.latency_ms[0]:.1f}x" if reference and result.latency_ms else "",
            _rate(result.throughput.get(1)),
        ]
        for result, score in zip(results, scores, strict=True)
    ]
    filled = [any(column) for column in zip(*rows, strict=True)]
    header, *rows = (list(compress(row, filled)) for row in (header, *rows))
    counts = sorted({score.problems for score in scores})
    problems = f"{counts[0]} problems" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} problems"
    if group is None and len(groups) > 1:
        problems += f" in {len(groups)} groups, accuracy is the mean over the groups"
    caption = [problems, "forwards and tokens: per answer, tokens before the first EOS"]
    if times := [name for name in ("latency", "tokens/s") if name in header]:
        caption.append(f"{' and '.join(times)}: one sequence alone, median (10th-90th percentile)")
    if "speed-up" in header:
        caption.append(f"speed-up against {baseline}")
    return Sheet(header, rows, group or "All problems", "; ".join(caption))


def score_table(scores: dict[str, Score]) -> Sheet:
    """One row per problem group, of one method."""
    rows = [[group, str(score.problems), *_quality(score)] for group, score in scores.items()]
    return Sheet(["problems", "number", *QUALITY], rows)


def accuracy_table(results: Sequence[Measured]) -> Sheet:
    """Accuracy by problem group, and the mean over the groups."""
    groups = groups_of(results)
    rows = [
        [result.name, *(_percent(result.scores[group].accuracy) for group in groups), _percent(score.accuracy)]
        for result in results
        for score in [overall(result.scores.values())]
    ]
    return Sheet(["method", *groups, "mean"], rows, "Accuracy")


def aup_table(results: Sequence[Measured]) -> Sheet:
    """AUP of every series by problem group, and the mean over the groups."""
    groups = groups_of(results)
    found = {group: series_aup(results, group) for group in groups}
    rows = [
        [series, *(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f}"]
        for series in found[groups[0]]
        for values in [[found[group][series] for group in groups]]
    ]
    caption = (
        "accuracy in percent x tokens per forward (d3LLM's definition); a series' least parallel point is its reference"
    )
    return Sheet(["series", *groups, "mean"], rows, "Accuracy under parallelism (AUP)", caption)


def throughput_table(results: Sequence[Measured]) -> Sheet:
    """Tokens per second by batch size, one row per method that has them, and what compiling cost."""
    timed = [result for result in results if result.throughput]
    sizes = sorted({size for result in timed for size in result.throughput})
    rows = [
        [result.name, *(_rate(result.throughput.get(size)) for size in sizes), f"{result.compile_seconds:.1f} s"]
        for result in timed
    ]
    caption = "tokens before the first EOS per second, median (10th-90th percentile); compile: batch 1, not counted"
    return Sheet(["method", *(f"batch {size}" for size in sizes), "compile"], rows, "Throughput", caption)


# ---- cells ---------------------------------------------------------------------------------------------------------


def _named(results: Sequence[Measured], baseline: str) -> Measured:
    named = {result.name: result for result in results}
    if baseline not in named:
        raise InputError(f"baseline {baseline!r} is not among the methods: {', '.join(named) or 'none given'}")
    return named[baseline]


def _quality(score: Score) -> list[str]:
    return [_percent(score.accuracy), f"{score.forwards:.2f}", f"{score.tokens_per_forward:.2f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def milliseconds(median: float, spread: tuple[float, float] | None = None) -> str:
    """With about three digits, as in 7.50 ms (7.05-8.40)."""
    digits = 2 if median < 10 else 1 if median < 100 else 0
    around = "" if spread is None else " ({:.{d}f}-{:.{d}f})".format(*spread, d=digits)
    return f"{median:.{digits}f} ms{around}"


def _rate(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*spread, d=0 if spread[0] >= 100 else 1)
