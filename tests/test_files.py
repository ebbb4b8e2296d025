"""Only regular files are opened, in every place that opens a path of a user's."""

import gzip
import json
import re
import shutil

import pytest
from hostile import KINDS, put, time_limit
from test_store import METADATA, write_missing
from tiny import TINY

from cdlm_jax import files, tasks
from cdlm_jax.commands import parsing
from cdlm_jax.commands.configs import define_config
from cdlm_jax.config import InputError
from cdlm_jax.evaluation import prompts
from cdlm_jax.files import check_regular, check_tree, read_bytes, read_text
from cdlm_jax.tasks import public, real_data
from cdlm_jax.tasks.mixture import PromptFile
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.training.checkpoints import Checkpoints
from cdlm_jax.training.metrics_log import MetricsLog
from cdlm_jax.trajectories.store import Store, read

LETTERS = Tokenizer.characters("ab")


def command_line(path):
    parsing.parse("collect", lambda values: define_config(values, "tiny"), [f"--config={path}"])


# Whatever opens a file that a user names.
READERS = {
    "bytes": read_bytes,
    "text": read_text,
    "a library's file": check_regular,
    "prompts to answer": lambda path: prompts.file_items(prompts.Reader(LETTERS), TINY, path, 1),
    "prompts to collect": lambda path: PromptFile(path, LETTERS, 8, seed=0),
    "puzzles": real_data.load,
    "a benchmark": public.read_rows,
    **{name: lambda path, name=name: tasks.benchmark_named(name).problems(path) for name in tasks.BENCHMARKS},
    "metrics": lambda path: MetricsLog(path.parent, 0, lambda step: True, None),
}


def refuses(reader, path, message: str) -> None:
    with time_limit(), pytest.raises(InputError, match=re.escape(message)) as error:
        reader(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_opened(tmp_path, reader, kind):
    path = tmp_path / "metrics.jsonl"
    put(kind, path)
    message = f"cannot read {path}: it is {KINDS[kind]}; only regular files, and links to them, are read"
    refuses(READERS[reader], path, message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_file_is_a_file(tmp_path, kind):
    put(kind, tmp_path / "config.py")
    refuses(command_line, tmp_path / "config.py", f"{tmp_path / 'config.py'}")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_missing(Store.create_or_resume(folder, METADATA))
    return folder


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["store.json", "features.json", "dataset_info.json", "trajectories-train*-00002-of*"])
def test_a_store_s_files_are_files(store, tmp_path, name, kind):
    shutil.copytree(store, tmp_path / "store")
    (path,) = (tmp_path / "store").glob(name)
    put(kind, path)
    for opens in (read, lambda folder: Store.create_or_resume(folder, METADATA)):
        refuses(opens, tmp_path / "store", f"cannot read {path}: it is {KINDS[kind]}")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe"])
def test_a_checkpoint_s_files_are_files(tmp_path, kind):
    (tmp_path / "4" / "state").mkdir(parents=True)
    path = tmp_path / "4" / "state" / "_METADATA"
    put(kind, path)
    refuses(lambda folder: Checkpoints(folder, {}), tmp_path, "it is a named pipe")


def test_links_and_plain_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes("é\r\n".encode())
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_text(tmp_path / name) == read_text(str(tmp_path / name)) == "é\r\n"
    check_tree(tmp_path)
    check_tree(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, message", [("no", "No such file"), ("loop", "Too many levels"), ("a\0b", "null byte"), ("f/x", "Not a dir")]
)
def test_what_cannot_be_opened(tmp_path, name, message):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "f").touch()
    for reader in (read_bytes, check_regular):
        refuses(reader, tmp_path / name, message)


def test_the_size_of_a_text_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"\xff" * 9)
    refuses(lambda path: read_bytes(path, 8), path, f"cannot read {path}: it has more than 8 bytes")
    refuses(read_text, path, "not UTF-8 text")
    assert read_bytes(path, 9) == b"\xff" * 9
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(json.dumps({"a": "b" * 10_000}).encode()))
    assert len(public.read_rows(bomb)) == 1
    assert files.MAX_DATA == public.MAX_DATA
    monkeypatch.setattr(public, "MAX_DATA", 1000)
    refuses(public.read_rows, bomb, "unpacked it has more than 1,000 bytes")
    bomb.write_bytes(bomb.read_bytes()[:-20] + b"x" * 20)
    refuses(public.read_rows, bomb, "cannot read")
