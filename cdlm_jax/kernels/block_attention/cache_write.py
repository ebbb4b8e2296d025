"""Putting a block's keys and values into the cache on TPU, in place.

XLA turns so small a scatter into a loop of one token at a time. Here every row is one copy per array, or one per token
where some of its tokens are left out. All rows are copied at once, or, where their slots do not fit the scalar memory,
as many as do.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cdlm_jax.kernels.block_attention.mesh import alone
from cdlm_jax.kernels.block_attention.tiles import SCALARS
from cdlm_jax.mesh import sharding

SLOTS = SCALARS // 2  # of a program, while the next one's are fetched


def _kernel(layer, first, slots, k_new, v_new, k_old, v_old, k_cache, v_cache, semaphores, *, rows: int):
    """One program: `rows` rows. first [all rows]: where a row's tokens go, if one after the other, else -1; slots
    [1, 1, rows * Q]: where each goes."""
    queries = k_new.shape[1]
    size = k_cache.shape[2]
    first_row = pl.program_id(0) * rows

    def transfer(act, r, token, slot, count):
        for i, (new, cache) in enumerate(((k_new, k_cache), (v_new, v_cache))):
            source, target = new.at[r, pl.ds(token, count)], cache.at[layer[0], r, pl.ds(slot, count)]
            act(pltpu.make_async_copy(source, target, semaphores.at[i]))

    def by_row(act, r, _):
        pl.when(first[r] >= 0)(lambda: transfer(act, r, 0, first[r], queries))

        def by_token(token, _):
            slot = slots[0, 0, (r - first_row) * queries + token]
            pl.when((slot >= 0) & (slot < size))(lambda: transfer(act, r, token, slot, 1))

        jax.lax.fori_loop(0, jnp.where(first[r] >= 0, 0, queries), by_token, None)

    for act in (lambda copy: copy.start(), lambda copy: copy.wait()):
        jax.lax.fori_loop(first_row, first_row + rows, partial(by_row, act), None)


def writes_in_place(cache: jax.Array, queries: int) -> bool:
    """Whether `cache_write` is for this cache and so many tokens of a row: on a TPU, and not where a device has an odd
    number of key heads, whose tokens share 32-bit words with their neighbours' in the layout that the attention reads,
    nor where a row's slots alone do not fit the scalar memory."""
    if sharding.device().platform != "tpu" or queries > SLOTS:
        return False
    return cache.shape[3] // sharding.pieces(cache, 3) % 2 == 0


def sharded_cache_write(k_cache, v_cache, k, v, *, layer, slots, interpret=False):
    """`cache_write` on the current mesh: every device writes its own rows and key heads."""
    if alone():
        return cache_write(k_cache, v_cache, k, v, layer=layer, slots=slots, interpret=interpret)
    cache, new = jax.typeof(k_cache).sharding.spec, jax.typeof(k).sharding.spec
    return jax.shard_map(
        lambda *arrays: cache_write(*arrays[:4], layer=arrays[4], slots=arrays[5], interpret=interpret),
        in_specs=(cache, cache, new, new, jax.P(), jax.P(new[0])),
        out_specs=(cache, cache),
        check_vma=False,
    )(k_cache, v_cache, k, v, layer, slots)


def cache_write(
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: jax.Array,
    slots: jax.Array,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The caches [layers, rows, S, K, D] with k, v [rows, Q, K, D] of one layer at slots [rows, Q], on one device.

    Slots outside 0..S-1 are dropped; a row's other slots differ from each other.
    """
    rows, queries = slots.shape
    at_once = max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * queries <= SLOTS))
    in_order = (slots == slots[:, :1] + jnp.arange(queries)).all(axis=1)
    inside = (slots[:, 0] >= 0) & (slots[:, 0] + queries <= k_cache.shape[2])
    k, v = k.astype(k_cache.dtype), v.astype(v_cache.dtype)
    by_program = slots.reshape(-1, 1, at_once * queries)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, rows=at_once),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows // at_once,),
            in_specs=[
                pl.BlockSpec((1, 1, at_once * queries), lambda i, *_: (i, 0, 0), memory_space=pltpu.SMEM),
                *[anywhere] * 4,
            ],
            out_specs=[anywhere] * 2,
            scratch_shapes=[pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_cache, v_cache)],
        input_output_aliases={5: 0, 6: 1},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * (k.nbytes + v.nbytes)),
        interpret=interpret,
        name="cache_write",
    )(layer.reshape(1), jnp.where(in_order & inside, slots[:, 0], -1), by_program, k, v, k_cache, v_cache)
