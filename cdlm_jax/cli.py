"""The command line: `cdlm <command>` parses and calls, nothing else."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from cdlm_jax.config import InputError, build

USAGE = """usage: cdlm <command> [--flag=value ...]        (cdlm <command> --help lists its flags)

  quickstart   shipped teacher -> trajectories -> student -> held-out report, on this machine
  pretrain     train a tiny bidirectional teacher, or a causal model to compare with
  collect      decode prompts with a teacher, keep its trajectories
  distill      train a block-causal student on trajectories
  generate     answer prompts with a model folder
  evaluate     score a model folder on problems with verifiable answers
  benchmark    compare every decoder on the same weights, problems and machine
  lm-eval      lm-evaluation-harness with --model cdlm_jax; its own arguments
  export       write a model folder with another dtype
  plan         compile a stage for a TPU slice or GPUs that are not here: does it fit, what bounds it

pretrain, collect, distill, quickstart, benchmark, plan take --config=configs/x.py, and overrides of it such as
--config.distill.steps=200."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for unusable input (one line says why), 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"cdlm: unknown command {name!r}, allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _quiet()
    define, run = COMMANDS[name]
    try:
        parsed = rest if define is None else _parse(name, define, rest)  # another program parses its own arguments
        if parsed is None:
            return 0
        run(parsed)
    except InputError as error:
        print(f"cdlm {name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cdlm {name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cdlm {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _quiet() -> None:
    """No chatter of libraries between our own lines."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(orbax|tensorflow_datasets|etils|grain)\b.*")


# ---- flags ---------------------------------------------------------------------------------------------------------


def _parse(command: str, define: Callable[[flags.FlagValues], None], arguments: list[str]) -> flags.FlagValues | None:
    """The command's flags; None if help was asked for. Anything unusable becomes one InputError."""
    values = flags.FlagValues()
    if any(argument in ("--help", "-h", "--helpfull") for argument in arguments):
        define(values)
        print(f"cdlm {command}\n{values.get_help()}")
        return None
    arguments = [command, *map(_underscored, arguments)]
    for argument in arguments:
        path = argument.removeprefix("--config=").partition(":")[0]
        if argument.startswith("--config=") and not Path(path).is_file():
            raise InputError(f"no config file at {path}")
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    try:
        if overrides and all("=" in override for override in overrides):
            plain = [argument for argument in arguments[1:] if argument not in overrides]
            _check_overrides(_parse(command, define, plain), overrides)
        with _program_arguments(arguments):
            define(values)  # a config file that is the default is read here
            rest = values(arguments)[1:]
    except InputError:
        raise
    except Exception as error:  # a config file is a program, and can raise anything
        kind = "" if isinstance(error, flags.Error) else f"{type(error).__name__}: "
        file = next((f"{a.removeprefix('--config=')}: " for a in arguments if a.startswith("--config=")), "")
        raise InputError(f"{file}{kind}{_one_line(error)}") from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags are given as --name=value")
    return values


def _check_overrides(values: flags.FlagValues, arguments: list[str]) -> None:
    """Name an override of a key that the config file does not have."""
    for argument in arguments if "config" in values else []:
        section, path = values.config, argument.partition("=")[0].removeprefix("--")
        for name in path.split(".")[1:]:
            if not isinstance(section, ConfigDict) or name not in section:
                allowed = f"; allowed: {', '.join(section)}" if isinstance(section, ConfigDict) else ""
                raise InputError(f"unknown config key {path}{allowed}")
            section = section[name]


def _underscored(argument: str) -> str:
    """--show-steps=... is --show_steps=...; overrides of a config, and values, stay as they are."""
    if not argument.startswith("--") or argument.startswith("--config"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value


@contextlib.contextmanager
def _program_arguments(arguments: list[str]):
    """ml_collections looks for overrides in sys.argv, whatever it is asked to parse."""
    saved, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = saved


def _one_line(error: BaseException) -> str:
    """The message, or the last line of one that carries a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip() if any("Traceback" in line for line in lines) else " ".join(lines)


def _config_flags(name: str, variant: str = "full") -> Callable[[flags.FlagValues], None]:
    def define(values: flags.FlagValues) -> None:
        path = f"{_config_path(name)}:{variant}".rstrip(":")
        config_flags.DEFINE_config_file("config", path, "Recipe to run.", flag_values=values)

    return define


def _config_path(name: str) -> str:
    """A recipe of this project: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).parent
    inside, beside = package / "configs" / name, package.parent / "configs" / name
    return str(inside if inside.exists() else beside)


def _quickstart_flags(values: flags.FlagValues) -> None:
    _config_flags("tiny.py", "quick")(values)
    flags.DEFINE_bool("from_scratch", False, "Train the teacher too.", flag_values=values)


def _model_flags(values: flags.FlagValues) -> None:
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


def _generate_flags(values: flags.FlagValues) -> None:
    _model_flags(values)
    flags.DEFINE_string("prompt", None, "Text to answer.", flag_values=values)
    flags.DEFINE_list("prompt_ids", None, "Token ids to answer, comma-separated.", flag_values=values)
    flags.DEFINE_string("task", None, "Answer held-out problems of this task.", flag_values=values)
    flags.DEFINE_integer("num", 4, "How many problems of --task.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("input", None, 'JSON lines: {"prompt": text} or {"prompt_ids": [...]}.', flag_values=values)
    flags.DEFINE_string("output", None, "Write answers here as JSON lines.", flag_values=values)
    flags.DEFINE_bool("chat", True, "Use the folder's chat template for text, if it has one.", flag_values=values)
    flags.DEFINE_bool("show_steps", False, "Play the refinement of each answer.", flag_values=values)


def _evaluate_flags(values: flags.FlagValues) -> None:
    _model_flags(values)
    flags.DEFINE_list("task", None, "Tasks and public benchmarks (gsm8k ...), comma-separated.", flag_values=values)
    number = flags.DEFINE_integer
    number("num", None, "Problems of each [512 of a task, all of a benchmark].", lower_bound=1, flag_values=values)
    data = "Files: 4x4 Sudoku, Countdown-3, or name=path of a benchmark; comma-separated."
    flags.DEFINE_list("data", None, data, flag_values=values)
    flags.DEFINE_bool("chat", True, "Use the folder's chat template for benchmarks, if it has one.", flag_values=values)
    _code_flag(values)


def _code_flag(values: flags.FlagValues) -> None:
    text = "Run the programs that the model writes for humaneval and mbpp, in a sandbox."
    flags.DEFINE_bool("allow_code_execution", False, text, flag_values=values)


def _benchmark_flags(values: flags.FlagValues) -> None:
    _config_flags("benchmark.py")(values)
    flags.DEFINE_list("methods", None, "In place of config.methods, comma-separated.", flag_values=values)
    flags.DEFINE_list("task", None, "In place of config.tasks, comma-separated.", flag_values=values)
    flags.DEFINE_list("data", None, "In place of config.data: files of real problems.", flag_values=values)
    _code_flag(values)


def _plan_flags(values: flags.FlagValues) -> None:
    _config_flags("dream_7b.py", "")(values)
    text = flags.DEFINE_string
    text("topology", None, "A TPU slice or GPUs, such as v5e:4x4 or h100:8.", flag_values=values)
    text("stage", "distill", "distill, collect or generate.", flag_values=values)
    flags.DEFINE_bool("sweep", False, "Try other meshes and batches, rank those that fit.", flag_values=values)
    text("output", None, "Write the figures here as JSON.", flag_values=values)


def _export_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "Model folder.", flag_values=values)
    flags.DEFINE_string("output", None, "New folder.", flag_values=values)
    flags.DEFINE_string("dtype", None, "float32 or bfloat16; default as stored.", flag_values=values)


# ---- commands ------------------------------------------------------------------------------------------------------
# Imports happen inside, so that help and wrong flags answer at once.


def _recipe(values: flags.FlagValues):
    from cdlm_jax.recipe import Recipe

    return build(Recipe, values.config, "config")


def _stage(name: str) -> Callable[[flags.FlagValues], None]:
    def run(values: flags.FlagValues) -> None:
        from cdlm_jax import recipe

        settings = _recipe(values)
        print(f"{name}: everything is written under {settings.folder}")
        getattr(recipe, name)(settings)

    return run


def _quickstart(values: flags.FlagValues) -> None:
    from cdlm_jax.quickstart import quickstart

    quickstart(_recipe(values), from_scratch=values.from_scratch, console=_console())


def _generate(values: flags.FlagValues) -> None:
    from cdlm_jax import generate
    from cdlm_jax.model_folder import ModelFolder

    sources = [name for name in ("prompt", "prompt_ids", "task", "input") if values[name].value is not None]
    if len(sources) != 1:
        got = ", ".join(sources) or "none"
        raise InputError(f"give exactly one of --prompt, --prompt_ids, --task, --input; got {got}")
    folder, options = ModelFolder.load(values.model), _options(values)
    options = options.resolve(folder.metadata, causal=folder.model.config.causal)
    tokenizer = folder.tokenizer
    match sources[0]:
        case "prompt":
            cases = [generate.text_case(tokenizer, values.prompt, chat=values.chat)]
        case "prompt_ids":
            cases = [generate.Case(_integers("prompt_ids", values.prompt_ids))]
        case "task":
            cases = generate.task_cases(folder, values.task, values.num)
        case "input":
            cases = generate.file_cases(tokenizer, Path(values.input), chat=values.chat)
    generate.run(
        folder,
        cases,
        options,
        batch_size=values.batch_size,
        output=None if values.output is None else Path(values.output),
        steps_shown=values.show_steps,
        console=_console(),
    )


def _evaluate(values: flags.FlagValues) -> None:
    from cdlm_jax import evaluate
    from cdlm_jax.evaluation.report import score_table
    from cdlm_jax.model_folder import ModelFolder

    if not values.task and not values.data:
        raise InputError("give --task=names, --data=files, or both")
    folder = ModelFolder.load(values.model)
    options = _options(values).resolve(folder.metadata, causal=folder.model.config.causal)
    if values.allow_code_execution:
        _warn_of_gaps()
    cases = evaluate.cases(
        folder.tokenizer,
        values.task or [],
        values.data or [],
        count=values.num,
        chat=values.chat,
        allow_code_execution=values.allow_code_execution,
    )
    scores = evaluate.score(folder, cases, options, values.batch_size)
    _console().print(score_table(scores).rich())


def _warn_of_gaps() -> None:
    """Says which layers hold programs that a model writes, and what they could do all the same."""
    from cdlm_jax.evaluation.code_sandbox import isolation

    print(isolation(), file=sys.stderr)


def _benchmark(values: flags.FlagValues) -> None:
    from cdlm_jax.benchmark import BenchmarkConfig, benchmark

    settings = values.config.to_dict()
    for name, flag in (("methods", "methods"), ("tasks", "task"), ("data", "data")):
        if values[flag].value is not None:
            settings[name] = tuple(values[flag].value)
    settings["allow_code_execution"] |= values.allow_code_execution
    config = build(BenchmarkConfig, settings, "config")
    if config.allow_code_execution:
        _warn_of_gaps()
    benchmark(config, _console())


def _lm_eval(arguments: list[str]) -> None:
    import cdlm_jax.evaluation.lm_eval_adapter  # noqa: F401  registers the model, or says what is missing

    with _program_arguments(["cdlm lm-eval", *arguments]):
        from lm_eval.__main__ import cli_evaluate  # only now: the line above is the one that explains its absence

        cli_evaluate()


def _export(values: flags.FlagValues) -> None:
    from cdlm_jax.model_folder import ModelFolder

    if values.model is None or values.output is None:
        raise InputError("give --model and --output")
    ModelFolder.load(values.model).save(values.output, dtype=values.dtype)
    print(f"wrote {values.output}")


def _plan(values: flags.FlagValues) -> None:
    if values.topology is None:
        raise InputError("give --topology, such as v5e:4x4 or h100:8")
    output = None if values.output is None else Path(values.output)
    from cdlm_jax import planning

    settings = _recipe(values)
    planning.run(settings, values.topology, values.stage, sweeps=values.sweep, output=output, console=_console())


def _options(values: flags.FlagValues):
    from dataclasses import fields

    from cdlm_jax.decoding.options import Options

    return Options(**{field.name: values[field.name].value for field in fields(Options)})


def _integers(name: str, items: list[str]) -> list[int]:
    with contextlib.suppress(ValueError):
        return [int(item) for item in items]
    raise InputError(f"--{name} takes comma-separated integers, got {','.join(items)!r}")


def _console():
    from rich.console import Console

    return Console()


COMMANDS: dict[str, tuple[Callable | None, Callable]] = {
    "quickstart": (_quickstart_flags, _quickstart),
    "pretrain": (_config_flags("tiny.py"), _stage("pretrain")),
    "collect": (_config_flags("tiny.py"), _stage("collect")),
    "distill": (_config_flags("tiny.py"), _stage("distill")),
    "generate": (_generate_flags, _generate),
    "evaluate": (_evaluate_flags, _evaluate),
    "benchmark": (_benchmark_flags, _benchmark),
    "lm-eval": (None, _lm_eval),
    "export": (_export_flags, _export),
    "plan": (_plan_flags, _plan),
}
