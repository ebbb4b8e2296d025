"""Bad input to the commands on four devices: one clear line, a non-zero exit status, and nothing written."""

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from devices import environment
from test_model_folder import contents, tiny_folder
from test_recipe import SETTINGS, write_config

from cdlm_jax.cli import main

TESTS = Path(__file__).parent
COLLECT, DISTILL, EVALUATE = (
    "collect --config=pod.py",
    "distill --config=pod.py",
    "evaluate --model=teacher --task=chain",
)
CLUSTER = f"{COLLECT} --coordinator=localhost:1234"

# name -> command, and what its one line says
CASES = {
    "mesh too large": (f"{COLLECT} --config.mesh.data=3", ["mesh data 3 x fsdp -1", "does not fit 4 devices"]),
    "mesh too small": (f"{COLLECT} --config.mesh.fsdp=2", ["mesh data 1 x fsdp 2", "does not fit 4 devices"]),
    "mesh of nothing": (f"{COLLECT} --config.mesh.tensor=0", ["positive sizes", "one may be -1"]),
    "mesh of two unknowns": (f"{COLLECT} --config.mesh.data=-1", ["positive sizes", "one may be -1"]),
    "mesh axis misspelt": (
        f"{COLLECT} --config.mesh.tensors=2",
        ["config.mesh.tensors", "data, fsdp, tensor"],
    ),
    "mesh of a flag": (f"{EVALUATE} --mesh=2x2", ["dataxfsdpxtensor", "'2x2'"]),
    "mesh of a flag too large": (f"{EVALUATE} --mesh=8x1x1", ["data 8", "does not fit 4 devices"]),
    "heads that tensor does not divide": (
        f"{COLLECT} --config.mesh.fsdp=1 --config.mesh.tensor=4",
        ["num_heads 2 must be a multiple of the mesh's tensor 4"],
    ),
    "batch of collect": (f"{COLLECT} --config.collect.batch_size=6", ["6 rows", "data 1 * fsdp 4"]),
    "batch of distill": (f"{DISTILL} --config.distill.batch_size=6", ["6 rows", "data 1 * fsdp 4"]),
    "parts of a batch": (
        f"{DISTILL} --config.distill.batch_size=8 --config.distill.accumulate=4",
        ["2 rows", "data 1 * fsdp 4"],
    ),
    "half a cluster": (CLUSTER, ["--coordinator, --num_processes and --process_id together", "num_processes"]),
    "process outside": (f"{CLUSTER} --num_processes=2 --process_id=2", ["--process_id", "0..1", "got 2"]),
    "coordinator without a port": (
        f"{COLLECT} --coordinator=localhost --num_processes=2 --process_id=0",
        ["--coordinator", "host:port", "'localhost'"],
    ),
    "no cluster": (f"{COLLECT} --distributed", ["cannot join the cluster that the environment describes"]),
    "no prompts": ("collect --config=no_prompts.py", ["cannot read nowhere.jsonl"]),
    "a line that is no prompt": ("collect --config=bad_prompts.py", ["prompts.jsonl, line 2", '{"prompt": text']),
    "fewer prompts than asked for": ("collect --config=few_prompts.py", ["num_prompts is 10", "1 of its 1 prompts"]),
    "two sources of prompts": ("collect --config=two_sources.py", ["config.tasks or config.prompts"]),
    "another architecture": ("collect --config=deeper.py", ["config.architecture.num_layers is 3", "teacher has 2"]),
    "weights without stores": ("distill --config=weights.py", ["0 stores cannot have 1 store_weights"]),
    "a store of another model": ("distill --config=pod.py --config.teacher=other", ["model_fingerprint: got "]),
    "a damaged shard": (f"{DISTILL} --config.work=damaged", ["damaged trajectory shard", "00001-of-00004"]),
    "checkpoints of another run": (f"{DISTILL} --config.distill.lora_rank=3", ["another run: distill.lora_rank is 2"]),
    "weights cut short": (f"{COLLECT} --config.teacher=truncated", ["truncated"]),
    "keeping what is never saved": (f"{DISTILL} --config.distill.keep_every=3", ["keep_every 3", "checkpoint_every 2"]),
}


def _world() -> None:
    """One good model and one finished run on four devices, and what can be wrong with either."""
    for seed, name in enumerate(("teacher", "other")):
        tiny_folder(seed).save(Path(name))
    shutil.copytree("teacher", "truncated")
    weights = Path("teacher/model.safetensors").read_bytes()
    Path("truncated/model.safetensors").write_bytes(weights[: len(weights) // 2])
    distill = SETTINGS["distill"] | {"accumulate": 1, "steps": 2, "keep_every": 0}
    good = SETTINGS | {"distill": distill}
    write_config(Path("pod.py"), good)
    Path("prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    given = good | {"tasks": {}, "prompts": "prompts.jsonl", "work": "new"}
    write_config(Path("few_prompts.py"), given)
    write_config(Path("no_prompts.py"), given | {"prompts": "nowhere.jsonl"})
    Path("bad_prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": 7}\n')
    write_config(Path("bad_prompts.py"), given | {"prompts": "bad_prompts.jsonl"})
    write_config(Path("two_sources.py"), given | {"tasks": {"chain": 1.0}})
    write_config(Path("weights.py"), good | {"store_weights": (1.0,)})
    config = tiny_folder().model.config
    architecture = {name: getattr(config, name) for name in config.__dataclass_fields__} | {"num_layers": 3}
    write_config(Path("deeper.py"), good | {"architecture": architecture})
    for command in (COLLECT, DISTILL):
        assert main(shlex.split(command)) == 0
    shutil.copytree("run/trajectories", "damaged/trajectories")
    shard = next(Path("damaged/trajectories").glob("*-00001-of-00004"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _run(line: str) -> tuple[int, str, bool]:
    """Exit status, what went to stderr, and whether any file changed."""
    before, error = contents(Path()), io.StringIO()
    sys.modules.pop("config_config", None)  # the config file that was loaded before
    with contextlib.redirect_stderr(error):
        status = main(shlex.split(line))
    return status, error.getvalue(), contents(Path()) != before


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Every case, run in one process that has four devices."""
    folder = tmp_path_factory.mktemp("pods")
    done = subprocess.run(
        [sys.executable, __file__, "results.json"], cwd=folder, env=environment(4), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, results):
    line, expected = CASES[name]
    status, error, changed = results[name]
    assert status == 2
    assert error.startswith(f"cdlm {line.split()[0]}: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for part in expected:
        assert part in error
    assert not changed


if __name__ == "__main__":
    _world()
    found = {name: _run(line) for name, (line, _) in CASES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))
