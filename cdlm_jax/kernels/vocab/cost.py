"""What the kernels cost, from their sizes and tiles alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cdlm_jax.chips import Chip
from cdlm_jax.kernels.vocab import gpu
from cdlm_jax.kernels.vocab.statistics import Rows
from cdlm_jax.kernels.vocab.tpu import KEPT, LANES, MIB, SUMMED, Sizes, Tiles, choose, lanes


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call. Bytes moved to and from HBM, and the least: hidden rows and head read once. flops: of the products.
    vmem: bytes, of a GPU in shared memory; fetched: bytes that its programs copy there."""

    moved: int
    least: int
    flops: int
    vmem: int
    tiles: Tiles | gpu.Tiles
    fetched: int = 0

    @property
    def ratio(self) -> float:
        return self.moved / self.least

    @property
    def intensity(self) -> float:
        return self.flops / self.moved

    def seconds(self, chip: Chip) -> float:
        """The roofline's bound."""
        return max(self.moved / chip.bandwidth, self.flops / chip.flops)


def _rows(n: int, d: int, dtype, hiddens: int, extras: int) -> Rows:
    hidden = (jax.ShapeDtypeStruct((n, d), dtype),) * hiddens
    return Rows(hidden, None, (jax.ShapeDtypeStruct((n, 1), jnp.float32),) * extras)


# Hidden rows of a row, its other numbers (a weight among them), and its statistics.
STATISTICS = {"confidence": (1, 0, 6), "confidence, drawn": (1, 3, 9), "KL": (2, 1, 5), "NLL": (1, 2, 3)}
GRADIENTS = {"KL": (2, 4), "NLL": (1, 4)}


def forward_sizes(op: str, n: int, d: int, vocab: int, dtype=jnp.bfloat16) -> Sizes:
    """Of statistics, for an op of STATISTICS: what its tiles are chosen, and looked up, by."""
    hiddens, extras, kept = STATISTICS[op]
    head = jax.ShapeDtypeStruct((d, vocab), dtype)
    return Sizes.of(_rows(n, d, dtype, hiddens, extras), (head,), per_row=KEPT * LANES * kept)


def forward(op: str, n: int, d: int, vocab: int, cores: int, vmem: int, dtype=jnp.bfloat16) -> Cost:
    """Of statistics, for an op of STATISTICS."""
    hiddens, extras, kept = STATISTICS[op]
    return _cost(_rows(n, d, dtype, hiddens, extras), vocab, hiddens, cores, vmem, per_row=KEPT * LANES * kept)


def backward(op: str, of: str, n: int, d: int, vocab: int, cores: int, vmem: int, dtype=jnp.bfloat16) -> Cost:
    """Of the gradient `of` "hidden" or "head", for an op of GRADIENTS."""
    hiddens, extras = GRADIENTS[op]
    stays = {"per_row": SUMMED * lanes(d)} if of == "hidden" else {"per_column": SUMMED * d}
    return _cost(_rows(n, d, dtype, hiddens, extras), vocab, hiddens + 1, cores, vmem, of == "head", **stays)


HOPPER_CORES, HOPPER_L2 = 132, 50 * MIB


def on_gpu(op: str, n: int, d: int, vocab: int, cores: int = HOPPER_CORES, tiles: gpu.Tiles | None = None) -> Cost:
    """Of confidence, drawn or not, in bfloat16.

    Programs that run at once have the same columns for other rows, and find them in L2: the head is read from HBM once
    for as many tiles of rows as run. So are the hidden rows, if half of L2 holds them; else again for each tile of
    columns. What the kernel writes is read once more, to be put together.
    """
    _, extras, kept = STATISTICS[op]
    tiles = tiles or gpu.choose(n, vocab, extras > 0, cores)
    row_tiles, column_tiles = math.ceil(n / tiles.rows), math.ceil(vocab / tiles.columns)
    rows, head = n * d * 2, d * vocab * 2
    again = 1 if rows <= HOPPER_L2 / 2 else math.ceil(column_tiles / tiles.splits)
    results = tiles.splits * row_tiles * tiles.rows * gpu.WIDTH * 4 * kept
    return Cost(
        moved=head * math.ceil(row_tiles / cores) + rows * again + 2 * results,
        least=rows + head,
        flops=2 * n * d * vocab,
        vmem=tiles.shared(extras),
        tiles=tiles,
        fetched=row_tiles * column_tiles * d // gpu.DEPTH * tiles.stage,
    )


def _cost(rows: Rows, vocab, products, cores, vmem, columns_first=False, **stays) -> Cost:
    n, d = rows.hidden[0].shape
    dtype = rows.hidden[0].dtype
    sizes = Sizes.of(rows, (jax.ShapeDtypeStruct((d, vocab), dtype),), **stays)
    tiles = choose(sizes, columns_first, cores, vmem)
    return Cost(
        moved=sizes.moved(tiles, columns_first),
        least=(n * len(rows.hidden) + vocab) * d * dtype.itemsize,
        flops=2 * n * d * vocab * products,
        vmem=sizes.vmem(tiles.rows, tiles.columns),
        tiles=tiles,
    )
