"""A command's arguments as absl flags and ml_collections overrides; what is unusable becomes one InputError."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from absl import flags
from ml_collections import ConfigDict

from cdlm_jax.commands.configs import find
from cdlm_jax.config import InputError


def parse(command: str, define: Callable[[flags.FlagValues], None], arguments: list[str]) -> flags.FlagValues:
    """The command's flags. Anything unusable becomes one InputError."""
    values = flags.FlagValues()
    given = list(_joined(map(_underscored, arguments)))
    arguments = [command, *map(_with_path, given)]
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    try:
        if overrides and all("=" in override for override in overrides):
            plain = [argument for argument in arguments[1:] if argument not in overrides]
            _check_overrides(parse(command, define, plain), overrides)
        with program_arguments(arguments):
            define(values)  # a config file that is the default is read here
            rest = values(arguments)[1:]
    except InputError:
        raise
    except Exception as error:  # a config file is a program, and can raise anything
        kind = "" if isinstance(error, flags.Error) else f"{type(error).__name__}: "
        file = next((f"{a.removeprefix('--config=')}: " for a in given if a.startswith("--config=")), "")
        raise InputError(f"{file}{kind}{one_line(error)}") from error
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


def _joined(arguments: Iterable[str]) -> Iterator[str]:
    """`--config file` is --config=file."""
    rest = iter(arguments)
    for argument in rest:
        yield f"--config={next(rest, '')}" if argument == "--config" else argument


def _with_path(argument: str) -> str:
    """A config by its name is the file that it names."""
    return f"--config={find(argument.removeprefix('--config='))}" if argument.startswith("--config=") else argument


@contextlib.contextmanager
def program_arguments(arguments: list[str]):
    """ml_collections looks for overrides in sys.argv, whatever it is asked to parse."""
    saved, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = saved


def one_line(error: BaseException) -> str:
    """The message, or the last line of one that carries a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip() if any("Traceback" in line for line in lines) else " ".join(lines)
