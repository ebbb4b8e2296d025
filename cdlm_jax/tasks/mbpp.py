"""MBPP (Austin et al. 2021): write a Python function; three asserts are shown and decide."""

import ast
import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.extraction import code, syntax_error
from cdlm_jax.tasks.public import CodeBenchmark, Program, field, read_rows

TEST_SPLIT = range(11, 511)  # of the task ids 1..974; 1..10 are for prompts, the others for training
_SHOWN = "Your code should pass the test:"

# Task ids 2, 3 and 4, as Austin et al. prompt with.
_EXAMPLES = (
    (
        "Write a function to find the similar elements from the given two tuple lists.",
        (
            "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
            "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
            "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
        ),
        "def similar_elements(test_tup1, test_tup2):\n  res = tuple(set(test_tup1) & set(test_tup2))\n  return (res) ",
    ),
    (
        "Write a python function to identify non-prime numbers.",
        (
            "assert is_not_prime(2) == False",
            "assert is_not_prime(10) == True",
            "assert is_not_prime(35) == True",
        ),
        "import math\n"
        "def is_not_prime(n):\n"
        "    result = False\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\n"
        "        if n % i == 0:\n"
        "            result = True\n"
        "    return result",
    ),
    (
        "Write a function to find the largest integers from a given list of numbers using heap queue algorithm.",
        (
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
        ),
        "import heapq as hq\n"
        "def heap_queue_largest(nums,n):\n"
        "  largest_nums = hq.nlargest(n, nums)\n"
        "  return largest_nums",
    ),
)


@dataclass(frozen=True)
class MbppProblem(Problem):
    """prompt: the description; answer: the reference code, or empty; tests: statements; setup: code before them."""

    tests: tuple[str, ...]
    setup: str = ""


class Mbpp(CodeBenchmark[MbppProblem]):
    """Zero-shot chat by default; a chat answer begins with an opened fence.

    Problems come from a file: the public mbpp.jsonl (`text`, `test_list`; of all 974 rows the test split 11 to 510),
    sanitized-mbpp.json (`prompt`), or the copy with `question`, which the tests are cut off.
    """

    name = "mbpp"
    source = "lm-evaluation-harness mbpp_instruct, which Dream's authors use with 0 shots; mbpp for plain models"
    template = (
        "You are an expert Python programmer, and here is your task:\n{prompt}\n"
        "Your code should pass these tests:\n{tests}"
    )
    opening = "\n```python\n"
    extraction = "the response up to the next ```, or the first fenced block that defines the function"
    stop = ("[DONE]",)

    def __init__(self, shots: int = 0):
        if not 0 <= shots <= len(_EXAMPLES):
            raise InputError(f"mbpp has 0 to {len(_EXAMPLES)} shots, got {shots}")
        self.shots = shots

    def problems(self, path: str | Path | None = None) -> list[MbppProblem]:
        if path is None:
            raise InputError("mbpp needs a data file: mbpp.jsonl, sanitized-mbpp.json, or rows with test_list")
        rows = [(place, row) for place, row in read_rows(path) if row.get("task_id", TEST_SPLIT[0]) in TEST_SPLIT]
        if not rows:
            raise InputError(f"{path} holds no task id of the test split, {TEST_SPLIT[0]} to {TEST_SPLIT[-1]}")
        return [_problem(row, place) for place, row in rows]

    def question(self, problem: MbppProblem) -> str:
        return _fill(self.template, problem.prompt, problem.tests)

    def examples(self) -> Sequence[tuple[str, str]]:
        return [
            (_fill(self.template, text, tests), f"{self.opening}{answer}\n```")
            for text, tests, answer in _EXAMPLES[: self.shots]
        ]

    def prompt(self, problem: MbppProblem) -> str:
        """Austin et al.: the code stands between [BEGIN] and [DONE]."""
        ask = (
            "You are an expert Python programmer, and here is your task: {prompt} "
            "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )
        shots = [_fill(ask, text, tests) + f"{answer}\n[DONE]" for text, tests, answer in _EXAMPLES[: self.shots]]
        return "\n\n".join([*shots, _fill(ask, problem.prompt, problem.tests)])

    def program(self, problem: MbppProblem, response: str) -> Program:
        body = response.partition("[DONE]")[0].rpartition("[BEGIN]")[2]
        names = _taken(problem.tests)
        # Objects that the setup makes need the classes of the code, so it runs there; modules are the tests' own.
        return Program(
            code=f"{code(body, names[0])}\n{problem.setup}\n",
            setup="".join(f"import {module}\n" for module in sorted(_modules(problem.tests))),
            tests=problem.tests,
            names=names,
        )


def _fill(template: str, text: str, tests: Sequence[str]) -> str:
    return template.replace("{tests}", "\n".join(tests)).replace("{prompt}", text)


def _names(tests: Sequence[str], name_of: Callable[[ast.AST], ast.AST | None]) -> list[str]:
    """The names among `name_of(node)` of all nodes, in order of appearance."""
    found = (name_of(node) for test in tests for node in ast.walk(ast.parse(test)))
    return [node.id for node in found if isinstance(node, ast.Name)]


def _modules(tests: Sequence[str]) -> set[str]:
    """Names whose attributes the tests use, as in `sys.getsizeof(...)`."""
    return set(_names(tests, lambda node: node.value if isinstance(node, ast.Attribute) else None))


def _taken(tests: Sequence[str]) -> tuple[str, ...]:
    """What the tests take from the code, the function under test first: names that they neither set nor import.

    Built-in names are not taken, except where all functions called are named so: `assert sum(10,15) == 6`.
    """
    assigned = _names(tests, lambda node: node if isinstance(getattr(node, "ctx", None), ast.Store) else None)
    own = {*vars(builtins), *_modules(tests), *assigned}
    used = [name for name in _names(tests, lambda node: node) if name not in own]
    called = _names(tests, lambda node: node.func if isinstance(node, ast.Call) else None)
    first = [name for name in called if name in used] if used else called
    return tuple(dict.fromkeys([*first, *used]))


def _problem(row, place: str) -> MbppProblem:
    tests = tuple(field(row, place, "test_list", kind=list))
    imports = "\n".join(field(row, place, "test_imports", kind=list, default=[]))
    problem = MbppProblem(
        prompt=field(row, place, "text", "prompt", "question").partition(_SHOWN)[0].rstrip(),
        answer=field(row, place, "code", default=""),
        tests=tests,
        setup=f"{imports}\n{field(row, place, 'test_setup_code', default='')}".replace("\r\n", "\n").strip(),
    )
    if not tests or not all(isinstance(test, str) and not syntax_error(test) for test in tests) or not _taken(tests):
        raise InputError(f"{place}: test_list must hold Python statements that call a function, got {tests!r:.120}")
    return problem
