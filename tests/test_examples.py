"""The examples run as they stand, on sizes of their own flags, and print what they promise."""

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(capsys):
    """run(name, *flags) -> what it printed."""

    def call(name: str, *flags: str) -> str:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main([*map(str, flags)])
        return capsys.readouterr().out

    return call


def test_jitted_sampling(run):
    rows = run("jitted_sampling", "--problems", 8, "--taus", 0.5, 0.99).splitlines()[1:]
    speeds = [float(row.split()[2]) for row in rows]
    assert len(rows) == 2 and speeds[0] > speeds[1] > 1
    assert rows[1].split()[1] == "8/8"


def test_unmask_policy(run):
    found = re.findall(r"(\w+)\(.*\): (\d+) of 8 right in ([\d.]+) forwards", run("unmask_policy", "--problems", 8))
    (_, right, threshold), (name, also_right, in_order) = found
    assert name == "LeftToRight" and float(in_order) >= float(threshold)  # it takes a part of what the other takes
    assert int(right) >= 5 and int(also_right) >= 5


@pytest.mark.slow
def test_own_task(run, tmp_path):
    lines = run("own_task", "--prompts", 32, "--steps", 6, "--work", tmp_path / "run").splitlines()
    answered = [line for line in lines if line.endswith("forwards")]
    assert len(answered) == 8 and all(re.match(r"\d([+-]\d){3}=  ", line) for line in answered)
    assert (tmp_path / "run" / "student" / "config.json").is_file()


def test_every_example_has_a_test_and_says_how_it_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"jitted_sampling", "own_task", "unmask_policy"}
    assert all(f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text() for name in names)
