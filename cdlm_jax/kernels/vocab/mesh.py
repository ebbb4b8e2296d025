"""The vocabulary's kernels on a mesh: every device has its own rows and columns; collectives join what they find."""

import dataclasses
from functools import reduce

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cdlm_jax.kernels.vocab.statistics import Rows

GATHERED = 16384  # columns of a head whose `fsdp` pieces are put together at a time


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


def flat(rows: Rows) -> Rows:
    """[..., k] -> [n, k]"""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
