"""Mutated model folders: each is refused in one line or loads harmlessly; none hangs, none raises anything else."""

import json
import random
import shutil
from pathlib import Path

import pytest
from hostile import KINDS, put, time_limit
from test_model_folder import tiny_folder
from test_tokenizers import CONFIG, bpe_folder

from cdlm_jax.config import InputError
from cdlm_jax.models.model_folder import ModelFolder

ROUNDS = 12
ODD = [None, True, -1, 0, 7, 2**31, 10**12, 10**400, 0.5, float("nan"), float("inf"), "", "x" * 10**5, [], [[]], {}]
HANGING = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
BYTES = {
    "empty": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "a byte": lambda data, rng: _with_byte(data, rng.randrange(min(len(data), 4096)), rng.randrange(256)),
    "noise": lambda data, rng: rng.randbytes(1000),
    "nested": lambda data, rng: b'{"a":' + b"[" * 10**6,
    "length": lambda data, rng: rng.randbytes(8) + data[8:],
}


def _with_byte(data: bytes, place: int, byte: int) -> bytes:
    return data[:place] + bytes([byte]) + data[place + 1 :]


def _odd_value(data: bytes, rng: random.Random) -> bytes:
    """One value, at any depth of a JSON object, is gone or another."""
    value = json.loads(data)
    inner = value
    while True:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        key = rng.choice(keys)
        if not (isinstance(inner[key], dict | list) and inner[key]) or rng.random() < 0.3:
            break
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(ODD)
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """One with tokenizer.json, one with vocab.json and merges.txt, both with a template and an index beside weights."""
    folders = [tmp_path_factory.mktemp("folders") / name for name in ("json", "bpe")]
    for folder in folders:
        tiny_folder().save(folder)
    (folders[0] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folders[1] / "tokenizer.json").unlink()
    bpe_folder(folders[1], CONFIG)
    weights = folders[1] / "model.safetensors"
    size = int.from_bytes(weights.read_bytes()[:8], "little")
    names = json.loads(weights.read_bytes()[8 : 8 + size]).keys() - {"__metadata__"}
    weights.rename(folders[1] / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(sorted(names), "model-00001-of-00001.safetensors")}
    (folders[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    return folders


def load(folder: Path) -> None:
    """As `generate` does, up to the prompt's token ids. An InputError of one line is an answer, too."""
    with time_limit(60):
        try:
            loaded = ModelFolder.load(folder)
            if (tokenizer := loaded.tokenizer) is not None:
                text = "1+1=" if tokenizer.chat_template is None else None
                messages = [{"role": "user", "content": "1+1="}]
                tokenizer.encode(text or tokenizer.apply_chat_template(messages))
        except InputError as error:
            assert "\n" not in str(error)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(folders, tmp_path, kind):
    for number, source in enumerate(folders):
        for name in names(source):
            folder = tmp_path / f"{number} {name}"
            shutil.copytree(source, folder)
            put(kind, folder / name)
            with time_limit(), pytest.raises(InputError, match=f"{name}.*: it is {KINDS[kind]}; only regular files"):
                ModelFolder.load(folder)


def test_a_template_that_hangs_is_refused(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "folder")
    (tmp_path / "folder" / "chat_template.jinja").write_text(HANGING)
    load(tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_mutated_folders(folders, tmp_path, seed):
    """About ten mutations each time: every file of both folders, each in a way of its own."""
    for number, source in enumerate(folders):
        for name in names(source):
            rng = random.Random(f"{seed} {number} {name}")
            folder = tmp_path / f"{number} {name}"
            shutil.copytree(source, folder)
            data = (folder / name).read_bytes()
            odd = name.endswith(".json") and rng.random() < 0.7
            mutate = _odd_value if odd else rng.choice(list(BYTES.values()))
            (folder / name).write_bytes(mutate(data, rng))
            load(folder)
            shutil.rmtree(folder)
