"""How the TPU kernels cut the rows and the vocabulary: figures measured on a device (`tuning.json`), or what fits."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cdlm_jax.kernels.vocab.statistics import Rows
from cdlm_jax.kernels.vocab.xla import LANES

STEP = 256  # rows of a tile that are computed with at a time: bounds the code's length and its intermediate values
TUNED = Path(__file__).with_name("tuning.json")  # device kind -> `Sizes.name` -> fields of Tiles
MIB = 2**20

# Bytes in VMEM for each number of a result: written from there while the next is computed; or also summed there.
KEPT, SUMMED = 2 * 4, 4 + 2 * 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """rows, columns: of a tile. splits: parts of the vocabulary that cores walk on their own. vmem: bytes allowed."""

    rows: int
    columns: int
    splits: int = 1
    vmem: int = 16 * MIB


class Sizes(NamedTuple):
    """Of a kernel's arguments; widths in bytes, as they lie in VMEM."""

    rows: int
    d: int
    vocab: int
    row: int  # bytes of a row of all inputs
    column: int  # bytes of a column of all heads
    per_row: int  # bytes of what stays in VMEM, for a row of a tile
    per_column: int  # and for a column of a tile

    @classmethod
    def of(cls, rows: Rows, heads, per_row: int = 0, per_column: int = 0) -> "Sizes":
        n, d = rows.hidden[0].shape
        row = sum(lanes(x.shape[1]) * x.dtype.itemsize for x in jax.tree.leaves(rows))
        column = sum(head.shape[0] * head.dtype.itemsize for head in heads)
        return cls(n, d, heads[0].shape[1], row, column, per_row, per_column)

    @property
    def name(self) -> str:
        return "x".join(map(str, self))

    def moved(self, tiles: Tiles, columns_first: bool = False) -> int:
        """Bytes that a kernel reads: a tile is fetched when it is not the one of the step before."""
        row_tiles, column_tiles = pl.cdiv(self.rows, tiles.rows), pl.cdiv(self.vocab, tiles.columns)
        rows, head = self.rows * self.row, self.vocab * self.column
        if columns_first:
            return rows * (column_tiles if row_tiles > 1 else 1) + head
        return rows * tiles.splits + head * (row_tiles if column_tiles > tiles.splits else 1)

    def vmem(self, rows: int, columns: int) -> int:
        """Bytes that a program needs: what is fetched is there twice, the next tile coming while one is in use."""
        values = 4 * min(rows, STEP) * columns * 12
        return 2 * (rows * self.row + columns * self.column) + rows * self.per_row + columns * self.per_column + values


class Op(NamedTuple):
    """What a function keeps of a row, beside its hidden ones. numbers: that its statistics need, a weight among them;
    statistics: how many those are; in_gradients: numbers that the gradients need, None if it has none."""

    numbers: int
    statistics: int
    in_gradients: int | None = None


OPS = {
    "confidence": Op(0, 6),
    "confidence, drawn": Op(3, 9),
    "KL": Op(1, 5, 4),
    "NLL": Op(2, 3, 4),
    "NLL of each row": Op(1, 3),
}


def walks(op: str, hiddens, heads) -> dict[str, Sizes]:
    """The sizes of each kernel that an op of OPS, and its gradients, need: hiddens [n, d], heads [d, V]."""
    n, d = hiddens[0].shape

    def sizes(numbers: int, **stays) -> Sizes:
        extra = (jax.ShapeDtypeStruct((n, 1), jnp.float32),) * numbers
        return Sizes.of(Rows(tuple(hiddens), extra=extra), heads, **stays)

    numbers, statistics, in_gradients = OPS[op]
    found = {"statistics": sizes(numbers, per_row=KEPT * LANES * statistics)}
    if in_gradients is not None:
        found["d hidden"] = sizes(in_gradients, per_row=SUMMED * lanes(d))
        found["d head"] = sizes(in_gradients, per_column=SUMMED * d)
    return found


def fitting(sizes: Sizes, vmem: int) -> list[tuple[int, int]]:
    """(rows, columns) of the tiles that fit, with room for what the compiler adds; none may.

    Columns divide the vocabulary, as it lies in memory, so that none is computed in vain.
    """
    n = sizes.rows
    rows = [size for size in (16, 32, 64, 128) if size < n] + ([n] if n <= STEP else list(range(STEP, 1025, STEP)))
    columns = [size for size in range(LANES, 512 + 1, LANES) if lanes(sizes.vocab) % size == 0]
    return [(r, c) for r in rows for c in columns if sizes.vmem(r, c) <= 0.8 * vmem]


def choose(sizes: Sizes, columns_first: bool, cores: int, vmem: int) -> Tiles:
    """Of the tiles that fit, those that move the least: the head is read once per tile of rows, or, for d head
    (`columns_first`), the rows once per tile of columns. The larger ones among equals."""

    def cost(tile):
        rows, columns = tile
        return sizes.moved(Tiles(rows=rows, columns=columns), columns_first), -rows * columns

    rows, columns = min(fitting(sizes, vmem), key=cost)
    splits = cores if rows >= sizes.rows and not columns_first else 1
    return Tiles(rows=rows, columns=columns, splits=splits, vmem=vmem)


def tuned(device_kind: str, sizes: Sizes) -> Tiles | None:
    """The tiles that were fastest on such a device; None if nobody measured."""
    found = _tuned().get(device_kind, {}).get(sizes.name)
    return Tiles(**found) if found else None


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TUNED.read_text())


def lanes(width: int) -> int:
    """Columns that a row of `width` takes in VMEM."""
    return pl.cdiv(width, LANES) * LANES
