"""Block attention on TPU (Pallas Mosaic): a row's visible keys and values stream once from HBM, all heads at a time.

Shape letters: Q queries of a program, H query heads, K key heads, G = H / K, M = G * Q, T keys of a tile, D head_dim.
`docs/kernels.md` draws how the kernel walks memory.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cdlm_jax.kernels.block_attention.common import HIDDEN, estimate, padded
from cdlm_jax.kernels.block_attention.tiles import LANES, SCALARS, VMEM, Tiles, heads_at_once, heuristic, vmem

ALIGNED = 8  # copies from HBM bring multiples of so many rows of [S * K, D]


def refusal(q: jax.Array, k: jax.Array, page_size: int | None, pages: int = 0) -> str | None:
    """Why the kernel cannot take one device's arguments of `api.block_attention`; None if it can. pages: of a row."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q is {q.dtype}, not bfloat16 or float32"
    if q.shape[-1] not in (64, 128):
        return f"head_dim is {q.shape[-1]}, not 64 or 128"
    if page_size and (page_size * k.shape[-2] % ALIGNED or (LANES % page_size and page_size % LANES)):
        return f"page_size is {page_size}: it must divide {LANES} or be a multiple of it, and hold {ALIGNED} rows"
    tiles = heuristic(q, k, page_size is not None)
    if (needed := vmem(q, k, tiles)) > VMEM:
        heads = f"{q.shape[2]} heads of {q.shape[3]} in {q.dtype} and {k.shape[-2]} key heads in {k.dtype}"
        return f"{heads} take {needed / 2**20:.1f} MiB of vector memory, more than {VMEM / 2**20:.0f}"
    if (scalars := q.shape[0] * (pl.cdiv(q.shape[1], tiles.queries) + pages)) > SCALARS:
        return f"the page table and the rows' lengths are {scalars} numbers on a device, more than {SCALARS}"
    return None


@dataclasses.dataclass(frozen=True)
class Walk:
    """In which copies the keys of a tile come from HBM.

    slots: of a row (dense) or of a page (paged). unit: consecutive keys that one copy can bring. chunk: keys of a copy
    where less than a unit is wanted, so that hardly any key is fetched that no query sees.
    """

    tile: int
    slots: int
    unit: int
    chunk: int
    pages: int  # entries of a row of the page table, 0 if dense

    @classmethod
    def of(cls, tiles: Tiles, slots: int, pages: int) -> "Walk":
        unit = min(tiles.keys, slots) if pages else tiles.keys
        return cls(tiles.keys, slots, unit, min(tiles.chunk, unit, slots), pages)

    def for_each_copy(self, first: jax.Array, wanted: jax.Array, visit) -> None:
        """Calls visit(offset in the tile, static size) for every copy that brings `wanted` keys from slot `first` on
        (a multiple of the tile)."""
        ragged = (self.unit if self.pages else self.slots) % self.chunk  # keys of the last chunk, where not a whole one

        def by_unit(u, _):
            base = u * self.unit
            here = wanted - base
            if self.unit <= self.slots:
                pl.when(here >= self.unit)(lambda: visit(base, self.unit))

            def by_chunk(c, _):
                at = base + c * self.chunk
                if ragged:
                    room = self.unit - c * self.chunk if self.pages else self.slots - first - at
                    pl.when(room >= self.chunk)(lambda: visit(at, self.chunk))
                    pl.when(room < self.chunk)(lambda: visit(at, ragged))
                else:
                    visit(at, self.chunk)

            chunks = jnp.where(here < self.unit, pl.cdiv(here, self.chunk), 0)
            jax.lax.fori_loop(0, chunks, by_chunk, None)

        units = jnp.where(wanted > 0, pl.cdiv(jnp.minimum(wanted, self.tile), self.unit), 0)
        jax.lax.fori_loop(0, units, by_unit, None)


def _kernel(*refs, walk: Walk, heads: int, scale: float, scaled: bool, with_lse: bool):
    """One program: some rows, one after the other; of each Q queries against all keys that any of them sees."""
    left = iter(refs)
    take = lambda count: [next(left) for _ in range(count)]  # noqa: E731
    streams = 4 if scaled else 2
    lengths, layer, table = take(3)  # SMEM: [rows * programs along Q], [1], [rows * pages]
    q_ref, end_ref = take(2)  # VMEM: [rows, Q, H, D], [rows, 1, 1, Q]
    hbm = take(streams)  # k, v [layers, rows or pages, S * K, D] and their scales [rows, K, S]
    out_ref, *lse_ref = take(2 if with_lse else 1)  # VMEM: [rows, Q, H, D], [rows, 1, H, Q]
    buffers = take(streams)  # VMEM: [2, T * K, D], [2, K, T]
    q_state, end_state, highest, total, weighted, semaphores = left
    k_buffer, v_buffer, *scale_buffers = buffers

    rows, queries, all_heads, head_dim = q_ref.shape
    group = all_heads // heads
    tile = walk.tile
    dtype = q_ref.dtype
    first_row = pl.program_id(0) * rows
    piece, pieces = pl.program_id(1), pl.num_programs(1)  # of the queries

    def length(r):
        """Keys that any query of row r sees."""
        return lengths[(first_row + r) * pieces + piece]

    # ---- from HBM --------------------------------------------------------------------------------------------------

    def transfer(act, r, t, slot):
        """Start, or wait for, the copies of tile t of row r."""
        row, first = first_row + r, t * tile
        wanted = length(r) - first

        def visit(offset, size):
            position = first + offset
            if walk.pages:
                place = table[row * walk.pages + jax.lax.div(position, walk.slots)]
                position = jax.lax.rem(position, walk.slots)
            else:
                place = row
            for i in range(2):
                source = hbm[i].at[layer[0], place, pl.ds(position * heads, size * heads)]
                target = buffers[i].at[slot, pl.ds(offset * heads, size * heads)]
                act(pltpu.make_async_copy(source, target, semaphores.at[slot, i]))

        walk.for_each_copy(first, wanted, visit)
        if scaled:

            @pl.when(wanted > 0)
            def _():
                for i in range(2, 4):
                    source = hbm[i].at[row, :, pl.ds(pl.multiple_of(first, tile), tile)]
                    act(pltpu.make_async_copy(source, buffers[i].at[slot], semaphores.at[slot, i]))

    start = partial(transfer, lambda copy: copy.start())
    wait = partial(transfer, lambda copy: copy.wait())

    def clear_unseen(r, t, slot):
        """Values that no query sees have weight 0 but, being whatever was left there, may be nan: they become 0."""
        values, keys_per_index, axis = (scale_buffers[1], 1, 1) if scaled else (v_buffer, heads, 0)
        index = jax.lax.broadcasted_iota(jnp.int32, values.shape[1:], axis)
        unseen = index >= (length(r) - t * tile) * keys_per_index
        values[slot] = jnp.where(unseen, jnp.zeros((), values.dtype), values[slot])

    # ---- the online softmax ----------------------------------------------------------------------------------------

    step = heads_at_once(heads, k_buffer.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    over_d, over_keys = ((((2,), (axis,)), ((0,), (0,))) for axis in (2, 1))

    def load(buffer, slot, first):
        """`step` heads of a tile, from `first` on, [step, T, D] in q's dtype.

        A tile lies as it does in HBM, [T * K, D]: a head is every K-th row. Rows of less than 32 bits share words
        with those of the next heads, which are loaded together and parted by shifts.
        """
        packed = 4 // buffer.dtype.itemsize  # heads in a word
        if heads % packed:
            return jnp.swapaxes(buffer[slot].reshape(tile, heads, head_dim), 0, 1).astype(dtype)
        words = buffer if packed == 1 else buffer.bitcast(jnp.int32)
        found = []
        for i in range(step // packed):
            word = words[slot, pl.ds(first // packed + i, tile, stride=heads // packed)]
            if packed == 1:
                found.append(word)
            elif packed == 2:  # a bfloat16 is the upper half of a float32
                found += [pltpu.bitcast(half, jnp.float32) for half in (word << 16, word & -(1 << 16))]
            else:
                found += [((word << 24 - 8 * byte) >> 24).astype(jnp.float32) for byte in range(4)]
        return jnp.stack([each.astype(dtype) for each in found])

    def attend(t, slot):
        """All queries of a row against tile t. A few heads at a time: what they need mostly fits the registers."""
        for first in range(0, heads, step):
            here = pl.ds(first, step)
            scores = product(q_state[here], load(k_buffer, slot, first), over_d)  # [step, M, T]
            if scaled:
                scores *= scale_buffers[0][slot, here][:, None]
            position = jax.lax.broadcasted_iota(jnp.int32, (queries, tile), 1) + t * tile
            seen = position < end_state[:, :1]  # [Q, T]
            by_query = scores.reshape(step * group, queries, tile)
            scores = jnp.where(seen[None], by_query, HIDDEN).reshape(scores.shape)
            before = highest[here]  # [step, M, LANES], all lanes the same
            now = jnp.maximum(before, jnp.max(scores, axis=2, keepdims=True))
            kept = jnp.exp((before - now) * scale)
            weights = jnp.exp((scores - now[:, :, :1]) * scale)
            highest[here] = now
            # Each lane sums its own keys; the lanes are summed once, at the row's end.
            total[here] = total[here] * kept + sum(weights[:, :, i : i + LANES] for i in range(0, tile, LANES))
            if scaled:
                weights *= scale_buffers[1][slot, here][:, None]
            update = product(weights.astype(dtype), load(v_buffer, slot, first), over_keys)
            weighted[here] = weighted[here] * kept[:, :, :head_dim] + update

    # ---- the program -----------------------------------------------------------------------------------------------

    def by_row(r, slot):
        q_state[...] = jnp.swapaxes(q_ref[r], 0, 1).reshape(q_state.shape)  # [H, Q, D] -> [K, M, D]
        end_state[...] = jnp.broadcast_to(_to_sublanes(end_ref[r, 0]), end_state.shape)
        highest[...] = jnp.full_like(highest, HIDDEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)
        last = jnp.maximum(pl.cdiv(length(r), tile), 1) - 1

        def by_tile(t, slot):
            next_row, next_tile = jnp.where(t == last, r + 1, r), jnp.where(t == last, 0, t + 1)
            pl.when(next_row < rows)(lambda: start(next_row, next_tile, 1 - slot))
            wait(r, t, slot)
            pl.when(t == last)(lambda: clear_unseen(r, t, slot))
            attend(t, slot)
            return 1 - slot

        slot = jax.lax.fori_loop(0, last + 1, by_tile, slot)
        sees = (end_state[:, :1] > 0)[None]  # [1, Q, 1]
        by_query = (all_heads, queries, -1)
        sums = jnp.sum(total[...], axis=2, keepdims=True).reshape(by_query)
        out = jnp.where(sees, weighted[...].reshape(by_query) / sums, 0)
        out_ref[r] = jnp.swapaxes(out.astype(dtype), 0, 1)
        if with_lse:
            lse = highest[:, :, :1].reshape(by_query) * scale + jnp.log(sums)
            lse_ref[0][r, 0] = _to_lanes(jnp.where(sees, lse, -jnp.inf))
        return slot

    start(0, 0, 0)
    jax.lax.fori_loop(0, rows, by_row, 0)


def _diagonal(n: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (n, n), 0) == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)


def _to_sublanes(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0), axis=1, keepdims=True)


def _to_lanes(column: jax.Array) -> jax.Array:
    """[H, n, 1] -> [H, n]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[1])[None], column, 0), axis=1)


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    layer: jax.Array,
    scale: float,
    tiles: Tiles,
    page_table: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    interpret=False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The kernel on one device; arguments as `api.block_attention` has checked and completed them.

    q [rows, Q, H, D]; k, v [layers, rows, S, K, D], or [layers, pages, page_size, K, D]; layer int32 scalar;
    visible_end 0..S; k_scale, v_scale float32 [rows, K, S], also for pages. interpret: as in `pallas_call`.
    Returns out [rows, Q, H, D] and, on request, the log-sum-exp float32 [rows, Q, H].
    """
    rows, num_queries, num_heads, head_dim = q.shape
    heads, queries = k.shape[3], tiles.queries
    if k.shape[2] * heads % ALIGNED:  # a copy of the layer, which slots in a multiple of 8 avoid
        k, v = (padded(x[layer][None], 2, ALIGNED) for x in (k, v))
        layer = jnp.zeros_like(layer)
    walk = Walk.of(tiles, k.shape[2], 0 if page_table is None else page_table.shape[1])

    # Beyond its end an array's block is neither read nor written: queries need no padding, only what is known of them.
    ends = padded(padded(visible_end, 0, tiles.rows), 1, queries)
    ends = ends.reshape(ends.shape[0], -1, 1, queries)
    grid = (ends.shape[0] // tiles.rows, ends.shape[1])
    table = jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1)
    scales = [padded(each, 2, walk.tile) for each in (k_scale, v_scale) if each is not None]

    def by_program(*block):
        """Along the grid: some rows, and a piece of the second axis."""
        return pl.BlockSpec(block, lambda i, j, *_: (i, j) + (0,) * (len(block) - 2))

    q_block = by_program(tiles.rows, queries, num_heads, head_dim)
    out_specs, out_shape = [q_block], [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if return_lse:
        out_specs.append(by_program(tiles.rows, 1, num_heads, queries))
        out_shape.append(jax.ShapeDtypeStruct((rows, grid[1], num_heads, queries), jnp.float32))
    folded = (heads, num_heads // heads * queries)  # [K, M]
    out, *lse = pl.pallas_call(
        partial(_kernel, walk=walk, heads=heads, scale=scale, scaled=bool(scales), with_lse=return_lse),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                q_block,
                by_program(tiles.rows, 1, 1, queries),
                *[pl.BlockSpec(memory_space=pl.ANY)] * (2 + len(scales)),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                *[pltpu.VMEM((2, walk.tile * heads, head_dim), each.dtype) for each in (k, v)],
                *[pltpu.VMEM((2, heads, walk.tile), jnp.float32) for _ in scales],
                pltpu.VMEM((*folded, head_dim), q.dtype),
                pltpu.VMEM((queries, LANES), jnp.int32),
                pltpu.VMEM((*folded, LANES), jnp.float32),
                pltpu.VMEM((*folded, LANES), jnp.float32),
                pltpu.VMEM((*folded, head_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2 + len(scales))),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=estimate(q, k, page_table),
        interpret=interpret,
        name="block_attention",
    )(
        ends.max((2, 3)).reshape(-1),
        layer.reshape(1),
        table,
        q,
        ends,
        *[x.reshape(*x.shape[:2], -1, head_dim) for x in (k, v)],
        *scales,
    )
    return (out, lse[0].swapaxes(2, 3).reshape(rows, -1, num_heads)[:, :num_queries]) if return_lse else out
