"""What every command says of its flags, configs by name, and where a pipe is closed."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from cdlm_jax import __version__, cli
from cdlm_jax.commands import COMMANDS
from cdlm_jax.commands.common import console, define_model
from cdlm_jax.commands.configs import find, own
from cdlm_jax.commands.groups import REST, Group, help_page
from cdlm_jax.commands.parsing import parse
from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import DECODERS

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

OWN = [name for name in COMMANDS if name != "lm-eval"]  # which parses its own arguments
LINES, COLUMNS = 30, 100


def printed(capsys, *arguments) -> list[str]:
    assert cli.main(list(arguments)) == 0
    out, error = capsys.readouterr()
    assert not error
    return out.splitlines()


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", OWN)
def test_help_fits_a_screen_and_the_full_one_has_every_flag(command, capsys):
    page, full = printed(capsys, command, "--help"), printed(capsys, command, "--helpfull")
    assert len(page) <= LINES and max(map(len, page + full)) <= COLUMNS
    values = flags.FlagValues()
    cli._command(command).define(values)
    for name in values:
        assert sum(line.startswith((f"  --{name}=", f"  --[no]{name} ")) for line in full) == 1, name
    assert REST not in full, "a flag without a Group"
    assert set(filter(None, page[:-1])) <= set(full)


def test_help_shows_defaults_and_groups():
    values = flags.FlagValues()
    Group(values, "machine").number("chips", 4, "Of the slice.")
    Group(values, "prompts").switch("chat", True, "With the template.")
    Group(values, "prompts").text("input", None, "A file [none].")
    flags.DEFINE_string("stray", None, "Nobody's.", flag_values=values, module_name="a.module")
    page = help_page("ask", "what it does", values, full=False).split("\n")
    assert page[:3] == ["cdlm ask: what it does", "", "prompts"]
    assert page[3:5] == [
        "  --[no]chat              With the template [true].",
        "  --input=TEXT            A file [none].",
    ]
    assert page[-1] == "More by --helpfull: machine, other."
    *_, first, chips, _, rest, stray = help_page("ask", "what it does", values, full=True).split("\n")
    assert (first, chips) == ("machine", "  --chips=N               Of the slice [4].")
    assert (rest, stray) == ("other", "  --stray=TEXT            Nobody's.")


def test_the_flags_of_a_decoder_are_its_own():
    values = flags.FlagValues()
    define_model(values)
    fields = {name: {field.name for field in dataclasses.fields(module.Config)} for name, module in DECODERS.items()}
    groups = {group.removeprefix("of "): members for group, members in values.flags_by_module_dict().items()}
    for decoder in fields.keys() & groups.keys():
        for flag in groups[decoder]:
            assert flag.name in fields[decoder], f"--{flag.name} is no option of {decoder}"
    for flag in groups["several decoders"]:
        assert {name for name in fields if f" {name}" in flag.help.replace(",", " ")} == {
            name for name in fields if flag.name in fields[name]
        }


def test_help_and_wrong_flags_do_not_wait_for_jax():
    lines = ["--help", "generate --help", "distill --helpfull", "plan --config=tinny", "collect --bogus"]
    run = f"[main(line.split()) for line in {lines}]"
    code = f"import sys; from cdlm_jax.cli import main; {run}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


def test_version(capsys):
    assert printed(capsys, "--version") == [f"cdlm_jax {__version__}"]


# ---- configs by name -------------------------------------------------------------------------------------------------


def test_a_config_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(own()) == ["benchmark", "dream_7b", "llada_8b", "tiny"]
    tiny = str(own()["tiny"])
    assert find("tiny") == find("configs/tiny.py") == find("./configs/tiny.py") == tiny
    assert find("tiny:quick") == f"{tiny}:quick"
    Path("tiny").touch()  # a file of that name comes first
    assert find("tiny:quick") == "tiny:quick"
    for unknown in ("tinny", "configs/tinny.py", "elsewhere/tiny.py", ""):
        with pytest.raises(InputError, match=f"^no config file at {unknown}, .*: benchmark, dream_7b, llada_8b, tiny$"):
            find(unknown)


@pytest.mark.parametrize("given", [["--config=tiny:quick"], ["--config", "tiny:quick"]])
def test_overrides_of_a_config_by_name(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = parse("distill", cli._command("distill").define, [*given, "--config.distill.steps=3"])
    assert (values.config.work, values.config.distill.steps) == ("runs/quickstart", 3)


def test_a_variant_that_a_config_lacks_is_named(capsys):
    assert cli.main(["distill", "--config=tiny:fast"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cdlm distill: tiny:fast: ") and "allowed: full, finish" in error and error.count("\n") == 1


# ---- a closed pipe ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def closed_pipe():
    """Standard output into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_a_closed_pipe_ends_quietly(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["cdlm", "collect", "--help"])
    with closed_pipe() as stream:
        assert cli.entry() == 141
        stream.flush()  # as Python's end does: nothing is left that could not be written
    assert capfd.readouterr().err == ""


def test_tables_leave_a_closed_pipe_to_the_command_line():
    with closed_pipe(), pytest.raises(BrokenPipeError):
        console().print("a table")
