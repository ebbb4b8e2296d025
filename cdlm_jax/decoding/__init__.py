"""Decoders: `<name>.generate(model, prompts, prompt_lengths, config, key=None) -> DecodeResult`."""
