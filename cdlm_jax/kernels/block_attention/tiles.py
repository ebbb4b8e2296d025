"""How the TPU kernel cuts its work: figures measured on a device (`tuning.json`), or a heuristic."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

Shaped = jax.Array | jax.ShapeDtypeStruct  # only its shape and dtype are read

TUNED = Path(__file__).with_name("tuning.json")  # device kind -> shape (`shape_name`) -> fields of Tiles
SUBLANES, LANES = 16, 128  # bfloat16's second-to-last dimension, and any dtype's last one, come in multiples of these
BLOCK = 2**20  # bytes of a tile of keys, of a program's queries, ...
VMEM = 15 * 2**20  # bytes that a program may need by `vmem`: the smallest VMEM is 16 MiB, on v4
SCALARS = 2**17  # int32 of the scalar memory that a kernel may fill: half of every chip's 1 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """rows: of a program, one after the other. queries: of each of them at a time. keys: of a tile, of which one is
    computed with while the next is fetched. chunk: keys of a copy at a row's end, where no whole tile is needed."""

    rows: int
    queries: int
    keys: int
    chunk: int = 32


def choose(device_kind: str, q: jax.Array, k: jax.Array, pages: int = 0) -> Tiles:
    """Tiles for q [rows, Q, heads, D] and k [..., rows, S, kv_heads, D] on one device, or for rows of so many pages of
    S slots."""
    tuned = {} if pages else measured(device_kind, q, k)
    return Tiles(**tuned) if tuned else heuristic(q, k, bool(pages))


def measured(device_kind: str, q: jax.Array, k: jax.Array) -> dict[str, int]:
    """The entry of `tuning.json` for these shapes; {} if there is none."""
    return _tuned().get(device_kind, {}).get(shape_name(q, k), {})


def shape_name(q: Shaped, k: Shaped) -> str:
    """What tuned tiles depend on: queries, heads, key heads and head_dim, and the two dtypes."""
    sizes = "x".join(map(str, (q.shape[1], q.shape[2], k.shape[-2], q.shape[3])))
    return f"{sizes} {q.dtype} {k.dtype}"


def heuristic(q: Shaped, k: Shaped, paged: bool) -> Tiles:
    """Tiles of about `BLOCK` bytes, for shapes that nobody has tuned, or smaller ones where they do not fit.

    With fewer rows a program has less to do, with smaller tiles of keys a step; with fewer queries keys are fetched
    once more: so they are halved in this order. The smallest tiles may still not fit (`vmem`).
    """
    rows, num_queries, heads, head_dim = q.shape
    slots, kv_heads = k.shape[-3:-1]
    queries = min(_up(num_queries, SUBLANES), _power_of_two(BLOCK / (heads * head_dim * 4), SUBLANES, 256))
    width = max(head_dim, LANES)  # as it lies in memory
    keys = _power_of_two(BLOCK / (kv_heads * width * k.dtype.itemsize), LANES, 512)
    keys = min(keys, _power_of_two(2 * BLOCK / _scores(q, k, queries), LANES, 512))
    if not paged:
        keys = min(keys, _up(slots, LANES))
    elif keys % slots:
        keys = math.gcd(keys, slots)
    spare = 2 * BLOCK - keys * kv_heads * width * k.dtype.itemsize
    fit = spare // (queries * heads * width * q.dtype.itemsize)
    # Two programs at least, since some chips have two cores.
    tiles = Tiles(rows=max(1, min(fit, 8, math.ceil(rows / 2))), queries=queries, keys=keys)
    while vmem(q, k, tiles) > VMEM:
        if tiles.rows > 1:
            tiles = dataclasses.replace(tiles, rows=tiles.rows // 2)
        elif tiles.keys % (2 * LANES) == 0:
            tiles = dataclasses.replace(tiles, keys=tiles.keys // 2)
        elif tiles.queries > SUBLANES:
            tiles = dataclasses.replace(tiles, queries=_up(tiles.queries // 2, SUBLANES))
        else:
            break
    return tiles


def vmem(q: Shaped, k: Shaped, tiles: Tiles) -> int:
    """Bytes of VMEM that a program needs at most: `buffers`, and what the compiler adds, which is fitted to its reports
    (tests/aot): a step's scores, and a row's queries and results on their way between the two layouts."""
    heads, kv_heads, itemsize = q.shape[2], k.shape[-2], k.dtype.itemsize
    moving = tiles.queries * heads * max(q.shape[3], LANES) * (8 + 5 * q.dtype.itemsize)
    if kv_heads % (4 // itemsize):  # no whole words: a tile of keys is transposed
        moving += tiles.keys * (_up(kv_heads, 32 // itemsize) + kv_heads) * LANES * itemsize
    return buffers(q, k, tiles) + moving + _scores(q, k, tiles.queries) * tiles.keys


def buffers(q: Shaped, k: Shaped, tiles: Tiles) -> int:
    """Bytes of what the kernel asks for: double-buffered tiles of keys and values, queries and results; the queries by
    head, and the softmax's state."""
    heads, width, kv_heads = q.shape[2], max(q.shape[3], LANES), k.shape[-2]
    keys = 2 * 2 * tiles.keys * kv_heads * (width * k.dtype.itemsize + (4 if k.dtype.itemsize == 1 else 0))
    as_in_hbm = tiles.queries * _up(heads, 32 // q.dtype.itemsize) * width  # a register's heads
    blocks = 2 * 2 * tiles.rows * as_in_hbm * q.dtype.itemsize
    state = tiles.queries * heads * (width * (q.dtype.itemsize + 4) + 2 * LANES * 4)
    return keys + blocks + state


def _scores(q: Shaped, k: Shaped, queries: int) -> int:
    """Bytes for each key of a step."""
    kv_heads = k.shape[-2]
    return heads_at_once(kv_heads, k.dtype) * q.shape[2] // kv_heads * queries * 4


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
