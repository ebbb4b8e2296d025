"""Tables say what was measured."""

import dataclasses
import io

import pytest
from rich.box import HEAVY_HEAD
from rich.console import Console
from test_metrics import measured

from cdlm_jax.config import InputError
from cdlm_jax.evaluation import report
from cdlm_jax.evaluation.harness import Score
from cdlm_jax.evaluation.metrics import Measured


def result(name, accuracy, forwards, latency, series="") -> Measured:
    """Of two groups, one answered half a percent better than `accuracy` and one worse."""
    scores = {
        group: Score(256, accuracy + better, forwards, 28.3, 28.3 / forwards)
        for group, better in (("chain", 0.005), ("sort", -0.005))
    }
    return measured(name, scores, series, latency_ms=(latency, 0.9 * latency, 1.1 * latency))


TEACHER = result("teacher", 0.99, 48, 151.2, "teacher")
STUDENT = result("CDLM, tau 0.9", 0.986, 4.03, 7.5, "CDLM")
MANY = [
    TEACHER,
    result("teacher, 24 forwards", 0.975, 24, 75, "teacher"),
    result("teacher, 12 forwards", 0.84, 12, 38, "teacher"),
    result("teacher, 6 forwards", 0.55, 6, 19.4, "teacher"),
    result("teacher, threshold 0.9", 0.988, 4.03, 13.2),
    result("untrained student, tau 0.9", 0.83, 5.2, 10),
    result("CDLM, tau 0.95", 0.99, 4.5, 8.1, "CDLM"),
    STUDENT,
    result("CDLM, tau 0.7", 0.969, 3.3, 6.3, "CDLM"),
]


def printed(grid, width=160) -> str:
    """As in a terminal, with lines around the cells to tell them apart."""
    out = io.StringIO()
    grid.box, grid.pad_edge = HEAVY_HEAD, True
    Console(file=out, width=width).print(grid)
    return out.getvalue()


NAIVE = measured(
    "naive",
    {"chain": Score(100, 0.9, 48.0, 24.0, 0.5), "sudoku": Score(300, 0.5, 40.0, 10.0, 0.25)},
    latency_ms=(151.2, 144.4, 166.0),
)
CDLM = measured(
    "CDLM, tau 0.9",
    {"chain": Score(100, 0.8, 4.0, 20.0, 5.0), "sudoku": Score(300, 0.6, 5.0, 10.0, 2.0)},
    "CDLM",
    latency_ms=(7.5, 7.05, 8.4),
    throughput={1: (3775.4, 3511.0, 3964.0), 4: (99.95, 90.0, 120.0)},
)
UNTIMED = measured(
    "a|b", {"chain": Score(100, 0.75, 4.0, 20.0, 5.0), "sudoku": Score(300, 0.6, 5.0, 10.0, 2.0)}, "CDLM"
)
BENCHMARK = [NAIVE, CDLM, UNTIMED]
TIMES = (
    "forwards and tokens: per answer, tokens before the first EOS; latency and tokens/s: one sequence alone, "
    "median (10th-90th percentile); speed-up against naive"
)


def test_benchmark_markdown_in_full():
    header = "| method | accuracy | forwards | tokens/forward | tokens | latency | speed-up | tokens/s |\n"
    rule = "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    slow = "151 ms (144-166) | 1.0x |  |\n"
    fast = "7.50 ms (7.05-8.40) | 20.2x | 3775 (3511-3964) |\n"
    assert report.benchmark_markdown(BENCHMARK, "naive") == (
        "### All problems\n\n" + header + rule + "| naive | 70.0 % | 42.00 | 0.32 | 13.5 | " + slow +
        "| CDLM, tau 0.9 | 70.0 % | 4.75 | 2.63 | 12.5 | " + fast +
        "| a\\|b | 67.5 % | 4.75 | 2.63 | 12.5 |  |  |  |\n\n"
        f"400 problems in 2 groups, accuracy is the mean over the groups; {TIMES}\n\n"
        "### Accuracy\n\n| method | chain | sudoku | mean |\n| --- | ---: | ---: | ---: |\n"
        "| naive | 90.0 % | 50.0 % | 70.0 % |\n| CDLM, tau 0.9 | 80.0 % | 60.0 % | 70.0 % |\n"
        "| a\\|b | 75.0 % | 60.0 % | 67.5 % |\n\n"
        "### Accuracy under parallelism (AUP)\n\n| series | chain | sudoku | mean |\n| --- | ---: | ---: | ---: |\n"
        "| naive | 45.0 | 12.5 | 28.8 |\n| CDLM | 400.0 | 120.0 | 260.0 |\n\n"
        "accuracy in percent x tokens per forward (d3LLM's definition); "
        "a series' least parallel point is its reference\n\n"
        "### Throughput\n\n| method | batch 1 | batch 4 | compile |\n| --- | ---: | ---: | ---: |\n"
        "| CDLM, tau 0.9 | 3775 (3511-3964) | 100.0 (90.0-120.0) | 2.0 s |\n\n"
        "tokens before the first EOS per second, median (10th-90th percentile); compile: batch 1, not counted\n\n"
        "### chain\n\n" + header + rule + "| naive | 90.0 % | 48.00 | 0.50 | 24.0 | " + slow +
        "| CDLM, tau 0.9 | 80.0 % | 4.00 | 5.00 | 20.0 | " + fast +
        f"| a\\|b | 75.0 % | 4.00 | 5.00 | 20.0 |  |  |  |\n\n100 problems; {TIMES}\n\n"
        "### sudoku\n\n" + header + rule + "| naive | 50.0 % | 40.00 | 0.25 | 10.0 | " + slow +
        "| CDLM, tau 0.9 | 60.0 % | 5.00 | 2.00 | 10.0 | " + fast +
        f"| a\\|b | 60.0 % | 5.00 | 2.00 | 10.0 |  |  |  |\n\n300 problems; {TIMES}\n"
    )  # fmt: skip


def test_columns_that_nobody_fills_are_left_out():
    sheet = report.comparison_table([TEACHER, STUDENT], None, "teacher")
    assert sheet.markdown() == (
        "### All problems\n\n"
        "| method | accuracy | forwards | tokens/forward | latency | speed-up |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| teacher | 99.0 % | 48.00 | 0.59 | 151 ms (136-166) | 1.0x |\n"
        "| CDLM, tau 0.9 | 98.6 % | 4.03 | 7.02 | 7.50 ms (6.75-8.25) | 20.2x |\n\n"
        "512 problems in 2 groups, accuracy is the mean over the groups; forwards and tokens: per answer, tokens "
        "before the first EOS; latency: one sequence alone, median (10th-90th percentile); speed-up against teacher\n"
    )
    untimed = report.comparison_table([UNTIMED], "chain", UNTIMED.name)
    assert untimed.header == ["method", "accuracy", "forwards", "tokens/forward"]
    assert untimed.caption == "100 problems; forwards and tokens: per answer, tokens before the first EOS"
    batches = report.comparison_table([dataclasses.replace(CDLM, throughput={4: (1.0, 1.0, 1.0)})], None, CDLM.name)
    assert batches.header[4:] == ["tokens", "latency", "speed-up"]


@pytest.mark.parametrize(("results", "baseline"), [(MANY, "teacher"), (BENCHMARK, "naive")])
def test_the_terminal_table_says_the_same(results, baseline):
    sheet = report.comparison_table(results, None, baseline)
    lines = printed(sheet.rich()).splitlines()
    content = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    expected = sheet.markdown().replace("\\|", "\0").splitlines()[4 : 4 + len(results)]
    assert content == [[cell.strip().replace("\0", "|") for cell in line.split("|")[1:-1]] for line in expected]
    below = lines[lines.index(next(line for line in lines if line.startswith("└"))) + 1 :]
    assert " ".join(" ".join(below).split()) == sheet.caption


def test_names_are_not_markup():
    odd = dataclasses.replace(TEACHER, name="[bold]x[/]")
    assert "[bold]x[/]" in printed(report.comparison_table([odd], None, odd.name).rich())


def test_the_terminal_gets_the_first_tables():
    tables = report.benchmark_tables(BENCHMARK, "naive")
    assert [table.title.plain for table in tables] == [
        "All problems",
        "Accuracy",
        "Accuracy under parallelism (AUP)",
        "Throughput",
    ]
    shown = [printed(table) for table in tables]
    assert "20.2x" in shown[0] and "67.5 %" in shown[1] and "260.0" in shown[2] and "3775 (3511-3964)" in shown[3]


def test_one_group_is_shown_once_and_throughput_only_if_measured():
    single = dataclasses.replace(NAIVE, scores={"chain": NAIVE.scores["chain"]})
    text = report.benchmark_markdown([single], "naive")
    assert text.count("### ") == 3 and "Throughput" not in text
    assert text.count("100 problems; ") == 1 and "groups" not in text


def test_long_group_names_are_whole_in_a_narrow_terminal():
    name = "dream_sudoku_4x4_with_a_long_name.jsonl"
    sheet = report.accuracy_table([measured(f"method {i}", {name: Score(1, 1.0, 1.0, 1.0, 1.0)}) for i in range(3)])
    cells = [
        line.split("┃")[2].strip() for line in printed(sheet.rich(), width=40).splitlines() if line.startswith("┃")
    ]
    assert "".join(cells) == name


def test_bad_benchmarks_are_refused():
    with pytest.raises(InputError, match=r"baseline 'nobody' is not among the methods: naive, CDLM, tau 0.9, a|b"):
        report.benchmark_tables(BENCHMARK, "nobody")
    with pytest.raises(InputError, match="group 'sort' is not among those measured: chain, sudoku"):
        report.comparison_table(BENCHMARK, "sort", "naive")
    odd = measured("odd", {"chain": CDLM.scores["chain"]})
    for table in (report.accuracy_table, report.aup_table):
        with pytest.raises(InputError, match="'odd' was scored on chain, but 'naive' on chain, sudoku"):
            table([*BENCHMARK, odd])


def test_a_score_table_has_a_row_per_group():
    sheet = report.score_table({"chain": Score(8, accuracy=0.875, forwards=3.5, tokens=10.0, tokens_per_forward=2.857)})
    assert sheet.rows == [["chain", "8", "87.5 %", "3.50", "2.86"]]
    assert "chain" in printed(sheet.rich()) and "tokens/" in printed(sheet.rich())
