"""The benchmark table on the models shipped in the package: every decoder, all six tiny tasks (docs/benchmarks.md).

cdlm benchmark                                                 # this file; pip install -e '.[reasoning]' first
cdlm benchmark --config=benchmark:quick             # 64 problems per task, two tasks
cdlm benchmark --config=benchmark --data=dream_sudoku_4x4_4.jsonl,dream_cd3_test.jsonl
"""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    config = ConfigDict()
    config.work = "runs/benchmark"
    config.seed = 0
    config.teacher = "shipped"
    config.student = "shipped/student"
    config.autoregressive = "shipped/autoregressive"
    config.methods = ("naive", "truncated", "dream", "dllm_cache", "fast_dllm", "autoregressive", "untrained", "cdlm")
    config.tasks = ("chain", "sudoku4", "sort", "countdown3", "spell_backward", "chain_sum")
    config.per_task = 512
    config.data = ()
    config.allow_code_execution = False
    config.gen_length = 0
    config.block_size = 0
    config.thresholds = (1.0, 0.995, 0.99, 0.95, 0.9, 0.7, 0.5)
    config.headline_threshold = 0.0  # the student's preset
    config.caches = ("none", "prefix", "dual")
    config.steps = (24, 12, 6, 3)
    config.prompt_interval = 50
    config.response_interval = 7
    config.batch_sizes = (1, 2, 4, 8, 16)
    config.repetitions = 5
    config.latency_problems = 16
    config.batch_size = 64
    if variant == "quick":
        config.tasks = ("chain", "sudoku4")
        config.per_task = 64
        config.thresholds = (0.9,)
        config.headline_threshold = 0.9
    elif variant != "full":
        raise ValueError(f"configs/benchmark.py:{variant} is unknown, allowed: full, quick")
    return config
