"""Decoders: `<name>.generate(model, prompts, prompt_lengths, config, key=None) -> DecodeResult`."""

from cdlm_jax.decoding import autoregressive, cdlm, dllm_cache, dream, fast_dllm, naive

__all__ = ["autoregressive", "cdlm", "dllm_cache", "dream", "fast_dllm", "naive"]
