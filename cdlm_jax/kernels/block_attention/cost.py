"""What a call of a kernel moves and computes, without running it: its own walk through memory, counted.

The least is each visible key and value, each query and result once; FLOPs are of the two products over visible keys. A
GPU's bytes are also those that its cache answers; to a TPU's buffers the compiler adds its temporaries.
"""

import math

import numpy as np

from cdlm_jax.kernels.block_attention.gpu_tiles import WGMMA, GpuTiles
from cdlm_jax.kernels.block_attention.tiles import LANES, Shaped, Tiles, buffers
from cdlm_jax.kernels.cost import Cost


def cost(
    q: Shaped,
    k: Shaped,
    visible_end: np.ndarray,
    tiles: Tiles,
    page_size: int | None = None,
) -> Cost:
    """The TPU kernel's cost for q [rows, Q, H, D] and one layer's k [..., S, K, D] (or pages); visible_end [rows, Q] as
    numbers.

    An int8 call also counts the copy of the layer's scales that XLA makes in front of the kernel, of every slot whether
    it is seen or not: read, put together (of pages: as many as the farthest-seeing row needs, the least that a table
    has), and written.
    """
    rows, num_queries, heads, head_dim = q.shape
    slots, kv_heads = k.shape[-3:-1]
    q_tiles = math.ceil(num_queries / tiles.queries)
    lengths = _lengths(visible_end, tiles.queries)
    scaled = k.dtype.itemsize == 1

    def key_bytes(keys: int, lanes: int) -> int:
        return 2 * keys * kv_heads * lanes * k.dtype.itemsize

    width = max(head_dim, LANES)  # a shorter row takes a whole one in HBM
    moved = sum(key_bytes(keys_fetched(int(each), tiles, slots, page_size), width) for each in lengths)
    if scaled:
        moved += sum(2 * math.ceil(each / tiles.keys) * tiles.keys * kv_heads * 4 for each in lengths)
        copied = math.ceil(visible_end.max() / page_size) * page_size if page_size else slots
        moved += 2 * rows * kv_heads * 4 * (copied + math.ceil(copied / tiles.keys) * tiles.keys)
    queries_and_result = 2 * rows * num_queries * heads * q.dtype.itemsize
    moved += queries_and_result * width + math.ceil(rows / tiles.rows) * tiles.rows * q_tiles * tiles.queries * 4
    return Cost(moved=moved, on_chip=buffers(q, k, tiles), **_needed(q, k, visible_end))


def gpu_cost(
    q: Shaped,
    k: Shaped,
    visible_end: np.ndarray,
    tiles: GpuTiles,
    page_size: int | None = None,
) -> Cost:
    """The GPU kernel's; arguments as of `cost`. With splits, what the merge reads and writes is counted too."""
    heads, head_dim = q.shape[2:]
    slots, kv_heads = k.shape[-3:-1]
    group = heads // kv_heads
    lengths = _lengths(visible_end, tiles.queries)
    whole = -(-lengths // tiles.keys) * tiles.keys
    keys = int((whole if page_size else np.minimum(whole, slots)).sum())  # behind a row's last slot nothing is read
    programs = len(lengths) * kv_heads * tiles.splits
    padded = tiles.blocks(group) * WGMMA  # rows of the product
    queries = len(lengths) * tiles.queries * heads * head_dim * q.dtype.itemsize
    results = queries if tiles.splits == 1 else 2 * programs * padded * head_dim * 4 + queries
    statistics = (2 if tiles.splits == 1 else 3) * programs * padded * 4  # ends; log-sum-exps, which a merge reads
    return Cost(
        moved=2 * keys * kv_heads * head_dim * k.dtype.itemsize + queries * tiles.splits + results + statistics,
        on_chip=tiles.shared(group, head_dim),
        **_needed(q, k, visible_end),
    )


def _lengths(visible_end: np.ndarray, queries: int) -> np.ndarray:
    """Keys that any query of a tile of queries sees, for every (row, tile)."""
    starts = range(0, visible_end.shape[1], queries)
    return np.concatenate([visible_end[:, start : start + queries].max(axis=1) for start in starts])


def _needed(q, k, visible_end: np.ndarray) -> dict[str, int]:
    """What any kernel has to move at least, and to compute."""
    heads, head_dim = q.shape[2:]
    visible = int(visible_end.max(axis=1).sum()) * k.shape[-2]  # keys of key heads
    scales = 8 * visible if k.dtype.itemsize == 1 else 0
    return {
        "least": 2 * (visible * head_dim * k.dtype.itemsize + math.prod(q.shape) * q.dtype.itemsize) + scales,
        "flops": 4 * heads * head_dim * int(visible_end.sum()),
    }


def keys_fetched(length: int, tiles: Tiles, slots: int, page_size: int | None = None) -> int:
    """Keys that the kernel copies for queries of which the farthest-seeing one sees `length`."""
    unit = min(tiles.keys, page_size) if page_size else tiles.keys
    end = unit if page_size else slots - length // unit * unit  # where a row's last unit ends
    chunk = min(tiles.chunk, unit, page_size or slots)
    return length // unit * unit + min(math.ceil(length % unit / chunk) * chunk, end)
