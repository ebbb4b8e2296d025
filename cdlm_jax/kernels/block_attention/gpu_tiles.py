"""How the GPU kernel cuts its work: figures measured on a device (`tuning.json`), or a heuristic."""

import dataclasses
import math

import jax

from cdlm_jax.kernels.block_attention import tiles as device_tiles
from cdlm_jax.kernels.block_attention.tiles import Shaped
from cdlm_jax.mesh.chips import HOPPER_CORES, HOPPER_SHARED

ALIGNED = 8  # rows of a swizzled tile, which is what copies bring
WGMMA = 64  # rows of a warpgroup's product
MOST_ROWS = 4 * WGMMA  # of the product, in a program: two warpgroups with two blocks of 64 each
OVERHEAD = 3 * 2**10  # bytes that the compiler adds: barriers, room for reductions
LEAST_TILES = 4  # of a split, to be worth its program


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """queries: of a program, a multiple of 8. keys: of a tile, a multiple of 64. stages: tiles in flight. splits: of a
    row's keys among programs, whose results are merged."""

    queries: int
    keys: int
    stages: int
    splits: int = 1

    def blocks(self, group: int) -> int:
        """Of 64 rows, that the product of a program with `group` query heads a key head has."""
        blocks = math.ceil(group * self.queries / WGMMA)
        return math.ceil(blocks / 2) * 2 if blocks > 1 else 1

    def workers(self, group: int) -> int:
        """Warpgroups that compute."""
        return min(2, self.blocks(group))

    def shared(self, group: int, head_dim: int) -> int:
        """Bytes of shared memory: 16-bit queries and keys, and the float32 results of a split on their way out."""
        rows = self.blocks(group) * WGMMA
        parts = 4 * self.workers(group) * WGMMA**2 if self.splits > 1 else 0
        return 2 * head_dim * (rows + 2 * self.stages * self.keys) + 8 * rows + parts + OVERHEAD


def choose(device_kind: str, q: jax.Array, k: jax.Array, pages: int = 0) -> GpuTiles:
    """Tiles for q [rows, Q, H, D] and k [..., rows, S, K, D] on one device; or for rows of so many pages of S slots."""
    tuned = {} if pages else device_tiles.measured(device_kind, q, k)
    return heuristic(q, k, pages, **tuned)


def heuristic(
    q: Shaped, k: Shaped, pages: int = 0, *, queries: int | None = None, keys: int = WGMMA, stages: int = 6
) -> GpuTiles:
    """Tiles for any shapes.

    All queries that share a key head are in one program if they fit, so that nothing is fetched twice; tiles of keys
    are small, so that hardly any is fetched that no query sees; keys are split where there are too few rows and key
    heads for all cores; there are as many stages as have room. What was measured takes the place of some of this.
    """
    rows, num_queries, heads, head_dim = q.shape
    slots, kv_heads = k.shape[-3:-1]
    group = heads // kv_heads
    if queries is None:
        most = MOST_ROWS // group // ALIGNED * ALIGNED
        even = math.ceil(num_queries / math.ceil(num_queries / most))
        queries = math.ceil(even / ALIGNED) * ALIGNED
    programs = rows * kv_heads * math.ceil(num_queries / queries)
    splits = max(1, min(HOPPER_CORES // programs, slots * max(1, pages) // (keys * LEAST_TILES)))
    tiles = GpuTiles(queries=queries, keys=keys, stages=0, splits=splits)
    room = HOPPER_SHARED - tiles.shared(group, head_dim)
    return dataclasses.replace(tiles, stages=min(stages, room // (4 * head_dim * keys)))
