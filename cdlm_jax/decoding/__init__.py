"""Decoders: `<name>.generate(model, prompts, prompt_lengths, config, key=None) -> DecodeResult`."""

from cdlm_jax.decoding import cdlm, naive

__all__ = ["cdlm", "naive"]
