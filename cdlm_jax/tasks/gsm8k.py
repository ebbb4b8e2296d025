"""GSM8K (Cobbe et al. 2021): grade school word problems whose answer is a number."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.extraction import final_number, number
from cdlm_jax.tasks.public import ScoredBenchmark, cut, field, read_rows

# Wei et al. 2022, "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models", table 20.
CHAIN_OF_THOUGHT = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, "
        "there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been "
        "21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, "
        "they had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did "
        "Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. "
        "The answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have "
        "now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. "
        "The answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from monday to "
        "thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers "
        "were added. 9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf "
        "balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he "
        "had 35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars "
        "left. 23 - 15 is 8. The answer is 8.",
    ),
)


class Gsm8k(ScoredBenchmark):
    """Zero-shot chat: `question`, "Please reason step by step, and put your final answer within \\boxed{}."

    Problems are read from the public jsonl (`question`, `answer` that ends in `#### n`), else from a TFDS `gsm8k` that
    is prepared on this machine.
    """

    name = "gsm8k"
    source = "OpenCompass gsm8k_0shot_v2_gen_6e39a4"
    template = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
    extraction = 'number in the last \\boxed{}, else after "####" or "answer is", else the last; equal as numbers'

    def problems(self, path: str | Path | None = None) -> list[Problem]:
        if path is None:
            return [_problem(row, f"TFDS gsm8k, row {number}") for number, row in enumerate(_prepared_rows(), 1)]
        return [_problem(row, place) for place, row in read_rows(path)]

    def extract(self, problem: Problem, response: str) -> str | None:
        found = final_number(cut(response, self.stop))
        return None if found is None else str(found)

    def score(self, problem: Problem, response: str) -> bool:
        return final_number(cut(response, self.stop)) == gold(problem)


class Gsm8kCot(Gsm8k):
    """Eight worked examples, "Q: ... A:".

    With shots=0 and a chat template this is how Dream's authors evaluate Dream-7B-Instruct (eval_instruct/eval.sh).
    """

    name = "gsm8k_cot"
    source = "lm-evaluation-harness gsm8k_cot; examples of Wei et al. 2022"
    template = "Q: {prompt}\nA:"
    stop = ("Q:", "</s>", "<|im_end|>")

    def __init__(self, shots: int = len(CHAIN_OF_THOUGHT)):
        if not 0 <= shots <= len(CHAIN_OF_THOUGHT):
            raise InputError(f"gsm8k_cot has 0 to {len(CHAIN_OF_THOUGHT)} shots, got {shots}")
        self.shots = shots

    def examples(self) -> Sequence[tuple[str, str]]:
        return [
            (self.template.replace("{prompt}", question), answer) for question, answer in CHAIN_OF_THOUGHT[: self.shots]
        ]


def gold(problem: Problem) -> Decimal | None:
    """The number behind `####` of the worked answer; None if there is none, which `_problem` refuses."""
    return number(problem.answer.rpartition("####")[2])


def _problem(row, place: str) -> Problem:
    problem = Problem(field(row, place, "question"), field(row, place, "answer"))
    if "####" not in problem.answer or gold(problem) is None:
        raise InputError(f"{place}: answer must end in #### and a number, got {problem.answer[-40:]!r}")
    return problem


def _prepared_rows() -> list[dict[str, str]]:
    """The test split of TFDS gsm8k, if it lies prepared on this machine."""
    import tensorflow_datasets as tfds

    try:
        source = tfds.data_source("gsm8k", split="test", download=False)
    except Exception as error:  # TFDS and ArrayRecord have no common class for what is missing or damaged
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"gsm8k: no data file was given, and no TFDS gsm8k is prepared here as array_record ({reason})"
        ) from error
    return [{name: row[name].decode() for name in ("question", "answer")} for row in source]
