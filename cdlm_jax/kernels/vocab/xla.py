"""Streams the vocabulary in tiles of head columns, and long batches in chunks of rows: only [chunk, tile] logits ever
exist, forward and backward.

Inside, every array of rows is [m, k]; on a mesh that cuts the rows into G groups [G, m, k], and each device goes
through the m of its own group in chunks. On a mesh that cuts the head's columns into P pieces, each device streams its
own: arrays have one more axis, P before the tile's, and what the pieces say is merged at the end. A tile's `fsdp`
pieces are gathered when its turn comes.
"""

import dataclasses
from functools import reduce
from itertools import cycle

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cdlm_jax.kernels.vocab.reference import logits
from cdlm_jax.kernels.vocab.statistics import Rows, nothing, peak
from cdlm_jax.mesh.sharding import gathered, pieces, whole

LANES = 128  # columns that a TPU keeps together
CHUNK = 2048  # rows of a device whose logits exist together

# ---- rows ----------------------------------------------------------------------------------------------------------


def in_groups(rows: Rows) -> Rows:
    """[..., k] -> [m, k] or [G, m, k]; groups are consecutive along the first axis."""
    lead = rows.hidden[0].shape[:-1]
    groups = pieces(rows.hidden[0], 0) if lead else 1
    if groups == 1:
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
    cut = jax.tree.map(lambda x: x.reshape(groups, lead[0] // groups, *x.shape[1:]), rows)
    return jax.tree.map(lambda x: x.reshape(groups, -1, x.shape[-1]), cut)


def out_of_groups(x, like):
    """in_groups in reverse: [..., k], k its own, the rest as in `like`."""
    lead = like.shape[:-1]
    if x.ndim == 3:
        x = x.reshape(x.shape[0], lead[0] // x.shape[0], *lead[1:], x.shape[-1])
    return x.reshape(*lead, x.shape[-1])


class Chunks:
    """A device's rows in chunks, which are cut along the axis of m."""

    def __init__(self, rows: Rows):
        self.axis = rows.hidden[0].ndim - 2
        self.count = rows.hidden[0].shape[self.axis]

    def take(self, tree, start, size):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, self.axis), tree)

    def put(self, tree, new, start):
        update = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, new: update(x, new, start, self.axis), tree, new)


# ---- columns -------------------------------------------------------------------------------------------------------


def in_pieces(heads):
    """[d, V] -> [d, P, V / P], one piece of consecutive columns per device, if the first head is cut so."""
    count = pieces(heads[0], 1)
    return heads if count == 1 else tuple(head.reshape(head.shape[0], count, -1) for head in heads)


def columns(head, start, size):
    """[d, size], or of every piece together [d, P * size]; whole along d."""
    w = jax.lax.dynamic_slice_in_dim(head, start, size, axis=-1).reshape(head.shape[0], -1)
    return gathered(w, "fsdp")


def tokens(head, start, size):
    """int32 [size], the ids of a tile's columns, or [P, size]."""
    ids = start + jnp.arange(size, dtype=jnp.int32)
    if head.ndim == 2:
        return ids
    return ids + jnp.arange(head.shape[1], dtype=jnp.int32)[:, None] * head.shape[2]


def tile_of(heads, start, size):
    return tuple(columns(head, start, size) for head in heads), tokens(heads[0], start, size)


def tile_logits(rows, weights, ids):
    """float32 [..., m, size] or [..., m, P, size], of every head."""
    every = (logits(hidden, w) for hidden, w in zip(rows.hidden, cycle(weights), strict=False))
    return tuple(z.reshape(*z.shape[:-1], *ids.shape) for z in every)


def over_columns(tree, ids):
    """Arrays [..., m, 1], or [..., m, 1, 1], to meet a tile's logits."""
    return tree if ids.ndim == 1 else jax.tree.map(lambda x: x[..., None], tree)


def sweep(step, carry, count, most):
    """carry = step(carry, start, size) over all of `count` columns or rows, at most `most` at a time, left to right.

    Up to `most` of them compile without a loop. For more, `most` becomes the largest multiple of LANES that divides
    them, if there is one above half of it: then a program holds the step once. Otherwise the first step takes the
    remainder.
    """
    if count <= most:
        return step(carry, 0, count)
    even = (size for size in range(most - most % LANES, most // 2, -LANES) if count % size == 0)
    size = next(even, most)
    full, first = divmod(count, size)
    if first:
        carry = step(carry, 0, first)
    return jax.lax.fori_loop(0, full, lambda i, carry: step(carry, first + i * size, size), carry)


# ---- forward and backward ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Engine:
    """tile: columns of the head at a time."""

    tile: int

    peak = staticmethod(peak)

    def statistics(self, measure, merge, rows: Rows, heads):
        """[..., 1] of every row: measure(logits of every head, ids, extra) of all tiles, merged left to right, and then
        over the pieces."""
        like = rows.hidden[0]
        rows, heads = in_groups(rows), in_pieces(heads)
        chunks = Chunks(rows)

        def measure_rows(rows, weights, ids):
            rows = rows.used()
            return measure(tile_logits(rows, weights, ids), ids, over_columns(rows.extra, ids))

        def of_tile(carry, start, size):
            weights, ids = tile_of(heads, start, size)

            def of_chunk(carry, first, count):
                new = measure_rows(chunks.take(rows, first, count), weights, ids)
                return chunks.put(carry, merge(chunks.take(carry, first, count), new), first)

            return sweep(of_chunk, carry, chunks.count, CHUNK)

        if heads[0].shape[-1] <= self.tile and chunks.count <= CHUNK:
            found = measure_rows(rows, *tile_of(heads, 0, heads[0].shape[-1]))
        else:
            start = nothing(jax.eval_shape(lambda: measure_rows(rows, *tile_of(heads, 0, 1))))
            found = sweep(of_tile, start, heads[0].shape[-1], self.tile)
        if heads[0].ndim == 3:
            found = jax.tree.map(lambda x: whole(x, -2), found)
            found = reduce(merge, (jax.tree.map(lambda x, i=i: x[..., i, :], found) for i in range(heads[0].shape[1])))
        return jax.tree.map(lambda x: out_of_groups(x, like), found)

    def pull_back(self, d_logits, rows: Rows, heads):
        """(d hidden, d head) of the first hidden and head, from d_logits(logits of every head, ids, extra), the
        gradient at a tile of the first one's logits.

        d hidden accumulates over the tiles in float32, a tile of d head over the chunks of rows and then over their
        groups; every column of d head is written once.
        """
        like = rows.hidden[0]
        rows, heads = in_groups(rows), in_pieces(heads)
        chunks = Chunks(rows)
        head = heads[0]
        of_hidden, of_head = jax.typeof(rows.hidden[0]).sharding, jax.typeof(head).sharding

        def product(subscripts, a, b, sharding):
            return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, out_sharding=sharding)

        def of_tile(carry, start, size):
            d_hidden, d_head = carry
            weights, ids = tile_of(heads, start, size)
            w = weights[0]
            of_groups = NamedSharding(of_hidden.mesh, P(*of_hidden.spec[:-2], None, jax.typeof(w).sharding.spec[1]))

            def of_chunk(carry, first, count):
                d_hidden, d_w = carry
                chunk = chunks.take(rows, first, count).used()
                dz = d_logits(tile_logits(chunk, weights, ids), ids, over_columns(chunk.extra, ids))
                hidden = chunk.hidden[0]
                dz = dz.astype(like.dtype).reshape(*hidden.shape[:-1], -1)  # [..., m, size], or [..., m, P * size]
                new = chunks.take(d_hidden, first, count) + product("...v,dv->...d", dz, w, of_hidden)
                d_w += product("...md,...mv->...dv", hidden, dz, of_groups)
                return chunks.put(d_hidden, new, first), d_w

            d_w = jnp.zeros((*rows.hidden[0].shape[:-2], *w.shape), jnp.float32, out_sharding=of_groups)
            d_hidden, d_w = sweep(of_chunk, (d_hidden, d_w), chunks.count, CHUNK)
            d_w = d_w if d_w.ndim == 2 else d_w.sum(axis=0)
            d_w = d_w.astype(head.dtype).reshape(*head.shape[:-1], size)
            d_w = d_w if of_head.mesh.empty else jax.reshard(d_w, of_head)
            return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_w, start, axis=-1)

        zeros = jnp.zeros_like(rows.hidden[0], dtype=jnp.float32), jnp.zeros_like(head)
        d_hidden, d_head = sweep(of_tile, zeros, head.shape[-1], self.tile)
        return out_of_groups(d_hidden.astype(like.dtype), like), d_head.reshape(head.shape[0], -1)
