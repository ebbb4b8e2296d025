"""Run by test_block_attention_api in a process of its own, with four devices:

python attention_cases.py tpu cache "int8 pages"   fails where the public functions' values on a mesh are wrong
"""

import contextlib
import dataclasses
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from test_block_attention import Case, check, make_call

from cdlm_jax.kernels.block_attention import block_attention, tpu
from cdlm_jax.kernels.block_attention.cache_write import sharded_cache_write
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.models.cache import KVCache


@contextlib.contextmanager
def as_on_tpu():
    """The public functions take the kernel, which is interpreted."""
    device = SimpleNamespace(platform="tpu", device_kind="TPU v4")
    with (
        mock.patch.object(sharding, "device", lambda: device),
        mock.patch.object(tpu, "block_attention", partial(tpu.block_attention, interpret=True)),
    ):
        yield


CASES = {
    "dense": Case(rows=2, kv_heads=2),
    "key heads that do not divide": Case(rows=2, kv_heads=3, group=2, slots=40),
    "pages": Case(rows=2, page_size=16, slots=144, dtype="bfloat16"),
    "int8": Case(rows=2, int8=True, kv_heads=4, group=1),
    "int8, key heads that do not divide": Case(rows=2, int8=True, kv_heads=1, group=4, slots=128),
    "int8 pages": Case(rows=2, int8=True, kv_heads=4, group=1, page_size=16, dtype="bfloat16"),
    "int8 pages, key heads that do not divide": Case(rows=2, int8=True, kv_heads=1, group=4, page_size=16),
}


def placed(case: Case, x: jax.Array, name: str, split: bool) -> jax.Array:
    """An argument where the models put it, or whole on every device."""
    place = None if case.page_size else "rows"
    axes = {"q": ("rows", None, "heads", None), "visible_end": ("rows",), "page_table": ("rows",), "layer": ()}
    axes |= dict.fromkeys("kv", ("layers", place, None, "kv_heads", None))
    axes |= dict.fromkeys(("k_scale", "v_scale"), ("layers", place, "kv_heads", None))
    return sharding.put(jnp.array(x), *axes[name], kv_heads=case.kv_heads) if split or name == "q" else jnp.array(x)


def attention(case: Case, implementation: str) -> None:
    """Where keys lie as the queries do, and where they are whole on every device."""
    ends = np.random.default_rng(0).integers(0, case.slots + 1, (case.rows, case.queries), dtype=np.int32)
    ends[1] = case.slots
    call = make_call(case, 0, ends)
    for split in (True, False):
        q = placed(case, call.q, "q", split)
        arguments = {name: placed(case, x, name, split) for name, x in call.poisoned.items()}
        run = jax.jit(partial(block_attention, return_lse=True, implementation=implementation))
        check(dataclasses.replace(call, q=q, poisoned=arguments), run)
        if split and "layer" in arguments:
            heads = np.lcm(case.kv_heads, 2)
            whole = f"[2,{case.rows},{case.slots},{heads}," if heads != case.kv_heads else None
            assert whole is None or whole not in str(jax.make_jaxpr(run)(q, **arguments))


def inside_of_shard_map() -> None:
    """The arrays are one device's."""
    case = CASES["dense"]
    call = make_call(case, 1, np.full((case.rows, case.queries), case.slots, np.int32))
    rows = jax.P(("data", "fsdp"))
    specs = {"visible_end": rows, "layer": jax.P(), "k": jax.P(None, *rows), "v": jax.P(None, *rows)}

    def run(q, **arguments):
        local = lambda q, arguments: block_attention(q, **arguments, return_lse=True, implementation="tpu")  # noqa: E731
        return jax.shard_map(local, in_specs=(rows, specs), out_specs=(rows, rows), check_vma=False)(q, arguments)

    q = jax.reshard(jnp.array(call.q), rows)
    arguments = {name: jax.reshard(jnp.array(x), specs[name]) for name, x in call.poisoned.items()}
    check(dataclasses.replace(call, q=q, poisoned=arguments), jax.jit(run))


def cache() -> None:
    """Every device writes its own rows and key heads, as the scatter does."""
    rng = np.random.default_rng(0)
    axes = ("rows", None, "kv_heads", None)
    old = [rng.normal(size=(2, 4, 20, 4, 64)).astype(np.float32) for _ in "kv"]
    new = [sharding.put(jnp.asarray(rng.normal(size=(4, 5, 4, 64)), jnp.float32), *axes, kv_heads=4) for _ in "kv"]
    slots = np.array([[3, 4, 5, 6, 7], [18, 19, 20, 21, 22], [20, 1, 20, 2, 0], [15, 16, 17, 18, 19]], np.int32)
    slots = sharding.by_rows(jnp.array(slots))
    k, v = (sharding.put(jnp.asarray(x), "layers", *axes, kv_heads=4) for x in old)
    empty = KVCache(k, v, sharding.by_rows(jnp.zeros(4, jnp.int32)))
    expected = jax.jit(KVCache.write)(empty, jnp.int32(1), *new, slots)
    found = jax.jit(partial(sharded_cache_write, interpret=True))(k, v, *new, layer=jnp.int32(1), slots=slots)
    for one, other in zip(found, (expected.k, expected.v), strict=True):
        assert (np.asarray(one) != old[0]).any()
        np.testing.assert_array_equal(one, other)


if __name__ == "__main__":
    implementation, *names = sys.argv[1:]
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))):
        for name in names:
            if name == "cache":
                cache()
                continue
            with as_on_tpu():
                inside_of_shard_map() if name == "shard_map" else attention(CASES[name], implementation)
            print(name, "holds")
