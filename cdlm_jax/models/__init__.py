"""The Transformer, its exact block cache, LoRA adapters, and Hugging Face checkpoints."""
