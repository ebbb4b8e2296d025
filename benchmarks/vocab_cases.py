"""The vocabulary's kernels against the plain XLA path and materialized logits."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from cases import Case, Compared, Tuning
from jax.experimental.pallas import tpu as pltpu

from cdlm_jax.kernels.vocab import confidence, linear_kl, linear_nll, ops, reference, tpu
from cdlm_jax.kernels.vocab.api import TILE
from cdlm_jax.kernels.vocab.cost import Cost, on_gpu, on_tpu, sizes_of
from cdlm_jax.kernels.vocab.noise import row_seeds
from cdlm_jax.kernels.vocab.tiles import MIB, TUNED, Sizes, Tiles, choose
from cdlm_jax.mesh.chips import HOPPER_SHARED, Chip

MODELS = {"Dream-7B": (3584, 152064), "LLaDA-8B": (4096, 126464)}
FORBIDDEN = (7, 9)
TEMPERATURE = 0.5  # of the op `drawn`
# Platform -> op with a kernel -> rows; for those of the losses, all logits and their gradients have to have room.
KERNELS = {
    "tpu": {"confidence": (32, 1024), "drawn": (32,), "KL": (2048,), "NLL": (1024,)},
    "gpu": {"confidence": (32, 1024), "drawn": (32,)},
}
TILES = (TILE, 4 * TILE)  # of the XLA path
CHIPS = {  # with the cores that JAX sees as one device
    name: pltpu.get_tpu_info_for_chip(version, cores)
    for name, version, cores in (
        ("TPU v4", pltpu.ChipVersion.TPU_V4, 2),
        ("TPU v5e", pltpu.ChipVersion.TPU_V5E, 1),
        ("TPU v5p", pltpu.ChipVersion.TPU_V5P, 2),
        ("TPU v6e", pltpu.ChipVersion.TPU_V6E, 1),
        ("TPU7x", pltpu.ChipVersion.TPU_7X, 1),
    )
}


def arguments(op: str, n: int, d: int, vocab: int) -> tuple[jax.Array, ...]:
    """hidden and head, of which logits are about as wide as a model's; a teacher's hidden rows, or targets, and weights
    for a loss."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, teacher = (2 * jax.random.normal(key, (n, d), jnp.bfloat16) for key in keys[:2])
    head = jax.random.normal(keys[2], (d, vocab), jnp.bfloat16) * d**-0.5
    weights = jax.random.uniform(keys[3], (n,))
    more = {"KL": (teacher, weights), "NLL": (jax.random.randint(keys[1], (n,), 0, vocab), weights)}
    return hidden, head, *more.get(op, ())


def kl_with_gradient(kl):
    """(value, gradient of the student's hidden rows): the head is frozen, as with LoRA."""

    def both(student, head, teacher, weights):
        return jax.value_and_grad(lambda student: kl(teacher, student, head, weights))(student)

    return both


def with_gradients(nll):
    """(value, gradients of the hidden rows and of the head)."""
    return jax.value_and_grad(nll, (0, 1))


def on(op: str, **options):
    """The public function: `implementation`, and the XLA path's `tile`."""
    if op == "KL":
        return kl_with_gradient(partial(linear_kl, **options))
    if op == "NLL":
        return with_gradients(partial(linear_nll, **options))
    if op == "drawn":
        return lambda *given: confidence(
            *given, forbidden=FORBIDDEN, temperature=TEMPERATURE, key=jax.random.key(1), **options
        )
    return partial(confidence, forbidden=FORBIDDEN, **options)


def with_tiles(tiles: Tiles):
    """`confidence` at temperature 0 on the TPU's kernel."""
    engine = tpu.Engine(tiles=tiles)
    return lambda hidden, head: ops.confidence(engine, hidden, head, FORBIDDEN, 0.0, None)


def candidates(sizes: Sizes) -> list[Tiles]:
    """Those that fit this TPU: the chosen ones, and other numbers of columns."""
    cores, vmem = tpu.cores_and_vmem()
    first = choose(sizes, False, cores, vmem)
    columns = [c for c in (128, 256, 512, 1024, 2048, 4096) if sizes.vmem(first.rows, c) <= vmem]
    splits = sorted({1, first.splits})
    return [dataclasses.replace(first, columns=c, splits=each) for c in columns for each in splits]


def with_logits(op: str):
    """The definitions: an array of all logits."""
    if op == "KL":
        return kl_with_gradient(reference.linear_kl)
    if op == "NLL":
        return with_gradients(reference.linear_nll)

    def call(hidden, head):
        if op == "drawn":
            return reference.confidence(hidden, head, FORBIDDEN, TEMPERATURE, row_seeds(jax.random.key(1), hidden))
        return reference.confidence(hidden, head, FORBIDDEN)

    return call


def case(platform: str, model: str, op: str, n: int) -> Case:
    d, vocab = MODELS[model]
    others = {f"XLA, tile {tile}": Compared(on(op, implementation="xla", tile=tile)) for tile in TILES}
    tuning = None
    if platform == "tpu" and op == "confidence":
        sizes = sizes_of("confidence", n, d, vocab)["statistics"]
        tuning = Tuning(candidates=partial(candidates, sizes), call=with_tiles, file=TUNED, shape=sizes.name)
    return Case(
        name=f"{model}, {op}, {n} rows",
        make=partial(arguments, op, n, d, vocab),
        call=on(op, implementation=platform),
        expected=with_logits(op),
        others=others | {"logits": Compared(with_logits(op))},
        least=2 * d * (vocab * (2 if op == "NLL" else 1) + n * {"KL": 3, "NLL": 2}.get(op, 1)),
        tuning=tuning,
    )


def cases(platform: str) -> list[Case]:
    """Those of a platform that has a kernel."""
    known = KERNELS.get(platform, {})
    return [case(platform, model, op, n) for model in MODELS for op in known for n in known[op]]


def cost_model(chips: list[Chip]) -> tuple[list[str], list[list[str]]]:
    """A table, its head and its rows: the kernels' tiles, bytes and bounds, on chips of one kind."""
    on_chip = "VMEM MiB" if chips[0].torus else "shared KiB"
    head = ["vocabulary", "kernel", "chip", "R x C", on_chip, "moved / least", "FLOPs/byte", "bound"]
    lines = []
    for model, sizes in MODELS.items():
        for name, walk in (TPU_WALKS if chips[0].torus else GPU_WALKS).items():
            for chip in chips:
                lines.append([model, name, *_line(chip, walk, sizes)])
    return head, lines


TPU_WALKS = {
    "confidence, 32 rows": partial(on_tpu, "confidence", "statistics", 32),
    "confidence, drawn, 32 rows": partial(on_tpu, "confidence, drawn", "statistics", 32),
    "confidence, 1024 rows": partial(on_tpu, "confidence", "statistics", 1024),
    "KL, 16384 rows": partial(on_tpu, "KL", "statistics", 16384),
    "KL, d hidden": partial(on_tpu, "KL", "d hidden", 16384),
    "KL, d head": partial(on_tpu, "KL", "d head", 16384),
    "NLL, 16384 rows": partial(on_tpu, "NLL", "statistics", 16384),
    "NLL, d hidden": partial(on_tpu, "NLL", "d hidden", 16384),
    "NLL, d head": partial(on_tpu, "NLL", "d head", 16384),
}
GPU_WALKS = {
    f"{op}, {n} rows": partial(on_gpu, op, n) for op in ("confidence", "confidence, drawn") for n in (32, 1024)
}


def _line(chip: Chip, walk: Callable[..., Cost], sizes: tuple[int, int]) -> list[str]:
    if chip.torus:
        info = CHIPS[chip.name]
        vmem = info.vmem_capacity_bytes
        found, room = walk(*sizes, info.num_cores, vmem), vmem / MIB
        used = found.on_chip / MIB
    else:
        found, room = walk(*sizes), HOPPER_SHARED / 2**10
        used = found.on_chip / 2**10
    return [
        chip.name,
        f"{found.tiles.rows} x {found.tiles.columns}",
        f"{used:.1f} of {room:.0f}",
        f"{found.ratio:.3f}",
        f"{found.intensity:.0f}",
        f"{1e3 * found.seconds(chip):.3g} ms, {'FLOPs' if found.intensity > chip.ridge else 'HBM'}",
    ]
