"""CDLM (Consistency Diffusion Language Models, arXiv 2511.19269) in JAX.

import cdlm_jax
from cdlm_jax.decoding import cdlm

model = cdlm_jax.load_model("path/to/student")
result = cdlm.generate(model, prompts, prompt_lengths, cdlm.Config(gen_length=256, block_size=32))
"""

import importlib
from typing import TYPE_CHECKING

from cdlm_jax.mesh import platforms  # noqa: F401  before anything imports JAX

if TYPE_CHECKING:
    from cdlm_jax.models.hf import export_hf, load_model
    from cdlm_jax.models.model_folder import ModelFolder
    from cdlm_jax.visibility import visible_end

__version__ = "0.1.0"
__all__ = ["ModelFolder", "export_hf", "load_model", "visible_end"]

_HOME = {
    "ModelFolder": "models.model_folder",
    "export_hf": "models.hf",
    "load_model": "models.hf",
    "visible_end": "visibility",
}


def __getattr__(name: str):
    """The public names, imported where they are first used: `cdlm --help` need not wait for JAX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(globals() | _HOME)
