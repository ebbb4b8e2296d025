"""The cache's write in place, interpreted, against the scatter that it stands for."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tiny import TINY

from cdlm_jax.kernels.block_attention import cache_write as cache_write_module
from cdlm_jax.kernels.block_attention.cache_write import cache_write, writes_in_place
from cdlm_jax.mesh import sharding
from cdlm_jax.models.cache import KVCache

LAYERS, LAYER = 2, 1


def test_cache_write_is_the_scatter():
    config = dataclasses.replace(TINY, num_layers=LAYERS)
    rng = np.random.default_rng(0)
    rows, queries, slots = 4, 5, 20
    cache = KVCache.create(config, rows, slots, jnp.float32)
    random = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    cache = dataclasses.replace(cache, k=random(cache.k.shape), v=random(cache.v.shape))
    k, v = (random((rows, queries, *cache.k.shape[3:])) for _ in "kv")
    at = jnp.array([[3, 4, 5, 6, 7], [18, 19, 20, 21, 22], [20, 1, 20, 2, 0], [15, 16, 17, 18, 19]], jnp.int32)
    expected = cache.write(LAYER, k, v, at)
    found = cache_write(cache.k, cache.v, k, v, layer=jnp.int32(LAYER), slots=at, interpret=True)
    np.testing.assert_array_equal(found[0], expected.k)
    np.testing.assert_array_equal(found[1], expected.v)


def test_cache_write_in_parts(monkeypatch):
    """As many rows at once as the scalar memory has slots for."""
    rng = np.random.default_rng(0)
    cache, new = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 6, 9, 2, 64), (6, 3, 2, 64)))
    at = jnp.asarray(rng.permuted(np.tile(np.arange(12), (6, 1)), axis=1)[:, :3], jnp.int32).at[0].set([2, 3, 4])
    expected = cache.at[0, jnp.arange(6)[:, None], at].set(new, mode="drop")
    for slots, programs in ((17, 2), (1, 6)):
        monkeypatch.setattr(cache_write_module, "SLOTS", slots)
        write = functools.partial(cache_write, layer=jnp.int32(0), slots=at, interpret=True)
        assert f"grid=({programs},)" in str(jax.make_jaxpr(write)(cache, cache, new, new))
        for found in write(cache, cache, new, new):
            np.testing.assert_array_equal(found, expected)


def test_where_the_cache_is_written_in_place(monkeypatch):
    cache = jnp.zeros((1, 2, 8, 4, 8))
    assert not writes_in_place(cache, 8)
    monkeypatch.setattr(sharding, "device", lambda: SimpleNamespace(platform="tpu"))
    assert writes_in_place(cache, cache_write_module.SLOTS)
    assert not writes_in_place(cache, cache_write_module.SLOTS + 1)
    assert not writes_in_place(cache[:, :, :, :3], 8)
