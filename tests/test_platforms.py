"""libtpu on a machine without a TPU is not looked at."""

import importlib.util
import os
import subprocess
import sys

import pytest

from cdlm_jax.mesh import platforms


@pytest.mark.parametrize(
    ("installed", "tpu", "given", "expected"),
    [
        ({"libtpu"}, False, None, "cpu"),
        ({"libtpu"}, True, None, None),
        ({"libtpu"}, False, "tpu", "tpu"),
        ({"libtpu", "jax_plugins"}, False, None, None),  # there may be GPUs
        (set(), False, None, None),
    ],
)
def test_jax_keeps_to_the_cpu_only_where_nothing_else_is(installed, tpu, given, expected, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if given:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(platforms, "has_tpu", lambda: tpu)
    platforms.skip_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


def test_nothing_is_printed():
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    script = "import cdlm_jax, jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert not done.stderr
