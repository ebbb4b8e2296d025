"""What the kernels cost, from their sizes and tiles alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cdlm_jax.kernels import cost
from cdlm_jax.kernels.vocab import gpu
from cdlm_jax.kernels.vocab.tiles import MIB, OPS, Sizes, Tiles, choose, walks
from cdlm_jax.mesh.chips import HOPPER_CORES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost(cost.Cost):
    """least: hidden rows and head read once. fetched: bytes that a GPU's programs copy into shared memory."""

    tiles: Tiles | gpu.Tiles
    fetched: int = 0


def sizes_of(op: str, n: int, d: int, vocab: int, dtype=jnp.bfloat16) -> dict[str, Sizes]:
    """Of each kernel of an op of `tiles.OPS`: what its tiles are chosen, and looked up, by. One head for all rows."""
    hidden, head = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, vocab), dtype)
    return walks(op, (hidden,) * hiddens(op), (head,))


def hiddens(op: str) -> int:
    return 2 if op == "KL" else 1


def on_tpu(
    op: str, kernel: str, n: int, d: int, vocab: int, cores: int, vmem: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Cost:
    """Of one kernel ("statistics", "d hidden" or "d head") of an op."""
    sizes, columns_first = sizes_of(op, n, d, vocab, dtype)[kernel], kernel == "d head"
    tiles = choose(sizes, columns_first, cores, vmem)
    return Cost(
        moved=sizes.moved(tiles, columns_first),
        least=(n * hiddens(op) + vocab) * d * jnp.dtype(dtype).itemsize,
        flops=2 * n * d * vocab * (hiddens(op) + (kernel != "statistics")),
        on_chip=sizes.vmem(tiles.rows, tiles.columns),
        tiles=tiles,
    )


HOPPER_L2 = 50 * MIB


def on_gpu(op: str, n: int, d: int, vocab: int, cores: int = HOPPER_CORES, tiles: gpu.Tiles | None = None) -> Cost:
    """Of confidence, drawn or not, in bfloat16.

    Programs that run at once have the same columns for other rows, and find them in L2: the head is read from HBM once
    for as many tiles of rows as run. So are the hidden rows, if half of L2 holds them; else again for each tile of
    columns. What the kernel writes is read once more, to be put together.
    """
    numbers, kept, _ = OPS[op]
    tiles = tiles or gpu.choose(n, vocab, numbers > 0, cores)
    row_tiles, column_tiles = math.ceil(n / tiles.rows), math.ceil(vocab / tiles.columns)
    rows, head = n * d * 2, d * vocab * 2
    again = 1 if rows <= HOPPER_L2 / 2 else math.ceil(column_tiles / tiles.splits)
    results = tiles.splits * row_tiles * tiles.rows * gpu.WIDTH * 4 * kept
    return Cost(
        moved=head * math.ceil(row_tiles / cores) + rows * again + 2 * results,
        least=rows + head,
        flops=2 * n * d * vocab,
        on_chip=tiles.shared(numbers),
        tiles=tiles,
        fetched=row_tiles * column_tiles * d // gpu.DEPTH * tiles.stage,
    )
