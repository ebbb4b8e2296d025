"""The command line: `cdlm <command>` finds the command, runs it, and turns a failure into one line and a status."""

import contextlib
import importlib
import logging
import os
import sys
import traceback
import warnings

from absl import flags

from cdlm_jax import __version__
from cdlm_jax.commands import ANSWERING, COMMANDS, CONTINUED, HELP, INCOMPLETE
from cdlm_jax.commands.configs import own
from cdlm_jax.commands.groups import help_page
from cdlm_jax.commands.parsing import one_line, parse
from cdlm_jax.config import InputError
from cdlm_jax.mesh import preemption

USAGE = """usage: cdlm <command> [--flag=value ...]        (cdlm <command> --help lists its flags)

{commands}

quickstart, pretrain, collect, distill, benchmark and plan take --config=file.py, or --config=name of this project's
({configs}), and overrides such as --config.distill.steps=200. cdlm --version prints {version}."""
CLOSED_PIPE = 141  # as a shell reports SIGPIPE


def usage() -> str:
    commands = "\n".join(f"  {name:<12} {_command(name).SUMMARY}" for name in COMMANDS)
    return USAGE.format(commands=commands, configs=", ".join(own()), version=__version__)


def _help(name: str, *, full: bool) -> str:
    command, values = _command(name), flags.FlagValues()
    command.define(values)
    return help_page(name, command.SUMMARY, values, full=full)


def _command(name: str):
    return importlib.import_module(f"cdlm_jax.commands.{COMMANDS[name]}")


def entry() -> int:
    """The `cdlm` program: `main`, and an end for a process whose peers are still at work.

    Python's own end would wait for them, while they wait for this process in an exchange that it will never join.
    """
    together = False  # whether every process ends so, each by itself
    try:
        status = _piped()
        together = status in (0, INCOMPLETE, preemption.EXIT_STATUS)
    except BaseException:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        status = 1
    if not together and _is_one_of_several():
        os._exit(status)
    return status


def _piped() -> int:
    """`main`, which ends quietly where nobody reads on: `cdlm ... | head`."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)  # now: at Python's end it could only complain
    except BrokenPipeError:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in its buffer goes there
        return CLOSED_PIPE


def _is_one_of_several() -> bool:
    """Only a process that has JAX can be one: a wrong flag need not wait for its import."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 1 where some prompts could not be answered; 2 for unusable input (one line says why); 130 when interrupted; 75
    when SIGTERM ended what the same command continues.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(f"cdlm_jax {__version__}")
        return 0
    if not arguments or arguments[0] in ("help", *HELP):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"cdlm: unknown command {name!r}, allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _quiet()
    command = _command(name)
    try:
        if command.define is not None and not HELP.isdisjoint(rest):
            print(_help(name, full="--helpfull" in rest))
            return 0
        if command.define is None:  # another program, which parses its own arguments
            return command.run(rest) or 0
        values = parse(name, command.define, rest)
        continued = name in CONTINUED or (name in ANSWERING and values.output is not None)
        with preemption.stops_at_once() if continued else contextlib.nullcontext():
            return command.run(values) or 0
    except InputError as error:
        print(f"cdlm {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise  # of standard output: `_piped`
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
