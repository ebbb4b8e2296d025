"""SIGTERM: within a block it raises, or is noted; `cdlm distill` saves, says so, and the same command continues."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from test_model_folder import contents, tiny_folder
from test_recipe import SETTINGS, metrics, write_config

from cdlm_jax.preemption import EXIT_STATUS, Notice, Preempted, noticed, stops_at_once


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def default_action():
    """No test leaves a handler behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


# ---- the blocks ----------------------------------------------------------------------------------------------------


def test_it_stops_at_once():
    reached = []
    with pytest.raises(Preempted, match="^preempted; run the same command to continue$"), stops_at_once():
        terminate()
        reached.append(1)
    assert not reached


def test_a_second_signal_does_not_disturb_the_way_out():
    cleaned = []
    with pytest.raises(Preempted), stops_at_once():
        try:
            terminate()
        finally:
            terminate()
            cleaned.append(1)
    assert cleaned


def test_it_is_noted():
    seen = []
    with pytest.raises(Preempted), stops_at_once(), noticed() as notice:
        seen.append(notice.received)
        terminate()
        seen.append(notice.received)
    assert seen == [False, True]


def test_without_a_signal_nothing_happens():
    with stops_at_once(), noticed() as notice:
        pass
    assert not notice.received


def test_an_inner_block_shares_the_notice():
    reached = []
    with pytest.raises(Preempted), noticed() as outer:
        with noticed() as inner:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library may do
            with noticed():
                assert isinstance(signal.getsignal(signal.SIGTERM), Notice)
        terminate()
        with noticed() as later:
            reached.append(later is inner is outer and later.received)
    assert reached == [True]


def test_an_error_of_the_block_is_what_counts():
    with pytest.raises(RuntimeError), noticed():
        terminate()
        raise RuntimeError


def test_handlers_of_errors_let_it_pass():
    with pytest.raises(Preempted), stops_at_once():
        try:
            terminate()
        except Exception as error:
            raise AssertionError from error


def test_another_thread_is_left_alone():
    found = []

    def work():
        with stops_at_once(), noticed() as notice:
            found.append(notice.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


# ---- the command ---------------------------------------------------------------------------------------------------

# Runs a command, and sends itself SIGTERM when the batch of that number is asked for, or before any work.
TOLD = """
import os, signal, sys
from cdlm_jax import cli, recipe
moment, *arguments = sys.argv[1:]

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

def failing(state, frozen, batch, *, step):
    if moment != "never" and int(state.step) == int(moment):
        terminate()
    return step(state, frozen, batch)

def make(*arguments, **options):
    from functools import partial
    return partial(failing, step=make_train_step(*arguments, **options))

make_train_step, recipe.make_train_step = recipe.make_train_step, make
if moment == "loading":
    moment, read = "never", recipe.read
    recipe.read = lambda *a, **k: terminate() or read(*a, **k)
sys.exit(cli.main(arguments))
"""


def test_a_preempted_command_continues(tmp_path):
    tiny_folder().save(tmp_path / "teacher")
    sizes = {"distill": SETTINGS["distill"] | {"steps": 4, "accumulate": 1, "checkpoint_every": 0}}
    config = write_config(tmp_path / "config.py", SETTINGS | sizes)
    (tmp_path / "told.py").write_text(TOLD)
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(command: str, work: str, moment: str = "never") -> tuple[int, str]:
        line = [sys.executable, "told.py", moment, command, f"--config={config}", f"--config.work={work}"]
        done = subprocess.run(line, cwd=tmp_path, env=os.environ | compiled, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr.strip()

    assert run("collect", "calm")[0] == run("distill", "calm")[0] == 0
    os.symlink(tmp_path / "calm" / "trajectories", (tmp_path / "work").mkdir() or tmp_path / "work" / "trajectories")
    again = "run the same command to continue"
    assert run("distill", "work", "loading") == (EXIT_STATUS, f"cdlm distill: preempted; {again}")
    assert not (tmp_path / "work" / "distill").exists()
    assert run("distill", "work", "0") == (EXIT_STATUS, f"cdlm distill: preempted at step 1, saved; {again}")
    assert run("distill", "work", "2") == (EXIT_STATUS, f"cdlm distill: preempted at step 3, saved; {again}")
    assert not (tmp_path / "work" / "student").exists()
    assert run("distill", "work") == (0, "")
    assert contents(tmp_path / "work" / "student") == contents(tmp_path / "calm" / "student")

    def losses(work: str) -> list:
        return [(row["step"], row["loss"]) for row in metrics(tmp_path / work / "distill")]

    assert losses("work") == losses("calm") and len(losses("calm")) == 4
