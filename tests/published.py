"""The published models, as their config.json files give them."""

from cdlm_jax.config import ModelConfig

DREAM = ModelConfig(
    family="dream",
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    mlp_size=18944,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    logit_alignment="shifted",
    mask_token_id=151666,
    eos_token_id=151643,
    pad_token_id=151643,
    max_length=131072,
)
LLADA = ModelConfig(
    family="llada",
    vocab_size=126464,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    mlp_size=12288,
    rope_theta=5e5,
    norm_eps=1e-5,
    logit_alignment="same_position",
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
    max_length=4096,
)
