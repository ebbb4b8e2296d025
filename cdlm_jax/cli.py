"""The command line: `cdlm <command>` parses and calls, nothing else."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from cdlm_jax import cli_flags, preemption
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


def entry() -> int:
    """The `cdlm` program: `main`, and an end for a process whose peers are still at work.

    Python's own end would wait for them, while they wait for this process in an exchange that it will never join.
    """
    try:
        status = main()
    except BaseException:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        status = 1
    if status not in (0, preemption.EXIT_STATUS) and _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_one_of_several() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 2 for unusable input (one line says why); 130 when interrupted; 75 when SIGTERM ended what the same command
    continues.
    """
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
        with preemption.stops_at_once() if name in CONTINUED else contextlib.nullcontext():
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
    except preemption.Preempted as stop:
        print(f"cdlm {name}: {stop}", file=sys.stderr)
        return preemption.EXIT_STATUS
    return 0


def _quiet() -> None:
    """No chatter of libraries between our own lines."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.excepthook = _report
    warnings.filterwarnings("ignore", module=r"(orbax|tensorflow_datasets|etils|grain)\b.*")


def _report(kind, error, where) -> None:
    """As Python does, but not the tasks that Orbax leaves behind where a checkpoint is damaged: they fail in turn."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, where)


# ---- parsing ---------------------------------------------------------------------------------------------------------


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


# ---- commands ------------------------------------------------------------------------------------------------------
# Imports happen inside, so that help and wrong flags answer at once.


def _recipe(values: flags.FlagValues):
    from cdlm_jax.recipe import Recipe

    return build(Recipe, values.config, "config")


def _join(values: flags.FlagValues) -> None:
    """Become one of several processes, if so asked."""
    from cdlm_jax import distributed

    cluster = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    if values.distributed or any(value is not None for value in cluster.values()):
        distributed.initialize(**cluster)


@contextlib.contextmanager
def _model(values: flags.FlagValues):
    """The model folder of the flags, on the mesh of the flags, and the options of its decoder."""
    import jax

    from cdlm_jax.model_folder import ModelFolder
    from cdlm_jax.sharding import MeshConfig, make_mesh

    mesh = MeshConfig() if values.mesh is None else MeshConfig.parse(values.mesh)
    _join(values)
    with jax.set_mesh(make_mesh(mesh)):
        folder = ModelFolder.load(values.model, dtype=values.dtype)
        yield folder, _options(values).resolve(folder.metadata, causal=folder.model.config.causal)


def _stage(name: str) -> Callable[[flags.FlagValues], None]:
    def run(values: flags.FlagValues) -> None:
        import jax

        from cdlm_jax import distributed, recipe
        from cdlm_jax.sharding import make_mesh

        settings = _recipe(values)
        _join(values)
        if distributed.is_main():
            print(f"{name}: everything is written under {settings.folder}")
        options = {"profile": values.profile} if "profile" in values else {}
        # Alone, a process stops at once where it is not training; several stop where they agree to.
        told = preemption.noticed() if jax.process_count() > 1 else contextlib.nullcontext()
        with told, jax.set_mesh(make_mesh(settings.mesh)):
            getattr(recipe, name)(settings, **options)

    return run


def _quickstart(values: flags.FlagValues) -> None:
    from cdlm_jax.quickstart import quickstart

    quickstart(_recipe(values), from_scratch=values.from_scratch, console=_console())


def _generate(values: flags.FlagValues) -> None:
    from cdlm_jax import generate

    sources = [name for name in ("prompt", "prompt_ids", "task", "input") if values[name].value is not None]
    if len(sources) != 1:
        got = ", ".join(sources) or "none"
        raise InputError(f"give exactly one of --prompt, --prompt_ids, --task, --input; got {got}")
    with _model(values) as (folder, options):
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

    if not values.task and not values.data:
        raise InputError("give --task=names, --data=files, or both")
    with _model(values) as (folder, options):
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
    from cdlm_jax.distributed import is_main
    from cdlm_jax.evaluation.code_sandbox import isolation

    if is_main():
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
    import jax

    from cdlm_jax.model_folder import ModelFolder
    from cdlm_jax.sharding import MeshConfig, make_mesh

    if values.model is None or values.output is None:
        raise InputError("give --model and --output")
    with jax.set_mesh(make_mesh(MeshConfig())):
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

    from cdlm_jax.distributed import is_main

    return Console(quiet=not is_main())


CONTINUED = ("quickstart", "pretrain", "collect", "distill")  # by the same command, where they were interrupted

COMMANDS: dict[str, tuple[Callable | None, Callable]] = {
    "quickstart": (cli_flags.quickstart, _quickstart),
    "pretrain": (cli_flags.training, _stage("pretrain")),
    "collect": (cli_flags.stage, _stage("collect")),
    "distill": (cli_flags.training, _stage("distill")),
    "generate": (cli_flags.generate, _generate),
    "evaluate": (cli_flags.evaluate, _evaluate),
    "benchmark": (cli_flags.benchmark, _benchmark),
    "lm-eval": (None, _lm_eval),
    "export": (cli_flags.export, _export),
    "plan": (cli_flags.plan, _plan),
}
