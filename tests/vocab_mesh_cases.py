"""Run by test_vocab in a process of its own, with eight devices: every engine's values on a mesh are those without one.

python vocab_mesh_cases.py   prints the name of each engine that holds
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cdlm_jax.kernels.vocab import confidence, gpu, linear_kl, linear_nll, mesh, ops, reference, tpu, xla
from cdlm_jax.kernels.vocab.noise import Seeds
from cdlm_jax.mesh import sharding

MESH = sharding.MeshConfig(data=2, fsdp=2, tensor=2)


def inputs(d=8, vocab=520):
    """teacher, student [4, 6, d], head [d, vocab], targets, weights [4, 6], seeds."""
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 4, 6, d)).astype(np.float32)
    head = rng.normal(size=(d, vocab)).astype(np.float32)
    targets, weights = rng.integers(vocab, size=(4, 6), dtype=np.int32), rng.uniform(size=(4, 6)).astype(np.float32)
    return teacher, student, head, targets, weights, Seeds(*rng.integers(2**32, size=(3, 4, 6), dtype=np.uint32))


def same(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


def on_xla() -> None:
    """The public functions, on a mesh of anyone's: its axes have other names, and the head is whole or in pieces."""

    @jax.jit
    def run(teacher, student, head, targets, weights):
        def loss(student, head):
            kl = linear_kl(teacher, student, head, weights, tile=16)
            return kl + linear_nll(student, head, targets, weights, tile=16)

        seen = confidence(student, head, tile=16, forbidden=(20,))
        drawn = confidence(student, head, tile=16, forbidden=(20,), temperature=0.7, key=jax.random.key(3))
        return jax.value_and_grad(loss, (0, 1))(student, head), seen, drawn

    teacher, student, head, targets, weights, _ = inputs(vocab=48)
    expected = run(teacher, student, head, targets, weights)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    two = jax.make_mesh((2, 2), ("data", "model"), axis_types=explicit, devices=jax.devices()[:4])
    for spec in (jax.P(), jax.P(None, "model")):
        with jax.set_mesh(two):
            place = lambda x, spec: jax.device_put(x, jax.NamedSharding(two, spec))  # noqa: E731
            rows = [place(x, jax.P("data")) for x in (teacher, student, targets, weights)]
            same(run(*rows[:2], place(head, spec), *rows[2:]), expected)


def on_tpu() -> None:
    @partial(jax.jit, static_argnums=0)
    def run(engine, teacher, student, head, targets, weights, seeds):
        def loss(student, head):
            kl = ops.linear_kl(engine, student, teacher, (head,), weights)
            return kl + ops.linear_nll(engine, student, head, targets, weights)

        return jax.value_and_grad(loss, (0, 1))(student, head), ops.confidence(engine, student, head, (20,), 0.5, seeds)

    teacher, student, head, *rest = inputs()
    expected = run(xla.Engine(64), teacher, student, head, *rest)
    with jax.set_mesh(sharding.make_mesh(MESH)):
        teacher, student, *rest = jax.tree.map(lambda x: sharding.put(x, "rows"), (teacher, student, *rest))
        on_columns = sharding.put(head, "embed", "vocab")
        found = run(tpu.Engine(interpret=True), teacher, student, on_columns, *rest)
    assert found[0][1][1].sharding == on_columns.sharding
    same(found, expected)


def on_gpu() -> None:
    """With a part for every column: interpret mode knows one device only."""

    def kernel(measure, merge, rows, head, first, tiles, interpret):
        z = reference.logits(rows.hidden[0], head)
        return measure((z,), jnp.broadcast_to(first + jnp.arange(head.shape[1]), z.shape), rows.extra)

    @partial(jax.jit, static_argnums=0)
    def run(engine, hidden, head, seeds):
        drawn = ops.confidence(engine, hidden, head, (20,), 0.5, seeds)
        return drawn, ops.confidence(engine, hidden, head, (), 0.0, None)

    hidden, _, head, *_, seeds = inputs(d=64)
    hidden, head = jnp.asarray(hidden / 4, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    gpu.statistics = kernel
    expected = run(xla.Engine(64), hidden, head, seeds)
    with jax.set_mesh(sharding.make_mesh(MESH)):
        hidden, seeds = jax.tree.map(lambda x: sharding.put(x, "rows"), (hidden, seeds))
        tiles = gpu.Tiles(rows=64, columns=16, splits=2, stages=2)
        same(run(gpu.Engine(tiles=tiles), hidden, sharding.put(head, "embed", "vocab"), seeds), expected)


if __name__ == "__main__":
    mesh.GATHERED = 100  # so that a device's columns are gathered in several steps
    for name, case in {"xla": on_xla, "tpu": on_tpu, "gpu": on_gpu}.items():
        case()
        print(name)
