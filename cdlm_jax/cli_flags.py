"""The flags of every command."""

from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags


def _config(name: str, variant: str = "full") -> Callable[[flags.FlagValues], None]:
    def define(values: flags.FlagValues) -> None:
        path = f"{_config_path(name)}:{variant}".rstrip(":")
        config_flags.DEFINE_config_file("config", path, "Recipe to run.", flag_values=values)

    return define


def stage(values: flags.FlagValues) -> None:
    _config("tiny.py")(values)
    _processes(values)


def training(values: flags.FlagValues) -> None:
    stage(values)
    flags.DEFINE_bool("profile", False, "Write an XProf trace of 3 steps under the work folder.", flag_values=values)


def _processes(values: flags.FlagValues) -> None:
    cluster = "Join the processes of Cloud TPU, Slurm, Open MPI or Kubernetes."
    flags.DEFINE_bool("distributed", False, cluster, flag_values=values)
    flags.DEFINE_string("coordinator", None, "Or these three: host:port of process 0,", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "their number,", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "and which one this is.", lower_bound=0, flag_values=values)


def _config_path(name: str) -> str:
    """A recipe of this project: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).parent
    inside, beside = package / "configs" / name, package.parent / "configs" / name
    return str(inside if inside.exists() else beside)


def quickstart(values: flags.FlagValues) -> None:
    _config("tiny.py", "quick")(values)
    flags.DEFINE_bool("from_scratch", False, "Train the teacher too.", flag_values=values)


def _model(values: flags.FlagValues) -> None:
    _processes(values)
    text, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    shipped = "in the package: shipped (the teacher), shipped/student, shipped/autoregressive"
    text("model", "shipped", f"Model folder; {shipped}.", flag_values=values)
    text("decoder", None, "cdlm, naive, dream, fast_dllm, dllm_cache or autoregressive.", flag_values=values)
    number("gen_length", None, "Response tokens.", lower_bound=1, flag_values=values)
    number("block_size", None, "Tokens per block.", lower_bound=1, flag_values=values)
    real("threshold", None, "Finalize every token surer than this.", flag_values=values)
    number("steps", None, "Forwards in all (naive, dream, fast_dllm, dllm_cache).", lower_bound=1, flag_values=values)
    real("factor", None, "Fast-dLLM's factor rule.", flag_values=values)
    text("cache", None, "Of fast_dllm: none, prefix or dual.", flag_values=values)
    text("remasking", None, "Of naive: low_confidence or random.", flag_values=values)
    real("cfg_scale", None, "Of naive: classifier-free guidance.", flag_values=values)
    text("algorithm", None, "Of dream: origin, maskgit_plus, topk_margin or entropy.", flag_values=values)
    real("alg_temp", None, "Of dream: above 0, positions are drawn.", flag_values=values)
    number("prompt_interval", None, "Of dllm_cache: K_p.", lower_bound=1, flag_values=values)
    number("response_interval", None, "Of dllm_cache: K_r.", lower_bound=1, flag_values=values)
    real("update_ratio", None, "Of dllm_cache: rho.", flag_values=values)
    real("temperature", 0.0, "0 is greedy.", flag_values=values)
    real("top_p", None, "Of dream and autoregressive: nucleus sampling.", flag_values=values)
    number("top_k", None, "Of dream and autoregressive: the k most probable.", lower_bound=1, flag_values=values)
    number("seed", 0, "Of sampling.", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    number("batch_size", 16, "Prompts decoded together.", lower_bound=1, flag_values=values)
    text("mesh", None, "data x fsdp x tensor of the devices, such as 1x4x2 [1x-1x1: fsdp].", flag_values=values)
    text("dtype", None, "float32 or bfloat16 [as stored].", flag_values=values)


def generate(values: flags.FlagValues) -> None:
    _model(values)
    flags.DEFINE_string("prompt", None, "Text to answer.", flag_values=values)
    flags.DEFINE_list("prompt_ids", None, "Token ids to answer, comma-separated.", flag_values=values)
    flags.DEFINE_string("task", None, "Answer held-out problems of this task.", flag_values=values)
    flags.DEFINE_integer("num", 4, "How many problems of --task.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("input", None, 'JSON lines: {"prompt": text} or {"prompt_ids": [...]}.', flag_values=values)
    flags.DEFINE_string("output", None, "Write answers here as JSON lines.", flag_values=values)
    flags.DEFINE_bool("chat", True, "Use the folder's chat template for text, if it has one.", flag_values=values)
    flags.DEFINE_bool("show_steps", False, "Play the refinement of each answer.", flag_values=values)


def evaluate(values: flags.FlagValues) -> None:
    _model(values)
    flags.DEFINE_list("task", None, "Tasks and public benchmarks (gsm8k ...), comma-separated.", flag_values=values)
    number = flags.DEFINE_integer
    number("num", None, "Problems of each [512 of a task, all of a benchmark].", lower_bound=1, flag_values=values)
    data = "Files: 4x4 Sudoku, Countdown-3, or name=path of a benchmark; comma-separated."
    flags.DEFINE_list("data", None, data, flag_values=values)
    flags.DEFINE_bool("chat", True, "Use the folder's chat template for benchmarks, if it has one.", flag_values=values)
    _code(values)


def _code(values: flags.FlagValues) -> None:
    text = "Run the programs that the model writes for humaneval and mbpp, in a sandbox."
    flags.DEFINE_bool("allow_code_execution", False, text, flag_values=values)


def benchmark(values: flags.FlagValues) -> None:
    _config("benchmark.py")(values)
    flags.DEFINE_list("methods", None, "In place of config.methods, comma-separated.", flag_values=values)
    flags.DEFINE_list("task", None, "In place of config.tasks, comma-separated.", flag_values=values)
    flags.DEFINE_list("data", None, "In place of config.data: files of real problems.", flag_values=values)
    _code(values)


def plan(values: flags.FlagValues) -> None:
    _config("dream_7b.py", "")(values)
    text = flags.DEFINE_string
    text("topology", None, "A TPU slice or GPUs, such as v5e:4x4 or h100:8.", flag_values=values)
    text("stage", "distill", "distill, collect or generate.", flag_values=values)
    flags.DEFINE_bool("sweep", False, "Try other meshes and batches, rank those that fit.", flag_values=values)
    text("output", None, "Write the figures here as JSON.", flag_values=values)


def export(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "Model folder.", flag_values=values)
    flags.DEFINE_string("output", None, "New folder.", flag_values=values)
    flags.DEFINE_string("dtype", None, "float32 or bfloat16; default as stored.", flag_values=values)
