"""What the kernels of both devices use."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that loses against any other; finite, so that x - x is 0


def padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros at an axis's end, up to a multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def estimate(q: jax.Array, k: jax.Array, page_table: jax.Array | None) -> pl.CostEstimate:
    """For XLA and the planner, which do not know the lengths: as if every query saw all slots of its row."""
    slots = k.shape[2] * (1 if page_table is None else page_table.shape[1])
    scores = q.size // q.shape[3] * slots
    keys = q.shape[0] * slots * k.shape[3] * k.shape[4]
    return pl.CostEstimate(
        flops=4 * scores * q.shape[3],
        transcendentals=scores,
        bytes_accessed=2 * (keys * k.dtype.itemsize + q.size * q.dtype.itemsize),
    )
