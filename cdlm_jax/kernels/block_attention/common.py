"""What the kernels of both devices use."""

import jax
import jax.numpy as jnp

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that loses against any other; finite, so that x - x is 0


def padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros at an axis's end, up to a multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
