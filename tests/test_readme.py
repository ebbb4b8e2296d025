"""The Python example of the README runs, word for word, and its tables are those that are printed."""

import ast
import re
from pathlib import Path

from test_metrics import measured, score

from cdlm_jax.evaluation.report import accuracy_table, comparison_table

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_answers(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    answers = ast.literal_eval(printed[: printed.index("]") + 1])
    assert len(answers) == 2 and all(answers)


def test_the_quickstart_tables_have_the_printed_columns_and_caption():
    groups = {name: score(1.0, 0.48, 128) for name in ("chain", "sudoku4")}
    teacher = [measured("teacher, 1 token per step", groups, latency_ms=(74.6, 73.6, 76.5))]
    text, compared = README.read_text(), comparison_table(teacher, None, teacher[0].name)
    for sheet in (compared, accuracy_table(teacher)):
        assert f"\n| {' | '.join(sheet.header)} |\n" in text
    assert compared.caption in " ".join(text.split())


def test_every_picture_and_page_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
