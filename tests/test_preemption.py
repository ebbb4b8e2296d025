"""SIGTERM: within a block it raises, or is noted; `cdlm distill` saves, says so, and the same command continues."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from test_model_folder import contents, tiny_folder
from test_recipe import SETTINGS, metrics, write_config

from cdlm_jax.cli import main
from cdlm_jax.mesh.preemption import EXIT_STATUS, Notice, Preempted, noticed, received, stops_at_once
from cdlm_jax.recipes import recipe


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


def test_it_can_be_asked_for():
    assert not received()
    with stops_at_once():
        assert not received()
    with pytest.raises(Preempted), noticed():
        assert not received()
        terminate()
        assert received()
    assert not received()


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

# Runs a command that gets SIGTERM when it starts the training step of this number.
TOLD = """
import os, signal, sys
from cdlm_jax import cli
from cdlm_jax.recipes import recipe

make = recipe.make_train_step

def make_told(*arguments, **options):
    train_step = make(*arguments, **options)

    def told(state, frozen, batch):
        if int(state.step) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, frozen, batch)

    return told

recipe.make_train_step = make_told
sys.exit(cli.main(sys.argv[2:]))
"""
AGAIN = "run the same command to continue"


@pytest.fixture
def config(tmp_path):
    tiny_folder().save(tmp_path / "teacher")
    sizes = SETTINGS["distill"] | {"steps": 3, "accumulate": 1, "checkpoint_every": 0}
    return write_config(tmp_path / "config.py", SETTINGS | {"teacher": str(tmp_path / "teacher"), "distill": sizes})


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_preempted_command_continues(config, tmp_path, monkeypatch, capsys):
    """The command that is told to stop is a process of its own, the calm ones and the one that continues are not."""

    def run(command: str, work: str) -> tuple[int, str]:
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config file that was loaded before
        status = main([command, f"--config={config}", f"--config.work={work}"])
        return status, capsys.readouterr().err.strip()

    def losses(work: str) -> list:
        return [(row["step"], row["loss"]) for row in metrics(tmp_path / work / "distill")]

    monkeypatch.chdir(tmp_path)
    assert run("collect", "calm") == run("distill", "calm") == (0, "")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "trajectories").symlink_to(tmp_path / "calm" / "trajectories")
    (tmp_path / "told.py").write_text(TOLD)
    line = [sys.executable, "told.py", "0", "distill", f"--config={config}", "--config.work=work"]  # about to compile
    told = subprocess.run(line, capture_output=True, text=True)
    said = f"cdlm distill: preempted at step 1, saved; {AGAIN}"
    assert (told.returncode, told.stderr.strip()) == (EXIT_STATUS, said)
    assert not (tmp_path / "work" / "student").exists()
    assert run("distill", "work") == (0, "")
    assert contents(tmp_path / "work" / "student") == contents(tmp_path / "calm" / "student")
    assert losses("work") == losses("calm") and len(losses("calm")) == 3


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_before_training_it_stops_at_once(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "read", lambda *arguments, **options: terminate())
    assert main(["distill", f"--config={config}", f"--config.work={tmp_path / 'work'}"]) == EXIT_STATUS
    assert capsys.readouterr().err == f"cdlm distill: preempted; {AGAIN}\n"
