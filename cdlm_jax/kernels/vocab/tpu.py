"""Streams the head through VMEM (Pallas Mosaic): a tile of logits is made, read and forgotten on the chip.

Three kernels, each a grid of tiles of rows [R, d] and of columns [d, C], both whole along d:

- statistics: columns innermost; a row tile's statistics stay in VMEM until all columns went by.
- d hidden: columns innermost; [R, d] in float32 stays in VMEM.
- d head: rows innermost; [d, C] in float32 stays in VMEM.

`docs/kernels.md` draws how they walk memory. On a mesh every device runs them on its own rows and columns, inside
`jax.shard_map`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import reduce
from itertools import cycle
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cdlm_jax.kernels.vocab.mesh import Axes, flat, per_device
from cdlm_jax.kernels.vocab.statistics import LEAST, NO_TOKEN, Rows, nothing, peak, statistics_shapes
from cdlm_jax.kernels.vocab.tiles import (
    KEPT,
    LANES,
    MIB,
    STEP,
    SUMMED,
    Sizes,
    Tiles,
    choose,
    fitting,
    lanes,
    tuned,
    walks,
)
from cdlm_jax.kernels.vocab.xla import sweep
from cdlm_jax.mesh import sharding


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

    part: slice | pl.Slice  # of the tile's rows
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
            if (end := kernel.end) is not None:
                pl.when(inner == grid[-1] - 1)(lambda: end(*out))

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
                dimension_semantics=[*["parallel"] * (len(grid) - 1), "arbitrary"],  # type: ignore[list-item]
                vmem_limit_bytes=tiles.vmem,
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


def cores_and_vmem() -> tuple[int, int]:
    """Of the current device, bytes of each core."""
    found = pltpu.get_tpu_info()
    return found.num_cores, found.vmem_capacity_bytes


def refusal(op: str, hiddens, heads) -> str | None:
    """Why the kernels cannot run an op of `tiles.OPS`, and its gradients, on hiddens [..., d] and heads [d, V], one for
    each or one for all; None if they can."""
    dtypes = {x.dtype for x in (*hiddens, *heads)}
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        names = " and ".join(", ".join(str(x.dtype) for x in each) for each in (hiddens, heads))
        return f"hidden rows are {names} heads, not all bfloat16 or all float32"
    n = max(1, math.prod(hiddens[0].shape[:-1]) // sharding.pieces(hiddens[0], 0))  # of a device
    _, vmem = cores_and_vmem()
    rows = [jax.ShapeDtypeStruct((n, x.shape[-1]), x.dtype) for x in hiddens]
    for name, sizes in walks(op, rows, heads).items():
        if not fitting(sizes, vmem):
            return f"{name} of rows of {sizes.d} {dtypes.pop()} does not fit the {vmem // MIB} MiB of VMEM of this TPU"
    return None


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
        cores, vmem = (2, 128 * MIB) if self.interpret else cores_and_vmem()
        tiles = self.tiles or tuned(sharding.device().device_kind, sizes)
        return Walk(rows, heads, first, tiles or choose(sizes, columns_first, cores, vmem), self.interpret)
