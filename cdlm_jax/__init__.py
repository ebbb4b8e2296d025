"""CDLM (Consistency Diffusion Language Models, arXiv 2511.19269) in JAX.

import cdlm_jax
from cdlm_jax.decoding import cdlm

model = cdlm_jax.load_model("path/to/student")
result = cdlm.generate(model, prompts, prompt_lengths, cdlm.Config(gen_length=256, block_size=32))
"""

from cdlm_jax import platforms  # noqa: F401  before anything imports JAX
from cdlm_jax.models.hf import export_hf, load_model
from cdlm_jax.visibility import visible_end

__all__ = ["export_hf", "load_model", "visible_end"]
