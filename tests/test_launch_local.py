"""launch/local.sh looks after its processes: their ids, signals, failures and restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parent.parent / "launch" / "local.sh"
STAGE = ["distill", "--config=configs/tiny.py", '--config.note=it\'s a "b" $HOME & \\']

# Notes its arguments and environment, then does what its process id's entry of PLAN says: exits with that status,
# or waits for SIGTERM and exits with the status after the dash. A list of statuses is used up start by start.
PROGRAM = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
folder, arguments = Path(os.environ["NOTES"]), sys.argv[1:]
process = next(a.partition("=")[2] for a in arguments if a.startswith("--process_id="))
starts = len(list(folder.glob(process + ".*.json")))
plan = os.environ["PLAN"].split(",")[int(process)].split("/")
then, _, on_signal = plan[min(starts, len(plan) - 1)].partition("-")
if on_signal == "never":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif on_signal:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(int(on_signal)))
note = {{"arguments": arguments, "environment": dict(os.environ), "pid": os.getpid()}}
draft = folder / (process + ".draft")
draft.write_text(json.dumps(note))
draft.rename(folder / f"{{process}}.{{starts}}.json")
if then == "wait":
    time.sleep(60)
time.sleep(0.1)
os._exit(int(then))
"""


@pytest.fixture
def local(tmp_path):
    """Starts local.sh with two stub processes that follow PLAN; see `PROGRAM`."""
    program = tmp_path / "the program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    started = []

    def start(plan, *options, folder=tmp_path):
        environment = os.environ | {"NOTES": str(folder), "PLAN": plan, "PROGRAM": str(program)}
        command = [LOCAL, "--port=5000", *options, "--", *STAGE]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    # A run in the background ignores SIGINT, and what it starts could not trap it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start
    signal.signal(signal.SIGINT, before)
    pids = [json.loads(path.read_text())["pid"] for path in tmp_path.rglob("*.json")]
    left = [pid for pid in pids if alive(pid)]
    for process in started:
        process.kill()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()
    assert not left, "local.sh left processes behind"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def notes(folder):
    return {path.name.removesuffix(".json"): json.loads(path.read_text()) for path in folder.glob("*.json")}


def wait_for(folder, *names):
    deadline = time.monotonic() + 60
    while not all((folder / f"{name}.json").exists() for name in names):
        assert time.monotonic() < deadline, f"started: {sorted(notes(folder))}"
        time.sleep(0.02)


def test_local_starts_every_process_with_its_id(local, tmp_path):
    process = local("0,0", "--devices=2")
    assert process.wait(60) == 0
    seen = notes(tmp_path)
    assert sorted(seen) == ["0.0", "1.0"]
    for number in (0, 1):
        note = seen[f"{number}.0"]
        assert note["arguments"] == [
            *STAGE,
            *["--coordinator=localhost:5000", "--num_processes=2", f"--process_id={number}"],
        ]
        assert note["environment"]["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_on_and_waits(local, tmp_path, signum):
    process = local("wait-75,wait-75", "--restarts=3")
    wait_for(tmp_path, "0.0", "1.0")
    process.send_signal(signum)
    assert process.wait(60) == 75
    assert sorted(notes(tmp_path)) == ["0.0", "1.0"]  # told to stop: no restart


def test_local_starts_again_when_all_saved(local, tmp_path):
    process = local("75/75/0,75/75/0", "--restarts=2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(notes(tmp_path)) == [f"{number}.{start}" for number in (0, 1) for start in (0, 1, 2)]
    assert "starting again, 2 of 2" in said


def test_local_reports_75_when_no_restart_is_left(local, tmp_path):
    assert local("75,75", "--restarts=1").wait(60) == 75
    assert sorted(notes(tmp_path)) == ["0.0", "0.1", "1.0", "1.1"]


def test_local_ends_the_others_when_one_fails(local, tmp_path):
    """All plans at once: where one process saved, the others have a few seconds to end by themselves."""
    plans = {
        "3,wait-75": 3,  # the first failure counts, not what it leads to
        "wait-143,4": 4,
        "75,wait-5": 5,  # one saved, one did not
        "0,75": 75,
        "75,wait-75": 75,  # one was told to stop, and the other hears of it
    }
    started = {}
    for plan in plans:
        (tmp_path / plan).mkdir()
        started[plan] = local(plan, "--restarts=0", folder=tmp_path / plan)
    for plan, status in plans.items():
        _, said = started[plan].communicate(timeout=60)
        assert started[plan].returncode == status, plan
        assert f"ended with status {status}" in said
        assert sorted(notes(tmp_path / plan)) == ["0.0", "1.0"]


def test_local_kills_what_does_not_end(local, tmp_path):
    process = local("wait-75,wait-never", "--grace=1", "--restarts=1")
    wait_for(tmp_path, "0.0", "1.0")
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGKILL


def test_local_refuses_a_program_that_is_not_there():
    done = subprocess.run([LOCAL, "--program=no/such", *STAGE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "local.sh: no program 'no/such': install it or set --program\n"
