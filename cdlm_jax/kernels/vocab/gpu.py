"""Streams hidden rows and head through the shared memory of an NVIDIA Hopper (Pallas Mosaic GPU): logits are made by
wgmma, read in registers and forgotten.

One kernel, for `confidence`, on a grid of (splits of the vocabulary, tiles of rows). One of a program's warpgroups
copies (TMA, into a ring of stages); each of the others has ROWS rows of the tile and goes through the split's columns,
tile by tile, with the statistics of its rows in registers. `docs/kernels.md` draws how it walks memory. On a mesh
every device runs it on its own rows and columns, as the TPU kernels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cdlm_jax.kernels.cost import estimated
from cdlm_jax.kernels.vocab.mesh import flat, per_device
from cdlm_jax.kernels.vocab.statistics import LEAST, NO_TOKEN, Rows, nothing, peaks, statistics_shapes, together
from cdlm_jax.kernels.vocab.xla import sweep
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.chips import is_hopper

ROWS = 64  # of a warpgroup's wgmma
DEPTH = 64  # of d that a stage holds: 128 bytes, the widest swizzle
ALIGNED = 8  # rows that TMA lays out together, with DEPTH columns
WIDTH = 8  # columns whose statistics are kept apart: those that lie in the same registers
RING = 216 * 2**10  # bytes of the ring at most, of `chips.HOPPER_SHARED`

# ---- tiles ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """rows, columns: of a tile. splits: parts of the vocabulary, one for each program. stages: of the ring."""

    rows: int
    columns: int
    splits: int
    stages: int

    @property
    def groups(self) -> int:
        """Warpgroups that compute."""
        return self.rows // ROWS

    @property
    def stage(self) -> int:
        """Bytes of a stage."""
        return (self.rows + self.columns) * DEPTH * 2

    def shared(self, extras: int) -> int:
        """Bytes of shared memory: the ring, results on their way out, a row's `extras` numbers, and barriers."""
        results = 2 * self.rows * WIDTH * 4
        return self.stages * self.stage + results + 4 * extras * self.rows + 8 * (2 * self.stages + 1)


def choose(n: int, vocab: int, drawn: bool, cores: int) -> Tiles:
    """Up to 64 rows the head's bytes are the limit, and a narrow tile's statistics are done before the ring is full.
    Above, the products are, and a wide tile fetches less for each; but noise costs as much, in code that grows with it.
    All programs run at once, if they can, and have about as many columns each.
    """
    rows = ROWS if n <= ROWS else 2 * ROWS
    columns = 128 if n <= ROWS or drawn else 256
    tiles = pl.cdiv(vocab, columns)
    each = pl.cdiv(tiles, max(1, cores // pl.cdiv(n, rows)))
    one = Tiles(rows=rows, columns=columns, splits=pl.cdiv(tiles, each), stages=1)
    return dataclasses.replace(one, stages=RING // one.stage)


# ---- kernel --------------------------------------------------------------------------------------------------------


def statistics(measure, merge, rows: Rows, head, first, tiles: Tiles, interpret=None):
    """[n, splits * WIDTH] of rows [n, .] and head [d, V], whose first column is token `first`: a split's columns are
    counted in WIDTH parts, every WIDTH-th in one. measure tells the statistics of each column by itself."""
    (n, d), vocab = rows.hidden[0].shape, head.shape[1]
    hidden = jnp.pad(rows.hidden[0], ((0, -n % ALIGNED), (0, 0)))
    row_tiles, column_tiles, steps = pl.cdiv(n, tiles.rows), pl.cdiv(vocab, tiles.columns), d // DEPTH
    per_split = pl.cdiv(column_tiles, tiles.splits)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: of_groups(x, row_tiles, tiles), rows.extra))
    block = (ROWS, WIDTH)
    z, ids, *numbers = (jax.ShapeDtypeStruct(block, x) for x in (jnp.float32, jnp.int32, *(x.dtype for x in leaves)))
    shapes = jax.eval_shape(measure, (z,), ids, jax.tree.unflatten(tree, numbers))

    def body(hidden, head, first, *refs, hidden_ring, head_ring, full, free, numbers, arrived, results):
        split, row_tile, group = (jax.lax.axis_index(name) for name in ("splits", "row_tiles", "group"))
        first_tile = split * per_split
        count = jnp.minimum(column_tiles - first_tile, per_split)

        def copy(step, _):
            slot = jax.lax.rem(step, tiles.stages)
            pl.when(step >= tiles.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            depth = pl.ds(jax.lax.rem(step, steps) * DEPTH, DEPTH)
            columns = pl.ds((first_tile + jax.lax.div(step, steps)) * tiles.columns, tiles.columns)
            # What lies past the end of an array arrives as zeros.
            mine = hidden.at[pl.ds(row_tile * tiles.rows, tiles.rows), depth]
            plgpu.copy_gmem_to_smem(mine, hidden_ring.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(head.at[depth, columns], head_ring.at[slot], full.at[slot])

        def multiply(step, acc):
            slot = jax.lax.rem(step, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(acc, hidden_ring.at[slot, pl.ds(group * ROWS, ROWS)], head_ring.at[slot])
            plgpu.wgmma_wait(1)
            # The product before this one is done; its stage is free, which matters as long as there is more to copy.
            wanted = (step > 0) & (step - 1 + tiles.stages < count * steps)
            before = jax.lax.rem(step - 1 + tiles.stages, tiles.stages)
            pl.when(wanted)(lambda: plgpu.barrier_arrive(free.at[before]))

        def logits(tile):
            def multiplied(acc):
                jax.lax.fori_loop(0, steps, lambda k, _: multiply(tile * steps + k, acc), None)
                return acc[...]

            return pl.run_scoped(multiplied, plgpu.ACC((ROWS, tiles.columns), jnp.float32))

        @pl.when(group == tiles.groups)
        def _():
            if tiles.groups > 1:
                plgpu.set_max_registers(40, action="decrease")
            for source, target in zip(refs, numbers, strict=False):
                plgpu.copy_gmem_to_smem(source.at[row_tile], target, arrived)
            jax.lax.fori_loop(0, count * steps, copy, None)

        @pl.when(group < tiles.groups)
        def _():
            if tiles.groups > 1:
                plgpu.set_max_registers(232, action="increase")
            if leaves:
                plgpu.barrier_wait(arrived)
            extra = jax.tree.unflatten(tree, [jax.lax.broadcast_in_dim(ref[group], block, (0,)) for ref in numbers])
            first_id, lane = first[0], jax.lax.broadcasted_iota(jnp.int32, block, 1)

            def of_tile(tile, so_far):
                z = logits(tile)
                for left in range(0, tiles.columns, WIDTH):
                    column = (first_tile + tile) * tiles.columns + left + lane
                    exists = column < vocab
                    # The number of a column that does not exist may be that of one elsewhere, so it gets no token's.
                    ids = jnp.where(exists, first_id + column, NO_TOKEN)
                    each = jnp.where(exists, z[:, left : left + WIDTH], LEAST)
                    so_far = merge(so_far, measure((each,), ids, extra))
                return so_far

            found = jax.lax.fori_loop(0, count, of_tile, nothing(shapes))
            for target, x in zip(refs[len(leaves) :], jax.tree.leaves(found), strict=True):
                result = results[x.dtype.name].at[group]
                result[...] = x
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(result, target.at[split, row_tile, group])
                plgpu.wait_smem_to_gmem(0)

    def shared(dtype, *shape):
        swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
        tiling = plgpu.TilingTransform((ALIGNED, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    lead = tiles.splits, row_tiles, tiles.groups, *block
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(lead, x.dtype) for x in jax.tree.leaves(shapes)],
        scratch_types={
            "hidden_ring": shared(head.dtype, tiles.stages, tiles.rows, DEPTH),
            "head_ring": shared(head.dtype, tiles.stages, DEPTH, tiles.columns),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            "free": plgpu.Barrier(num_arrivals=tiles.groups, num_barriers=tiles.stages),
            "numbers": [plgpu.SMEM((tiles.groups, ROWS), x.dtype) for x in leaves],
            "arrived": plgpu.Barrier(num_arrivals=max(1, len(leaves))),
            "results": {name: shared(name, tiles.groups, *block) for name in ("float32", "int32")},
        },
        grid=(tiles.splits, row_tiles),
        grid_names=("splits", "row_tiles"),
        num_threads=tiles.groups + 1,
        thread_name="group",
        kernel_name="vocab_statistics",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    with estimated(pl.CostEstimate(2 * n * d * vocab, n * vocab, hidden.nbytes + head.nbytes)):
        out = kernel(hidden, head, first[None], *leaves)

    def of_rows(x):
        return jnp.moveaxis(x.reshape(tiles.splits, -1, WIDTH)[:, :n], 0, 1).reshape(n, -1)

    return jax.tree.map(of_rows, jax.tree.unflatten(jax.tree.structure(shapes), out))


def of_groups(x, row_tiles: int, tiles: Tiles):
    """[n, 1] -> [row tiles, groups, ROWS]"""
    x = jnp.pad(x[:, 0], (0, row_tiles * tiles.rows - x.shape[0]))
    return x.reshape(row_tiles, tiles.groups, ROWS)


def refusal(op: str, hiddens, heads) -> str | None:
    """Why the kernel cannot run `confidence` on the current device with these rows [..., d] and this head [d, V]; None
    if it can. Draws or none, it takes the same."""
    (hidden,), (head,) = hiddens, heads
    if not is_hopper(kind := sharding.device().device_kind):
        return f"it needs Hopper's wgmma, which the {kind} has not"
    if hidden.dtype != jnp.bfloat16 or head.dtype != jnp.bfloat16:
        return f"hidden is {hidden.dtype} and head {head.dtype}, not both bfloat16"
    d, vocab = head.shape[0], head.shape[1] // sharding.pieces(head, 1)
    if d % DEPTH or vocab % DEPTH:
        return f"a device's piece of the head is [{d}, {vocab}], not multiples of {DEPTH}"
    return None


def multiprocessors() -> int:
    """Of the current device."""
    device = sharding.device()
    return device.core_count if isinstance(device, jax.Device) else device.num_cores


@dataclasses.dataclass(frozen=True)
class Engine:
    """The kernel on every device's rows and columns; between devices, the collectives of `mesh.Axes`."""

    interpret: Any = None  # InterpretGPUParams
    tiles: Tiles | None = None  # None: chosen for the chip

    peak = staticmethod(peaks)

    def statistics(self, measure, merge, rows: Rows, heads):
        """As `xla.Engine.statistics`, for a measure that tells the statistics of each column by itself."""

        def local(axes, rows, heads):
            lead = rows.hidden[0].shape[:-1]
            rows = flat(rows)
            n, vocab = rows.hidden[0].shape[0], heads[0].shape[1]

            def of_columns(so_far, start, size):
                (head,), first = axes.columns(heads, start, size)
                tiles = self.tiles or choose(n, size, rows.extra is not None, multiprocessors())
                new = statistics(measure, merge, rows, head, first, tiles, self.interpret)
                return merge(so_far, together(new))

            start = nothing(statistics_shapes(lambda *given: together(measure(*given)), rows))
            found = sweep(of_columns, start, vocab, axes.at_once(heads[0]))
            return jax.tree.map(lambda x: x.reshape(*lead, 1), axes.merged(merge, found))

        return per_device(local, rows, heads, lambda of_rows, of_head: of_rows)
