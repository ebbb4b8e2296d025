"""The recipe end to end on a minute model: stages, continuation, and processes killed at random moments."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console
from test_model_folder import BLOCK_SIZE, GEN_LENGTH, PROMPT_LENGTH, contents, tiny_folder

from cdlm_jax import tasks
from cdlm_jax.cli import main
from cdlm_jax.config import InputError, build
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation import operating_point
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.recipes import recipe as stages
from cdlm_jax.recipes.quickstart import quickstart
from cdlm_jax.recipes.recipe import Recipe
from cdlm_jax.tasks.base import split_of
from cdlm_jax.trajectories import collect as collecting
from cdlm_jax.trajectories.store import read

SETTINGS = {
    "work": "run",
    "seed": 3,
    "tasks": {"chain": 1.0},
    "prompt_length": PROMPT_LENGTH,
    "gen_length": GEN_LENGTH,
    "block_size": BLOCK_SIZE,
    "teacher": "teacher",
    "heldout_per_task": 0,
    "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "mlp_size": 48,
        "rope_theta": 100.0,
        "norm_eps": 1e-5,
    },
    "pretrain": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "log_every": 1},
    "collect": {"num_prompts": 10, "temperatures": (0.0, 0.5), "batch_size": 4, "shard_size": 6},
    "distill": {
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "lora_rank": 2,
        "ema_decay": 0.9,
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
    },
}


def write_config(path: Path, settings: dict) -> Path:
    """A config file as a user would write it."""
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    )
    return path


def make_recipe(work: Path, **changes) -> Recipe:
    return build(Recipe, ConfigDict({**SETTINGS, "work": str(work), **changes}), "config")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work folder of an uninterrupted run: pretrain -> collect -> distill."""
    work = tmp_path_factory.mktemp("finished")
    stages.pretrain(make_recipe(work, heldout_per_task=2))
    recipe = make_recipe(work, teacher=str(work / "teacher"))
    stages.collect(recipe)
    stages.distill(recipe)
    return work


def continued(finished: Path, work: Path) -> Recipe:
    """A recipe in a new work folder that begins with the finished run's teacher and trajectories."""
    shutil.copytree(finished / "trajectories", work / "trajectories")
    return make_recipe(work, teacher=str(finished / "teacher"))


# ---- stages --------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_and_several_stores(tmp_path, finished):
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(5) for b in range(2)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    teacher = str(finished / "teacher")
    given = {"tasks": {}, "prompts": str(tmp_path / "sums.jsonl"), "teacher": teacher, "model": None, "pretrain": None}
    first = make_recipe(tmp_path / "first", **given)
    stages.collect(first)
    store = read(tmp_path / "first" / "trajectories")
    assert store.metadata.tasks == ("sums",) and store.metadata.num_records == 20
    stores = [str(tmp_path / "first" / "trajectories"), str(finished / "trajectories")]
    distill = SETTINGS["distill"] | {"steps": 2}
    second = make_recipe(
        tmp_path / "second", **given, stores=stores, store_weights=(1.0, 2.0), distill=distill, dtype="bfloat16"
    )
    with pytest.raises(InputError, match="model_fingerprint: got "):  # in bfloat16 it is another teacher
        stages.distill(second)
    stages.distill(dataclasses.replace(second, dtype=""))
    assert ModelFolder.load(tmp_path / "second" / "student").metadata["tasks"] == []
    with pytest.raises(InputError, match=r"num_prompts is 11, but .*sums.jsonl has fewer: 10 of its 10 prompts"):
        stages.collect(dataclasses.replace(first, collect=dataclasses.replace(first.collect, num_prompts=11)))
    with pytest.raises(InputError, match="pre-training needs config.tasks, config.model and config.pretrain"):
        stages.pretrain(first)


def test_a_teacher_of_another_architecture(tmp_path, finished):
    config = dataclasses.asdict(ModelFolder.load(finished / "teacher").model.config) | {"source": ""}
    recipe = make_recipe(tmp_path, teacher=str(finished / "teacher"), architecture=config)
    assert recipe.load_teacher().model.config.num_layers == 2
    recipe = make_recipe(tmp_path, teacher=str(finished / "teacher"), architecture=config | {"num_layers": 3})
    with pytest.raises(InputError, match="config.architecture.num_layers is 3, but .*teacher has 2"):
        recipe.load_teacher()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "prompts.jsonl"}, "give either config.tasks or config.prompts"),
        ({"tasks": {}}, "give either config.tasks or config.prompts"),
        ({"stores": ("a",), "store_weights": (1.0, 2.0)}, "1 stores cannot have 2 store_weights"),
        ({"dtype": "float16"}, "config.dtype must be '' or float32 or bfloat16, got 'float16'"),
        ({"mesh": {"data": 0}}, "must have positive sizes, of which one may be -1"),
        ({"architecture": {"layers": 2}}, "unknown config key config.architecture.layers"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        make_recipe(tmp_path, **changes)


def test_pretraining_a_causal_model(tmp_path, finished):
    pretrain = SETTINGS["pretrain"] | {"steps": 2, "objective": "autoregressive"}
    recipe = make_recipe(tmp_path, heldout_per_task=2, pretrain=pretrain)
    model = stages.pretrain(recipe)
    assert model.model.config.causal and model.metadata["role"] == "autoregressive"
    assert ModelFolder.load(tmp_path / "autoregressive").metadata == model.metadata
    assert metrics(tmp_path / "pretrain")[-1]["heldout/forwards"] <= GEN_LENGTH
    with pytest.raises(InputError, match="is a causal model, which objective masked_denoising cannot train"):
        stages.pretrain(make_recipe(tmp_path / "other", init=str(tmp_path / "autoregressive")))
    with pytest.raises(InputError, match="is a bidirectional model, which objective autoregressive cannot train"):
        stages.pretrain(dataclasses.replace(recipe, work=str(tmp_path / "third"), init=str(finished / "teacher")))


def test_pretraining(finished):
    teacher = ModelFolder.load(finished / "teacher")
    assert teacher.metadata == {
        "role": "teacher",
        "tasks": ["chain"],
        "prompt_length": PROMPT_LENGTH,
        "gen_length": GEN_LENGTH,
        "block_size": BLOCK_SIZE,
    }
    assert teacher.tokenizer.fingerprint() == tiny_folder().tokenizer.fingerprint()
    assert teacher.model.config.max_length == PROMPT_LENGTH + GEN_LENGTH
    rows = metrics(finished / "pretrain")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "heldout/chain" in row] == [2, 4]
    assert all(row["heldout/forwards"] == GEN_LENGTH for row in rows if "heldout/chain" in row)


def test_trajectories(finished):
    records = list(read(finished / "trajectories"))
    assert [int(record["prompt_id"]) for record in records] == [*range(10)] * 2
    assert [float(record["temperature"]) for record in records] == [0.0] * 10 + [0.5] * 10
    for record in records:
        blocks = record["order"].reshape(-1, BLOCK_SIZE)
        steps = np.arange(GEN_LENGTH).reshape(-1, BLOCK_SIZE)
        np.testing.assert_array_equal(np.sort(blocks, axis=1), steps)  # one token a step, blocks in turn
    for greedy, drawn in zip(records[:10], records[10:], strict=True):
        np.testing.assert_array_equal(greedy["prompt"], drawn["prompt"])
        np.testing.assert_array_equal(greedy["answer"], drawn["answer"])


def test_the_student_is_a_model_folder(finished, capsys):
    teacher, student = (ModelFolder.load(finished / role) for role in ("teacher", "student"))
    assert student.metadata == {**teacher.metadata, "role": "student"}
    same = {"source": ""}  # but the text of config.json; adapters are merged
    assert dataclasses.replace(student.model.config, **same) == dataclasses.replace(teacher.model.config, **same)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(teacher.model), jax.tree.leaves(student.model), strict=True)
    ]
    assert any(changed)
    assert [row["step"] for row in metrics(finished / "distill")] == [1, 2, 3, 4, 5, 6]
    assert main(["evaluate", f"--model={finished / 'student'}", "--task=chain", "--num=3"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "chain" in line)
    assert "3" in row and "%" in row


def test_the_student_gets_its_preset(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "distill", tmp_path / "distill")
    recipe = continued(finished, tmp_path)
    recipe = dataclasses.replace(recipe, distill=dataclasses.replace(recipe.distill, preset_problems=2))
    asked = []

    def sweep(student, problems):
        asked.extend(problems)
        yield from real(student, problems)

    real = operating_point.sweep
    monkeypatch.setattr(operating_point, "THRESHOLDS", (1.0, 0.0))  # of random weights neither is better
    monkeypatch.setattr(operating_point, "sweep", sweep)
    stages.distill(recipe)  # no step is left: a checkpoint of a run without a preset continues
    student = ModelFolder.load(tmp_path / "student")
    assert student.metadata == ModelFolder.load(finished / "student").metadata | {"preset": {"threshold": 0.0}}
    assert Options().resolve(student.metadata).threshold == 0.0
    trained = [recipe.mixture("train", 20, stream=stream)[index] for stream in (0, 1) for index in range(20)]
    chain = tasks.get("chain")
    assert len(asked) == 2 and all(split_of(chain, problem) == "train" for _, problem in asked)
    assert not {problem.prompt for _, problem in asked} & {problem.prompt for _, problem in trained}


# ---- continuation --------------------------------------------------------------------------------------------------


def interrupted_before(step: int, make):
    """`make_train_step`, whose step number `step` never happens."""

    def make_failing(*args, **options):
        train_step = make(*args, **options)

        def run(state, frozen, batch):
            if int(state.step) == step:
                raise KeyboardInterrupt
            return train_step(state, frozen, batch)

        return run

    return make_failing


def test_distillation_continues_where_it_was_interrupted(finished, tmp_path, monkeypatch):
    recipe = continued(finished, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "make_train_step", interrupted_before(5, stages.make_train_step))
        with pytest.raises(KeyboardInterrupt):
            stages.distill(recipe)
    assert not (tmp_path / "student").exists()
    with monkeypatch.context() as patch:  # steps 0 to 3 are not repeated: 4 was saved
        for step in range(4):
            patch.setattr(stages, "make_train_step", interrupted_before(step, stages.make_train_step))
        stages.distill(recipe)
    assert contents(tmp_path / "student") == contents(finished / "student")

    def losses(folder):
        return [(row["step"], row["loss"]) for row in metrics(folder / "distill")]

    assert losses(tmp_path) == losses(finished), "a step that is repeated is logged once"


def test_finished_stages_do_nothing_again(finished, monkeypatch):
    recipe = make_recipe(finished, teacher=str(finished / "teacher"))
    before = contents(finished / "trajectories"), contents(finished / "student")

    def decode(*args, **options):
        raise AssertionError("a finished store is decoded again")

    monkeypatch.setattr(collecting, "trajectories", decode)
    for step in range(6):
        monkeypatch.setattr(stages, "make_train_step", interrupted_before(step, stages.make_train_step))
    stages.collect(recipe)
    stages.distill(recipe)
    assert (contents(finished / "trajectories"), contents(finished / "student")) == before


def test_collection_continues_where_it_was_interrupted(finished, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, teacher=str(finished / "teacher"))
    decode, calls = collecting.trajectories, []

    def failing(*args, **options):
        calls.append(options["temperature"])
        if len(calls) == 4:  # shard 0 is two batches; shard 1 has one of each temperature
            raise KeyboardInterrupt
        return decode(*args, **options)

    monkeypatch.setattr(collecting, "trajectories", failing)
    with pytest.raises(KeyboardInterrupt):
        stages.collect(recipe)
    assert len(list((tmp_path / "trajectories").glob("*.array_record-*"))) == 1
    stages.collect(recipe)
    assert calls == [0.0, 0.0, 0.0, 0.5] + [0.0, 0.5] + [0.5, 0.5] + [0.5]
    assert contents(tmp_path / "trajectories") == contents(finished / "trajectories")


# ---- slow ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quickstart(tmp_path):
    """Everything but good results: the models are random."""
    with (tmp_path / "printed.txt").open("w") as file:
        quickstart(
            make_recipe(tmp_path / "run", heldout_per_task=3), from_scratch=True, console=Console(file=file, width=120)
        )
    printed = (tmp_path / "printed.txt").read_text()
    work = tmp_path / "run" / "from_scratch"
    folder = work / "report"
    written = (folder / "results.md").read_text()
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.md", "accuracy.png", "order.png"}
    summary = json.loads((folder / "results.json").read_text())
    assert list(summary["seconds"]) == ["teacher", "trajectories", "student", "report"]
    assert len(summary["results"]) == 8
    for result in summary["results"]:
        assert list(result["scores"]) == ["chain"]
        assert result["scores"]["chain"]["problems"] == 3
        median, low, high = result["latency_ms"]
        assert 0 < low <= median <= high
        accuracy = f"{100 * result['scores']['chain']['accuracy']:.1f} %"
        assert f"| {result['name']} | {accuracy} | {accuracy} |\n" in written
    assert summary["results"][0]["scores"]["chain"]["forwards"] == GEN_LENGTH
    assert "| method | accuracy | forwards | tokens/forward | latency | speed-up |\n" in written
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("accuracy.png", "order.png"))
    assert "\nforward " in printed
    assert f"cdlm generate --model={work / 'student'}" in printed.replace("\n", "")


# A process that is going to be killed dies at one of these moments:
#   start: some time before it changes anything
#   work: some time after a few changes under its work folder (files appear, grow, get their final names)
#   end: as soon as its last product appears under any name
KILLS = {"start": 4, "work": 13, "end": 3}
LAST_PRODUCT = {"collect": "dataset_info.json", "distill": "student"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["collect", "distill"])
def test_killed_at_random_moments(command, tmp_path):
    """Whatever the moments, the run that ends at last leaves the same files as one that was never killed."""
    tiny_folder().save(tmp_path / "teacher")
    sizes = {
        "collect": {**SETTINGS["collect"], "num_prompts": 60, "shard_size": 5},
        "distill": {**SETTINGS["distill"], "steps": 24},
    }
    config = write_config(tmp_path / "config.py", {**SETTINGS, **sizes})
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def live(command: str, work: str, ends) -> bool:
        """Run the command, until ends(seconds, changes, names) says to kill it. Whether it was killed."""

        def names() -> list[str]:
            return sorted(f"{folder}/{name}" for folder, *lists in os.walk(tmp_path / work) for name in sum(lists, []))

        line = [sys.executable, "-m", "cdlm_jax", command, f"--config={config}", f"--config.work={work}"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                line, cwd=tmp_path, env=os.environ | compiled, stdout=log, stderr=subprocess.STDOUT
            )
        begin, before, changes = time.monotonic(), names(), 0
        with process:
            while process.poll() is None:
                now = names()
                changes += now != before
                before = now
                if ends(time.monotonic() - begin, changes, now):
                    process.kill()
                time.sleep(0.001)
        assert process.returncode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        return process.returncode != 0

    # The run that is never killed; it also shows how long the start takes, and how much there is to see.
    seen = {}

    def watch(seconds, changes, names):
        seen.setdefault(changes, seconds)

    if command == "distill":
        live("collect", "calm", watch)
        seen.clear()
    live(command, "calm", watch)
    start, changes_in_all = seen[1], max(seen)
    calm = tmp_path / "calm"
    rng = random.Random(2511)

    def moment(kind: str):
        enough = rng.randint(1, max(1, changes_in_all // 8))
        delay = rng.uniform(0, {"start": start, "work": 0.05, "end": 0.005}[kind])

        def ends(seconds, changes, names):
            if kind == "start":
                return seconds > delay
            if changes < enough if kind == "work" else not any(LAST_PRODUCT[command] in name for name in names):
                return False
            time.sleep(delay)
            return True

        return ends

    def fresh() -> str:
        work = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
        work.mkdir()
        if command == "distill":
            shutil.copytree(calm / "trajectories", work / "trajectories")
        return work.name

    def check(work: Path) -> None:
        assert {path.name for path in work.iterdir()} == {path.name for path in calm.iterdir()}
        assert contents(work / "trajectories") == contents(calm / "trajectories")
        if command == "collect":
            assert [int(record["prompt_id"]) for record in read(work / "trajectories")] == [*range(60)] * 2
        else:
            assert contents(work / "student") == contents(calm / "student")
            assert [row["step"] for row in metrics(work / "distill")] == [*range(1, 25)]

    work, kinds, finished = fresh(), rng.sample(list(KILLS), counts=KILLS.values(), k=sum(KILLS.values())), 0
    while kinds:
        if live(command, work, moment(kinds[-1])):
            kinds.pop()
        else:  # it was faster: a new run takes what is left of the kills
            check(tmp_path / work)
            work, finished = fresh(), finished + 1
    assert not live(command, work, lambda *_: False)
    check(tmp_path / work)
    print(f"{command}: {KILLS} kills, {finished + 1} finished runs, start {start:.1f} s, {changes_in_all} changes")
