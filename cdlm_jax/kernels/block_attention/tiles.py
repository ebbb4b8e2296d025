"""How the TPU kernel cuts its work: figures measured on a device (`tuning.json`), or a heuristic."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

TUNED = Path(__file__).with_name("tuning.json")  # device kind -> shape (`shape_name`) -> fields of Tiles
SUBLANES, LANES = 16, 128  # bfloat16's second-to-last dimension, and any dtype's last one, come in multiples of these
BLOCK = 2**20  # bytes of a tile of keys, of a program's queries, ...: several of each fit the smallest VMEM, 16 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """rows: of a program, one after the other. queries: of each of them at a time. keys: of a tile, of which one is
    computed with while the next is fetched. chunk: keys of a copy at a row's end, where no whole tile is needed."""

    rows: int
    queries: int
    keys: int
    chunk: int = 32


def choose(device_kind: str, q: jax.Array, k: jax.Array, paged: bool) -> Tiles:
    """Tiles for q [rows, Q, heads, D] and k [..., rows, S, kv_heads, D] (or pages of S slots) on one device."""
    tuned = measured(device_kind, q, k)
    return Tiles(**tuned) if tuned and not paged else heuristic(q, k, paged)


def measured(device_kind: str, q: jax.Array, k: jax.Array) -> dict[str, int]:
    """The entry of `tuning.json` for these shapes; {} if there is none."""
    return _tuned().get(device_kind, {}).get(shape_name(q, k), {})


def shape_name(q: jax.Array, k: jax.Array) -> str:
    """What tuned tiles depend on: queries, heads, key heads and head_dim, and the two dtypes."""
    sizes = "x".join(map(str, (q.shape[1], q.shape[2], k.shape[-2], q.shape[3])))
    return f"{sizes} {q.dtype} {k.dtype}"


def heuristic(q: jax.Array, k: jax.Array, paged: bool) -> Tiles:
    """Tiles of about `BLOCK` bytes, for shapes that nobody has tuned."""
    rows, num_queries, heads, head_dim = q.shape
    slots, kv_heads = k.shape[-3:-1]
    queries = min(_up(num_queries, SUBLANES), _power_of_two(BLOCK / (heads * head_dim * 4), SUBLANES, 256))
    width = max(head_dim, LANES)  # as it lies in memory
    keys = _power_of_two(BLOCK / (kv_heads * width * k.dtype.itemsize), LANES, 512)
    scores = heads_at_once(kv_heads, k.dtype) * heads // kv_heads * queries * 4  # bytes for each key
    keys = min(keys, _power_of_two(2 * BLOCK / scores, LANES, 512))
    if not paged:
        keys = min(keys, _up(slots, LANES))
    elif keys % slots:
        keys = math.gcd(keys, slots)
    spare = 2 * BLOCK - keys * kv_heads * width * k.dtype.itemsize
    fit = spare // (queries * heads * width * q.dtype.itemsize)
    # Two programs at least, since some chips have two cores.
    return Tiles(rows=max(1, min(fit, 8, math.ceil(rows / 2))), queries=queries, keys=keys)


def heads_at_once(kv_heads: int, dtype) -> int:
    """Key heads that a step works on: a few, for their products to overlap, and whole 32-bit words of them."""
    step = math.gcd(kv_heads, 8)
    return kv_heads if step % (4 // jnp.dtype(dtype).itemsize) else step


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _power_of_two(limit: float, least: int, most: int) -> int:
    """The largest power of two up to the limit, within bounds."""
    return min(most, max(least, 2 ** math.floor(math.log2(limit))))


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TUNED.read_text())
