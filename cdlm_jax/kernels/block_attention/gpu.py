"""Block attention on NVIDIA Hopper (Pallas Mosaic GPU): a program streams one key head's visible keys and values once.

Shape letters: Q queries of a program, H query heads, K key heads, G = H / K, M = G * Q in whole 64s, T keys of a tile,
D head_dim, P programs along the queries. `docs/kernels.md` draws how the kernel walks memory.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu

from cdlm_jax.kernels.block_attention.common import HIDDEN, estimate, padded
from cdlm_jax.kernels.block_attention.gpu_tiles import ALIGNED, MOST_ROWS, WGMMA, GpuTiles
from cdlm_jax.kernels.cost import estimated
from cdlm_jax.mesh.chips import is_hopper

LOG2_E = math.log2(math.e)
GRID = ("rows", "heads", "pieces")  # rows * heads would be more than CUDA's 65535; the last one varies first
SWIZZLED = (plgpu.TilingTransform((ALIGNED, 64)), plgpu.SwizzleTransform(128))  # as wgmma reads 16-bit matrices
SWIZZLED_32 = (plgpu.TilingTransform((ALIGNED, 32)), plgpu.SwizzleTransform(128))


def refusal(q: jax.Array, k: jax.Array, page_size: int | None, device_kind: str) -> str | None:
    """Why the kernel cannot take these arguments of `api.block_attention` on this device; None if it can."""
    if not is_hopper(device_kind):
        return f"it needs Hopper's wgmma, which the {device_kind} has not"
    if q.dtype != jnp.bfloat16:
        return f"q is {q.dtype}, not bfloat16"
    if k.dtype != q.dtype:
        return f"k is {k.dtype}, not bfloat16"
    if q.shape[-1] not in (64, 128):
        return f"head_dim is {q.shape[-1]}, not 64 or 128"
    if (group := q.shape[2] // k.shape[-2]) * ALIGNED > MOST_ROWS:
        return f"{group} query heads share a key head, at most {MOST_ROWS // ALIGNED}"
    if page_size and (page_size % ALIGNED or (WGMMA % page_size and page_size % WGMMA)):
        return f"page_size is {page_size}: it must be a multiple of {ALIGNED} that divides {WGMMA}, or one of {WGMMA}"
    return None


# ---- the two products ----------------------------------------------------------------------------------------------
# Interpret mode knows wgmma only of factors that both are in shared memory, and lie there as they are multiplied. There
# they are loaded, which takes a fence before the next copy comes, as wgmma's own reading does not.


def _loaded(ref: jax.Ref) -> jax.Array:
    found = ref[...]
    plgpu.commit_smem()
    return found


def _scores(q: jax.Ref, k: jax.Ref, interpret: bool) -> jax.Array:
    """q [M, D] k^T [D, T] in float32."""
    if interpret:
        return jnp.dot(_loaded(q), _loaded(k).T, preferred_element_type=jnp.float32)

    def multiply(scores):
        plgpu.wgmma(scores, q, plgpu.transpose_ref(k, (1, 0)))
        return scores[...]

    return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))


def _accumulate(weighted: jax.Array, weights: jax.Array, v: jax.Ref, interpret: bool) -> jax.Array:
    """weighted [M, D] + weights [M, T] v [T, D]."""
    if interpret:
        return weighted + jnp.dot(weights, _loaded(v), preferred_element_type=jnp.float32)
    return pl.run_state(lambda sum_: plgpu.wgmma(sum_, weights, v))(plgpu.ACC.init(weighted))


def share(length: jax.Array, split: jax.Array, tiles: GpuTiles) -> tuple[jax.Array, jax.Array]:
    """The first of a split's tiles, and the one behind its last, of a row of which `length` keys are seen."""
    all_tiles = pl.cdiv(length, tiles.keys)
    most = pl.cdiv(all_tiles, tiles.splits)
    first = jnp.minimum(split * most, all_tiles)
    return first, jnp.minimum(first + most, all_tiles)


# ---- the kernel ----------------------------------------------------------------------------------------------------


def _kernel(*refs, tiles: GpuTiles, group: int, pages: int, scale: float, interpret: bool):
    """One program: Q queries of a row, of the heads that share a key head, against one split of the row's keys."""
    lengths, first_place, table, ends, q, k, v, out, lse, *on_chip = refs  # HBM, as `block_attention` hands them over
    q_buffer, k_buffer, v_buffer, ends_buffer, lse_buffer, *barriers = on_chip  # shared memory
    q_ready, k_ready, v_ready, k_free, v_free, cleared, finished, *part_buffer = barriers
    row, head_and_split, piece = (jax.lax.axis_index(name) for name in GRID)
    head, split = jax.lax.div(head_and_split, tiles.splits), jax.lax.rem(head_and_split, tiles.splits)
    warpgroup, workers = jax.lax.axis_index("warpgroup"), tiles.workers(group)
    slots, keys, queries = k.shape[1], tiles.keys, tiles.queries
    head_dim = q.shape[3]

    length = lengths[row * ends.shape[1] + piece]
    first, last = share(length, split, tiles)

    def stage(t):
        return jax.lax.rem(t - first, tiles.stages)

    def by_head(q_or_out):
        """This program's part of it, head by head, and where that is in the buffer."""
        for g in range(group):
            there = q_or_out.at[row, pl.ds(piece * queries, queries), head * group + g]
            yield there, q_buffer.at[pl.ds(g * queries, queries)]

    # ---- one warpgroup copies --------------------------------------------------------------------------------------

    def fetch(source, buffer, ready, t):
        """Tile t, or as many pages. What lies behind the last slot of a row arrives as zeros."""
        size = min(keys, slots) if pages else keys  # of a copy
        for i in range(keys // size):
            copy, place = t * (keys // size) + i, row
            if pages:  # behind the row's end, where the table may hold anything, its last page once more
                copy = jnp.minimum(copy, jax.lax.div(length - 1, size))
                page, copy = jax.lax.div(copy, slots // size), jax.lax.rem(copy, slots // size)
                place = table[row * pages + page]
            here = source.at[first_place[0] + place, pl.ds(copy * size, size), head]
            plgpu.copy_gmem_to_smem(here, buffer.at[stage(t), pl.ds(i * size, size)], ready.at[stage(t)])

    @pl.when(warpgroup == workers)
    def _():
        if workers > 1:
            plgpu.set_max_registers(24, action="decrease")
        for source, target in by_head(q):
            plgpu.copy_gmem_to_smem(source, target, q_ready)
        plgpu.copy_gmem_to_smem(ends.at[row, piece], ends_buffer, q_ready)

        def wait(free, t):
            plgpu.barrier_wait(free.at[stage(t)])

        def by_tile(t, _):
            for source, buffer, ready, free in ((k, k_buffer, k_ready, k_free), (v, v_buffer, v_ready, v_free)):
                pl.when(t - first >= tiles.stages)(partial(wait, free, t))
                pl.when(t < last)(partial(fetch, source, buffer, ready, t))

        jax.lax.fori_loop(first, jnp.where(first < last, last + tiles.stages, first), by_tile, None)
        plgpu.barrier_wait(finished)
        plgpu.copy_smem_to_gmem(lse_buffer, lse.at[split, row, head, piece])
        if tiles.splits == 1:
            for target, source in by_head(out):
                plgpu.copy_smem_to_gmem(source, target)
        plgpu.wait_smem_to_gmem(0)

    # ---- the others compute, each for its rows of the product ------------------------------------------------------

    def clear_unseen(t):
        """Values that no query sees have weight 0 but, being whatever was left there, may be nan: they become 0."""

        @pl.when(warpgroup == 0)
        def _():
            for column in range(0, head_dim, WGMMA):
                part = v_buffer.at[stage(t), :, pl.ds(column, WGMMA)]
                position = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0) + t * keys
                part[...] = jnp.where(position < length, part[...], jnp.zeros((), v.dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(cleared)

        plgpu.barrier_wait(cleared)

    @pl.when(warpgroup < workers)
    def _():
        if workers > 1:
            plgpu.set_max_registers(240, action="increase")
        blocks = tiles.blocks(group) // workers
        starts = [(warpgroup * blocks + i) * WGMMA for i in range(blocks)]

        def across(column, width):
            """A value per row, [64] -> [64, width]."""
            return jax.lax.broadcast_in_dim(column, (WGMMA, width), (0,))

        def by_tile(t, states):
            plgpu.barrier_wait(k_ready.at[stage(t)])
            position = jax.lax.broadcasted_iota(jnp.int32, (WGMMA, keys), 1) + t * keys
            following = []
            for start, end, (weighted, highest, total) in zip(starts, seen, states, strict=True):
                scores = _scores(q_buffer.at[pl.ds(start, WGMMA)], k_buffer.at[stage(t)], interpret)
                if start is starts[-1]:
                    plgpu.barrier_arrive(k_free.at[stage(t)])
                scores = jnp.where(position < across(end, keys), scores, HIDDEN)
                now = jnp.maximum(highest, jnp.max(scores, axis=1))
                kept = jnp.exp2((highest - now) * (scale * LOG2_E))
                weights = jnp.exp2((scores - across(now, keys)) * (scale * LOG2_E))
                total = total * kept + jnp.sum(weights, axis=1)
                if start is starts[0]:
                    plgpu.barrier_wait(v_ready.at[stage(t)])
                    pl.when((t + 1) * keys > length)(lambda: clear_unseen(t))
                weighted *= across(kept, head_dim)
                weighted = _accumulate(weighted, weights.astype(v.dtype), v_buffer.at[stage(t)], interpret)
                following.append((weighted, now, total))
            plgpu.barrier_arrive(v_free.at[stage(t)])
            return following

        nothing = (
            jnp.zeros((WGMMA, head_dim), jnp.float32),
            jnp.full((WGMMA,), HIDDEN, jnp.float32),
            jnp.zeros((WGMMA,), jnp.float32),
        )
        plgpu.barrier_wait(q_ready)
        seen = [ends_buffer[pl.ds(start, WGMMA)] for start in starts]
        states = jax.lax.fori_loop(first, last, by_tile, [nothing] * blocks)
        for start, end, (weighted, highest, total) in zip(starts, seen, states, strict=True):
            sees = end > first * keys  # any key of this split
            found = jnp.where(across(sees, head_dim), weighted / across(total, head_dim), 0.0)
            lse_buffer[pl.ds(start, WGMMA)] = jnp.where(sees, highest * scale + jnp.log(total), -jnp.inf)
            if tiles.splits == 1:
                q_buffer[pl.ds(start, WGMMA)] = found.astype(out.dtype)
                continue
            for column in range(0, head_dim, WGMMA):
                plgpu.wait_smem_to_gmem(0)
                part_buffer[0][warpgroup] = found[:, column : column + WGMMA]
                plgpu.commit_smem()
                there = out.at[split, row, head, piece, pl.ds(start, WGMMA), pl.ds(column, WGMMA)]
                plgpu.copy_smem_to_gmem(part_buffer[0].at[warpgroup], there)
        plgpu.wait_smem_to_gmem(0)
        plgpu.commit_smem()
        plgpu.barrier_arrive(finished)


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    layer: jax.Array,
    scale: float,
    tiles: GpuTiles,
    page_table: jax.Array | None = None,
    return_lse: bool = False,
    interpret=None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The kernel on one device; arguments as `api.block_attention` has checked and completed them.

    q [rows, Q, H, D]; k, v [layers, rows, S, K, D], or [layers, pages, page_size, K, D]; layer int32 scalar;
    visible_end 0..S. interpret: as in `plgpu.kernel`.
    Returns out [rows, Q, H, D] and, on request, the log-sum-exp float32 [rows, Q, H].
    """
    rows, num_queries, num_heads, head_dim = q.shape
    heads = k.shape[3]
    group, queries, keys = num_heads // heads, tiles.queries, tiles.keys
    if k.shape[2] % ALIGNED:  # a copy of the layer, which slots in a multiple of 8 avoid
        k, v = (padded(x[layer][None], 2, ALIGNED) for x in (k, v))
        layer = jnp.zeros_like(layer)
    q, ends = padded(q, 1, queries), padded(visible_end, 1, queries)
    pieces, padded_rows = ends.shape[1] // queries, tiles.blocks(group) * WGMMA
    by_piece = ends.reshape(rows, pieces, queries)
    folded = padded(jnp.tile(by_piece, (1, 1, group)), 2, padded_rows)
    table = jnp.zeros(1, jnp.int32) if page_table is None else page_table.reshape(-1)
    copies = max(1, keys // k.shape[2]) if page_table is not None else 1

    statistics = jax.ShapeDtypeStruct((tiles.splits, rows, heads, pieces, padded_rows), jnp.float32)
    parts = jax.ShapeDtypeStruct((*statistics.shape, head_dim), jnp.float32)
    ring = plgpu.SMEM((tiles.stages, keys, head_dim), k.dtype, transforms=SWIZZLED)
    workers = tiles.workers(group)
    kernel = plgpu.kernel(
        partial(
            _kernel,
            tiles=tiles,
            group=group,
            pages=0 if page_table is None else page_table.shape[1],
            scale=scale,
            interpret=bool(interpret),
        ),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype) if tiles.splits == 1 else parts, statistics),
        grid=(rows, heads * tiles.splits, pieces),
        grid_names=GRID,
        num_threads=workers + 1,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((padded_rows, head_dim), q.dtype, transforms=SWIZZLED),
            ring,
            ring,
            plgpu.SMEM((padded_rows,), jnp.int32),
            plgpu.SMEM((padded_rows,), jnp.float32),
            plgpu.Barrier(num_arrivals=group + 1),
            *[plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages)] * 2,
            *[plgpu.Barrier(num_arrivals=workers, num_barriers=tiles.stages)] * 2,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=workers),
            *[plgpu.SMEM((workers, WGMMA, WGMMA), jnp.float32, transforms=SWIZZLED_32)] * (tiles.splits > 1),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="block_attention",
    )
    with estimated(estimate(q, k, page_table)):
        out, lse = kernel(
            by_piece.max(2).reshape(-1),
            (layer * k.shape[1]).reshape(1),
            table,
            folded,
            q,
            *[x.reshape(-1, *x.shape[2:]) for x in (k, v)],
        )

    def by_query(x):
        """[rows, K, P, M, ...] -> [rows, Q, H, ...]."""
        x = x[:, :, :, : group * queries].reshape(rows, heads, pieces, group, queries, *x.shape[4:])
        return jnp.moveaxis(x, (2, 4), (1, 2)).reshape(rows, pieces * queries, num_heads, *x.shape[5:])

    if tiles.splits > 1:
        out, lse = merge(jax.vmap(by_query)(out), jax.vmap(by_query)(lse))
        out = out.astype(q.dtype)
    else:
        lse = by_query(lse[0])
    out, lse = out[:, :num_queries], lse[:, :num_queries]
    return (out, lse) if return_lse else out


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention to all keys from attention to parts of them: exact, but for rounding.

    outs float32 [parts, ..., D], lses float32 [parts, ...], -inf (and out finite) where a query sees no key of a part.
    Returns out [..., D] and its lse [...]; 0 and -inf for a query that sees nothing.
    """
    highest = lses.max(axis=0)
    shares = jnp.exp(lses - jnp.where(jnp.isfinite(highest), highest, 0))
    total = shares.sum(axis=0)
    out = (outs * shares[..., None]).sum(axis=0) / jnp.where(total == 0, 1, total)[..., None]
    return out, highest + jnp.log(total)
