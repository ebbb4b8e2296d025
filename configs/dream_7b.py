"""PLACEHOLDER"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.work = "runs/dream_7b"
    config.seed = 0
    config.teacher = "models/Dream-v0-Instruct-7B"
    config.dtype = "bfloat16"
    config.tasks = {}
    config.prompts = "data/prompts.jsonl"
    config.prompt_length = 512
    config.gen_length = 256
    config.block_size = 32
    config.heldout_per_task = 0
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.architecture = {
        "family": "dream",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "mlp_size": 18944,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "qkv_bias": True,
        "logit_alignment": "shifted",
        "mask_token_id": 151666,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
        "max_length": 131072,
    }
    config.collect = {"num_prompts": 7500, "temperatures": (0.0, 0.5), "batch_size": 64, "shard_size": 256}
    config.distill = {
        "steps": 3750,  # 16 epochs of 15,000 trajectories
        "batch_size": 64,
        "accumulate": 1,
        "checkpoint_every": 250,
        "evaluate_every": 0,
        "log_every": 10,
        "teacher": "offline",
        "consistency_scope": "later_blocks",
        "weights": {"distill": 1.0, "consistency": 0.5, "dlm": 0.01},
        "lora_rank": 32,
        "lora_alpha": 32.0,
        "remat": True,
        "ema_decay": 0.0,
        "optimizer": {
            "name": "adamw",
            "learning_rate": 2e-5,
            "warmup_fraction": 0.05,
            "weight_decay": 0.01,
            "b1": 0.9,
            "b2": 0.95,
            "clip": 1.0,
        },
    }
    return config
