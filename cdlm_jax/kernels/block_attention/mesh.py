"""Attention on a mesh: each device's own rows and heads."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cdlm_jax.mesh import sharding


def per_device(local, q, k, v, options, return_lse=False):
    """local(q, k, v, options), on a mesh by every device for its rows and heads on their own: nothing is exchanged,
    but for what does not lie as q does. Inside of a `jax.shard_map`, arrays are one device's already.

    Pages are whole on every device, but for the key heads; page tables are split by rows.
    """
    if alone():
        return local(q, k, v, options)
    of_q = jax.typeof(q).sharding.spec
    rows, heads = of_q[0], of_q[2]
    scales = [name for name in ("k_scale", "v_scale") if name in options]
    keys = PartitionSpec(*(None,) * (k.ndim - 4), None if "page_table" in options else rows, None, heads, None)
    if "layer" in options and any(jax.typeof(x).sharding.spec != keys for x in (k, v)):
        # What is moved, or repeated, is one layer of the cache and not all of it.
        cut = {name: options[name][options["layer"]][None] for name in scales}
        k, v = (x[options["layer"]][None] for x in (k, v))
        options = options | cut | {"layer": jnp.zeros((), jnp.int32)}
    k, v = (jax.reshard(like_queries(x, q), keys) for x in (k, v))
    options = options | {name: like_queries(options[name], q) for name in scales}
    specs = {"layer": PartitionSpec()} | dict.fromkeys(scales, PartitionSpec(*keys[:-3], keys[-2], None))
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


def shapes_per_device(q: jax.Array, k: jax.Array, paged: bool) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """q, and one layer's k, as `per_device` hands them to each device."""
    rows, heads = sharding.pieces(q, 0), sharding.pieces(q, 2)
    of_q = (q.shape[0] // rows, q.shape[1], q.shape[2] // heads, q.shape[3])
    places, slots, kv_heads, head_dim = k.shape[-4:]
    of_k = (places if paged else of_q[0], slots, math.lcm(heads, kv_heads) // heads, head_dim)
    return jax.ShapeDtypeStruct(of_q, q.dtype), jax.ShapeDtypeStruct(of_k, k.dtype)


def alone() -> bool:
    """Whether arrays are those of one device: there is no mesh, or this is inside of a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.are_all_axes_manual or not sharding.mesh_sizes()


def like_queries(x: jax.Array, q: jax.Array) -> jax.Array:
    """x [..., K, D], or scales [..., K, S], of which key heads are whole on every device where query heads are split
    over them: each device takes those that its query heads use, which repeats some of them."""
    axis = x.ndim - 2
    over = sharding.pieces(q, 2)
    if over == sharding.pieces(x, axis):
        return x
    repeats = math.lcm(over, x.shape[axis]) // x.shape[axis]
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = jax.typeof(q).sharding.spec[2]
    return jax.reshard(jnp.repeat(x, repeats, axis=axis), jax.P(*spec))
