"""Several processes as one program: who holds which rows, refusals, and the whole recipe on two real processes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import environment, free_port
from flax import nnx
from test_model_folder import contents, tiny_folder
from test_recipe import SETTINGS, write_config

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.mesh import distributed
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.trajectories.store import read

ROOT = Path(__file__).parent.parent

# ---- refusals, and one process -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            ("localhost:1234", None, 0),
            "give --coordinator, --num_processes and --process_id together; missing: n",
        ),
        ((None, 2, 0), "missing: coordinator"),
        (("localhost:1234", 2, 2), r"--process_id must be in 0\.\.1, got 2"),
        (("localhost", 2, 0), "--coordinator must be host:port of process 0, got 'localhost'"),
        ((None, None, None), "cannot join the cluster that the environment describes: "),
    ],
)
def test_clusters_that_cannot_be_joined(cluster, message, monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM", "OMPI", "TPU", "KUBERNETES", "JOB")):
            monkeypatch.delenv(name)
    with pytest.raises(InputError, match=message):
        distributed.initialize(*cluster)


def test_one_process_holds_everything():
    assert distributed.is_main() and distributed.own_pieces() == [0]
    assert distributed.own_rows(3).tolist() == [0, 1, 2]
    assert distributed.row_group() == (0, 1, True)
    assert distributed.agreed(np.arange(3)).tolist() == [0, 1, 2]
    assert distributed.fetch({"x": jax.numpy.ones(2)})["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("pieces", "groups"),
    [
        ([[0, 1], [2, 3]], [(0, 2, True), (1, 2, True)]),
        ([[0], [0], [1], [1]], [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),  # tensor crosses processes
        ([[2, 3], [0, 1]], [(1, 2, True), (0, 2, True)]),
        ([[0, 1], [0, 1]], [(0, 1, True), (0, 1, False)]),
        ([[0, 1], [1, 0, 2]], None),
        ([[0], [1, 2]], None),
    ],
)
def test_groups_of_processes_with_the_same_rows(pieces, groups, monkeypatch):
    monkeypatch.setattr(distributed, "_pieces_by_process", lambda: pieces)
    monkeypatch.setattr(distributed.sharding, "row_pieces", lambda: len(set(sum(pieces, []))))
    for process in range(len(pieces)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if groups is None:
            with pytest.raises(InputError, match="processes must hold whole, equal groups of rows"):
                distributed.row_group()
        else:
            assert distributed.row_group() == groups[process]
            rows = distributed.own_rows(2 * len(set(sum(pieces, []))))
            assert rows.tolist() == [2 * piece + i for piece in pieces[process] for i in range(2)]


# ---- the recipe on two processes of two devices --------------------------------------------------------------------

STEPS = 30


class Run:
    """`cdlm` in a folder, as so many processes of so many devices."""

    def __init__(self, folder: Path, processes: int, devices: int):
        self.folder, self.processes = folder, processes
        self.env = environment(devices)

    def start(self, *arguments: str) -> list[subprocess.Popen]:
        port = free_port()
        started = []
        for process in range(self.processes):
            cluster = [
                f"--coordinator=localhost:{port}",
                f"--num_processes={self.processes}",
                f"--process_id={process}",
            ]
            command = [sys.executable, "-m", "cdlm_jax", *arguments, *(cluster if self.processes > 1 else [])]
            with (self.folder / f"{arguments[0]}-{process}.log").open("w") as log:
                started.append(subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log))
        return started

    def __call__(self, *arguments: str) -> str:
        """What the first process printed, once all have ended well."""
        processes = self.start(*arguments)
        codes = [process.wait(timeout=300) for process in processes]
        logs = [(self.folder / f"{arguments[0]}-{process}.log").read_text() for process in range(self.processes)]
        assert not any(codes), "\n".join(logs)[-3000:]
        return logs[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes of two devices, and one of four, with the same recipe."""
    found = []
    for name, processes in (("two", 2), ("one", 1)):
        folder = tmp_path_factory.mktemp(name)
        tiny_folder().save(folder / "teacher")
        distill = {"steps": STEPS, "accumulate": 1, "optimizer": {"name": "adamw"}, "ema_decay": 0.0}
        mesh = {"data": 2, "fsdp": 2, "tensor": 1}
        write_config(folder / "recipe.py", SETTINGS | {"mesh": mesh, "distill": SETTINGS["distill"] | distill})
        found.append(Run(folder, processes, 4 // processes))
    return found


@pytest.mark.slow
def test_two_processes_do_what_one_does(runs):
    two, one = runs
    # Two processes begin the store, both die after their first shards, and one alone finishes it.
    processes = two.start("collect", "--config=recipe.py")
    while not list((two.folder / "run").glob("trajectories/*-of-00004")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    Run(two.folder, 1, 4)("collect", "--config=recipe.py")
    one("collect", "--config=recipe.py")
    stores = [read(run.folder / "run" / "trajectories") for run in runs]
    assert stores[0].metadata == stores[1].metadata
    for a, b in zip(*stores, strict=True):
        for name in a.keys() - {"hidden"}:
            np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_allclose(a["hidden"].astype(np.float32), b["hidden"].astype(np.float32), rtol=1e-2, atol=1e-2)

    # The second process dies after the first checkpoint: nobody finishes, and the same command continues.
    processes = two.start("distill", "--config=recipe.py")
    checkpoints = two.folder / "run" / "distill" / "checkpoints"
    while not (checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    processes[0].kill()  # as a launcher does; by itself it ends when the heartbeats are missed, after 100 s
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    assert not (two.folder / "run" / "student").exists()
    for run in runs:
        run("distill", "--config=recipe.py")
    students = [ModelFolder.load(run.folder / "run" / "student").model for run in runs]
    for ours, theirs in zip(*map(jax.tree.leaves, students), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)

    for run in runs:
        assert re.search(r"chain +5 ", run("evaluate", "--model=run/student", "--task=chain", "--num=5"))
        run("generate", "--model=run/student", "--task=chain", "--num=5", "--batch_size=4", "--output=answers.jsonl")
    answers = [(run.folder / "answers.jsonl").read_text() for run in runs]
    assert answers[0] == answers[1] and answers[0].count("\n") == 5


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(runs):
    two = runs[0]

    def stopped(work: str, stage: str, begun: Callable[[], bool]) -> str:
        """What both processes said when the second got SIGTERM as soon as something had begun."""
        processes = two.start(stage, "--config=recipe.py", f"--config.work={work}")
        while not begun():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[1].terminate()
        assert [process.wait(timeout=300) for process in processes] == [75, 75]
        said = [(two.folder / f"{stage}-{process}.log").read_text().splitlines()[-1] for process in range(2)]
        assert said[0] == said[1]
        return said[0]

    store, checkpoints = two.folder / "told" / "trajectories", two.folder / "told" / "distill" / "checkpoints"
    again = "run the same command to continue"
    assert stopped("told", "collect", (store / "store.json").exists) == f"cdlm collect: preempted; {again}"
    two("collect", "--config=recipe.py", "--config.work=told")
    shutil.copytree(store, two.folder / "calm" / "trajectories")
    two("distill", "--config=recipe.py", "--config.work=calm")
    said = stopped("told", "distill", checkpoints.is_dir)
    assert re.fullmatch(rf"cdlm distill: preempted at step \d+, saved; {again}", said)
    two("distill", "--config=recipe.py", "--config.work=told")
    assert contents(two.folder / "told" / "student") == contents(two.folder / "calm" / "student")
    lines = [json.loads(line) for line in (two.folder / "told" / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]


@pytest.mark.slow
def test_an_error_of_one_process_ends_it(runs):
    """While its peer waits for it: Python's own end would wait for the peer."""
    two = runs[0]
    occupied = two.folder / "occupied" / "trajectories"
    occupied.mkdir(parents=True)
    (occupied / "notes.txt").write_text("mine")
    first, second = two.start("collect", "--config=recipe.py", "--config.work=occupied")
    assert first.wait(timeout=120) == 2
    assert "holds 'notes.txt' but no trajectory store" in (two.folder / "collect-0.log").read_text()
    second.kill()
    second.wait()


@pytest.mark.slow
def test_processes_with_the_same_rows(runs):
    """`tensor` crosses two processes of one device: both decode the same rows, and the first one writes them."""
    folder, plain = runs[0].folder, tiny_folder()
    tokenizer = Tokenizer.characters(tasks.CHARACTERS, ("<eos>", "<mask>", "<unused>"))  # 52, which 2 divides
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<{name}>") for name in ("eos", "mask")}
    config = dataclasses.replace(
        plain.model.config, vocab_size=tokenizer.vocab_size, pad_token_id=ids["eos_token_id"], **ids
    )
    ModelFolder(Transformer(config, rngs=nnx.Rngs(0)), tokenizer, plain.metadata).save(folder / "even")
    for work, devices, mesh in (("tensor", 1, "2"), ("rows", 2, "1")):
        sizes = ["--config.mesh.data=1", "--config.mesh.fsdp=-1", f"--config.mesh.tensor={mesh}"]
        run = Run(folder, 2, devices)
        run("collect", "--config=recipe.py", "--config.teacher=even", f"--config.work={work}", *sizes)
    for a, b in zip(*(read(folder / name / "trajectories") for name in ("tensor", "rows")), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["order"], b["order"])
