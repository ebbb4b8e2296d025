"""Several processes as one program: how they find each other, which rows are whose, and what all of them must see.

Every process runs the same commands on the same mesh (`sharding.make_mesh`) and shares one file system. Its devices
hold some rows of every batch: it reads, decodes and writes those. On one process everything here is trivial.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from cdlm_jax.config import InputError
from cdlm_jax.mesh import sharding

# ---- the cluster ---------------------------------------------------------------------------------------------------


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes; call it before anything else of JAX.

    coordinator: host:port of process 0. All None: JAX finds them in the environment of Cloud TPU, Slurm, Open MPI or
    Kubernetes. InputError if some are given and others not, or if the others do not answer.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator is None or num_processes is None or process_id is None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            raise InputError(f"give --coordinator, --num_processes and --process_id together; missing: {missing[0]}")
    elif not 0 <= process_id < num_processes:
        raise InputError(f"--process_id must be in 0..{num_processes - 1}, got {process_id}")
    elif not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator must be host:port of process 0, got {coordinator!r}")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is handled in `preemption.py`
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        where = coordinator or "the cluster that the environment describes"
        raise InputError(f"cannot join {where}: {str(error).strip().splitlines()[0]}") from error


def is_main() -> bool:
    """Whether this process is the one that prints, and that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    multihost_utils.sync_global_devices(name)


def agreed(values: np.ndarray) -> np.ndarray:
    """Process 0's values, in every process; all give arrays of one shape."""
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


class Agreement:
    """Whether any process was told to stop: asked again and again by all of them, and always the same answer in all.

    One process is answered with its own question. Several start a sum over the devices of the current mesh each time,
    and read it the next time: a signal that reaches one of them stops all at the same place, and none waits.
    """

    def __init__(self):
        self._asked: jax.Array | None = None

    def __call__(self, told: bool) -> bool:
        if jax.process_count() == 1:
            return told
        before, self._asked = self._asked, _count(told)
        return before is not None and bool(before)


def _count(told: bool) -> jax.Array:
    """On how many devices it is so: int32 scalar, the same on each. Not waited for."""
    mesh = jax.sharding.get_mesh()
    places = np.full(mesh.local_mesh.size, told, np.int32)
    return _sum(jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(sharding.AXES)), places))


@jax.jit
def _sum(places: jax.Array) -> jax.Array:
    return places.sum()


# ---- rows ----------------------------------------------------------------------------------------------------------


def own_pieces() -> list[int]:
    """Which of the pieces that the mesh cuts rows into lie on this process's devices, in order."""
    return _pieces_by_process()[jax.process_index()]


def own_rows(rows: int) -> np.ndarray:
    """The places, in a batch of so many rows, of those on this process's devices: what `sharding.place` takes."""
    sharding.check_rows(rows)
    each = rows // sharding.row_pieces()
    return np.concatenate([piece * each + np.arange(each) for piece in own_pieces()])


def row_group() -> tuple[int, int, bool]:
    """(group of this process, number of groups, whether it is the first of its group).

    Processes with the same rows are a group: more than one where `tensor` crosses processes. InputError where two
    processes share some rows and not others.
    """
    pieces = [tuple(each) for each in _pieces_by_process()]
    groups = sorted(set(pieces))
    if sum(map(len, groups)) != sharding.row_pieces() or len(set(map(len, groups))) > 1:
        raise InputError(f"processes must hold whole, equal groups of rows; this mesh gives them the pieces {pieces}")
    own = pieces[jax.process_index()]
    return groups.index(own), len(groups), pieces.index(own) == jax.process_index()


def _pieces_by_process() -> list[list[int]]:
    if not sharding.mesh_sizes():
        return [[0]] * jax.process_count()
    count = sharding.row_pieces()
    by_rows = NamedSharding(jax.sharding.get_mesh(), sharding.spec("rows"))
    held: list[set[int]] = [set() for _ in range(jax.process_count())]
    for device, (index,) in by_rows.devices_indices_map((count,)).items():
        held[device.process_index].add(index.start or 0)  # type: ignore[attr-defined]
    return [sorted(pieces) for pieces in held]


def place_whole(batch):
    """A batch that every process has whole (NumPy) as global arrays split by rows."""
    return sharding.place(jax.tree.map(lambda x: np.asarray(x)[own_rows(len(x))], batch))


def fetch(tree):
    """Arrays, wherever their pieces are, whole and as NumPy in every process."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(one, tree)
