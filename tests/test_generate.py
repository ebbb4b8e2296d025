"""Answering: what goes through files and batches equals the decoders called directly; scores, pictures, templates."""

import dataclasses
import io
import json
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, load_case
from rich.console import Console
from test_model_folder import BLOCK_SIZE, GEN_LENGTH, tiny_folder
from tiny import TINY

from cdlm_jax import tasks
from cdlm_jax.cli import main
from cdlm_jax.commands.generate import show_steps
from cdlm_jax.config import InputError
from cdlm_jax.decoding import cdlm, naive
from cdlm_jax.decoding.options import DECODERS, Options
from cdlm_jax.decoding.progress import DecodeResult, response_lengths
from cdlm_jax.decoding.unmask import Threshold
from cdlm_jax.evaluation import answers, problems, prompts
from cdlm_jax.evaluation.harness import Answer, Case
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.text.tokenizers import Tokenizer

GEN, BLOCK = 32, 8  # of the golden decodes

# case id, flags, and the same decoder called directly
GOLDEN_DECODES = {
    "llada/generate_steps16_gen32_block8_cfg0": (
        "--decoder=naive --steps=16",
        (naive.generate, naive.Config(gen_length=GEN, block_size=BLOCK, steps=16)),
    ),
    "llada/student_decode_tau0.6_early_stop": (
        "--decoder=cdlm --threshold=0.6",
        (cdlm.generate, cdlm.Config(gen_length=GEN, block_size=BLOCK, unmask=Threshold(0.6))),
    ),
    "dream/teacher_trajectory": (
        "--decoder=naive",
        (naive.generate, naive.Config(gen_length=GEN, block_size=BLOCK)),
    ),
    "dream/student_decode_tau0.9_early_stop": (
        "--decoder=cdlm",
        (cdlm.generate, cdlm.Config(gen_length=GEN, block_size=BLOCK)),
    ),
}
# In every run one case of each family and of each decoder; the other pairs in the slow one.
SLOW_DECODES = ("llada/student_decode_tau0.6_early_stop", "dream/teacher_trajectory")


def golden_params():
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_DECODES)) for name in GOLDEN_DECODES]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny_folder().save(folder)
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- token ids in and out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", golden_params())
def test_golden_folders_with_token_ids_in_and_out(case_id, tmp_path):
    """Five prompts of mixed lengths in batches of two, the last one filled up, against one batch with more padding."""
    case, (flags, (decode, config)) = load_case(case_id), GOLDEN_DECODES[case_id]
    golden = case.arrays["prompt"][0].tolist()
    prompts = [golden[:4], golden, golden[5:], [7], golden[2:9]]
    source, output = write_rows(tmp_path / "in.jsonl", [{"prompt_ids": ids} for ids in prompts]), tmp_path / "out.jsonl"
    shape = f"--gen_length={GEN} --block_size={BLOCK} --batch_size=2"
    files = [f"--model={case.model}", f"--input={source}", f"--output={output}"]
    assert main(["generate", *files, *flags.split(), *shape.split()]) == 0
    found = read_rows(output)
    assert [row["prompt_ids"] for row in found] == prompts

    width = len(golden) + 3
    padded = np.array([ids + [501] * (width - len(ids)) for ids in prompts], np.int32)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    expected = jax.device_get(decode(ModelFolder.load(case.model).model, padded, lengths, config))
    np.testing.assert_array_equal([row["tokens"] for row in found], expected.tokens)
    assert [row["length"] for row in found] == expected.lengths.tolist()
    assert [row["forwards"] for row in found] == expected.forwards.tolist()
    keys = {"line", "prompt_ids", "tokens", "finalized_at", "length", "forwards"}
    assert all(row.keys() == keys for row in found), "no text to show"

    # And the second row is the golden decode itself, up to its first EOS.
    length = found[1]["length"]
    assert found[1]["tokens"][:length] == case.arrays["output_ids"][0, len(golden) :][:length].tolist()


def test_samples_do_not_depend_on_the_batch():
    """A sample belongs to its place in the list of cases and to the seed."""
    model_folder = ModelFolder.load(GOLDEN / "dream" / "model")
    cases = [Case([3, 4, 5]), Case([6]), Case([3, 4, 5])]
    options = Options(decoder="cdlm", gen_length=16, block_size=8, temperature=0.8, seed=5)

    def tokens(options, batch_size):
        return [answer.tokens.tolist() for answer in answers.answer_all(model_folder, cases, options, batch_size)]

    alone = tokens(options, 1)
    assert alone == tokens(options, 3)
    assert alone[0] != alone[2]
    assert alone != tokens(dataclasses.replace(options, seed=6), 1)


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_folder_says_how_it_is_decoded():
    student = Options(threshold=0.7, gen_length=64).resolve(tiny_folder(role="student").metadata)
    assert student == Options(decoder="cdlm", gen_length=64, block_size=BLOCK_SIZE, threshold=0.7)
    assert Options().resolve(tiny_folder().metadata).decoder == "naive"
    assert Options().resolve({}) == Options(decoder="naive", gen_length=256, block_size=32)
    assert Options().resolve({}, causal=True).decoder == "autoregressive"
    assert Options(decoder="dream").resolve({"block_size": 16}).block_size is None  # it has no blocks
    with pytest.raises(InputError, match="^block_size is no option of the dream decoder, allowed: "):
        Options(decoder="dream", block_size=16).resolve({})


def test_a_student_is_used_at_its_preset():
    preset = {"role": "student", "preset": {"threshold": 0.99}}
    assert Options().resolve(preset).threshold == 0.99
    assert Options(threshold=0.0).resolve(preset).threshold == 0.0  # what is given wins
    assert Options(decoder="naive", steps=256).resolve(preset).threshold is None  # chosen with another decoder
    assert Options().resolve({"role": "student"}).threshold is None


BROKEN = [0.9, [], {}, {"tau": 0.9}, {"threshold": None}, {"threshold": True}, {"threshold": "0.9"}]
BROKEN += [{"threshold": 1.5}, {"threshold": float("nan")}, {"threshold": 0.9, "steps": 3}]


@pytest.mark.parametrize("preset", BROKEN)
def test_a_broken_preset_is_refused(preset):
    with pytest.raises(
        InputError, match=r"^config.json: cdlm.preset must be \{\"threshold\": a number from 0 to 1\}, got "
    ):
        Options(threshold=0.5).resolve({"role": "student", "preset": preset})


@pytest.mark.parametrize("decoder", DECODERS)
def test_options_reach_every_decoder(decoder, monkeypatch):
    """By the names of its own Config; the others are refused by name."""
    options = {
        "naive": {"steps": 32, "remasking": "random", "cfg_scale": 0.5},
        "dream": {"steps": 7, "algorithm": "topk_margin", "alg_temp": 0.2, "top_p": 0.9, "top_k": 3},
        "fast_dllm": {"threshold": 0.25, "cache": "dual"},
        "dllm_cache": {"prompt_interval": 3, "response_interval": 2, "update_ratio": 0.5},
        "autoregressive": {"temperature": 0.5, "top_p": 0.9, "top_k": 3},
        "cdlm": {"temperature": 0.5},
    }[decoder]
    seen = Mock()
    monkeypatch.setattr(DECODERS[decoder], "generate", seen)
    Options(decoder=decoder, **options).resolve({"gen_length": 64, "block_size": 16}).bind()("model", "p", "n", "key")
    (*given, config, key), _ = seen.call_args
    assert (*given, key) == ("model", "p", "n", "key")
    assert type(config) is DECODERS[decoder].Config
    sizes = {"gen_length": 64} | ({"block_size": 16} if hasattr(config, "block_size") else {})
    assert {name: getattr(config, name) for name in sizes | options} == sizes | options
    foreign = "factor" if decoder != "fast_dllm" else "algorithm"
    value = {"factor": 0.5, "algorithm": "entropy"}[foreign]
    with pytest.raises(InputError, match=f"^{foreign} is no option of the {decoder} decoder, allowed: "):
        Options(decoder=decoder, **{foreign: value}).resolve({})


def test_a_zero_is_an_option_given(monkeypatch):
    seen = Mock()
    monkeypatch.setattr(cdlm, "generate", seen)
    Options(decoder="cdlm", threshold=0.0).resolve({}).bind()("model", "p", "n", "key")
    assert seen.call_args.args[3].unmask == Threshold(0.0)
    with pytest.raises(InputError, match="^Factor: factor must be positive, got 0.0$"):
        Options(decoder="fast_dllm", factor=0.0).resolve({})


# ---- tasks and their scores ----------------------------------------------------------------------------------------


@pytest.fixture
def expert(monkeypatch):
    """Puts a decoder in place of the teacher's that solves a chain if its value is even and else says its prompt."""
    tokenizer = tiny_folder().tokenizer

    def generate_(model, prompts, lengths, config, key):
        rows = []
        for row, length in zip(np.asarray(prompts), np.asarray(lengths), strict=True):
            problem = tasks.get("chain").from_prompt(tokenizer.decode(row[:length]))
            ids = tokenizer.encode(problem.answer if even(problem) else problem.prompt)
            rows.append(ids + [model.config.eos_token_id] * (config.gen_length - len(ids)))
        tokens = jnp.asarray(rows)
        at = jnp.broadcast_to(jnp.arange(config.gen_length), tokens.shape)
        return DecodeResult(tokens, response_lengths(tokens, model.config.eos_token_id), at[:, -1] + 1, at)

    monkeypatch.setattr(naive, "generate", generate_)


def even(problem: tasks.Problem) -> bool:
    return int(problem.answer[-1]) % 2 == 0


def test_task_mode_scores(teacher, tmp_path, expert, capsys):
    problems = [tasks.get("chain").problem("heldout", index) for index in range(7)]
    expected = [even(problem) for problem in problems]
    assert 0 < sum(expected) < 7
    task = [f"--model={teacher}", "--task=chain", "--num=7", "--batch_size=3"]

    assert main(["generate", *task, f"--output={tmp_path / 'out.jsonl'}"]) == 0
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in found] == [problem.prompt for problem in problems]
    assert [row["correct"] for row in found] == expected
    assert [row["response"] for row in found] == [p.answer if even(p) else p.prompt for p in problems]
    assert [row["length"] for row in found] == [len(row["response"]) for row in found]
    assert "7 answers written to" in capsys.readouterr().out.replace("\n", " ")

    assert main(["generate", *task]) == 0
    printed = capsys.readouterr().out
    assert (printed.count("  right\n"), printed.count("  wrong\n")) == (sum(expected), 7 - sum(expected))
    assert all(f"{row['prompt']} {row['response']}\n" in printed for row in found)


def test_evaluate_counts_like_generate(teacher, expert, capsys):
    problems = [tasks.get("chain").problem("heldout", index) for index in range(7)]
    lengths = [len(p.answer if even(p) else p.prompt) for p in problems]
    assert main(["evaluate", f"--model={teacher}", "--task=chain", "--num=7", "--batch_size=3"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "chain" in line]
    cells = re.split(r"\s{2,}", row.strip())
    accuracy = 100 * sum(map(even, problems)) / 7
    tokens_per_forward = sum(lengths) / (7 * GEN_LENGTH)
    assert cells == ["chain", "7", f"{accuracy:.1f} %", f"{GEN_LENGTH:.2f}", f"{tokens_per_forward:.2f}"]


def test_evaluate_reads_real_data(tmp_path, expert, monkeypatch):
    """Files of another task than the model was trained on are scored by that task."""
    row = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}
    path = write_rows(tmp_path / "countdown.jsonl", [row, row])
    case, _ = problems.cases(tiny_folder().tokenizer, [], [str(path)])
    assert (case.group, case.text) == ("countdown.jsonl", "15,44,79>50")
    assert case.check("44-15=29,79-29=50") and not case.check("44-15=29,79-29=51")


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    model_folder = tiny_folder()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    tokenizer = dataclasses.replace(model_folder.tokenizer, chat_template=template)
    folder = tmp_path_factory.mktemp("models") / "chat"
    dataclasses.replace(model_folder, tokenizer=tokenizer).save(folder)
    return folder


@pytest.mark.parametrize("flag, sent", [("--chat", "1+1="), ("--nochat", "1+1")])
def test_chat_template(chat_folder, tmp_path, flag, sent):
    source, output = write_rows(tmp_path / "in.jsonl", [{"prompt": "1+1"}]), tmp_path / "out.jsonl"
    files = [f"--model={chat_folder}", f"--input={source}", f"--output={output}"]
    assert main(["generate", *files, flag, "--decoder=cdlm"]) == 0
    (row,) = read_rows(output)
    assert row["prompt"] == "1+1", "the record shows what the user wrote"
    assert row["prompt_ids"] == tiny_folder().tokenizer.encode(sent)


def test_tasks_never_use_the_chat_template(chat_folder):
    (case,) = prompts.task_cases(ModelFolder.load(chat_folder), "chain", 1)
    assert case.ids == tiny_folder().tokenizer.encode(case.text)


@pytest.mark.parametrize("template", [None, "<eos>{{ messages[0]['content'] }}<eos>"])
def test_a_prompt_that_spells_a_special_token_is_text(template):
    tokenizer = dataclasses.replace(Tokenizer.characters("<mask>"), chat_template=template)
    special = [] if template is None else [tokenizer.token_to_id("<eos>")]
    case = prompts.Reader(tokenizer).text("<mask>")
    assert (case.text, case.ids) == ("<mask>", [*special, 0, 1, 2, 3, 4, 5, *special])


def test_lines_end_at_line_feeds_only(tmp_path):
    """JSON may hold other characters that Python counts as line ends (U+2028, U+0085 ...) as they are."""
    text = "a\u2028b\x85c"
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n\n" + '{"prompt_ids": [0]}', "utf-8")
    reader = prompts.Reader(Tokenizer.characters("abc\u2028\x85"))
    first, second = prompts.file_items(reader, dataclasses.replace(TINY, mask_token_id=39), path, gen_length=8)
    assert (first.text, first.ids, second.ids) == (text, [0, 3, 1, 4, 2], [0])


def test_show_steps_prints_a_line_per_forward_where_there_is_no_terminal(teacher, capsys):
    assert main(["generate", f"--model={teacher}", "--prompt=1+1=", "--show_steps", "--steps=6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"naive, block size {BLOCK_SIZE}  1+1="
    assert [line[: len("forward 1")] for line in lines[1:]] == [f"forward {i}" for i in range(1, 7)]
    assert lines[1].count("▒") == GEN_LENGTH - 8 and lines[-1].count("▒") == 0


def test_show_steps_without_a_tokenizer_shows_ids():
    model_folder = ModelFolder.load(GOLDEN / "llada" / "model")
    answer = Answer(
        Case([3, 4]),
        np.array([9, 17, 501, 501]),
        np.array([0, 1, 1, 0]),
        length=2,
        forwards=2,
        text=None,
        correct=None,
    )
    out = io.StringIO()
    show_steps(model_folder, answer, Options(decoder="cdlm", block_size=2), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert lines[0] == "cdlm, block size 2  3 4"
    assert lines[-1].split()[2:4] == ["9", "17"]


# ---- lines that cannot be answered ---------------------------------------------------------------------------------

BAD_LINES = {
    "1+1=": "not JSON",
    "[1]": "expected {",
    '{"prompt": ""}': "is empty",
    '{"prompt": "\u00e9"}': "not in the alphabet",
    '{"promt": "1"}': "unknown key 'promt', allowed: prompt, prompt_ids, messages, id",
    '{"prompt": "1", "prompt_ids": [1]}': "expected {",
    '{"prompt_ids": [1, true]}': "expected {",
    '{"prompt_ids": [4000]}': "token 4000",
    '{"prompt_ids": [50]}': "mask token",
    '{"prompt": "' + 500 * "1" + '"}': "exceeds the model's",
    '{"messages": [{"role": "assistant", "content": "1"}]}': "messages are of assistant; allowed: ",
}


def test_a_bad_line_ends_nothing(chat_folder, tmp_path, capsys):
    """It is named, the others are answered and carry their number and id, and the status says that some are missing."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"id": "a", "messages": [{"role": "system", "content": "9"}, {"role": "user", "content": "1+1"}]}
    lines = [json.dumps(chat), *BAD_LINES, "", '{"prompt_ids": [3, 4]}']
    source.write_bytes("\n".join(lines).encode() + b"\n\xff")
    line = ["generate", f"--model={chat_folder}", f"--input={source}", f"--output={output}", "--decoder=cdlm"]
    assert main(line) == 1
    *errors, closing = capsys.readouterr().err.splitlines()
    for number, (error, message) in enumerate(zip(errors, BAD_LINES.values(), strict=False), 2):
        assert error.startswith(f"cdlm generate: {source} line {number}: ") and message in error
    assert len(errors) == len(BAD_LINES) + 1 and "line 15: not JSON" in errors[-1]
    assert closing == "cdlm generate: 12 of 14 lines were not answered"

    first, *refused, second, last = read_rows(output)
    assert (first["line"], first["id"], first["prompt"]) == (1, "a", "1+1")
    assert first["prompt_ids"] == tiny_folder().tokenizer.encode("91+1=")
    assert (second["line"], second["prompt_ids"], last["line"]) == (14, [3, 4], 15)
    assert [row.keys() for row in (*refused, last)] == [{"line", "error"}] * 12

    assert main([*line, "--strict"]) == 2
    assert f"{source} line 2: not JSON" in capsys.readouterr().err


def test_a_system_message(chat_folder, teacher, capsys):
    reader = prompts.Reader(ModelFolder.load(chat_folder).tokenizer, system="7")
    own = [{"role": "system", "content": "9"}, {"role": "user", "content": "1"}]
    tokens = [reader.text("1"), reader.messages(own[1:]), reader.messages(own)]
    assert [case.ids for case in tokens] == [reader.tokenizer.encode(text) for text in ("71=", "71=", "91=")]
    assert main(["generate", f"--model={teacher}", "--prompt=1", "--system=2"]) == 2
    assert "--system needs a chat template" in capsys.readouterr().err
