"""The tiny recipe: six tasks in one character model of 1.2 M parameters, on two CPU cores.

The shipped teacher (cdlm_jax/pretrained/tiny_teacher) was trained by

    cdlm pretrain --config=tiny              # 7,500 steps of 64, about 0.35 s each: 45 minutes
    cdlm pretrain --config=tiny:finish       # 3,200 more, heavier on what was still weak: 19 minutes
    cdlm pretrain --config=tiny:uniform      # 4,000 more, every masked token of equal weight
    cdlm pretrain --config=tiny:arithmetic   # 4,000 more, where a short answer counts as much as a long one

on 2 cores of an AMD EPYC, float32, JAX 0.10.2 (spell_backward and chain_sum: `pip install -e '.[reasoning]'`).
chain_sum was at 41, 45 and 95 % after the last three, countdown3 at 6, 11 and 27 % (docs/method.md says why). Held-out
accuracy in the end, one token per step, 128 problems each: chain, sudoku4 and spell_backward 100 %, sort 98 %,
chain_sum 95 %, countdown3 27 %, and still rising.

Students of it:

    cdlm collect --config=tiny             # 5 minutes
    cdlm distill --config=tiny             # 12 minutes
    cdlm quickstart                                   # the variant `quick`: two tasks, in about 5 minutes

or, with every block of a trajectory trained at once (docs/packed.md measures it on the variant `quick`),

    cdlm distill --config=tiny --config.distill.mode=packed --config.distill.consistency_scope=same_block

The shipped student (`shipped/student`) is that of `collect` and the first `distill`; docs/benchmarks.md measures it.
`quick` chooses no preset, to be done sooner: --config.distill.preset_problems=128 does.
The causal model to compare with (`shipped/autoregressive`) had 4,000 steps of next-token prediction on the same mixture
(35 min):

    cdlm pretrain --config=tiny:autoregressive

Its held-out accuracy, 512 problems each: chain 100 %, spell_backward 100 %, sort 94 %, chain_sum 92 %, sudoku4 88 %,
countdown3 60 %.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    config = ConfigDict()
    config.work = "runs/tiny"
    config.seed = 0
    config.tasks = {
        "chain": 2.0,
        "sudoku4": 2.0,
        "sort": 1.0,
        "countdown3": 2.5,
        "spell_backward": 0.7,
        "chain_sum": 0.8,
    }
    config.prompt_length = 23
    config.gen_length = 48
    config.block_size = 16
    config.teacher = "shipped"
    config.init = ""
    config.heldout_per_task = 128
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.model = {
        "hidden_size": 128,
        "num_layers": 6,
        "num_heads": 4,
        "num_kv_heads": 4,
        "mlp_size": 336,
        "rope_theta": 100.0,
        "norm_eps": 1e-5,
    }
    config.pretrain = {
        "objective": "masked_denoising",
        "steps": 7500,
        "batch_size": 64,
        "ema_decay": 0.995,
        "filler_weight": 1.0,
        "checkpoint_every": 500,
        "keep_checkpoints": 2,
        "keep_every": 0,
        "evaluate_every": 0,
        "log_every": 20,
        "optimizer": {
            "name": "muon",
            "learning_rate": 1e-2,
            "adam_ratio": 0.3,
            "warmup_fraction": 0.02,
            "weight_decay": 0.0,
        },
        "noise": {"curriculum": 0.2, "first_t_max": 0.3, "min_t": 0.02, "weighting": "likelihood"},
    }
    config.collect = {"num_prompts": 3072, "temperatures": (0.0, 0.5), "batch_size": 64, "shard_size": 512}
    config.distill = {
        "steps": 1200,
        "batch_size": 48,
        "accumulate": 1,
        "checkpoint_every": 100,
        "keep_checkpoints": 2,
        "keep_every": 0,
        "evaluate_every": 0,
        "log_every": 10,
        "mode": "plain",
        "teacher": "offline",
        "consistency_scope": "later_blocks",
        "weights": {"distill": 1.0, "consistency": 0.5, "dlm": 0.1},
        "lora_rank": 0,
        "lora_alpha": 32.0,
        "ema_decay": 0.98,
        "preset_problems": 512,
        "optimizer": {
            "name": "muon",
            "learning_rate": 5e-3,
            "adam_ratio": 0.3,
            "warmup_fraction": 0.05,
            "weight_decay": 0.0,
        },
    }
    if variant == "finish":
        config.work = "runs/tiny/finish"
        config.init = "runs/tiny/teacher"
        config.tasks.update(chain=1.5, sudoku4=0.7, sort=2.5, countdown3=1.8, spell_backward=0.3, chain_sum=1.6)
        config.pretrain.update(steps=3200)
        config.pretrain.optimizer.learning_rate = 6e-3
        config.pretrain.noise.first_t_max = 1.0
    elif variant == "uniform":
        config.work = "runs/tiny/uniform"
        config.init = "runs/tiny/finish/teacher"
        config.tasks.update(chain=0.8, sudoku4=0.8, sort=1.2, countdown3=3.0, spell_backward=0.3, chain_sum=1.6)
        config.pretrain.update(steps=4000)
        config.pretrain.noise.update(first_t_max=1.0, weighting="uniform")
    elif variant == "arithmetic":
        config.work = "runs/tiny/arithmetic"
        config.init = "runs/tiny/uniform/teacher"
        config.tasks.update(chain=0.8, sudoku4=0.8, sort=1.2, countdown3=2.5, spell_backward=0.4, chain_sum=1.5)
        config.pretrain.update(steps=4000, filler_weight=0.02)
        config.pretrain.noise.update(first_t_max=1.0, weighting="uniform")
    elif variant == "autoregressive":
        config.work = "runs/tiny/autoregressive"
        config.pretrain.update(objective="autoregressive", steps=4000)
    elif variant == "quick":
        config.work = "runs/quickstart"
        config.tasks = {"chain": 2.0, "sudoku4": 1.0}
        config.heldout_per_task = 128
        config.collect.update(num_prompts=960, shard_size=256)
        config.distill.update(steps=320, batch_size=32, checkpoint_every=80, preset_problems=0)
    elif variant != "full":
        raise ValueError(
            f"configs/tiny.py:{variant} is unknown, allowed: full, finish, uniform, arithmetic, autoregressive, quick"
        )
    return config
