"""One answer in all processes: whether any of them was told to stop."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cdlm_jax.sharding import AXES


class Agreement:
    """Asked once a step by every process; says the same in all of them.

    Alone, a process is answered with its own question. Several start a sum over the devices of the current mesh at each
    step, and read it at the next one: a signal that reaches one of them stops all after the same step, and none waits.
    """

    def __init__(self):
        self._asked: jax.Array | None = None

    def __call__(self, told: bool) -> bool:
        if jax.process_count() == 1:
            return told
        before, self._asked = self._asked, _anywhere(told)
        return before is not None and bool(before)


def _anywhere(told: bool) -> jax.Array:
    """int32 scalar on every device of the mesh: in how many places it is so. Not waited for."""
    mesh = jax.sharding.get_mesh()
    places = np.full(mesh.local_mesh.size, told, np.int32)
    everywhere = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(AXES)), places)
    return _sum(everywhere)


@jax.jit
def _sum(places: jax.Array) -> jax.Array:
    return places.sum()
