"""What a call of the TPU kernel moves and computes, without running it: its own walk through memory, counted."""

import dataclasses
import math

import jax
import numpy as np

from cdlm_jax.chips import Chip
from cdlm_jax.kernels.block_attention.tiles import LANES, Tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """moved: bytes between HBM and the chip. least: each visible key and value, each query and result once.
    flops: of the two products, over visible keys only. buffers: bytes of VMEM that the kernel asks for; the compiler
    adds its temporaries.
    """

    moved: int
    least: int
    flops: int
    buffers: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.moved

    def seconds(self, chip: Chip) -> float:
        """The roofline's bound: what memory or arithmetic alone would take."""
        return max(self.moved / chip.bandwidth, self.flops / chip.flops)


def cost(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    visible_end: np.ndarray,
    tiles: Tiles,
    page_size: int | None = None,
) -> Cost:
    """The cost for q [rows, Q, H, D] and one layer's k [..., S, K, D] (or pages); visible_end [rows, Q] as numbers."""
    rows, num_queries, heads, head_dim = q.shape
    slots, kv_heads = k.shape[-3:-1]
    q_tiles = math.ceil(num_queries / tiles.queries)
    pieces = [visible_end[:, i * tiles.queries : (i + 1) * tiles.queries].max(axis=1) for i in range(q_tiles)]
    lengths = np.concatenate(pieces)  # of every (row, tile of queries)
    scaled = k.dtype.itemsize == 1

    def key_bytes(keys: int, lanes: int) -> int:
        return 2 * keys * kv_heads * lanes * k.dtype.itemsize

    width = max(head_dim, LANES)  # a shorter row takes a whole one in HBM
    moved = sum(key_bytes(keys_fetched(int(each), tiles, slots, page_size), width) for each in lengths)
    if scaled:
        moved += sum(2 * math.ceil(each / tiles.keys) * tiles.keys * kv_heads * 4 for each in lengths)
    queries_and_result = 2 * rows * num_queries * heads * q.dtype.itemsize
    moved += queries_and_result * width + math.ceil(rows / tiles.rows) * tiles.rows * q_tiles * tiles.queries * 4
    visible = int(visible_end.max(axis=1).sum())
    least = key_bytes(visible, head_dim) + queries_and_result * head_dim + (8 * visible * kv_heads if scaled else 0)
    return Cost(
        moved=moved,
        least=least,
        flops=4 * heads * head_dim * int(visible_end.sum()),
        buffers=_buffers(q, k, tiles),
    )


def keys_fetched(length: int, tiles: Tiles, slots: int, page_size: int | None = None) -> int:
    """Keys that the kernel copies for queries of which the farthest-seeing one sees `length`."""
    unit = min(tiles.keys, page_size) if page_size else tiles.keys
    end = unit if page_size else slots - length // unit * unit  # where a row's last unit ends
    chunk = min(tiles.chunk, unit, page_size or slots)
    return length // unit * unit + min(math.ceil(length % unit / chunk) * chunk, end)


def _buffers(q, k, tiles: Tiles) -> int:
    """Double-buffered tiles of keys and values, queries and results; the queries by head, and the softmax's state."""
    heads, width, kv_heads = q.shape[2], max(q.shape[3], LANES), k.shape[-2]
    keys = 2 * 2 * tiles.keys * kv_heads * (width * k.dtype.itemsize + (4 if k.dtype.itemsize == 1 else 0))
    one_row = tiles.queries * heads * width
    blocks = 2 * 2 * tiles.rows * one_row * q.dtype.itemsize
    state = one_row * (q.dtype.itemsize + 4) + 2 * tiles.queries * heads * LANES * 4
    return keys + blocks + state
