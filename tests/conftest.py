"""Reference cases from tests/golden (see its README): numbers of the authors' PyTorch code; one cache of programs."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings

import cdlm_jax  # noqa: F401  before a test imports JAX (cdlm_jax/mesh/platforms.py)

GOLDEN = Path(__file__).parent / "golden"
COMPILED = Path(__file__).parent.parent / ".cache" / "compiled"

# What one test process compiled, the others and the commands that tests start read: set before JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

settings.register_profile("same", derandomize=True, deadline=None, database=None)  # the same examples in every run
settings.load_profile("same")


class Case(NamedTuple):
    """One entry of manifest.json with its arrays."""

    id: str
    family: str
    kind: str
    model: Path | None
    args: dict[str, Any]
    tolerance: dict[str, float]
    arrays: dict[str, np.ndarray]


def golden_ids(*kinds: str) -> list[str]:
    """Ids of the cases of these kinds, for `pytest.mark.parametrize`."""
    return [entry["id"] for entry in _manifest().values() if entry["kind"] in kinds]


def load_case(case_id: str) -> Case:
    entry = _manifest()[case_id]
    with np.load(GOLDEN / entry["file"]) as file:
        arrays = dict(file)
    tolerance = entry.get("tolerance", {})
    model = entry["model"] and GOLDEN / entry["model"]
    return Case(case_id, entry["family"], entry["kind"], model, entry["args"], tolerance, arrays)


def _manifest() -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}


@pytest.fixture
def golden():
    """golden(case_id) -> Case."""
    return load_case
