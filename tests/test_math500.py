"""MATH: answers equal as mathematics, in whatever form, and never a hang."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from cdlm_jax.config import InputError
from cdlm_jax.tasks import math_equality
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.math500 import Math500, Math500Minerva
from cdlm_jax.tasks.math_equality import Judge, judge, normalized

DATA = Path(os.environ.get("CDLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
FILE = DATA / "math500.json"
needs_data = pytest.mark.skipif(not FILE.exists(), reason=f"no math500.json in {DATA} (set CDLM_DATA)")


@pytest.fixture
def needs_math_verify():
    pytest.importorskip("math_verify")


def test_prompts():
    problem = Problem("What is $1+1$?", "2")
    (message,) = Math500().messages(problem)
    assert message["content"] == (
        "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    task = Math500Minerva()
    prompt = task.prompt(problem)
    assert prompt.startswith(
        "Problem:\nFind the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.\n\nSolution: The"
    )
    assert prompt.endswith("is $-\\frac{2}{3}$. I hope it is correct.\n\nProblem:\nWhat is $1+1$?\n\nSolution:")
    assert prompt.count("I hope it is correct.") == task.shots == 4
    with pytest.raises(InputError, match="0 to 4 shots, got -1"):
        Math500Minerva(shots=-1)


def test_the_examples_are_right_by_their_own_rule():
    for (_, answer), gold in zip(Math500Minerva().examples(), ("[2,5)", "24", "16", r"-\frac{2}{3}"), strict=True):
        for text in (answer, answer.split("Final Answer:")[1]):
            assert Math500Minerva().score(Problem("", gold), text)


RIGHT = [
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    ("5", "5.0"),
    ("5", "x = 5"),
    ("5", r"5\text{ cm}"),
    ("5", r"5 \, \mathrm{cm}^2"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    (r"10,\!000", "10000"),
    (r"90^\circ", "90"),
    ("50", r"50\%"),
    ("18.90", r"\$18.90"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("[2,5)", r"x \in [2,5)"),
    (r"\{1,2\}", "2, 1"),
    ("6+9i", "9i+6"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\{x \mid x > \{1\}\}", r"\{x \mid x > \{1\}\}"),
]
WRONG = [
    ("5", "6"),
    ("5", "-5"),
    ("5", ""),
    ("5", r"\frac{"),
    ("5", r"\frac{1}{0}"),
    ("5", r"5\text{ or }6"),
    ("12", r"12\pi"),
    ("(1,2)", "(2,1)"),
    ("[2,5)", "[2,5]"),
    (r"\frac{1}{3}", "0.33"),
    (r"\text{even}", r"\text{odd}"),
    ("p-q", "q-p"),
    (r"\frac{11}{2}", r"1\frac{1}{2}"),
    ("5", r"\undefined{command}"),
    ("5", "\0\ud800"),
    ("5", "5+0" * 1000),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right(needs_math_verify, gold, answer):
    assert Math500().score(Problem("", gold), rf"Therefore $\boxed{{{answer}}}$. Done.")


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_wrong(needs_math_verify, gold, answer):
    assert not Math500().score(Problem("", gold), rf"Therefore $\boxed{{{answer}}}$. Done.")


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{4}, no, \boxed{5}", True),
        ("Final Answer: The final answer is $5$. I hope it is correct.", True),
        ("The answer is 5.", True),
        ("5", False),  # no rule finds it
        (r"\boxed{5", False),
        ("", False),
    ],
)
def test_where_the_answer_stands(needs_math_verify, response, right):
    assert Math500().score(Problem("", "5"), response) == right


def test_problems_that_the_model_invents_do_not_count(needs_math_verify):
    response = r"\boxed{5}" + "\n\nProblem:\nWhat is 2?\n\nSolution: \\boxed{2}"
    assert Math500Minerva().score(Problem("", "5"), response)


def test_normalized_text_needs_no_library(monkeypatch):
    monkeypatch.setattr(math_equality.importlib.util, "find_spec", lambda _: None)
    judge.cache_clear()
    try:
        assert normalized(r"\left( 3,\, \dfrac{\pi}{2} \right).") == r"(3,\frac{\pi}{2})"
        assert Math500().score(Problem("", r"\text{Evelyn}"), r"\boxed{Evelyn}")
        with pytest.raises(InputError, match=r'needs math-verify: pip install "cdlm_jax\[eval\]"'):
            Math500().score(Problem("", r"\frac{1}{2}"), r"\boxed{0.5}")
    finally:
        judge.cache_clear()


def test_threads_share_one_judge(needs_math_verify):
    """math-verify's own time limits work in the main thread only."""
    found = {}

    def ask(number):
        found[number] = judge().equal(f"{number}/2", str(number * 0.5)), judge().equal(str(number), str(number + 1))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), (True, False))


def test_an_endless_comparison_is_cut_off(needs_math_verify):
    impatient = Judge(seconds=0.5)
    try:
        assert impatient.equal("1/2", "0.5")
        first = impatient.worker.process
        assert not impatient.equal("5", "9^{9^{9^{9}}}")
        assert first.poll() is not None
        impatient.seconds = 10.0
        assert impatient.equal("1/2", "0.5"), "a new worker takes over"
    finally:
        impatient.close()


def test_a_dead_worker_is_replaced(needs_math_verify):
    found = Judge()
    try:
        assert found.equal("1/2", "0.5")
        found.worker.process.kill()
        found.worker.process.wait()
        assert found.equal("1/2", "0.5")
    finally:
        found.close()


def test_a_worker_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit")
    monkeypatch.setattr(math_equality, "_WORKER", broken)
    with pytest.raises(InputError, match="does not start"):
        Judge().equal("1", "2")


ROWS = [
    {"problem": "p", "solution": r"so \boxed{\frac{1}{2}}.", "level": "Level 1", "type": "Algebra"},
    {"problem": "p", "solution": "s", "answer": r"\frac{1}{2}", "unique_id": "x"},
    {"question": "p", "ground_truth_answer": r"\frac{1}{2}"},
]


def test_files(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert Math500().problems(path) == [Problem("p", r"\frac{1}{2}")] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "p"}, "line 1: no solution; the fields are problem"),
        ({"problem": "p", "solution": "five"}, r"holds no \\boxed{} answer"),
        ({"answer": "5"}, "no problem or question"),
    ],
)
def test_broken_rows_are_named(tmp_path, row, message):
    path = tmp_path / "math.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        Math500().problems(path)


def test_a_file_is_needed():
    with pytest.raises(InputError, match="math500_minerva needs a data file"):
        Math500Minerva().problems()


@needs_data
def test_every_real_answer_equals_itself(needs_math_verify):
    problems = Math500().problems(FILE)
    assert len(problems) == 500
    assert all(Math500().score(problem, rf"\boxed{{{problem.answer}}}") for problem in problems)
    assert all(Math500().score(problem, f"The final answer is ${problem.answer}$.") for problem in problems)
    assert all(judge().equal(problem.answer, problem.answer) for problem in problems[::5])


@pytest.fixture(autouse=True, scope="module")
def no_worker_stays():
    yield
    if "math_verify" in sys.modules or judge.cache_info().currsize:
        judge().close()
        judge.cache_clear()
