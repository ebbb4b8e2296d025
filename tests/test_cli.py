"""The command line: what is unusable is refused in one line that names it, and nothing is written or lost."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file
from test_model_folder import contents, tiny_folder
from test_recipe import SETTINGS, write_config

from cdlm_jax.cli import COMMANDS, main
from cdlm_jax.models.hf import load_model

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROW = '{"prompt": "1+1="}\n'
SUDOKU = {"input": "1234\n3412\n2143\n0000", "output": "1234\n3412\n2143\n4321"}

# Command line -> what its one line on stderr must hold: what was got, and what is allowed.
FLAGS = {
    "unknown flag": ("generate --promt=1+1=", ["promt", "prompt"]),
    "positional argument": ("generate 1+1=", ["unexpected argument '1+1='", "--name=value"]),
    "not an integer": ("generate --task=chain --num=many", ["--num=many", "invalid literal for int"]),
    "batch size 0": ("generate --task=chain --batch_size=0", ["--batch_size=0", "positive integer"]),
    "seed below 0": ("generate --task=chain --seed=-1", ["--seed=-1", "0"]),
    "not a boolean": ("generate --task=chain --show_steps=maybe", ["--show_steps=maybe", "boolean"]),
    "no source": ("generate --model=teacher", ["exactly one of --prompt, --prompt_ids, --task, --input", "got none"]),
    "two sources": ("generate --model=teacher --prompt=1+1= --task=chain", ["exactly one", "got prompt, task"]),
    "nothing to evaluate": ("evaluate --model=teacher", ["--task", "--data"]),
    "nothing to export": ("export --model=teacher", ["--model and --output"]),
}
MODELS = {
    "no folder": ("generate --model=nowhere --prompt=1+1=", ["no model folder at nowhere"]),
    "no config.json": ("generate --model=empty --prompt=1+1=", ["empty/config.json", "No such file"]),
    "broken config.json": ("generate --model=garbled --prompt=1+1=", ["garbled/config.json", "not valid JSON"]),
    "unknown model_type": ("generate --model=gpt2 --prompt=1+1=", ["gpt2/config.json", "'gpt2'", "llada, Dream"]),
    "truncated weights": ("generate --model=truncated --prompt=1+1=", ["truncated/model.safetensors: truncated"]),
    "missing tensor": ("evaluate --model=headless --task=chain", ["headless: missing tensor", "transformer.ff_out"]),
    "odd gen_length": ("generate --model=odd_size --prompt=1+1=", ["gen_length", "positive integer", "'long'"]),
    "odd role": ("generate --model=odd_role --prompt=1+1=", ["role", "teacher", "student", "['teacher']"]),
    "text without a tokenizer": ("generate --model=llada --prompt=hi", ["no tokenizer", "--prompt_ids"]),
    "tasks without a tokenizer": ("evaluate --model=llada --task=chain", ["no tokenizer"]),
}
PROMPTS = {
    "empty": ("generate --model=teacher --prompt=", ["prompt", "empty"]),
    "outside the alphabet": ("generate --model=teacher --prompt=1€=", ["'1€='", "not in the alphabet: '€'", "allowed"]),
    "too long": (f"generate --model=teacher --prompt={'1+' * 30}1=", ["prompt 62", "gen_length 48", "62 positions"]),
    "id out of range": ("generate --model=llada --prompt_ids=1,512", ["token 512", "0..511"]),
    "negative id": ("generate --model=llada --prompt_ids=-1,5", ["token -1", "0..511"]),
    "huge id": (f"generate --model=llada --prompt_ids={10**30}", [f"token {10**30}", "0..511"]),
    "mask id": ("generate --model=llada --prompt_ids=3,500", ["mask token 500", "position 1"]),
    "not ids": ("generate --model=llada --prompt_ids=1,two", ["--prompt_ids", "comma-separated integers", "'1,two'"]),
    "no ids": ("generate --model=llada --prompt_ids=", ["prompt", "empty"]),
    "unknown task": ("generate --model=teacher --task=chess", ["unknown task 'chess'", "chain, sudoku4"]),
    "one unknown task of two": ("evaluate --model=teacher --task=chain,chess", ["unknown task 'chess'"]),
    "too long for the folder": ("evaluate --model=teacher --task=sudoku4", ["prompt 17", "62 positions"]),
}
TEXT = "generate --model=teacher --prompt=1+1="
OPTIONS = {
    "gen_length": (f"{TEXT} --gen_length=47", ["gen_length 47", "multiple of block_size 16"]),
    "block_size": (f"{TEXT} --block_size=7", ["gen_length 48", "multiple of block_size 7"]),
    "steps of the student": (
        f"{TEXT} --decoder=cdlm --steps=8",
        ["steps is no option of the cdlm decoder", "threshold"],
    ),
    "steps and blocks": (f"{TEXT} --steps=7", ["steps", "multiple of the 3 blocks", "got 7"]),
    "steps and threshold": (f"{TEXT} --steps=6 --threshold=0.9", ["steps", "6", "0.9"]),
    "threshold": (f"{TEXT} --threshold=1.5", ["hreshold", "[0, 1]", "1.5"]),
    "threshold of evaluate": ("evaluate --model=teacher --task=chain --threshold=-0.1", ["hreshold", "-0.1"]),
    "temperature": (f"{TEXT} --temperature=-1", ["temperature", "0 or more", "-1"]),
    "temperature of evaluate": ("evaluate --model=teacher --task=chain --temperature=nan", ["temperature", "nan"]),
    "decoder": (f"{TEXT} --decoder=beam", ["decoder must be one of naive, ", "'beam'"]),
}
FROM_FILE = "generate --model=teacher --strict --input"
FILES = {
    "no input": (f"{FROM_FILE}=nowhere.jsonl", ["cannot read nowhere.jsonl", "No such file"]),
    "input is binary": (f"{FROM_FILE}=teacher/model.safetensors", ["teacher/model.safetensors line 1", "not JSON"]),
    "input is not JSON": (f"{FROM_FILE}=words.jsonl", ["words.jsonl line 2", "not JSON"]),
    "input of deep JSON": (f"{FROM_FILE}=deep.jsonl", ["deep.jsonl line 1", "not JSON"]),
    "wrong row": (f"{FROM_FILE}=rows.jsonl", ["rows.jsonl line 2", '{"prompt_ids": [integers]}', "[1, true]"]),
    "no rows": (f"{FROM_FILE}=blank.jsonl", ["blank.jsonl", "no prompts"]),
    "late empty prompt": (f"{FROM_FILE}=late_empty.jsonl --batch_size=1", ["prompt", "empty"]),
    "late odd token": (f"{FROM_FILE}=late_token.jsonl --batch_size=1", ["prompt", "token 4000", "0..50"]),
    "no output folder": (f"{TEXT} --output=nowhere/out.jsonl", ["nowhere/out.jsonl"]),
    "output is a folder": (f"{TEXT} --output=empty", ["empty", "folder"]),
    "no data": ("evaluate --model=teacher --data=nowhere.jsonl", ["cannot read nowhere.jsonl"]),
    "data is not JSON": ("evaluate --model=teacher --data=words.jsonl", ["words.jsonl, line 1", "input", "output"]),
    "data of deep JSON": ("evaluate --model=teacher --data=deep.jsonl", ["deep.jsonl, line 1", "not JSON"]),
    "wrong data": ("evaluate --model=teacher --data=sudoku.jsonl", ["sudoku.jsonl, line 2", "does not solve"]),
}
COLLECT, DISTILL = "collect --config=recipe.py", "distill --config=recipe.py"
RECIPES = {
    "no config": ("collect --config=nowhere.py", ["nowhere.py", "tiny"]),
    "syntax error": ("collect --config=unclosed.py", ["unclosed.py", "never closed", "line 5"]),
    "name error": ("collect --config=undefined.py", ["undefined.py", "NameError", "undefined_name"]),
    "unknown override": (f"{COLLECT} --config.sede=1", ["unknown config key config.sede", "allowed: ", "seed"]),
    "override of the wrong type": (f"{COLLECT} --config.seed=many", ["config.seed", "many", "int"]),
    "override before the file": ("collect --config.seed=1 --config=recipe.py", ["config.seed", "before"]),
    "unknown override of the default": ("collect --config.sede=1", ["config.sede", "allowed: ", "seed"]),
    "unknown override of a section": (
        f"{DISTILL} --config.distill.step=1",
        ["config.distill.step;", "allowed: ", "steps"],
    ),
    "override inside a value": (f"{DISTILL} --config.distill.steps.x=1", ["unknown config key config.distill.steps.x"]),
    "unknown variant": ("collect --config=recipe.py:fast", ["recipe.py", "fast"]),
    "unknown key": ("collect --config=unknown_key.py", ["config.collect.num_promts", "num_prompts"]),
    "missing key": ("collect --config=missing_key.py", ["config.prompt_length"]),
    "value of the wrong type": ("collect --config=wrong_type.py", ["config.collect.batch_size", "int", "'4'"]),
    "no section": ("collect --config=no_section.py", ["config.collect", "7"]),
    "unknown task in the mixture": ("collect --config=chess.py", ["unknown task 'chess'", "chain, sudoku4"]),
    "weights that are 0": ("collect --config=weightless.py", ["task weights", "not all zero", "0.0"]),
    "seed": (f"{COLLECT} --config.seed=-1", ["seed", "at least 0", "-1"]),
    "number of prompts": (f"{COLLECT} --config.collect.num_prompts=0", ["collect.num_prompts", "at least 1", "0"]),
    "learning rate": (f"{DISTILL} --config.distill.optimizer.learning_rate=-1", ["learning_rate", "positive", "-1"]),
    "optimizer": (f"{DISTILL} --config.distill.optimizer.name=sgd", ["'sgd'", "adamw or muon"]),
    "blocks": (f"{COLLECT} --config.work=new --config.block_size=7", ["gen_length 48", "multiple of block_size 7"]),
    "teacher too short": (f"{COLLECT} --config.work=new --config.gen_length=64", ["gen_length 64", "62 positions"]),
    "no teacher": (f"{COLLECT} --config.teacher=nowhere", ["no model folder at nowhere"]),
    "work is a file": (f"{COLLECT} --config.work=recipe.py/run", ["recipe.py"]),
    "work of pretrain is a file": ("pretrain --config=recipe.py --config.work=recipe.py/run", ["recipe.py"]),
}
STORES = {
    "no store": (f"{DISTILL} --config.work=new", ["new/trajectories", "not a trajectory store"]),
    "unfinished store": (f"{DISTILL} --config.work=unfinished", ["unfinished", "1 of 4 shards", "cdlm collect"]),
    "store of another model": (f"{DISTILL} --config.teacher=other", ["run/trajectories", "model_fingerprint: got"]),
    "collect for another model": (f"{COLLECT} --config.teacher=other", ["run/trajectories", "model_fingerprint: got"]),
    "store of other settings": (f"{COLLECT} --config.seed=4", ["run/trajectories", "seed: got 4, expected 5"]),
    "truncated shard": (f"{DISTILL} --config.work=damaged", ["damaged trajectory shard", "00002-of-00004"]),
    "folder of something else": (f"{COLLECT} --config.work=occupied", ["occupied/trajectories", "'notes.txt'"]),
    "fewer records than a batch": (f"{DISTILL} --config.distill.batch_size=64", ["batch_size 64", "20 records"]),
    "checkpoints of other settings": (
        f"{DISTILL} --config.distill.optimizer.learning_rate=0.5",
        ["run/distill/checkpoints", "learning_rate", "another work folder"],
    ),
}
EXPORTS = {
    "existing folder": ("export --model=teacher --output=other", ["other exists already", "new or empty folder"]),
    "unknown dtype": ("export --model=teacher --output=new --dtype=int4", ["dtype", "float32 or bfloat16", "int4"]),
    "no dtype": ("export --model=teacher --output=new --dtype=banana", ["dtype", "float32 or bfloat16", "'banana'"]),
    "output below a file": ("export --model=teacher --output=recipe.py/new", ["recipe.py"]),
}
GROUPS = {
    "flags": FLAGS,
    "models": MODELS,
    "prompts": PROMPTS,
    "options": OPTIONS,
    "files": FILES,
    "recipes": RECIPES,
    "stores": STORES,
    "exports": EXPORTS,
}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with one good model, one finished run, and everything that can be wrong with either."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        _models()
        _files()
        _configs()
        assert main(shlex.split(COLLECT)) == 0
        assert main(shlex.split(f"{DISTILL} --config.distill.steps=2")) == 0
        _runs()
    return folder


def _models() -> None:
    for seed, name in enumerate(("teacher", "other")):
        tiny_folder(seed).save(Path(name))
    for name in ("garbled", "gpt2", "truncated", "headless", "odd_size", "odd_role"):
        shutil.copytree("teacher", name)
    shutil.copytree(GOLDEN / "llada" / "model", "llada")
    Path("empty").mkdir()
    Path("garbled/config.json").write_text("{")
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    weights = Path("teacher/model.safetensors").read_bytes()
    Path("truncated/model.safetensors").write_bytes(weights[: len(weights) // 2])
    tensors = load_file("teacher/model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, "headless/model.safetensors")
    config = json.loads(Path("teacher/config.json").read_text())
    for name, odd in (("odd_size", {"gen_length": "long"}), ("odd_role", {"role": ["teacher"]})):
        Path(name, "config.json").write_text(json.dumps(config | {"cdlm": config["cdlm"] | odd}))


def _files() -> None:
    Path("words.jsonl").write_text(ROW + "1+1=\n")
    Path("deep.jsonl").write_text("[" * 200_000 + "\n")
    Path("rows.jsonl").write_text(ROW + '{"prompt_ids": [1, true]}\n')
    Path("blank.jsonl").write_text("\n\n")
    Path("late_empty.jsonl").write_text(ROW + '{"prompt": ""}\n')
    Path("late_token.jsonl").write_text(ROW + '{"prompt_ids": [1, 4000]}\n')
    wrong = SUDOKU | {"output": SUDOKU["output"].replace("4321", "4312")}
    Path("sudoku.jsonl").write_text(f"{json.dumps(SUDOKU)}\n{json.dumps(wrong)}\n")


def _configs() -> None:
    write_config(Path("recipe.py"), SETTINGS)
    write_config(Path("chess.py"), SETTINGS | {"tasks": {"chess": 1.0}})
    write_config(Path("weightless.py"), SETTINGS | {"tasks": {"chain": 0.0}})
    write_config(Path("unknown_key.py"), SETTINGS | {"collect": {"num_promts": 4}})
    write_config(Path("missing_key.py"), {key: value for key, value in SETTINGS.items() if key != "prompt_length"})
    write_config(Path("wrong_type.py"), SETTINGS | {"collect": SETTINGS["collect"] | {"batch_size": "4"}})
    write_config(Path("no_section.py"), SETTINGS | {"collect": 7})
    good = Path("recipe.py").read_text()
    Path("unclosed.py").write_text(good.replace("})", "}"))
    Path("undefined.py").write_text(good.replace("ConfigDict(", "undefined_name("))
    Path("functionless.py").write_text(good.replace("get_config", "get_settings"))


def _runs() -> None:
    for name in ("unfinished", "damaged"):
        shutil.copytree("run/trajectories", f"{name}/trajectories")
    next(Path("unfinished/trajectories").glob("*-00001-of-00004")).unlink()
    shard = next(Path("damaged/trajectories").glob("*-00002-of-00004"))
    shard.write_bytes(shard.read_bytes()[:-100])
    Path("occupied/trajectories").mkdir(parents=True)
    Path("occupied/trajectories/notes.txt").write_text("mine")


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, world, monkeypatch, capsys):
    line, expected = CASES[name]
    monkeypatch.chdir(world)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config file that was loaded before
    before = contents(world)
    status = main(shlex.split(line))
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"cdlm {line.split()[0]}: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for part in expected:
        assert part in error
    assert contents(world) == before


def test_settings_without_records_are_in_nobodys_way(world, monkeypatch, capsys):
    """Prompts turn out too long only when they are made; the settings that are right at last may use the folder."""
    monkeypatch.chdir(world)
    assert main(shlex.split(f"{COLLECT} --config.work=again --config.prompt_length=5")) == 2
    assert "10 tokens, allowed: 1 to 5" in capsys.readouterr().err
    assert main(shlex.split(f"{COLLECT} --config.work=again")) == 0
    assert contents(world / "again" / "trajectories") == contents(world / "run" / "trajectories")
    shutil.rmtree("again")


# ---- what is usable ------------------------------------------------------------------------------------------------


def test_unknown_command(capsys):
    assert main(["gemerate"]) == 2
    out, error = capsys.readouterr()
    assert error == f"cdlm: unknown command 'gemerate', allowed: {', '.join(COMMANDS)}\n" and not out


@pytest.mark.parametrize("line, status", [("", 2), ("help", 0), ("--help", 0), ("-h", 0)])
def test_usage(line, status, capsys):
    assert main(line.split()) == status
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_lm_eval_parses_its_own_arguments(capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    with pytest.raises(SystemExit, match="^0$"):
        main(["lm-eval", "--help"])
    assert "--tasks" in capsys.readouterr().out


def test_flags_may_be_written_with_hyphens(world, monkeypatch, capsys):
    """As most command lines spell them. Values keep theirs."""
    monkeypatch.chdir(world)
    line = "generate --model=llada --prompt-ids=5,6 --gen-length=8 --block-size=8 --decoder=cdlm --show-steps"
    assert main(shlex.split(line)) == 0
    assert capsys.readouterr().out.startswith("cdlm, block size 8  5 6\nforward 1")
    assert main(["export", "--model=no-such_folder", "--output=new"]) == 2
    assert "no model folder at no-such_folder" in capsys.readouterr().err


def test_overrides_come_from_the_arguments_given(world, monkeypatch, capsys):
    """Not from those of the process."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["cdlm", "collect", "--config.seed=4"])
    assert main(shlex.split(f"{COLLECT} --config.work=elsewhere --config.teacher=nowhere")) == 2
    out, error = capsys.readouterr()
    assert "collect: everything is written under elsewhere" in out and "no model folder at nowhere" in error


def test_export(world, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(world)
    assert main(["export", "--model=teacher", f"--output={tmp_path / 'half'}", "--dtype=bfloat16"]) == 0
    assert "half" in capsys.readouterr().out
    assert load_model(tmp_path / "half").embed[...].dtype == "bfloat16"
    assert main(["export", f"--model={tmp_path / 'half'}", f"--output={tmp_path / 'same'}"]) == 0
    assert contents(tmp_path / "same") == contents(tmp_path / "half")


def test_interruption(world, monkeypatch, capsys):
    def interrupt(folder, dtype):
        raise KeyboardInterrupt

    monkeypatch.chdir(world)
    monkeypatch.setattr("cdlm_jax.models.model_folder.load_model", interrupt)
    assert main(shlex.split(TEXT)) == 130
    assert capsys.readouterr().err.startswith("cdlm generate: interrupted")


def test_the_real_streams(world):
    """One process of its own: libraries add nothing to what is printed."""
    line = [sys.executable, "-m", "cdlm_jax", *shlex.split(RECIPES["unknown task in the mixture"][0])]
    done = subprocess.run(line, cwd=world, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert done.stdout == "collect: everything is written under run\n"
    assert done.stderr.startswith("cdlm collect: unknown task 'chess'") and done.stderr.count("\n") == 1
