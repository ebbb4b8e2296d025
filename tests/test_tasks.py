"""Tasks: splits that never meet, worked answers that score, wrong answers that do not, clear refusals."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.tasks import countdown, real_data, sudoku
from cdlm_jax.tasks.base import Problem

DATA = Path(os.environ.get("CDLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
SUDOKU_FILES = [DATA / f"dream_sudoku_4x4_{n}.jsonl" for n in (4, 8, 12)]
COUNTDOWN_FILE = DATA / "dream_cd3_test.jsonl"
needs_data = pytest.mark.skipif(not COUNTDOWN_FILE.exists(), reason=f"no real test files in {DATA} (set CDLM_DATA)")
SAMPLED = 1500
OPTIONAL = ("spell_backward", "chain_sum")


@pytest.fixture(params=tasks.NAMES)
def task(request):
    if request.param in OPTIONAL:
        pytest.importorskip("reasoning_gym")
    return tasks.get(request.param)


def sample(task, split, count=SAMPLED):
    return [task.problem(split, index) for index in range(count)]


# ---------------------------------------------------------------- every task


def test_problems_keep_the_limits_and_solve_themselves(task):
    for split in tasks.SPLITS:
        for problem in sample(task, split):
            assert len(problem.prompt) <= 23 and len(problem.answer) <= 40
            assert set(problem.prompt + problem.answer) <= set(task.characters)
            assert task.score(problem, problem.answer)


def test_splits_never_meet(task):
    keys = {}
    for split in tasks.SPLITS:
        problems = sample(task, split)
        assert {tasks.split_of(task, problem) for problem in problems} == {split}
        keys[split] = {task.key(problem) for problem in problems}
    assert not keys["train"] & keys["heldout"]


def test_problems_vary(task):
    fewest = 500 if task.name == "chain_sum" else 1000  # chain_sum: half of the items have one-digit operands
    assert all(len(set(sample(task, split))) > fewest for split in tasks.SPLITS)


def test_a_prompt_gives_its_problem_back(task):
    for problem in sample(task, "heldout", 50):
        typed = task.from_prompt(problem.prompt)
        assert typed.prompt == problem.prompt
        assert task.score(problem, typed.answer) and task.score(typed, problem.answer)


def test_changed_answers_are_wrong(task):
    """Replacing, dropping, adding or doubling a character of the last number, grid or word makes an answer wrong."""
    rng = random.Random(0)
    for problem in sample(task, "heldout", 300):
        answer = problem.answer
        last = rng.choice([c for c in task.characters if c.isalnum() and c != answer[-1]])
        doubled = "" if answer == "0" else answer + answer  # reasoning-gym takes 00 for 0
        for wrong in (answer[:-1] + last, answer[:-1], answer + last, doubled, ""):
            assert not task.score(problem, wrong), (problem, wrong)


def test_another_problems_answer_is_wrong(task):
    problems = sample(task, "heldout", 300)
    for problem, other in zip(problems, problems[1:], strict=False):
        if task.name == "chain":  # one digit of ten often agrees
            assert task.score(problem, other.answer) == (problem.answer[-1] == other.answer[-1])
        elif problem.answer != other.answer:
            assert not task.score(problem, other.answer)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(response=st.text(max_size=40) | st.text(tasks.CHARACTERS, max_size=40))
def test_odd_responses_never_raise(response):
    for name in (name for name in tasks.NAMES if name not in OPTIONAL):
        problem = tasks.get(name).problem("train", 0)
        right = tasks.get(name).score(problem, response)
        assert right is (response == problem.answer) or (name == "chain" and response.endswith(problem.answer[-2:]))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(prompt=st.text(max_size=20) | st.text(tasks.CHARACTERS, max_size=20))
def test_odd_prompts_are_refused_or_solved(prompt):
    for name in (name for name in tasks.NAMES if name not in OPTIONAL):
        task = tasks.get(name)
        try:
            problem = task.from_prompt(prompt)
        except InputError as error:
            assert name in str(error) and repr(prompt) in str(error)
        else:
            assert task.score(problem, problem.answer)


def test_same_problems_in_another_process():
    names = [name for name in tasks.NAMES if name not in OPTIONAL]
    problems = "[tasks.get(n).problem(s, i) for n in sys.argv[1:] for s in tasks.SPLITS for i in (0, 7)]"
    show = f"import sys; from cdlm_jax import tasks; print({problems})"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(Path(__file__).parents[1])}
    there = subprocess.run(
        [sys.executable, "-c", show, *names], env=environment, capture_output=True, text=True, check=True
    ).stdout
    here = [tasks.get(n).problem(s, i) for n in names for s in tasks.SPLITS for i in (0, 7)]
    assert there.strip() == str(here)


def test_problems_are_frozen_across_versions():
    """Records and checkpoints refer to problems by index: these must not change."""
    assert {name: tasks.get(name).problem("heldout", 0) for name in tasks.NAMES if name not in OPTIONAL} == {
        "chain": Problem("3-1+7-1-5+4-1=", "3-1=2;2+7=9;9-1=8;8-5=3;3+4=7;7-1=6;#6"),
        "sudoku4": Problem("2003010210000200:", "2413314213244231"),
        "countdown3": Problem("15,96,58>23", "96-15=81,81-58=23"),
        "sort": Problem("26,34,23,9,10,63,31<", "9,10,23,26,31,34,63"),
    }


def test_characters_are_those_of_all_tasks():
    assert list(tasks.CHARACTERS) == sorted(set("0123456789+-*/=;#,<:>?~abcdefghijklmnopqrstuvwxyz"))


def test_refusals():
    with pytest.raises(InputError, match=r"unknown task 'chess'; tasks are chain, sudoku4, countdown3"):
        tasks.get("chess")
    with pytest.raises(InputError, match=r"unknown split 'test'; splits are train, heldout"):
        tasks.get("chain").problem("test", 0)
    with pytest.raises(InputError, match=r"index is -1"):
        tasks.get("chain").problem("train", -1)


# ---------------------------------------------------------------- chain


def test_chain_by_hand():
    chain = tasks.get("chain")
    problem = chain.from_prompt("6+1-2+3=")
    assert problem.answer == "6+1=7;7-2=5;5+3=8;#8"
    assert chain.score(problem, "#8") and chain.score(problem, "6+1=9;#8")  # only the final number is judged
    for wrong in ("8", "#", "#7", "#08", "#8;", "#8#8", "#7#8", "#8 ", "6+1=7;7-2=5;5+3=8;8#"):
        assert not chain.score(problem, wrong), wrong


def test_chain_follows_arithmetic():
    for problem in sample(tasks.get("chain"), "train", 300):
        *steps, final = problem.answer.split(";")
        assert 4 <= len(steps) + 1 <= 7
        value = 0
        for operand, step in zip(re.findall(r"[+-]\d", problem.prompt), steps, strict=True):
            left, result = step.split("=")
            value = eval(left)
            assert left.endswith(operand) and str(value) == result and 0 <= value <= 9
        assert final == f"#{value}" and value == eval(problem.prompt[:-1])


@pytest.mark.parametrize("prompt", ["", "6=", "6+1", "12+3=", "6+1=7", "5+6=", "1-2+3=", "6*1=", "1+1+1+1+1+1+1+1="])
def test_chain_refuses(prompt):
    with pytest.raises(InputError, match="chain: prompt"):
        tasks.get("chain").from_prompt(prompt)


# ---------------------------------------------------------------- sort


def test_sort_by_hand():
    sort = tasks.get("sort")
    problem = sort.from_prompt("42,7,93,18,7<")
    assert problem.answer == "7,7,18,42,93"
    for wrong in ("7,18,42,93", "93,42,18,7,7", "7,7,18,42,93,", "07,7,18,42,93", "7, 7,18,42,93", "7,18,42,7,93"):
        assert not sort.score(problem, wrong), wrong
    assert sort.key(problem) == sort.key(sort.from_prompt("7,7,42,18,93<"))


@pytest.mark.parametrize("prompt", ["", "5<", "1,2", "1,,2<", "1,100<", "01,2<", "1,2,3,4,5,6,7,8<", "1,-2<"])
def test_sort_refuses(prompt):
    with pytest.raises(InputError, match="sort: prompt"):
        tasks.get("sort").from_prompt(prompt)


# ---------------------------------------------------------------- sudoku4


def solutions(prompt, symbols):
    """All completions, by plain search, sharing no code with the package."""
    found, cells = [], list(prompt[:16])

    def fill(i):
        if i == 16:
            found.append("".join(cells))
            return
        row, column = divmod(i, 4)
        for symbol in symbols if prompt[i] == "0" else prompt[i]:
            peers = [
                r * 4 + c
                for r in range(4)
                for c in range(4)
                if (r == row or c == column or (r // 2 == row // 2 and c // 2 == column // 2)) and r * 4 + c != i
            ]
            if all(cells[p] != symbol for p in peers if p < i or prompt[p] != "0"):
                cells[i] = symbol
                fill(i + 1)
                cells[i] = prompt[i]

    fill(0)
    return found


def test_there_are_288_grids_and_225_are_held_out():
    assert sorted(solutions("0" * 16, "1234")) == list(sudoku.grids())
    assert len(sudoku.grids()) == 288
    train, heldout = sudoku.grids_of("train"), sudoku.grids_of("heldout")
    assert (len(train), len(heldout)) == (63, 225)
    assert set(train) | set(heldout) == set(sudoku.grids())


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_sudoku_puzzles_have_one_solution(split):
    for problem in sample(tasks.get("sudoku4"), split, 300):
        assert solutions(problem.prompt, sorted(set(problem.answer))) == [problem.answer]
        assert 4 <= problem.prompt.count("0") <= 12


def test_sudoku_empties_are_uniform():
    counts = [p.prompt.count("0") for p in sample(tasks.get("sudoku4"), "train")]
    assert all(0.7 < counts.count(n) / (SAMPLED / 9) < 1.3 for n in range(4, 13))


def test_sudoku_training_renames_half_of_the_train_grids():
    problems = sample(tasks.get("sudoku4"), "train")
    plain = [p for p in problems if set(p.answer) == set("1234")]
    renamed = [p for p in problems if set(p.answer) != set("1234")]
    assert 0.45 < len(plain) / SAMPLED < 0.55
    assert {p.answer for p in plain} <= set(sudoku.grids_of("train"))
    assert all(set(p.prompt[:-1]) - {"0"} == set(p.answer) and "0" not in p.answer for p in renamed)
    assert len({frozenset(p.answer) for p in renamed}) > 100  # of 125
    heldout = sample(tasks.get("sudoku4"), "heldout")
    assert {p.answer for p in heldout} <= set(sudoku.grids_of("heldout"))


def test_sudoku_by_hand():
    task = tasks.get("sudoku4")
    problem = task.from_prompt("0042203140233214:")
    right = "1342243141233214"
    assert problem.answer == right and task.score(problem, right)
    swapped = right.translate(str.maketrans("12", "21"))  # complete, but other givens
    repeated_row = "1342" * 4
    boxes_wrong = "1234234134124123"  # rows and columns hold
    for wrong in (swapped, repeated_row, boxes_wrong, right[:-1], right + "1", "0042203140233214", " " + right):
        assert not task.score(problem, wrong), wrong
    assert not sudoku.is_complete(boxes_wrong)


def test_sudoku_accepts_any_completion():
    task = tasks.get("sudoku4")
    open_puzzle = task.from_prompt("1000000000000000:")
    right = [grid for grid in sudoku.grids() if task.score(open_puzzle, grid)]
    assert len(right) == 72 and all(grid[0] == "1" for grid in right)


def test_sudoku_scores_renamed_symbols():
    task = tasks.get("sudoku4")
    names = str.maketrans("1234", "7295")
    problem = task.from_prompt("0042203140233214:".translate(names))
    assert task.score(problem, "1342243141233214".translate(names))
    assert not task.score(problem, "1342243141233214")


@pytest.mark.parametrize(
    "prompt",
    ["", "0042203140233214", "004220314023321:", "00422031402332x4:", "5" + "0" * 15 + ":", "11" + "0" * 14 + ":"],
)
def test_sudoku_refuses(prompt):
    with pytest.raises(InputError, match="sudoku4: prompt"):
        tasks.get("sudoku4").from_prompt(prompt)


# ---------------------------------------------------------------- countdown3


def test_countdown_by_hand():
    task = tasks.get("countdown3")
    problem = Problem("15,44,79>50", "44-15=29,79-29=50")
    assert task.score(problem, problem.answer)
    assert task.score(problem, "79-44=35,35+15=50") and task.score(problem, "79-44=35,15+35=50")  # another way
    for wrong in (
        "44-15=29,79-29=51",  # false equation
        "44-15=29,79-28=51",  # number not there
        "44-15=29",  # number left over
        "44-15=29,29-15=14",  # number used twice
        "79-44=35,79-29=50",
        "15-44=29,79-29=50",  # negative
        "44-15=29, 79-29=50",
        "44-15=29,79-29=50,",
        "44-15=029,79-29=50",
        "79-29=50,44-15=29",
        "50",
        "15/0=50,44/0=79",
    ):
        assert not task.score(problem, wrong), wrong
    assert task.score(Problem("3,3,24>24", ""), "3-3=0,24+0=24")  # occurs in the real file
    assert not task.score(Problem("7,2,3>9", ""), "7/2=3,3*3=9")  # no rounding
    assert task.key(problem) == task.key(Problem("79,15,44>22", ""))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), count=st.integers(3, 9))
def test_countdown_of_any_size(data, count):
    """Numbers combined at random in any order are right for what they lead to, and for nothing else."""
    numbers = data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    available, steps = list(numbers), []
    while len(available) > 1:
        a, b = sorted((available.pop(data.draw(st.integers(0, len(available) - 1))) for _ in range(2)), reverse=True)
        results = {operator: countdown.apply(a, operator, b) for operator in "-+*/"}
        operator = data.draw(st.sampled_from([o for o, value in results.items() if value is not None and value < 100]))
        available.append(results[operator])
        steps.append(f"{a}{operator}{b}={available[-1]}")
    assume(available[0] > 0)
    puzzle = countdown.Countdown(count)
    problem = Problem(f"{','.join(map(str, numbers))}>{available[0]}", ",".join(steps))
    assert puzzle.score(problem, problem.answer)
    assert not puzzle.score(problem, problem.answer.replace("=", "=0", 1))
    assert not puzzle.score(problem, ",".join(steps[:-1]))


def test_countdown_numbers_and_mix():
    problems = sample(tasks.get("countdown3"), "train")
    for problem in problems:
        *numbers, target = map(int, re.split("[,>]", problem.prompt))
        assert all(1 <= n <= 99 for n in numbers) and 22 <= target <= 96
        assert all(int(value) > 0 for value in re.findall(r"\d+", problem.answer))
    operators = "".join(re.findall(r"[-+*/]", "".join(p.answer for p in problems)))
    real = {"-": 0.570, "+": 0.276, "/": 0.0815, "*": 0.0725}  # shares in dream_cd3_test.jsonl
    assert all(abs(operators.count(o) / len(operators) - share) < 0.03 for o, share in real.items())


@pytest.mark.parametrize("prompt", ["", "15,44,79", "15,44>50", "15,44,79>", "0,1,2>3", "1,2,100>5", "1,1,1>99"])
def test_countdown_refuses(prompt):
    with pytest.raises(InputError, match="countdown3: prompt"):
        tasks.get("countdown3").from_prompt(prompt)


def test_shipped_countdown_list_is_held_out():
    listed = countdown._in_test_file()
    assert len(listed) == 989
    task = tasks.get("countdown3")
    for key in listed:
        a, b, c = key.split(",")
        assert int(a) <= int(b) <= int(c)
        assert tasks.split_of(task, Problem(f"{c},{a},{b}>50", "")) == "heldout"


# ---------------------------------------------------------------- reasoning-gym


def test_spell_backward_by_hand():
    pytest.importorskip("reasoning_gym")
    task = tasks.get("spell_backward")
    problem = task.from_prompt("planet~")
    assert problem.answer == "tenalp"
    assert not any(task.score(problem, wrong) for wrong in ("planet", "tenal", "tenalpp", "tenlap", "tenalp~"))
    assert all(3 <= len(p.answer) <= 8 and p.answer == p.prompt[-2::-1] for p in sample(task, "train", 300))
    for prompt in ("planet", "Planet~", "ab~", "elephants~"):
        with pytest.raises(InputError, match="spell_backward: prompt"):
            task.from_prompt(prompt)


def test_chain_sum_by_hand():
    pytest.importorskip("reasoning_gym")
    task = tasks.get("chain_sum")
    assert task.from_prompt("12+34?").answer == "46" and task.from_prompt("5-9?").answer == "-4"
    problem = task.from_prompt("12-34?")
    assert task.score(problem, "-22") and not any(task.score(problem, wrong) for wrong in ("22", "-2", "-22?", "x"))
    assert task.key(task.from_prompt("12+34?")) == task.key(task.from_prompt("34+12?"))
    assert task.key(task.from_prompt("12-34?")) != task.key(task.from_prompt("34-12?"))
    assert all(int(p.answer) == eval(p.prompt[:-1]) for p in sample(task, "train", 300))
    for prompt in ("12+34=", "12+345?", "12*3?", "1+2+3?", "01+2?"):
        with pytest.raises(InputError, match="chain_sum: prompt"):
            task.from_prompt(prompt)


@pytest.mark.parametrize("name", OPTIONAL)
def test_missing_reasoning_gym_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    tasks.get.cache_clear()
    with pytest.raises(
        InputError, match=rf"task {name} needs .*pip install \"cdlm_jax\[reasoning\]\", or drop the task"
    ):
        tasks.get(name)


# ---------------------------------------------------------------- real files


@needs_data
def test_real_sudoku_grids_are_exactly_the_held_out_ones():
    seen = set()
    for path in SUDOKU_FILES:
        task, problems = real_data.load(path)
        assert task.name == "sudoku4" and len(problems) == 108
        seen |= {problem.answer for problem in problems}
    assert seen == set(sudoku.grids_of("heldout"))


@needs_data
@pytest.mark.parametrize("numbers", [3, 4, 5])
def test_real_countdown_of_any_size(numbers):
    """Every given solution is right, and none is once a step, an operator, or the target is another."""
    puzzle, problems = real_data.load(DATA / f"dream_cd{numbers}_test.jsonl")
    assert puzzle.name == f"countdown{numbers}" and len(problems) == 1000
    for problem in problems:
        steps = problem.answer.split(",")
        assert len(steps) == numbers - 1 and puzzle.score(problem, problem.answer)
        numbers_part, _, target = problem.prompt.partition(">")
        other = Problem(f"{numbers_part}>{int(target) % 99 + 1}", "")
        assert not puzzle.score(other, problem.answer)
        assert not puzzle.score(problem, ",".join(steps[:-1]))
        assert not puzzle.score(problem, ",".join([*steps, steps[-1]]))
        assert not puzzle.score(problem, problem.answer.replace("=", "=1", 1))


@needs_data
def test_real_countdown_numbers_are_exactly_the_shipped_ones():
    task, problems = real_data.load(COUNTDOWN_FILE)
    assert task.name == "countdown3" and len(problems) == 1000
    assert {task.key(problem) for problem in problems} == countdown._in_test_file()
    assert problems[0] == Problem("15,44,79>50", "44-15=29,79-29=50")


SUDOKU_ROW = {"input": "0042\n2031\n4023\n3214", "output": "1342\n2431\n4123\n3214"}
COUNTDOWN_ROW = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_real_data_formats(tmp_path):
    task, problems = real_data.load(write(tmp_path / "s.jsonl", SUDOKU_ROW, "", SUDOKU_ROW))
    assert task is tasks.get("sudoku4")
    assert problems == [Problem("0042203140233214:", "1342243141233214")] * 2
    task, problems = real_data.load(write(tmp_path / "c.jsonl", COUNTDOWN_ROW))
    assert task is tasks.get("countdown3")
    assert problems == [Problem("15,44,79>50", "44-15=29,79-29=50")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ({"input": "15,44,79,50"}, "expected an object with the texts 'input' and 'output'"),
        (
            {"input": "1,2,3,4,10", "output": "1+2=3,3+3=6,6+4=10"},
            "a countdown4 row in a file that began with countdown3 rows",
        ),
        ({**COUNTDOWN_ROW, "input": "1,2,3"}, "neither a 4x4 Sudoku nor 3 to 9 numbers and a target"),
        ({**COUNTDOWN_ROW, "input": "0,44,79,50"}, "3 numbers and a target of 1..99"),
        ({**COUNTDOWN_ROW, "output": "44-15=28,79-29=50"}, "does not solve"),
        ({**SUDOKU_ROW, "output": "1342\n2431\n4123\n3241"}, "does not solve"),
        (SUDOKU_ROW, "a sudoku4 row in a file that began with countdown3 rows"),
    ],
)
def test_real_data_refuses(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", COUNTDOWN_ROW, row)
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: .*{re.escape(message)}"):
        real_data.load(path)


def test_real_data_refuses_files(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.jsonl"):
        real_data.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="holds no problems"):
        real_data.load(write(tmp_path / "empty.jsonl", ""))
