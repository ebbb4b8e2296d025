"""PLACEHOLDER"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.work = "runs/llada_8b"
    config.seed = 0
    config.teacher = "models/LLaDA-8B-Instruct"
    config.dtype = "bfloat16"
    config.tasks = {}
    config.prompts = "data/prompts.jsonl"
    config.prompt_length = 512
    config.gen_length = 256
    config.block_size = 32
    config.heldout_per_task = 0
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.architecture = {
        "family": "llada",
        "vocab_size": 126464,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "mlp_size": 12288,
        "rope_theta": 5e5,
        "norm_eps": 1e-5,
        "qkv_bias": False,
        "logit_alignment": "same_position",
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
        "max_length": 4096,
    }
    config.collect = {"num_prompts": 15000, "temperatures": (0.0, 0.5), "batch_size": 64, "shard_size": 256}
    config.distill = {
        "steps": 7500,  # 16 epochs of 30,000 trajectories
        "batch_size": 64,
        "accumulate": 1,
        "checkpoint_every": 250,
        "evaluate_every": 0,
        "log_every": 10,
        "teacher": "offline",
        "consistency_scope": "later_blocks",
        "weights": {"distill": 1.0, "consistency": 0.5, "dlm": 0.1},
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
