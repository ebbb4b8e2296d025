"""Gumbel noise that is a function of (key, place, token id) and nothing else: no tile, mesh or backend changes it.

Where z / temperature + noise is largest over the tokens is an exact draw from softmax(z / temperature). The bits come
from Threefry-2x32 with 20 rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), written out
so that it runs inside a kernel, one token per counter.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Seeds(NamedTuple):
    """What a hidden row's noise starts from: the two words of its key, and its number among the rows of that key."""

    high: jax.Array  # uint32 [...]
    low: jax.Array  # uint32 [...]
    place: jax.Array  # uint32 [...]


def row_seeds(key: jax.Array | None, hidden: jax.Array) -> Seeds:
    """Of rows [..., d], [...] each: a row's place is its number in the dimensions that the keys leave.

    key: one, or an array of the first of hidden's leading dimensions; InputError if it is neither.
    """
    if key is None:
        raise InputError("temperature above 0 needs a random key, got none")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != hidden.shape[: key.ndim]:
        raise InputError(
            f"key must be a jax.random.key, or an array of them whose shape begins {hidden.shape[:-1]}; "
            f"got {key.dtype} {key.shape}"
        )
    words = jax.random.key_data(key)[..., :2]  # every generator keeps its seed in the first two words
    left = hidden.shape[key.ndim : -1]
    zeros = jnp.zeros_like(hidden[..., 0], jnp.uint32)
    high, low = (words[..., i].reshape(key.shape + (1,) * len(left)) for i in range(2))
    place = jnp.arange(math.prod(left), dtype=jnp.uint32).reshape(left)
    return Seeds(zeros + high, zeros + low, zeros + place)


def threefry(key: tuple[jax.Array, jax.Array], count: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """64 random bits for each 64-bit counter under each 64-bit key, all in halves: uint32 arrays that broadcast."""
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = count[0] + schedule[0], count[1] + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = ((b << jnp.uint32(rotation)) | (b >> jnp.uint32(32 - rotation))) ^ a
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b


def gumbel(seeds: Seeds, ids: jax.Array) -> jax.Array:
    """float32 noise of the tokens `ids` (int32, below 2**31), which broadcast against the seeds.

    The uniform number below has 62 bits and is small where the noise is large, so that a float32 resolves that tail.
    """
    high, low = threefry((seeds.high, seeds.low), (seeds.place, ids.astype(jnp.uint32)))
    high, low = ((word >> jnp.uint32(1)).astype(jnp.int32).astype(jnp.float32) for word in (high, low))
    u = jnp.minimum(high * 2.0**-31 + (low + 0.5) * 2.0**-62, 1 - 2.0**-24)
    return -jnp.log(exponential(u))


def exponential(u: jax.Array) -> jax.Array:
    """-log1p(-u) of float32 in (0, 1), to about 1e-6 of it, by operations that every kernel's compiler has: its series
    where 1 - u would lose too much of u."""
    series: jax.Array | float = 1 / 6
    for k in (5, 4, 3, 2, 1):
        series = series * u + 1 / k
    return jnp.where(u < 1 / 16, u * series, -jnp.log(1 - u))
