"""MATH (Hendrycks et al. 2021) and its 500-problem subset MATH-500 (Lightman et al. 2023): answers are LaTeX."""

import re
from collections.abc import Sequence
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.extraction import after_phrase, boxed
from cdlm_jax.tasks.math_equality import judge, normalized
from cdlm_jax.tasks.public import ScoredBenchmark, cut, field, read_rows

# Lewkowycz et al. 2022, "Solving Quantitative Reasoning Problems with Language Models" (Minerva), appendix D.
MINERVA = (
    (
        r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.",
        r"The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so $x\ge2$, and "
        r"$5 - x \ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. "
        r"Therefore, the domain of the expression is $\boxed{[2,5)}$."
        "\nFinal Answer: The final answer is $[2,5)$. I hope it is correct.",
    ),
    (
        r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find $\det (\mathbf{A} \mathbf{B}).$",
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = (2)(12) = \boxed{24}.$"
        "\nFinal Answer: The final answer is $24$. I hope it is correct.",
    ),
    (
        "Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many times "
        "must Terrell lift them in order to lift the same total weight?",
        r"If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\cdot 12\cdot20=480$ pounds of weight. "
        r" If he lifts two 15-pound weights instead for $n$ times, he will lift a total of $2\cdot15\cdot n=30n$ "
        r"pounds of weight.  Equating this to 480 pounds, we can solve for $n$:"
        "\n\\begin{align*}\n30n&=480\\\\\n\\Rightarrow\\qquad n&=480/30=\\boxed{16}\n\\end{align*}"
        "\nFinal Answer: The final answer is $16$. I hope it is correct.",
    ),
    (
        "If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y-9x &=b.\n\\end{align*}has a solution "
        r"$(x, y)$ where $x$ and $y$ are both nonzero,"
        "\n"
        r"find $\frac{a}{b},$ assuming $b$ is nonzero.",
        "If we multiply the first equation by $-\\frac{3}{2}$, we obtain\n\n$$6y-9x=-\\frac{3}{2}a.$$Since we also "
        "know that $6y-9x=b$, we have\n\n"
        r"$$-\frac{3}{2}a=b\Rightarrow\frac{a}{b}=\boxed{-\frac{2}{3}}.$$"
        "\nFinal Answer: The final answer is $-\\frac{2}{3}$. I hope it is correct.",
    ),
)


class Math500(ScoredBenchmark):
    """Zero-shot chat: `problem`, "Please reason step by step, and put your final answer within \\boxed{}."

    Problems are read from a file: MATH-500 (`problem`, `answer`), MATH (`problem`, `solution`, whose last \\boxed{} is
    the answer), or the copy with `question` and `ground_truth_answer`. Two answers are equal as normalized text or by
    math-verify (extra `eval`).
    """

    name = "math500"
    source = "OpenCompass math_0shot_gen_11c4b5, which LLaDA's authors use"
    template = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
    extraction = 'the last \\boxed{}, else the formula or sentence after the last "answer is"; equal by math-verify'

    def problems(self, path: str | Path | None = None) -> list[Problem]:
        if path is None:
            raise InputError(f"{self.name} needs a data file: rows with problem and answer, or problem and solution")
        return [_problem(row, place) for place, row in read_rows(path)]

    def extract(self, problem: Problem, response: str) -> str | None:
        text = cut(response, self.stop)
        return boxed(text) or after_phrase(text)

    def score(self, problem: Problem, response: str) -> bool:
        """InputError if math-verify is needed and not installed."""
        answer = self.extract(problem, response)
        if answer is None:
            return False
        return any(_equal(problem.answer, form) for form in _forms(answer))


class Math500Minerva(Math500):
    """Four worked examples, "Problem: ... Solution:". With shots=0 and a chat template: Dream's eval_instruct."""

    name = "math500_minerva"
    source = "lm-evaluation-harness minerva_math500; examples of Lewkowycz et al. 2022"
    template = "Problem:\n{prompt}\n\nSolution:"
    stop = ("Problem:",)

    def __init__(self, shots: int = len(MINERVA)):
        if not 0 <= shots <= len(MINERVA):
            raise InputError(f"math500_minerva has 0 to {len(MINERVA)} shots, got {shots}")
        self.shots = shots

    def examples(self) -> Sequence[tuple[str, str]]:
        return [(self.template.replace("{prompt}", problem), answer) for problem, answer in MINERVA[: self.shots]]


def _forms(answer: str) -> dict[str, None]:
    r"""The answer, and without a unit at its end: `5\text{ cm}`, `5 \, \mathrm{cm}^2`."""
    unit = re.search(r"(?<=[\d}])(?:\\[,;! ]|\s|~)*\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?$", answer)
    return dict.fromkeys([answer, answer[: unit.start()]] if unit else [answer])


def _equal(gold: str, answer: str) -> bool:
    return normalized(gold) == normalized(answer) or judge().equal(gold, answer)


def _problem(row, place: str) -> Problem:
    if "answer" in row or "ground_truth_answer" in row:
        answer = field(row, place, "answer", "ground_truth_answer")
    else:
        answer = boxed(field(row, place, "solution"))
    if not answer:
        raise InputError(f"{place}: the solution holds no \\boxed{{}} answer")
    return Problem(field(row, place, "problem", "question"), answer)
