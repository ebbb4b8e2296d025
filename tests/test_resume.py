"""Continued runs on several devices: on meshes of other shapes, and in a cluster that is preempted."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from resume_cases import STEPS

TESTS = Path(__file__).parent


def start(devices: int, *arguments) -> subprocess.Popen:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(TESTS.parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    line = [sys.executable, TESTS / "resume_cases.py", *arguments]
    return subprocess.Popen([*map(str, line)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> list:
    """The last line that each wrote."""
    written = [process.communicate() for process in processes]
    for process, (_, err) in zip(processes, written, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in written]


def test_a_run_continues_on_another_mesh(tmp_path):
    (found,) = finish(start(8, "meshes", tmp_path))
    assert found.keys() == {"2x2x2", "1x8x1", "one device"}
    assert all(differences["restored"] == 0 for differences in found.values())
    assert found["2x2x2"]["end"] == 0
    assert all(differences["end"] < 1e-6 for differences in found.values())


def test_a_cluster_stops_together_and_continues(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = finish(*(start(2, "cluster", tmp_path, port, process) for process in range(2)))
    for told in found:  # the second process had the signal in the second step; the next one carried the news
        assert told["preempted"] == "preempted at step 3, saved; run the same command to continue"
        assert told["difference"] == 0
        assert told["not a number"].startswith("step 6: ")
        assert told["not a number"].endswith(f"; stopped, the last good checkpoint is step {STEPS}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert all(line["tokens_per_second"] > 0 for line in lines)
