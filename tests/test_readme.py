"""The Python example of the README runs, word for word."""

import ast
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_answers(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    answers = ast.literal_eval(printed[: printed.index("]") + 1])
    assert len(answers) == 2 and all(answers)


def test_every_picture_and_page_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
