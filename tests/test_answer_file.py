"""A file of answers: killed anywhere and continued, it ends as if nobody had disturbed it; other settings are named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from devices import environment
from hypothesis import given
from hypothesis import strategies as st
from test_model_folder import tiny_folder

from cdlm_jax.cli import main
from cdlm_jax.config import InputError
from cdlm_jax.evaluation import answer_file as module
from cdlm_jax.evaluation.answer_file import AnswerFile, answer_file
from cdlm_jax.mesh.preemption import EXIT_STATUS

LINE = ["--decoder=cdlm", "--temperature=0.8", "--batch_size=3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_folder().save(folder)
    return folder


def command(name, model, output, *more):
    task = ["--task=chain", "--num=8"]
    return [name, f"--model={model}", *task, *LINE, f"--output={output}", *more]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The file of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(command("evaluate", model, output)) == 0
    return output


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_a_killed_run_continues(name, model, whole, tmp_path, monkeypatch, capsys):
    """SIGTERM after any number of answers, and a line torn by the machine's own end."""
    output, done = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    write = AnswerFile.write

    def written_until(count):
        def stop(file, record):
            write(file, record)
            if len(done.read_bytes().splitlines()) == count:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)  # Python sees the signal before this ends

        return stop

    for count in (1, 3, 5):
        monkeypatch.setattr(AnswerFile, "write", written_until(count))
        assert main(command(name, model, output)) == EXIT_STATUS
        assert "run the same command to continue" in capsys.readouterr().err
        assert whole.read_bytes().startswith(done.read_bytes()) and not output.exists()
        with done.open("ab") as file:
            file.write(b'{"prompt": "1+')
    counted = Mock(side_effect=write, autospec=True)
    monkeypatch.setattr(AnswerFile, "write", lambda *given: counted(*given))
    assert main(command(name, model, output)) == 0
    assert counted.call_count == 8 - 5
    assert output.read_bytes() == whole.read_bytes() and not done.exists()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all({"prompt", "response", "correct", "forwards", "tokens", "length"} <= row.keys() for row in rows)


def test_scores_are_of_all_answers(model, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(command("evaluate", model, output)) == 0
    table = capsys.readouterr().out.partition("out.jsonl\n")[2]
    kept = whole.read_bytes().splitlines(keepends=True)[:4]
    output.rename(tmp_path / "out.jsonl.partial").write_bytes(b"".join(kept))
    assert main(command("evaluate", model, output)) == 0
    assert capsys.readouterr().out.partition("out.jsonl\n")[2] == table
    assert main(command("evaluate", model, output)) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 answers were there already in") and out.partition("out.jsonl\n")[2] == table


@pytest.mark.parametrize("flag, name", [("--seed=1", "options.seed is 0 there, 1 here"), ("--num=9", "prompts.count")])
def test_other_settings_are_refused_by_name(flag, name, model, whole, capsys):
    before = whole.read_bytes()
    assert main(command("generate", model, whole, flag)) == 2
    assert f"{whole} holds answers of another run: {name}" in capsys.readouterr().err
    assert whole.read_bytes() == before


@given(kept=st.lists(st.dictionaries(st.text(), st.text())), torn=st.binary(max_size=9))
def test_whole_lines(kept, torn):
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in kept)
    rest = torn.replace(b"\n", b"")
    assert module._whole_lines(lines + rest) == (kept, len(lines))


def test_a_bad_line_before_others_loses_none_of_them(tmp_path):
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt), answer_file(path, 3, dict) as file:
        file.write({"n": 1})
        raise KeyboardInterrupt
    edited = partial.read_bytes() + b'{"n": 2\n{"n": 3}\n'
    partial.write_bytes(edited)
    with pytest.raises(InputError, match=r"out\.jsonl: line 2 is no answer; remove it or give another --output"):
        AnswerFile(path, 3, {})
    assert partial.read_bytes() == edited


def test_a_record_that_was_edited_is_named(model, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    del rows[0]["tokens"]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = whole.with_name(whole.name + ".settings.json").read_bytes()
    (tmp_path / "out.jsonl.settings.json").write_bytes(settings)
    assert main(command("generate", model, output)) == 2
    assert "was changed by hand: KeyError('tokens')" in capsys.readouterr().err


def test_what_is_refused(tmp_path):
    foreign, short = tmp_path / "notes", tmp_path / "short"
    foreign.write_text("mine")
    with pytest.raises(InputError, match=r"notes exists, and no notes.settings.json says how it was made"):
        AnswerFile(foreign, 1, {})
    assert foreign.read_text() == "mine"
    with answer_file(short, 1, dict) as file:
        file.write({})
        with pytest.raises(InputError, match="another process is at work on it"):
            AnswerFile(short, 1, {})
    short.write_text("{}\n{}\n")
    with pytest.raises(InputError, match="was changed by hand: it holds 2 of 1 answers"):
        AnswerFile(short, 1, {})


@pytest.mark.slow
def test_processes_killed_at_random_moments(model, whole, tmp_path):
    output, rng = tmp_path / "out.jsonl", random.Random(0)
    line = [sys.executable, "-m", "cdlm_jax", *command("generate", model, output)]
    for _ in range(12):
        process = subprocess.Popen(line, env=environment(1, optimized=True), stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(2, 8))
        process.kill()
        process.wait()
    assert subprocess.run(line, env=environment(1, optimized=True), check=False).returncode == 0
    assert output.read_bytes() == whole.read_bytes()
