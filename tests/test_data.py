"""Texts as token rows, the mixture of tasks, and batches whose place in the data can be saved."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.tasks.mixture import ProblemMixture, PromptFile
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.training.batches import problem_batches

TOKENIZER = Tokenizer.characters(tasks.CHARACTERS)
EOS, MASK = TOKENIZER.token_to_id("<eos>"), TOKENIZER.token_to_id("<mask>")
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    mlp_size=16,
    rope_theta=100.0,
    norm_eps=1e-5,
    mask_token_id=MASK,
    eos_token_id=EOS,
    pad_token_id=EOS,
    max_length=40,
)
ENCODER = Encoder(TOKENIZER, MODEL, 23, 8)
MIXTURE = ProblemMixture({"sort": 3.0, "chain": 1.0}, "train", 30, seed=5)

texts = st.text(tasks.CHARACTERS, max_size=30)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(texts)
def test_prompts_are_right_padded(text):
    ids = TOKENIZER.encode(text)
    if not 1 <= len(ids) <= 23:
        with pytest.raises(InputError, match=f"has {len(ids)} tokens, allowed: 1 to 23"):
            ENCODER.prompt(text)
        return
    row, length = ENCODER.prompt(text)
    assert (row.shape, row.dtype, length.dtype, length) == ((23,), np.int32, np.int32, len(ids))
    assert row.tolist() == ids + [EOS] * (23 - len(ids))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(texts)
def test_answers_are_cut_or_padded_and_read_back(text):
    row = ENCODER.answer(text)
    assert (row.shape, row.dtype) == ((8,), np.int32)
    assert row.tolist() == (TOKENIZER.encode(text) + [EOS] * 8)[:8]
    assert ENCODER.response(row) == text[:8]


def test_a_response_ends_at_its_first_eos():
    one, two = TOKENIZER.encode("12")
    assert ENCODER.response(np.array([one, EOS, two, EOS])) == "1"
    assert ENCODER.response(np.array([EOS, one])) == ""


def test_prompts_are_stacked():
    rows, lengths = ENCODER.prompts(["3,1<", "2,2,1<"])
    assert rows.shape == (2, 23) and lengths.tolist() == [4, 6]
    np.testing.assert_array_equal(rows[1], ENCODER.prompt("2,2,1<")[0])


def test_problems_depend_on_seed_and_index_only():
    drawn = [MIXTURE[i] for i in range(30)]
    assert drawn == [MIXTURE[i] for i in np.arange(30)] == [ProblemMixture(**vars(MIXTURE))[i] for i in range(30)]
    assert len(MIXTURE) == 30 and len(set(drawn)) > 25
    other = ProblemMixture({"sort": 3.0, "chain": 1.0}, "train", 30, seed=6)
    assert sum(a == other[i] for i, a in enumerate(drawn)) < 3


def test_tasks_are_drawn_by_weight():
    names = Counter(MIXTURE[i][0] for i in range(2000))
    assert names.keys() == {"sort", "chain"}
    assert abs(names["sort"] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    only = ProblemMixture({"sort": 0.0, "chain": 0.1}, "train", 30, seed=5)
    assert {only[i][0] for i in range(50)} == {"chain"}


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_problems_stay_in_their_split(split):
    mixture = ProblemMixture({"sort": 1.0, "chain": 1.0}, split, 100, seed=0)
    for index in range(100):
        name, problem = mixture[index]
        assert tasks.split_of(tasks.get(name), problem) == split


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "task weights must be finite, not negative and not all zero"),
        ({"sort": 0.0}, "task weights must be finite, not negative and not all zero"),
        ({"sort": 1.0, "chain": -0.5}, "task weights must be finite, not negative and not all zero"),
        ({"sort": float("nan")}, "task weights must be finite, not negative and not all zero"),
        ({"sort": float("inf")}, "task weights must be finite, not negative and not all zero"),
        ({"sorting": 1.0}, "unknown task 'sorting'; tasks are "),
    ],
)
def test_unusable_mixtures_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        ProblemMixture(weights, "train", 10, seed=0)


def assert_same_batches(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_hold_the_mixture_in_order():
    batches = list(problem_batches(MIXTURE, ENCODER, 4))
    assert len(batches) == 30 // 4  # the last two problems fill no batch
    for place, batch in enumerate(batches):
        problems = [MIXTURE[i][1] for i in range(4 * place, 4 * place + 4)]
        prompts, lengths = ENCODER.prompts([problem.prompt for problem in problems])
        answers = np.stack([ENCODER.answer(problem.answer) for problem in problems])
        assert_same_batches([batch], [{"prompt": prompts, "prompt_length": lengths, "answer": answers}])


def test_batches_continue_from_a_saved_place():
    iterator = iter(problem_batches(MIXTURE, ENCODER, 4))
    for _ in range(3):
        next(iterator)
    place = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    continued = iter(problem_batches(MIXTURE, ENCODER, 4))
    continued.set_state(place)
    assert len(rest) == 4
    assert_same_batches(list(continued), rest)


# ---- prompts from a file -------------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}$\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LETTERS = Tokenizer.characters("abcdefghijklmnopqrstuvwxyz[]$\n ")


def prompt_file(tmp_path, *lines, tokenizer=LETTERS, prompt_length=40):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return PromptFile(path, tokenizer, prompt_length, seed=2)


def test_prompts_of_a_file(tmp_path):
    rows = [
        {"prompt": "a b", "answer": "c"},
        {"question": "d" * 41, "answer": "e"},
        "",
        {"question": "f", "answer": "g"},
    ]
    problems = prompt_file(tmp_path, *rows)
    assert [problems[i] for i in range(len(problems))] == [
        ("prompts", tasks.Problem("a b", "c")),
        ("prompts", tasks.Problem("f", "g")),
    ]
    assert (problems.total, problems.names, problems.seed) == (3, ("prompts",), 2)
    assert problems.source == prompt_file(tmp_path, *rows).source != prompt_file(tmp_path, *rows[:1]).source


# Of Dream (as Qwen2.5's, without its system turn and tools) and LLaDA (as Llama 3's, which opens the next turn always).
DREAM = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLADA = (
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (CHAT, "[user]a b$\n[assistant]", "c$"),
        (DREAM, "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n", "c<|im_end|>"),
        (
            LLADA,
            "<|start_header_id|>user<|end_header_id|>\n\na b<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "c<|eot_id|>",
        ),
    ],
)
def test_prompts_in_a_chat_template(tmp_path, template, prompt, answer):
    tokenizer = dataclasses.replace(
        Tokenizer.characters("abcdefghijklmnopqrstuvwxyz[]<|>_$\n "), chat_template=template
    )
    row = {"prompt": "a b", "answer": "c"}
    problems = prompt_file(tmp_path, row, tokenizer=tokenizer, prompt_length=len(prompt))
    assert problems[0][1] == tasks.Problem(prompt, answer)
    assert len(prompt_file(tmp_path, row, tokenizer=tokenizer, prompt_length=len(prompt) - 1)) == 0
    assert problems.source != prompt_file(tmp_path, row).source  # the template belongs to what a store was made from


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"])
def test_special_tokens_that_a_prompt_file_spells_are_text(tmp_path, template):
    tokenizer = dataclasses.replace(Tokenizer.characters("<mask>"), chat_template=template)
    problem = prompt_file(tmp_path, {"prompt": "<mask>", "answer": "a<mask>"}, tokenizer=tokenizer, prompt_length=9)[0][
        1
    ]
    end = [] if template is None else [tokenizer.token_to_id("<eos>")]
    assert tokenizer.encode(problem.prompt) == [0, 1, 2, 3, 4, 5, *end]
    assert tokenizer.encode(problem.answer) == [2, 0, 1, 2, 3, 4, 5, *end]


def test_a_template_that_rewrites_prompts_is_refused(tmp_path):
    template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = dataclasses.replace(LETTERS, chat_template=template)
    with pytest.raises(InputError, match="writes a prompt in another way once it is answered"):
        prompt_file(tmp_path, {"prompt": "a", "answer": "b"}, tokenizer=tokenizer)


USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("user", "assistant"))


def test_chats_with_their_last_turn_as_the_answer(tmp_path):
    chatty = dataclasses.replace(LETTERS, chat_template=CHAT)
    turns = [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT]
    problems = prompt_file(tmp_path, {"messages": turns, "id": 3}, tokenizer=chatty, prompt_length=99)
    assert problems[0][1] == tasks.Problem("[system]s$\n[user]u$\n[assistant]a$\n[user]u$\n[assistant]", "a$")
    with pytest.raises(InputError, match="line 1: messages need a chat template, and this model folder has none"):
        prompt_file(tmp_path, {"messages": turns})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"must be a list of \{role, content\}, got \[\]"),
        (["hi"], "message 1 needs role and content, got 'hi'"),
        ([USER | {"name": "x"}], "message 1 has the unknown key 'name', allowed: role, content"),
        ([USER | {"role": "tool"}], "role must be one of system, user, assistant, got 'tool'"),
        ([USER, ASSISTANT | {"content": ""}], "message 2: content must be a text that is not empty, got ''"),
        ([USER], "messages are of user; allowed: perhaps system, .* assistant at the end"),
        ([USER, USER, ASSISTANT], "messages are of user, user, assistant; allowed"),
    ],
)
def test_messages_that_are_no_chat(tmp_path, messages, message):
    chatty = dataclasses.replace(LETTERS, chat_template=CHAT)
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        prompt_file(tmp_path, {"messages": messages}, tokenizer=chatty)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected "),
        ({"prompt": "a"}, "line 2: expected "),
        ({"prompt": "", "answer": "a"}, "line 2: expected "),
        ({"prompt": 3, "answer": "a"}, "line 2: expected "),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        prompt_file(tmp_path, {"prompt": "a", "answer": "b"}, line)
    with pytest.raises(InputError, match="cannot read "):
        PromptFile(tmp_path / "nowhere", LETTERS, 4, seed=0)
