"""What the paper's two students have in common: `configs/dream_7b.py` and `configs/llada_8b.py` start from it."""

from ml_collections import ConfigDict


def published_recipe(prompts: int) -> ConfigDict:
    """The recipe for a teacher of 7-8B parameters and so many prompts; `work`, `teacher`, `architecture` are missing.

    Two trajectories per prompt (temperatures 0 and 0.5), 16 epochs of them in updates of 64 rows. The paper leaves open
    rank, learning rate and schedule: those are this project's (docs/method.md).
    """
    config = ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.tasks = {}
    config.prompts = "data/prompts.jsonl"
    config.stores = ()
    config.store_weights = ()
    config.prompt_length = 512
    config.gen_length = 256
    config.block_size = 32
    config.heldout_per_task = 0
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.collect = {"num_prompts": prompts, "temperatures": (0.0, 0.5), "batch_size": 64, "shard_size": 256}
    config.distill = {
        "steps": 16 * 2 * prompts // 64,
        "batch_size": 64,
        "accumulate": 1,
        "checkpoint_every": 250,
        "keep_checkpoints": 2,
        "keep_every": 0,
        "evaluate_every": 0,
        "log_every": 10,
        "mode": "plain",
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
