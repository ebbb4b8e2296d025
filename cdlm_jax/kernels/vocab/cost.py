"""What the TPU kernels cost, from their sizes and tiles alone."""

import dataclasses

import jax
import jax.numpy as jnp

from cdlm_jax.chips import Chip
from cdlm_jax.kernels.vocab.statistics import Rows
from cdlm_jax.kernels.vocab.tpu import KEPT, LANES, SUMMED, Sizes, Tiles, choose, lanes


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call. Bytes moved, and the least: hidden rows and head read once. vmem: bytes, flops: of the products."""

    moved: int
    least: int
    flops: int
    vmem: int
    tiles: Tiles

    @property
    def ratio(self) -> float:
        return self.moved / self.least

    @property
    def intensity(self) -> float:
        return self.flops / self.moved

    def seconds(self, chip: Chip) -> float:
        """The roofline's bound."""
        return max(self.moved / chip.bandwidth, self.flops / chip.flops)


def _rows(n: int, d: int, dtype, hiddens: int, extras: int) -> Rows:
    hidden = (jax.ShapeDtypeStruct((n, d), dtype),) * hiddens
    return Rows(hidden, None, (jax.ShapeDtypeStruct((n, 1), jnp.float32),) * extras)


# Hidden rows of a row, its other numbers (a weight among them), and its statistics.
STATISTICS = {"confidence": (1, 0, 6), "confidence, drawn": (1, 3, 9), "KL": (2, 1, 5), "NLL": (1, 2, 3)}
GRADIENTS = {"KL": (2, 4), "NLL": (1, 4)}


def forward_sizes(op: str, n: int, d: int, vocab: int, dtype=jnp.bfloat16) -> Sizes:
    """Of statistics, for an op of STATISTICS: what its tiles are chosen, and looked up, by."""
    hiddens, extras, kept = STATISTICS[op]
    head = jax.ShapeDtypeStruct((d, vocab), dtype)
    return Sizes.of(_rows(n, d, dtype, hiddens, extras), (head,), per_row=KEPT * LANES * kept)


def forward(op: str, n: int, d: int, vocab: int, cores: int, vmem: int, dtype=jnp.bfloat16) -> Cost:
    """Of statistics, for an op of STATISTICS."""
    hiddens, extras, kept = STATISTICS[op]
    return _cost(_rows(n, d, dtype, hiddens, extras), vocab, hiddens, cores, vmem, per_row=KEPT * LANES * kept)


def backward(op: str, of: str, n: int, d: int, vocab: int, cores: int, vmem: int, dtype=jnp.bfloat16) -> Cost:
    """Of the gradient `of` "hidden" or "head", for an op of GRADIENTS."""
    hiddens, extras = GRADIENTS[op]
    stays = {"per_row": SUMMED * lanes(d)} if of == "hidden" else {"per_column": SUMMED * d}
    return _cost(_rows(n, d, dtype, hiddens, extras), vocab, hiddens + 1, cores, vmem, of == "head", **stays)


def _cost(rows: Rows, vocab, products, cores, vmem, columns_first=False, **stays) -> Cost:
    n, d = rows.hidden[0].shape
    dtype = rows.hidden[0].dtype
    sizes = Sizes.of(rows, (jax.ShapeDtypeStruct((d, vocab), dtype),), **stays)
    tiles = choose(sizes, columns_first, cores, vmem)
    return Cost(
        moved=sizes.moved(tiles, columns_first),
        least=(n * len(rows.hidden) + vocab) * d * dtype.itemsize,
        flops=2 * n * d * vocab * products,
        vmem=sizes.vmem(tiles.rows, tiles.columns),
        tiles=tiles,
    )
