"""GSM8K: prompts as published, right and wrong answers, files good and bad."""

import gzip
import json
import os
from pathlib import Path

import pytest

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.gsm8k import CHAIN_OF_THOUGHT, Gsm8k, Gsm8kCot

DATA = Path(os.environ.get("CDLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "gsm8k_test.jsonl").exists(), reason=f"no gsm8k files in {DATA}")
ROW = {"question": "How many?", "answer": "Twice 617 is <<2*617=1234>>1,234.\n#### 1,234"}
PROBLEM = Problem(ROW["question"], ROW["answer"])


def test_the_chat_asks_for_a_box():
    (message,) = Gsm8k().messages(PROBLEM)
    expected = "How many?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert message == {"role": "user", "content": expected}
    assert Gsm8k().text(PROBLEM, lambda messages: f"<{messages[-1]['content']}>") == f"<{expected}>"


def test_eight_shots():
    task = Gsm8kCot()
    prompt = task.prompt(PROBLEM)
    assert prompt.startswith("Q: There are 15 trees in the grove. Grove workers")
    assert prompt.endswith("So she has 23 - 15 dollars left. 23 - 15 is 8. The answer is 8.\n\nQ: How many?\nA:")
    assert prompt.count("The answer is") == task.shots == 8
    messages = task.messages(PROBLEM)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 8 + ["user"]
    assert messages[-1]["content"] == Gsm8kCot(shots=0).prompt(PROBLEM) == "Q: How many?\nA:"
    with pytest.raises(InputError, match="0 to 8 shots, got 9"):
        Gsm8kCot(shots=9)


def test_the_examples_are_right_by_their_own_rule():
    for _, answer in CHAIN_OF_THOUGHT:
        gold = answer.split("The answer is ")[1].rstrip(".")
        assert Gsm8kCot().score(Problem("", f"#### {gold}"), answer)
        assert not Gsm8kCot().score(Problem("", f"#### {gold}1"), answer)


RIGHT = [
    r"so \boxed{1234}",
    r"\boxed{1,234}",
    r"\boxed{1{,}234.00}",
    r"\boxed{\$1234 \text{ apples}}",
    "#### 1234",
    "The answer is $1,234.",
    "**Answer:** 1234 apples",
    "First 5, then 1234",
]
WRONG = [
    "",
    "I do not know",
    r"\boxed{1235}",
    r"\boxed{-1234}",
    r"\boxed{12.34}",
    "#### 1234.5",
    r"1234 is half of \boxed{2468}",
    "The answer is 5, not 1234 after all: the answer is 6",
    "\\boxed{" * 50,
    "#### ",
    "1" * 5000,
]


@pytest.mark.parametrize("response", RIGHT)
def test_right(response):
    assert Gsm8k().score(PROBLEM, response) and Gsm8kCot().score(PROBLEM, response)


@pytest.mark.parametrize("response", WRONG)
def test_wrong(response):
    assert not Gsm8k().score(PROBLEM, response) and not Gsm8kCot().score(PROBLEM, response)


def test_a_question_that_the_model_invents_does_not_count():
    response = "Twice 617. The answer is 1234.\n\nQ: What is 2 + 2?\nA: The answer is 4."
    assert Gsm8kCot().score(PROBLEM, response)
    assert not Gsm8k().score(PROBLEM, response)


@needs_data
def test_the_real_files():
    task = Gsm8k()
    for name, count in (("gsm8k_test.jsonl", 1319), ("gsm8k_train.jsonl", 7473)):
        problems = task.problems(DATA / name)
        assert len(problems) == count
        assert all(task.score(problem, problem.answer) for problem in problems)
        assert not any(task.score(problem, problem.answer + "1") for problem in problems)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_files(tmp_path):
    lines = json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n"
    assert Gsm8k().problems(write(tmp_path / "a.jsonl", lines)) == [PROBLEM] * 2
    assert Gsm8k().problems(write(tmp_path / "a.json", json.dumps([ROW]))) == [PROBLEM]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert Gsm8k().problems(tmp_path / "a.jsonl.gz") == [PROBLEM] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ("[]", "holds no problems"),
        ("{", r"a\.jsonl, line 1: not JSON"),
        ("[1, 2", r"a\.jsonl: not JSON"),
        ("[3]", r"a\.jsonl, entry 1: expected an object, got 3"),
        (json.dumps(ROW) + '\n{"question": "x"}', "line 2: no answer; the fields are question"),
        ('{"question": 3, "answer": "#### 3"}', "line 1: question must be str, got 3"),
        ('{"question": "x", "answer": "#### ?"}', r"line 1: answer must end in #### and a number, got '#### \?'"),
        ('{"question": "x", "answer": "3"}', "must end in ####"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        Gsm8k().problems(write(tmp_path / "a.jsonl", text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.jsonl"):
        Gsm8k().problems(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"cannot read .*a\.gz"):
        Gsm8k().problems(tmp_path / "a.gz")


@pytest.mark.filterwarnings("ignore")  # TFDS's own
def test_a_prepared_tfds_is_read(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.text.gsm8k import gsm8k

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data_source = tfds.data_source
    monkeypatch.setattr(tfds, "data_source", lambda *names, **more: data_source(*names, data_dir=tmp_path, **more))
    with pytest.raises(InputError, match="no data file was given, and no TFDS gsm8k is prepared here"):
        Gsm8k().problems()
    row = ROW | {"annotation": "", "short_answer": "1,234"}
    monkeypatch.setattr(gsm8k.Gsm8k, "_split_generators", lambda *_: {"test": iter([("0", row)])})
    gsm8k.Gsm8k(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert Gsm8k().problems() == [PROBLEM]
