"""Model folders: what is saved is loaded, foreign content is safe, and a save that dies anywhere loses nothing."""

import contextlib
import itertools
import shutil
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from flax import nnx

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.text.tokenizers import Tokenizer

PROMPT_LENGTH, GEN_LENGTH, BLOCK_SIZE = 14, 48, 16


def tiny_folder(seed: int = 0, role: str = "teacher") -> ModelFolder:
    """A character model of random weights, as a stage of the recipe would save it."""
    tokenizer = Tokenizer.characters(tasks.CHARACTERS)
    eos = tokenizer.token_to_id("<eos>")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        mlp_size=48,
        rope_theta=100.0,
        norm_eps=1e-5,
        mask_token_id=tokenizer.token_to_id("<mask>"),
        eos_token_id=eos,
        pad_token_id=eos,
        max_length=PROMPT_LENGTH + GEN_LENGTH,
    )
    sizes = {"prompt_length": PROMPT_LENGTH, "gen_length": GEN_LENGTH, "block_size": BLOCK_SIZE}
    return ModelFolder(Transformer(config, rngs=nnx.Rngs(seed)), tokenizer, {"role": role, "tasks": ["chain"], **sizes})


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under the folder with its bytes, and every folder (None)."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def saved(model_folder: ModelFolder, folder: Path) -> dict[str, bytes | None]:
    model_folder.save(folder, replace=True)
    return contents(folder)


def test_round_trip(tmp_path):
    model_folder = tiny_folder()
    model_folder.save(tmp_path / "model")
    again = ModelFolder.load(tmp_path / "model")
    assert again.metadata == model_folder.metadata
    assert again.tokenizer.fingerprint() == model_folder.tokenizer.fingerprint()
    for got, expected in zip(jax.tree.leaves(again.model), jax.tree.leaves(model_folder.model), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_folder_of_the_recipe_is_replaced_whole(tmp_path):
    saved(tiny_folder(0), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("left by an earlier run")
    assert saved(tiny_folder(1), tmp_path / "model") == saved(tiny_folder(1), tmp_path / "fresh")


@pytest.mark.parametrize("name, text", [("notes.txt", "mine"), ("config.json", '{"model_type": "llada"}')])
def test_other_content_is_refused_and_kept(tmp_path, name, text):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(InputError, match="model exists already"):
        tiny_folder().save(tmp_path / "model", replace=True)
    assert contents(tmp_path) == {"model": None, f"model/{name}": text.encode()}


def test_a_folder_of_the_recipe_is_kept_unless_asked(tmp_path):
    before = saved(tiny_folder(0), tmp_path / "model")
    with pytest.raises(InputError, match="model exists already"):
        tiny_folder(1).save(tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_a_folder_without_tokenizer_serves_token_ids_only():
    model_folder = ModelFolder.load(GOLDEN / "llada" / "model")
    assert model_folder.tokenizer is None and model_folder.metadata == {}
    with pytest.raises(InputError, match="no tokenizer; give token ids"):
        model_folder.encoder(PROMPT_LENGTH, GEN_LENGTH)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no model folder at .*nowhere"):
        ModelFolder.load(tmp_path / "nowhere")


# ---- saves that die ------------------------------------------------------------------------------------------------


class Death(BaseException):
    """Stands for SIGKILL: from some file operation on, this thread does no more of them, not even to clean up."""


class _Reaper:
    """Python announces every file operation to its audit hooks; one that raises prevents the operation."""

    operations = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})

    def __init__(self):
        self.left, self.thread = None, None
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.left is not None and event in self.operations and threading.get_ident() == self.thread:
            if self.left == 0:
                raise Death
            self.left -= 1

    @contextlib.contextmanager
    def after(self, operations: int):
        self.thread, self.left = threading.get_ident(), operations
        try:
            yield
        finally:
            self.left = None


@pytest.fixture(scope="module")
def reaper():
    return _Reaper()


def test_a_save_may_die_at_any_file_operation(tmp_path, reaper):
    """What is left is the old folder, the new one, or none; the next save succeeds and leaves nothing else behind."""
    old, new = tiny_folder(0), tiny_folder(1)
    before, after = saved(old, tmp_path / "old"), saved(new, tmp_path / "new")
    work, deaths = tmp_path / "work", 0
    for operations in itertools.count():
        shutil.copytree(tmp_path / "old", work / "model")
        try:
            with reaper.after(operations):
                new.save(work / "model", replace=True)
        except Death:
            deaths += 1
        else:
            break
        assert contents(work / "model") in (before, after, {}), f"half a folder after {operations} operations"
        assert saved(new, work / "model") == after
        assert [path.name for path in work.iterdir()] == ["model"], f"leftovers after {operations} operations"
        shutil.rmtree(work)
    assert contents(work / "model") == after
    assert deaths > 10
