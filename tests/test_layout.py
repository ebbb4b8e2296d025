"""The shape of the house: imports run down its floors, files stay short, and the wheel holds what the program reads."""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cdlm_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    path
    for folder in ("cdlm_jax", "configs", "tests", "benchmarks", "launch", "examples")
    for path in (ROOT / folder).rglob("*.py")
]

# Top floor first. A module imports from its own floor and from those below.
# `__init__` holds the package's public names: the programs above it may use them, the library below does not.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"planning"},
    {"__init__"},
    {"recipes"},
    {"training"},
    {"trajectories", "evaluation"},
    {"decoding"},
    {"models"},
    {"kernels"},
    {"tasks"},
    {"text", "mesh"},
    {"visibility", "config", "files", "worker"},
]
FLOOR = {name: len(FLOORS) - number for number, floor in enumerate(FLOORS) for name in floor}
MAX_LINES = 400


def name_of(path: Path) -> str:
    """Its name on the list of floors: a module directly in cdlm_jax by its own, any other by its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Full names of the modules that `source` imports; `from a import b` gives `a.b`, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def climbs(name: str, source: str) -> list[str]:
    """The imports of a module on floor `name` that it may not make."""
    refused = []
    for target in imported(source):
        top, _, rest = target.partition(".")
        part = rest.split(".")[0] if rest else "__init__"
        if target.startswith("."):
            refused.append(f"{target}: a relative import, write cdlm_jax. ...")
        elif top == "cdlm_jax" and FLOOR.get(part, FLOOR["__init__"]) > FLOOR[name]:
            refused.append(target)
    return refused


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down_the_floors(path):
    name = name_of(path)
    assert name in FLOOR, f"{name} has no floor: give it one in FLOORS of {Path(__file__).name}"
    assert not climbs(name, path.read_text()), f"{name} imports from a higher floor"


@pytest.mark.parametrize(
    ("name", "source", "refused"),
    [
        (
            "models",
            "from cdlm_jax.decoding.common import append_response",
            ["cdlm_jax.decoding.common.append_response"],
        ),
        ("models", "import cdlm_jax.decoding.cdlm", ["cdlm_jax.decoding.cdlm"]),
        ("models", "def f():\n    from cdlm_jax import decoding", ["cdlm_jax.decoding"]),
        ("models", "from cdlm_jax import load_model", ["cdlm_jax.load_model"]),
        ("models", "import cdlm_jax", ["cdlm_jax"]),
        ("models", "from ..config import InputError", ["..config.InputError: a relative import, write cdlm_jax. ..."]),
        (
            "models",
            "from cdlm_jax.models.cache import KVCache\nfrom cdlm_jax import config\nimport jax, cdlm_jaxtra",
            [],
        ),
        ("cli", "import cdlm_jax\nfrom cdlm_jax import load_model, planning", []),
    ],
)
def test_a_climbing_import_is_found(name, source, refused):
    assert climbs(name, source) == refused


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES or name_of(path) == "kernels", f"{lines} lines, at most {MAX_LINES}: one idea per file"


def test_there_is_no_torch():
    used = {
        path.name: target
        for path in SOURCES
        for target in imported(path.read_text())
        if target.split(".")[0] == "torch"
    }
    assert not used


@pytest.mark.slow
def test_the_wheel_holds_the_data_files(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.iterdir()
    held = set(zipfile.ZipFile(wheel).namelist())
    data = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".txt", ".json", ".safetensors"}]
    assert len(data) > len(MODULES)
    assert held >= {str(path.relative_to(ROOT)) for path in data}
    assert held >= {f"cdlm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
