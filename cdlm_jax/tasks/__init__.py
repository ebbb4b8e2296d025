"""Small tasks with verifiable answers: used by training, collection and evaluation alike.

    task = tasks.get("chain")
    problem = task.problem("heldout", 0)     # Problem(prompt="6+1-2+3=", answer="6+1=7;7-2=5;5+3=8;#8")
    task.score(problem, response)            # True or False

Prompts have at most 23 characters and worked answers at most 40. Each kind of prompt holds a character of its own
(`=` `:` `>` `<` `~` `?`), so one model can serve all tasks.

Public benchmarks (GSM8K, MATH, HumanEval, MBPP) make no problems of their own: `tasks.benchmark_named(name)`.
"""

from collections.abc import Callable
from functools import cache

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import SPLITS, Problem, Task, split_of
from cdlm_jax.tasks.chain import Chain
from cdlm_jax.tasks.countdown import Countdown3
from cdlm_jax.tasks.gsm8k import Gsm8k, Gsm8kCot
from cdlm_jax.tasks.humaneval import HumanEval
from cdlm_jax.tasks.math500 import Math500, Math500Minerva
from cdlm_jax.tasks.mbpp import Mbpp
from cdlm_jax.tasks.public import CodeBenchmark, ScoredBenchmark
from cdlm_jax.tasks.reasoning import ChainSum, SpellBackward
from cdlm_jax.tasks.sort import Sort
from cdlm_jax.tasks.sudoku import Sudoku4

__all__ = ["BENCHMARKS", "CHARACTERS", "NAMES", "SPLITS", "Problem", "Task", "benchmark_named", "get", "split_of"]

_TASKS = {task.name: task for task in (Chain, Sudoku4, Countdown3, Sort, SpellBackward, ChainSum)}
NAMES = tuple(_TASKS)
BENCHMARKS: dict[str, Callable[[], ScoredBenchmark | CodeBenchmark]] = {
    kind.name: kind for kind in (Gsm8k, Gsm8kCot, Math500, Math500Minerva, HumanEval, Mbpp)
}
CHARACTERS = "".join(sorted(set("".join(task.characters for task in _TASKS.values()))))


@cache
def get(name: str) -> Task:
    """The task called `name`. Raises InputError for an unknown name, or if the task's optional package is missing."""
    if name not in _TASKS:
        raise InputError(f"unknown task {name!r}; tasks are {', '.join(NAMES)}")
    return _TASKS[name]()


@cache
def benchmark_named(name: str) -> ScoredBenchmark | CodeBenchmark:
    """The public benchmark called `name`, in its usual setting."""
    return BENCHMARKS[name]()
