"""A model folder: weights and config.json in Hugging Face form, its tokenizer, and what the recipe says about it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from cdlm_jax.config import InputError
from cdlm_jax.mesh.distributed import barrier, is_main
from cdlm_jax.models.hf import export_hf, load_model, read_metadata
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.text.tokenizers import Tokenizer, has_tokenizer

# The tiny models in the package (configs/tiny.py says how they were made).
SHIPPED = {
    "shipped": "tiny_teacher",
    "shipped/student": "tiny_student",
    "shipped/autoregressive": "tiny_autoregressive",
}
PRETRAINED = Path(__file__).parent.parent / "pretrained"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """metadata: the `cdlm` entry of config.json ({} for folders made elsewhere): role, prompt_length, gen_length,
    block_size, tasks, and whatever a stage adds."""

    model: Transformer
    tokenizer: Tokenizer | None
    metadata: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path, *, dtype=None) -> "ModelFolder":
        """A folder, or a name of SHIPPED. dtype: of the parameters; None is as stored (SHIPPED: float32).

        InputError names what is wrong with a folder."""
        shipped = SHIPPED.get(str(folder))
        folder = PRETRAINED / shipped if shipped else Path(folder)
        if not folder.is_dir():
            raise InputError(f"no model folder at {folder}; in the package are {', '.join(SHIPPED)}")
        model = load_model(folder, dtype=dtype or ("float32" if shipped else None))
        tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
        return cls(model, tokenizer, read_metadata(folder))

    def save(self, folder: str | Path, *, dtype=None, replace: bool = False) -> None:
        """Write the folder, whole or not at all. `replace` allows it to take the place of one that a recipe wrote;
        any other content is refused. dtype: float32 or bfloat16, None as the parameters are. Of several processes all
        take part, and the first one writes."""
        folder = Path(folder).resolve()
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        ours = replace and (folder / "config.json").exists() and read_metadata(folder)
        if occupied and not ours:
            raise InputError(f"{folder} exists already; write to a new or empty folder")
        new, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
        barrier("the folder may be written")  # all have looked at it
        if is_main():
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier("the folder is empty")
        export_hf(self.model, new, dtype=dtype, metadata=self.metadata or None)
        if is_main():
            if self.tokenizer is not None:
                self.tokenizer.save(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        barrier("the folder is written")

    def encoder(self, prompt_length: int, gen_length: int) -> Encoder:
        """For texts; InputError if the folder has no tokenizer."""
        if self.tokenizer is None:
            raise InputError("this model folder has no tokenizer; give token ids instead of text")
        if prompt_length + gen_length > self.model.config.max_length:
            sizes = f"prompt_length {prompt_length} + gen_length {gen_length}"
            raise InputError(f"{sizes} exceeds the model's {self.model.config.max_length} positions")
        return Encoder(self.tokenizer, self.model.config, prompt_length, gen_length)
