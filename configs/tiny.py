"""The tiny recipe."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.tasks = ConfigDict(
        {"chain": 2.0, "sudoku4": 2.0, "sort": 1.0, "countdown3": 2.5, "spell_backward": 0.7, "chain_sum": 0.8}
    )
    config.prompt_length = 23
    config.gen_length = 48
    config.block_size = 16
    config.model = ConfigDict(
        dict(hidden_size=128, num_layers=6, num_heads=4, num_kv_heads=4, mlp_size=336, rope_theta=100.0, norm_eps=1e-5)
    )
    config.pretrain = ConfigDict(dict(steps=7500, batch_size=64, ema_decay=0.995, checkpoint_every=500))
    config.pretrain.optimizer = ConfigDict(dict(name="muon", learning_rate=1e-2, adam_ratio=0.3, warmup_fraction=0.02, weight_decay=0.0))
    config.pretrain.noise = ConfigDict(dict(curriculum=0.2, first_t_max=0.3, min_t=0.02))
    return config
