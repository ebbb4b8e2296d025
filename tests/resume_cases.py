"""Run by test_resume in processes of their own, since the number of devices is fixed when JAX starts:

python resume_cases.py meshes FOLDER           ->  JSON: how far continued runs are from an uninterrupted one
python resume_cases.py cluster FOLDER PORT ID  ->  one of two processes; JSON: the same, and what it said on stopping
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cdlm_jax.mesh import preemption, sharding
from cdlm_jax.mesh.preemption import Preempted
from cdlm_jax.training.loop import LoopConfig, NonFiniteLoss, train
from cdlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cdlm_jax.training.step import TrainState, make_train_step

STEPS, ROWS, WIDTH = 5, 8, 16
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.05, warmup_fraction=0.2), STEPS)


def loss_fn(trainable, frozen, batch, keys, step):
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    hidden = jnp.tanh(sharding.matmul(batch["x"] + noise, trainable["up"]))
    out = sharding.matmul(hidden, trainable["down"])
    return jnp.mean((out - batch["x"]) ** 2), {"mean_id": jnp.mean(batch["id"].astype(jnp.float32))}


TRAIN_STEP = make_train_step(loss_fn, OPTIMIZER, seed=7, ema_decay=0.9)


def start() -> TrainState:
    rng = np.random.default_rng(1)
    up, down = (jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 4, jnp.float32) for _ in range(2))
    placed = {"up": sharding.put(up, "embed", "mlp"), "down": sharding.put(down, "mlp", "embed")}
    return TrainState.create(placed, OPTIMIZER, ema=True)


def batches(poisoned: int | None = None) -> grain.IterDataset:
    """Shuffled batches, of which each process has an equal share of the rows; those of one batch may be no numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3 * ROWS, WIDTH)).astype(np.float32)
    if poisoned is not None:
        x[poisoned] = np.nan
    rows = [{"id": np.int32(i), "x": x[i], "answer": np.zeros(4, np.int32)} for i in range(len(x))]
    mine = grain.MapDataset.source(rows).seed(3).shuffle().repeat()[jax.process_index() :: jax.process_count()]
    dataset = mine.batch(ROWS // jax.process_count(), drop_remainder=True)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


def run(folder: Path, *, steps: int = STEPS, train_step=TRAIN_STEP, state=None, data=None) -> TrainState:
    return train(
        train_step,
        start() if state is None else state,
        None,
        batches() if data is None else data,
        LoopConfig(steps=steps, log_every=1),
        folder=folder,
        settings={"seed": 7},
        label="toy",
    )


def on(mesh: str):
    data, fsdp, tensor = map(int, mesh.split("x"))
    return jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)))


def laid_out(state: TrainState) -> list:
    return [jax.typeof(x) for x in jax.tree.leaves(state)]


def difference(one, other) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


def gathered(state: TrainState) -> list[np.ndarray]:
    whole = jax.sharding.NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    return jax.device_get(jax.tree.leaves(jax.jit(lambda x: x, out_shardings=whole)(state)))


def meshes(folder: Path) -> dict:
    """Three steps on one mesh, continued on others."""
    with on("2x2x2"):
        whole = jax.device_get(run(folder / "whole"))
        begun = jax.device_get(run(folder / "begun", steps=3))

    def continued(name: str) -> dict[str, float]:
        again = shutil.copytree(folder / "begun", folder / name)
        fresh = start()
        restored = run(again, steps=3, state=fresh)  # nothing left to do
        assert laid_out(restored) == laid_out(fresh)
        restored = jax.device_get(restored)
        return {"restored": difference(restored, begun), "end": difference(jax.device_get(run(again)), whole)}

    found = {}
    for mesh in ("2x2x2", "1x8x1"):
        with on(mesh):
            found[mesh] = continued(mesh)
    return found | {"one device": continued("one device")}


def cluster(folder: Path, process: int) -> dict:
    """SIGTERM reaches the second process only; both stop, go on, and later meet a loss that is not a number."""

    def told_at(step: int):
        def train_step(state, frozen, batch):
            if process == 1 and int(state.step) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return TRAIN_STEP(state, frozen, batch)

        return train_step

    def said(error, **options) -> str:
        try:
            with preemption.noticed():  # as a command in a cluster is run
                run(folder / "run", **options)
        except error as reason:
            return str(reason)
        return "nothing"

    found = {"preempted": said(Preempted, train_step=told_at(1))}
    whole, continued = run(folder / "whole"), run(folder / "run")
    assert laid_out(continued) == laid_out(start())
    found["difference"] = difference(*map(gathered, (whole, continued)))
    found["not a number"] = said(NonFiniteLoss, steps=STEPS + 3, data=batches(poisoned=0))
    return found


def main() -> None:
    kind, folder, *place = sys.argv[1:]
    if kind == "meshes":
        print(json.dumps(meshes(Path(folder))))
        return
    port, process = map(int, place)
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    with on("2x2x1"):
        print(json.dumps(cluster(Path(folder), process)))


if __name__ == "__main__":
    main()
