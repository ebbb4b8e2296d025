"""Attention on a mesh: each device's own rows and heads."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cdlm_jax import sharding


def per_device(local, q, k, v, options, return_lse=False):
    """local(q, k, v, options), on a mesh by every device for its rows and heads on their own: nothing is exchanged.

    Pages are whole on every device, but for the key heads; page tables are split by rows.
    """
    if not sharding.mesh_sizes():
        return local(q, k, v, options)
    k, v = like_queries(k, q), like_queries(v, q)
    of_q, of_k = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    rows, heads = of_q[0], of_q[2]
    stack = (None,) * (k.ndim - 4)
    keys = PartitionSpec(*stack, None if "page_table" in options else rows, None, of_k[-2], None)
    specs = {
        "layer": PartitionSpec(),
        "k_scale": PartitionSpec(*keys[:-3], keys[-2], None),
        "v_scale": PartitionSpec(*keys[:-3], keys[-2], None),
    }
    in_specs = {
        name: jax.tree.map(lambda _, n=name: specs.get(n, PartitionSpec(rows)), options[name]) for name in options
    }
    options = jax.tree.map(jax.reshard, options, in_specs)
    out = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        local,
        in_specs=(out, keys, keys, in_specs),
        out_specs=(out, PartitionSpec(*out[:-1])) if return_lse else out,
        check_vma=False,  # a Pallas call does not say over which axes its result varies
    )(q, k, v, options)


def like_queries(x: jax.Array, q: jax.Array) -> jax.Array:
    """Key heads (the axis before the last) that are whole on every device, where query heads are split over them: each
    device takes those that its query heads use, which repeats some of them."""
    axis = x.ndim - 2
    over = sharding.pieces(q, 2)
    if over == sharding.pieces(x, axis):
        return x
    repeats = math.lcm(over, x.shape[axis]) // x.shape[axis]
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = jax.typeof(q).sharding.spec[2]
    return jax.reshard(jnp.repeat(x, repeats, axis=axis), jax.P(*spec))
