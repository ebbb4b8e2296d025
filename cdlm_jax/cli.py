"""The command line: `cdlm <command>` finds the command, runs it, and turns a failure into one line and a status."""

import contextlib
import importlib
import logging
import os
import sys
import traceback
import warnings

from cdlm_jax.commands import ANSWERING, COMMANDS, CONTINUED, INCOMPLETE
from cdlm_jax.commands.parsing import one_line, parse
from cdlm_jax.config import InputError
from cdlm_jax.mesh import preemption

USAGE = """usage: cdlm <command> [--flag=value ...]        (cdlm <command> --help lists its flags)

{commands}

pretrain, collect, distill, quickstart, benchmark, plan take --config=configs/x.py, and overrides of it such as
--config.distill.steps=200."""


def usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:<12} {_command(name).SUMMARY}" for name in COMMANDS))


def _command(name: str):
    return importlib.import_module(f"cdlm_jax.commands.{COMMANDS[name]}")


def entry() -> int:
    """The `cdlm` program: `main`, and an end for a process whose peers are still at work.

    Python's own end would wait for them, while they wait for this process in an exchange that it will never join.
    """
    together = False  # whether every process ends so, each by itself
    try:
        status = main()
        together = status in (0, INCOMPLETE, preemption.EXIT_STATUS)
    except BaseException:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        status = 1
    if not together and _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_one_of_several() -> bool:
    import jax

    return jax.distributed.is_initialized()


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 1 where some prompts could not be answered; 2 for unusable input (one line says why); 130 when interrupted; 75
    when SIGTERM ended what the same command continues.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"cdlm: unknown command {name!r}, allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _quiet()
    command = _command(name)
    try:
        parsed = rest if command.define is None else parse(name, command.define, rest)
        if parsed is None:
            return 0
        continued = name in CONTINUED or (name in ANSWERING and parsed.output is not None)
        with preemption.stops_at_once() if continued else contextlib.nullcontext():
            return command.run(parsed) or 0
    except InputError as error:
        print(f"cdlm {name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cdlm {name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cdlm {name}: interrupted", file=sys.stderr)
        return 130
    except preemption.Preempted as stop:
        print(f"cdlm {name}: {stop}", file=sys.stderr)
        return preemption.EXIT_STATUS


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
