"""What a comparison of decoders shows: tables for the terminal and for Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from cdlm_jax.config import InputError
from cdlm_jax.evaluation.harness import Score, Spread
from cdlm_jax.evaluation.metrics import Measured, groups_of, overall, series_aup

WORDS = ("method", "series", "note")  # columns of text; numbers are aligned to the right


class Sheet(NamedTuple):
    """A table before it is drawn: every cell is formatted."""

    header: list[str]
    rows: list[list[str]]
    title: str = ""
    caption: str = ""

    def rich(self) -> Table:
        grid = Table(header_style="bold", title_justify="left")
        grid.title = Text(self.title, "bold") if self.title else None
        grid.caption = Text(self.caption) if self.caption else None
        for name in self.header:
            grid.add_column(Text(name), justify="left" if name in WORDS else "right", overflow="fold")
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


# ---- the quickstart's tables ---------------------------------------------------------------------------------------


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


def table(results: Sequence[MethodResult], baseline: str) -> Table:
    """One row per method. Speed-up is the latency of the method named `baseline` over the row's own."""
    return _comparison(results, baseline).rich()


def task_table(results: Sequence[MethodResult]) -> Table | None:
    """Accuracy by task, one row per method; None if no result has `per_task`."""
    sheet = _tasks(results)
    return sheet and sheet.rich()


def markdown(results: Sequence[MethodResult], baseline: str) -> str:
    """The content of `table`, and of `task_table` if there is one, as Markdown."""
    return "\n".join(sheet.markdown() for sheet in (_comparison(results, baseline), _tasks(results)) if sheet)


def _comparison(results: Sequence[MethodResult], baseline: str) -> Sheet:
    reference = _named(results, baseline).latency_ms
    header = ["method", "accuracy", "forwards", "tokens/forward", "latency", "speed-up"]
    rows = [
        [
            result.name,
            _percent(result.accuracy),
            f"{result.forwards:.2f}",
            f"{result.tokens_per_forward:.2f}",
            milliseconds(result.latency_ms, result.latency_spread),
            f"{reference / result.latency_ms:.1f}x",
        ]
        for result in results
    ]
    if any(result.note for result in results):
        header.append("note")
        rows = [[*row, result.note] for row, result in zip(rows, results, strict=True)]
    counts = sorted({result.problems for result in results})
    problems = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"{problems} problems; latency of one sequence alone (median); speed-up against {baseline}"
    return Sheet(header, rows, caption=caption)


def _tasks(results: Sequence[MethodResult]) -> Sheet | None:
    tasks = list(dict.fromkeys(task for result in results for task in result.per_task or {}))
    if not tasks:
        return None
    accuracy = [(result.name, result.per_task or {}) for result in results]
    rows = [[name, *(_percent(found[task]) if task in found else "" for task in tasks)] for name, found in accuracy]
    return Sheet(["method", *tasks], rows)


# ---- the benchmark's tables ----------------------------------------------------------------------------------------


def benchmark_tables(results: Sequence[Measured], baseline: str) -> list[Table]:
    """For the terminal: all groups as one, accuracy and AUP by group, throughput."""
    return [sheet.rich() for sheet in _summary(results, baseline)]


def benchmark_markdown(results: Sequence[Measured], baseline: str) -> str:
    """The tables of `benchmark_tables`, and the full one of every group."""
    groups = groups_of(results)
    single = [benchmark_table(results, group, baseline) for group in groups] if len(groups) > 1 else []
    return "\n".join(sheet.markdown() for sheet in (*_summary(results, baseline), *single))


def _summary(results: Sequence[Measured], baseline: str) -> list[Sheet]:
    sheets = [benchmark_table(results, None, baseline), accuracy_table(results), aup_table(results)]
    return [*sheets, throughput_table(results)] if any(result.throughput for result in results) else sheets


def benchmark_table(results: Sequence[Measured], group: str | None, baseline: str) -> Sheet:
    """One row per method on a problem group, None: on all (accuracy is their macro mean). The times are of all groups.

    Speed-up is the latency of the method named `baseline` over the row's own.
    """
    groups = groups_of(results)
    if group not in (None, *groups):
        raise InputError(f"group {group!r} is not among those measured: {', '.join(groups)}")
    scores = [overall(r.scores.values()) if group is None else r.scores[group] for r in results]
    reference = _named(results, baseline).latency_ms
    header = ["method", "accuracy", "forwards", "tokens/forward", "tokens", "latency", "speed-up", "tokens/s"]
    rows = [
        [
            result.name,
            *_quality(score),
            milliseconds(result.latency_ms[0], result.latency_ms[1:]) if result.latency_ms else "",
            f"{reference[0] / result.latency_ms[0]:.1f}x" if reference and result.latency_ms else "",
            _rate(result.throughput.get(1)),
        ]
        for result, score in zip(results, scores, strict=True)
    ]
    counts = sorted({score.problems for score in scores})
    problems = f"{counts[0]} problems" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} problems"
    if group is None and len(groups) > 1:
        problems += f" in {len(groups)} groups, accuracy is the mean over the groups"
    caption = (
        f"{problems}; forwards and tokens: per answer, tokens before the first EOS; latency and tokens/s: one sequence "
        f"alone, median (10th-90th percentile); speed-up against {baseline}"
    )
    return Sheet(header, rows, f"{group or 'All problems'}", caption)


def _quality(score: Score) -> list[str]:
    counts = (score.forwards, score.tokens_per_forward)
    return [_percent(score.accuracy), *(f"{value:.2f}" for value in counts), f"{score.tokens:.1f}"]


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


def _named(results: Sequence, baseline: str):
    named = {result.name: result for result in results}
    if baseline not in named:
        raise InputError(f"baseline {baseline!r} is not among the methods: {', '.join(named) or 'none given'}")
    return named[baseline]


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
