"""The smallest model that has everything: two layers, grouped heads, ids for mask and EOS."""

from cdlm_jax.config import ModelConfig

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=24,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    mask_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    max_length=64,
)
