"""`cdlm lm-eval`: lm-evaluation-harness, which parses its own arguments."""

import argparse
import contextlib
from collections.abc import Iterator
from unittest import mock

from cdlm_jax.commands.parsing import one_line, program_arguments
from cdlm_jax.config import InputError

SUMMARY = "lm-evaluation-harness with --model cdlm_jax; its own arguments"

define = None


def run(arguments: list[str]) -> None:
    import cdlm_jax.evaluation.lm_eval_adapter  # noqa: F401  registers the model, or says what is missing

    with program_arguments(["cdlm lm-eval", *arguments]), refusals():
        from lm_eval.__main__ import cli_evaluate  # only now: the line above is the one that explains its absence

        cli_evaluate()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the harness refuses becomes an InputError, without its usage and traceback.

    It refuses wrong arguments by ValueErrors of its own; one from deeper down is a fault, and keeps its traceback.
    """

    def refuse(parser: argparse.ArgumentParser, message: str):
        raise InputError(message)

    try:
        with mock.patch.object(argparse.ArgumentParser, "error", refuse):
            yield
    except InputError:
        raise
    except ValueError as error:
        if not _raised_in(error).startswith("lm_eval."):
            raise
        raise InputError(one_line(error)) from error


def _raised_in(error: BaseException) -> str:
    """The module whose code raised it."""
    place = error.__traceback__
    name = ""
    while place is not None:
        name, place = place.tb_frame.f_globals.get("__name__", ""), place.tb_next
    return name
