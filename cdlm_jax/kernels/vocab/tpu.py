"""Streams the head through VMEM (Pallas Mosaic): a tile of logits is made, read and forgotten on the chip.

Three kernels, each a grid of tiles of rows [R, d] and of columns [d, C], both whole along d:

- statistics: columns innermost; a row tile's statistics stay in VMEM until all columns went by.
- d hidden: columns innermost; [R, d] in float32 stays in VMEM.
- d head: rows innermost; [d, C] in float32 stays in VMEM.

`docs/kernels.md` draws how they walk memory. On a mesh every device runs them on its own rows and columns, inside
`jax.shard_map`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from functools import reduce
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from cdlm_jax import sharding
from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab.statistics import LEAST, Rows, nothing, peak
from cdlm_jax.kernels.vocab.xla import LANES, sweep

GATHERED = 16384  # columns of a head whose `fsdp` pieces are put together at a time
STEP = 256  # rows of a tile that are computed with at a time: bounds the code's length and its intermediate values
NO_TOKEN = 2**31 - 1
TUNED = Path(__file__).with_name("tuning.json")  # device kind -> `Sizes.name` -> fields of Tiles
MIB = 2**20

# Bytes in VMEM for each number of a result: written from there while the next is computed; or also summed there.
KEPT, SUMMED = 2 * 4, 4 + 2 * 4

# ---- tiles ---------------------------------------------------------------------------------------------------------


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
        column = sum(head.shape[0] for head in heads) * heads[0].dtype.itemsize
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


def row_sizes(n: int) -> list[int]:
    return [n] if n <= STEP else list(range(STEP, 1024 + 1, STEP))


def choose(sizes: Sizes, columns_first: bool, cores: int, vmem: int) -> Tiles:
    """The tiles that fit and move the least: the head is read once per tile of rows, or, for d head (`columns_first`),
    the rows once per tile of columns. The larger ones among equals.

    A tile's columns divide the vocabulary if any that are multiples of LANES do, so that none is computed in vain.
    """
    n, _, vocab = sizes[:3]
    columns = [c for c in range(LANES, 512 + 1, LANES) if vocab % c == 0 or vocab < c]
    small = [rows for rows in (16, 32, 64, 128) if rows < n]
    fitting = [
        (rows, c)
        for rows in [*small, *row_sizes(n)]
        for c in columns or [LANES, 2 * LANES, 4 * LANES]
        if sizes.vmem(rows, c) <= 0.8 * vmem
    ]
    if not fitting:
        raise InputError(f"rows of {sizes.d} do not fit the {vmem // MIB} MiB of VMEM of this TPU; allowed: 'xla'")

    def cost(tile):
        rows, columns = tile
        return sizes.moved(Tiles(rows=rows, columns=columns), columns_first), -rows * columns

    rows, column = min(fitting, key=cost)
    return Tiles(rows=rows, columns=column, splits=cores if rows >= n and not columns_first else 1, vmem=vmem)


def tuned(device_kind: str, sizes: Sizes) -> Tiles | None:
    """The tiles that were fastest on such a device; None if nobody measured."""
    found = _tuned().get(device_kind, {}).get(sizes.name)
    return found and Tiles(**found)


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TUNED.read_text())


# ---- kernels -------------------------------------------------------------------------------------------------------


def precision(x):
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def product(a, b, axis_a, axis_b):
    """float32 a * b, summed over an axis of each."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision(a), preferred_element_type=jnp.float32)


def where(condition, x):
    return jnp.where(condition, x, jnp.zeros((), x.dtype))


class Step(NamedTuple):
    """What a kernel computes with at a time: some rows of a tile against all its columns."""

    part: slice  # of the tile's rows
    rows: Rows
    weights: tuple[jax.Array, ...]  # [d, C]
    ids: jax.Array  # int32 [1, C]
    row_exists: jax.Array  # bool [., 1]; rows and columns that do not exist hold anything
    column_exists: jax.Array  # bool [1, C]

    def logits(self):
        """float32 [., C] of every hidden; below all others where the column does not exist."""
        every = (product(x, w, 1, 0) for x, w in zip(self.rows.hidden, cycle(self.weights), strict=False))
        return tuple(jnp.where(self.column_exists, z, LEAST) for z in every)


class Kernel(NamedTuple):
    """begin and end see the refs of outputs and scratch, step also a Step."""

    name: str
    step: Callable
    begin: Callable
    end: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Walk:
    """Over the grid of (row tiles, column tiles) of rows [n, k] and heads [d, V]."""

    rows: Rows
    heads: tuple[jax.Array, ...]
    first: jax.Array  # int32, the id of the heads' first column
    tiles: Tiles
    interpret: bool = False

    @property
    def grid(self):
        return pl.cdiv(self.rows.hidden[0].shape[0], self.tiles.rows), pl.cdiv(
            self.heads[0].shape[1], self.tiles.columns
        )

    def run(self, kernel: Kernel, *, grid, at, out_shape, out_specs, scratch=(), products, columns_first=False):
        """at(*grid indices) is (row tile, column tile); products: matrix products of a step."""
        (n, d), vocab, tiles = self.rows.hidden[0].shape, self.heads[0].shape[1], self.tiles
        leaves, tree = jax.tree.flatten(self.rows)
        last = self.grid[1] - 1
        size = min(tiles.rows, STEP)

        def of_rows(*index):
            return at(*index[:-1])[0], 0

        def of_columns(*index):
            # A split may have a tile too many: it gets the last one again, none of whose columns exist by its number.
            return 0, jnp.minimum(at(*index[:-1])[1], last)

        def body(first, *refs):
            inner = pl.program_id(len(grid) - 1)
            row_tile, column_tile = at(*(pl.program_id(i) for i in range(len(grid))))
            row_refs, head_refs = refs[: len(leaves)], refs[len(leaves) : len(leaves) + len(self.heads)]
            out = refs[len(leaves) + len(self.heads) :]
            column = column_tile * tiles.columns + jax.lax.broadcasted_iota(jnp.int32, (1, tiles.columns), 1)
            # The number of a column that does not exist may be that of one elsewhere, so it gets no token's.
            ids = jnp.where(column < vocab, first[0] + column, NO_TOKEN)
            weights = tuple(ref[...] for ref in head_refs)
            pl.when(inner == 0)(lambda: kernel.begin(*out))

            def step(i, _=None):
                part = pl.ds(i * size, size)
                row = row_tile * tiles.rows + i * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
                rows = jax.tree.unflatten(tree, [ref[part] for ref in row_refs]).used()
                kernel.step(Step(part, rows, weights, ids, row < n, column < vocab), *out)

            if tiles.rows == size:
                step(0)
            else:
                left = jnp.minimum(n - row_tile * tiles.rows, tiles.rows)
                jax.lax.fori_loop(0, pl.cdiv(left, size), step, None)
            if kernel.end is not None:
                pl.when(inner == grid[-1] - 1)(lambda: kernel.end(*out))

        return pl.pallas_call(
            body,
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=[
                    *(pl.BlockSpec((tiles.rows, x.shape[1]), of_rows) for x in leaves),
                    *(pl.BlockSpec((x.shape[0], tiles.columns), of_columns) for x in self.heads),
                ],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",), vmem_limit_bytes=tiles.vmem
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * n * d * vocab * products,
                bytes_accessed=Sizes.of(self.rows, self.heads).moved(tiles, columns_first),
                transcendentals=n * vocab * len(self.rows.hidden),
            ),
            interpret=self.interpret,
            name=kernel.name,
        )(self.first[None], *leaves, *self.heads)


def statistics(measure, merge, walk: Walk):
    """[n, 1] of every row, over the columns of the heads."""
    tiles, (row_tiles, column_tiles) = walk.tiles, walk.grid
    leaves, tree = jax.tree.flatten(statistics_shapes(measure, walk.rows))
    per_split = pl.cdiv(column_tiles, tiles.splits)

    def begin(*out):
        full = [jax.ShapeDtypeStruct(ref.shape, ref.dtype) for ref in out]
        for ref, x in zip(out, jax.tree.leaves(nothing(jax.tree.unflatten(tree, full))), strict=True):
            ref[...] = x

    def step(now: Step, *out):
        new = measure(now.logits(), now.ids, now.rows.extra)
        merged = merge(jax.tree.unflatten(tree, [ref[now.part] for ref in out]), new)
        for ref, x in zip(out, jax.tree.leaves(merged), strict=True):
            ref[now.part] = x

    found = walk.run(
        Kernel("vocab_statistics", step, begin),
        grid=(tiles.splits, row_tiles, per_split),
        at=lambda split, row, column: (row, split * per_split + column),
        out_shape=[jax.ShapeDtypeStruct((tiles.splits, *x.shape), x.dtype) for x in leaves],
        out_specs=[pl.BlockSpec((None, tiles.rows, 1), lambda split, row, *_: (split, row, 0)) for _ in leaves],
        products=len(walk.rows.hidden),
    )
    found = jax.tree.unflatten(tree, found)
    return reduce(merge, (jax.tree.map(lambda x, i=i: x[i], found) for i in range(tiles.splits)))


def statistics_shapes(measure, rows: Rows):
    z = tuple(jax.ShapeDtypeStruct((x.shape[0], LANES), jnp.float32) for x in rows.hidden)
    return jax.eval_shape(measure, z, jax.ShapeDtypeStruct((1, LANES), jnp.int32), rows.extra)


def zero(out, total):
    total[...] = jnp.zeros_like(total)


def write(out, total):
    out[...] = total[...].astype(out.dtype)


def d_hidden(d_logits, walk: Walk, dtype):
    """[n, d]"""
    hidden, tiles = walk.rows.hidden[0], walk.tiles

    def step(now: Step, out, total):
        dz, w = d_logits(now.logits(), now.ids, now.rows.extra), now.weights[0]
        if walk.heads[0].shape[1] % tiles.columns:
            dz, w = where(now.column_exists, dz), where(now.column_exists, w)
        total[now.part] += product(dz.astype(w.dtype), w, 1, 1)

    return walk.run(
        Kernel("vocab_d_hidden", step, zero, write),
        grid=walk.grid,
        at=lambda row, column: (row, column),
        out_shape=jax.ShapeDtypeStruct(hidden.shape, dtype),
        out_specs=pl.BlockSpec((tiles.rows, hidden.shape[1]), lambda row, *_: (row, 0)),
        scratch=[pltpu.VMEM((tiles.rows, hidden.shape[1]), jnp.float32)],
        products=len(walk.rows.hidden) + 1,
    )


def d_head(d_logits, walk: Walk, dtype):
    """[d, V]"""
    head, tiles = walk.heads[0], walk.tiles

    def step(now: Step, out, total):
        dz, hidden = d_logits(now.logits(), now.ids, now.rows.extra), now.rows.hidden[0]
        if walk.rows.hidden[0].shape[0] % min(tiles.rows, STEP):
            dz, hidden = where(now.row_exists, dz), where(now.row_exists, hidden)
        total[...] += product(hidden, dz.astype(hidden.dtype), 0, 0)

    return walk.run(
        Kernel("vocab_d_head", step, zero, write),
        grid=walk.grid[::-1],
        at=lambda column, row: (row, column),
        out_shape=jax.ShapeDtypeStruct(head.shape, dtype),
        out_specs=pl.BlockSpec((head.shape[0], tiles.columns), lambda column, *_: (0, column)),
        scratch=[pltpu.VMEM((head.shape[0], tiles.columns), jnp.float32)],
        products=len(walk.rows.hidden) + 1,
        columns_first=True,
    )


def refusal(hidden, head) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    if hidden.dtype != head.dtype or head.dtype not in (jnp.bfloat16, jnp.float32):
        return f"hidden is {hidden.dtype} and head {head.dtype}, not both bfloat16 or both float32"
    return None


# ---- on a mesh -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axes of the mesh that cut the rows, the head along d, and the head along the vocabulary. () without a mesh."""

    rows: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()

    @classmethod
    def of(cls, hidden, head) -> "Axes":
        every = jax.typeof(hidden).sharding.spec[:1], *([entry] for entry in jax.typeof(head).sharding.spec)
        return cls(*((entry,) if isinstance(entry, str) else tuple(entry or ()) for (entry,) in every))

    def at_once(self, head) -> int:
        """Columns of a device's head, of which pieces are put together at a time."""
        return GATHERED if self.embed else head.shape[1]

    def columns(self, heads, start, size):
        """(columns of the heads, whole along d; the id of the first)."""
        first = start + (jax.lax.axis_index(self.vocab) * heads[0].shape[1] if self.vocab else 0)
        heads = tuple(jax.lax.dynamic_slice_in_dim(head, start, size, axis=1) for head in heads)
        if self.embed:
            heads = tuple(jax.lax.all_gather(head, self.embed, axis=0, tiled=True) for head in heads)
        return heads, jnp.asarray(first, jnp.int32)

    def merged(self, merge, found):
        """The statistics of all parts of the vocabulary."""
        if not self.vocab:
            return found
        every = jax.lax.all_gather(found, self.vocab)
        parts = range(jax.lax.axis_size(self.vocab))
        return reduce(merge, (jax.tree.map(lambda x, i=i: x[i], every) for i in parts))

    def over_rows(self, d_head):
        """The sum over all rows, of which each device keeps its piece along d."""
        others = tuple(axis for axis in self.rows if axis not in self.embed)
        d_head = jax.lax.psum(d_head, others) if others else d_head
        if not self.embed:
            return d_head
        if set(self.embed) <= set(self.rows):
            return jax.lax.psum_scatter(d_head, self.embed, scatter_dimension=0, tiled=True)
        size = d_head.shape[0] // jax.lax.axis_size(self.embed)
        return jax.lax.dynamic_slice_in_dim(d_head, jax.lax.axis_index(self.embed) * size, size, axis=0)


def per_device(local, rows: Rows, heads, out_specs):
    """local(axes, rows, heads) of every device's own rows [..., k] and piece of each head; out_specs(specs of rows, of
    heads) says where the results are."""
    hidden, head = rows.hidden[0], heads[0]
    if jax.typeof(head).sharding.mesh.empty:
        return local(Axes(), rows, heads)
    axes = Axes.of(hidden, head)
    of_rows, of_head = P(axes.rows or None), P(axes.embed or None, axes.vocab or None)
    specs = jax.tree.map(lambda _: of_rows, rows), jax.tree.map(lambda _: of_head, heads)
    rows, heads = jax.tree.map(jax.reshard, (rows, heads), specs)
    return jax.shard_map(
        lambda rows, heads: local(axes, rows, heads),
        in_specs=specs,
        out_specs=out_specs(of_rows, of_head),
        check_vma=False,  # a Pallas call does not say over which axes its result varies
    )(rows, heads)


@dataclasses.dataclass(frozen=True)
class Engine:
    """The kernels on every device's rows and columns; between devices, collectives of `Axes` and below.

    all_gather of the head's pieces along d, columns by columns (`fsdp`); all_gather of the statistics and psum of d
    hidden (`tensor`); psum or psum_scatter of d head (the axes of the rows).
    """

    interpret: bool = False
    tiles: Tiles | None = None  # None: chosen for the chip

    peak = staticmethod(peak)

    def statistics(self, measure, merge, rows: Rows, heads):
        """As `xla.Engine.statistics`."""

        def local(axes: Axes, rows, heads):
            lead = rows.hidden[0].shape[:-1]
            rows = flat(rows)
            start = nothing(statistics_shapes(measure, rows))
            per_row = KEPT * LANES * len(jax.tree.leaves(start))

            def of_columns(so_far, first, size):
                walk = self.walk(rows, *axes.columns(heads, first, size), per_row=per_row)
                return merge(so_far, statistics(measure, merge, walk))

            found = sweep(of_columns, start, heads[0].shape[1], axes.at_once(heads[0]))
            return jax.tree.map(lambda x: x.reshape(*lead, 1), axes.merged(merge, found))

        return per_device(local, rows, heads, lambda of_rows, of_head: of_rows)

    def pull_back(self, d_logits, rows: Rows, heads):
        """As `xla.Engine.pull_back`."""

        def local(axes: Axes, rows, heads):
            hidden, head = rows.hidden[0], heads[0]
            vocab, at_once = head.shape[1], axes.at_once(head)
            whole = not axes.vocab and vocab <= at_once
            rows = flat(rows)
            width = rows.hidden[0].shape[1]

            def of_columns(carry, first, size):
                so_far, written = carry
                at = axes.columns(heads, first, size)
                of_rows = self.walk(rows, *at, per_row=SUMMED * lanes(width))
                of_head = self.walk(rows, *at, per_column=SUMMED * width, columns_first=True)
                new = d_hidden(d_logits, of_rows, hidden.dtype if whole else jnp.float32)
                d_columns = axes.over_rows(d_head(d_logits, of_head, jnp.float32 if axes.rows else head.dtype))
                written = jax.lax.dynamic_update_slice_in_dim(written, d_columns.astype(head.dtype), first, axis=1)
                return new if so_far is None else so_far + new, written

            zeros = None if vocab <= at_once else jnp.zeros(rows.hidden[0].shape, jnp.float32)
            d_rows, written = sweep(of_columns, (zeros, jnp.zeros_like(head)), vocab, at_once)
            d_rows = jax.lax.psum(d_rows, axes.vocab) if axes.vocab else d_rows
            return d_rows.astype(hidden.dtype).reshape(hidden.shape), written

        return per_device(local, rows, heads, lambda of_rows, of_head: (of_rows, of_head))

    def walk(self, rows: Rows, heads, first, *, per_row=0, per_column=0, columns_first=False) -> Walk:
        """per_row, per_column: bytes that stay in VMEM, beside the inputs, for a row and a column of a tile."""
        sizes = Sizes.of(rows, heads, per_row, per_column)
        if self.interpret:
            cores, vmem = 2, 128 * MIB
        else:
            cores, vmem = (info := pltpu.get_tpu_info()).num_cores, info.vmem_capacity_bytes
        tiles = self.tiles or tuned(sharding.device().device_kind, sizes)
        return Walk(rows, heads, first, tiles or choose(sizes, columns_first, cores, vmem), self.interpret)


def flat(rows: Rows) -> Rows:
    """[..., k] -> [n, k]"""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)


def lanes(width: int) -> int:
    """Columns that a row of `width` takes in VMEM."""
    return pl.cdiv(width, LANES) * LANES
