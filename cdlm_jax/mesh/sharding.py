"""Where arrays live on a mesh of devices: the axes, one table of rules, and the few ops that have to name a sharding.

    jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=4)))

The mesh's axes are Explicit: shardings are part of types, and follow from those of parameters and batches. Without a
mesh every function here that takes arrays returns them as they are (or the plain product, the plain lookup).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cdlm_jax.config import InputError, ModelConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Rows of a batch are split over `data` and `fsdp`, of which `fsdp` also keeps one piece each
# of every weight (gathered when it is used); `tensor` splits the work on each row.
ROWS = ("data", "fsdp")  # the axes that the rows of a batch are split over
RULES: dict[str, str | tuple[str, ...] | None] = {
    "rows": ROWS,
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",  # whole on every device where `tensor` does not divide them (`spec`)
    "mlp": "tensor",
}

# Linear layers, by name: the logical axes of their input and output.
LINEARS = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "out": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, the devices left. The default is plain FSDP."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if not all(size >= 1 or size == -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(f"mesh {self} must have positive sizes, of which one may be -1 (the devices left)")

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """`2x4x1` is data 2, fsdp 4, tensor 1."""
        sizes = text.split("x")
        if len(sizes) != len(AXES) or not all(size.removeprefix("-").isdecimal() for size in sizes):
            raise InputError(f"a mesh is given as {'x'.join(AXES)}, such as 2x4x1; got {text!r}")
        return cls(**dict(zip(AXES, map(int, sizes), strict=True)))

    def __str__(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for `jax.set_mesh`, over all devices unless some are given. InputError if they are too few or many."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise InputError(f"mesh {config} does not fit {len(devices)} devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def mesh_sizes() -> dict[str, int]:
    """Devices along each axis of the current mesh; {} without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    if mesh.axis_names != AXES or not mesh.are_all_axes_explicit:
        raise InputError(f"the mesh must be one of sharding.make_mesh (Explicit {', '.join(AXES)}), got {mesh}")
    return dict(mesh.shape)


def device():
    """A device that the program is for: of the current mesh, which may be another machine's, else `jax.default_device`.

    Of another machine's only `platform`, `device_kind` and `num_cores` are known.
    """
    if described := jax.sharding.get_abstract_mesh().abstract_device:
        return described
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # JAX adds its options at run time
    return jax.devices(default)[0] if isinstance(default, str) else default or jax.devices()[0]


def check_model(config: ModelConfig) -> None:
    """Refuse a model whose sizes the current mesh does not divide."""
    if not (mesh := mesh_sizes()):
        return
    for name in ("num_heads", "mlp_size", "vocab_size"):
        if getattr(config, name) % mesh["tensor"]:
            raise InputError(f"{name} {getattr(config, name)} must be a multiple of the mesh's tensor {mesh['tensor']}")
    if config.hidden_size % (mesh["fsdp"] * mesh["tensor"]):
        pieces = f"fsdp {mesh['fsdp']} * tensor {mesh['tensor']}"
        raise InputError(f"hidden_size {config.hidden_size} must be a multiple of the mesh's {pieces}")


def row_pieces() -> int:
    """Into how many pieces the rows of a batch are cut."""
    mesh = mesh_sizes()
    return math.prod(mesh.get(name, 1) for name in ROWS)


def check_rows(rows: int) -> None:
    """Refuse a batch whose rows the current mesh does not divide."""
    if rows % row_pieces():
        mesh = mesh_sizes()
        raise InputError(f"{rows} rows must be a multiple of the mesh's data {mesh['data']} * fsdp {mesh['fsdp']}")


def whole_batch(rows: int) -> int:
    """So many rows, or the next larger number that the current mesh divides."""
    return math.ceil(rows / row_pieces()) * row_pieces()


# ---- where things live ---------------------------------------------------------------------------------------------


def spec(*axes: str | None, kv_heads: int = 1) -> PartitionSpec:
    """Mesh axes of an array's logical axes (None: whole). kv_heads is how many a "kv_heads" axis holds.

    Mesh axes of one device are left out: they cut nothing, and a row alone on its device is then like any other.
    """
    few = kv_heads % mesh_sizes().get("tensor", 1) != 0
    rules = [None if axis is None or (axis == "kv_heads" and few) else RULES[axis] for axis in axes]
    return PartitionSpec(*(_cutting(_names(rule)) for rule in rules))


def _cutting(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """An entry of a PartitionSpec: those of these mesh axes that have several devices."""
    sizes = mesh_sizes()
    several = tuple(name for name in names if sizes.get(name, 1) > 1)
    return several[0] if len(several) == 1 else several or None


def put(x: jax.Array, *axes: str | None, kv_heads: int = 1) -> jax.Array:
    """x laid out by its leading logical axes, the others whole; works in and outside `jax.jit`."""
    return jax.reshard(x, spec(*axes, kv_heads=kv_heads)) if mesh_sizes() else x


def by_rows(tree):
    """Every array's leading axis split over the devices as rows are."""
    return jax.tree.map(lambda x: put(x, "rows"), tree)


def parameter_axes(path: str) -> tuple[str | None, ...]:
    """Logical axes of a Transformer's parameter by its dotted path, such as `layers.q.adapter.a`."""
    *parents, leaf = path.removesuffix(".value").split(".")
    stacked = ("layers",) if "layers" in parents else ()
    if leaf == "embed":
        return ("vocab", "embed")
    if leaf == "weight":  # of a norm
        return (*stacked, None)
    size_in, size_out = LINEARS[next(name for name in reversed(parents) if name != "adapter")]
    leaves = {"kernel": (size_in, size_out), "bias": (size_out,), "a": (size_in, None), "b": (None, size_out)}
    return stacked + leaves[leaf]


def parameter_specs(model):
    """A pytree like `model` (a Transformer, arrays or shapes) of PartitionSpecs. InputError if sizes do not divide."""
    check_model(model.config)
    return jax.tree.map_with_path(
        lambda path, _: spec(
            *parameter_axes(jax.tree_util.keystr(path, simple=True, separator=".")), kv_heads=model.config.num_kv_heads
        ),
        model,
    )


def parameter_shardings(model) -> list[NamedSharding | None]:
    """Where each leaf of `model` lives on the current mesh, in the order of the pytree; None without a mesh."""
    specs = jax.tree.leaves(parameter_specs(model))
    return [NamedSharding(jax.sharding.get_mesh(), each) if mesh_sizes() else None for each in specs]


def shard(model):
    """A Transformer with its parameters, adapters included, on the current mesh. What is derived from them follows:
    gradients, the optimizer's state."""
    return jax.tree.map(jax.reshard, model, parameter_specs(model)) if mesh_sizes() else model


def place(batch):
    """This process's rows of a batch (NumPy, equally many in every process) as global arrays split by rows."""
    if not mesh_sizes():
        return jax.tree.map(jnp.asarray, batch)
    check_rows(jax.process_count() * jax.tree.leaves(batch)[0].shape[0])
    rows = NamedSharding(jax.sharding.get_mesh(), spec("rows"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch)


def local_rows(x: jax.Array | np.ndarray) -> np.ndarray:
    """The rows of a global array that this process holds, in order: `place` in reverse."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    held = {piece.index[0].start or 0: piece.data for piece in x.addressable_shards}
    return np.concatenate([np.asarray(held[start]) for start in sorted(held)])


# ---- the ops that need to name a sharding --------------------------------------------------------------------------


def pieces(x: jax.Array, axis: int) -> int:
    """Into how many pieces an axis is cut."""
    sharding = jax.typeof(x).sharding
    return math.prod(sharding.mesh.shape[name] for name in _names(sharding.spec[axis]))


def gathered(x: jax.Array, *mesh_axes: str) -> jax.Array:
    """x with its pieces along these axes of the mesh put together on each device."""
    entries = [_names(entry) for entry in jax.typeof(x).sharding.spec]
    left = [tuple(name for name in entry if name not in mesh_axes) for entry in entries]
    return x if left == entries else jax.reshard(x, PartitionSpec(*(entry or None for entry in left)))


def whole(x: jax.Array, axis: int = -1) -> jax.Array:
    """x with the pieces of one of its own axes put together on each device."""
    return gathered(x, *_names(jax.typeof(x).sharding.spec[axis]))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out], whose `fsdp` pieces are gathered.

    Cut along `out`, the result is; cut along `in` (as x is then), the partial products are summed over the devices.
    """
    if not mesh_sizes():
        return x @ weight
    weight = gathered(weight, "fsdp")
    of_x, of_weight = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    return jnp.matmul(x, weight, out_sharding=PartitionSpec(*of_x[:-1], of_weight[-1]))


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of table [V, d] at tokens [rows, S]: [rows, S, d].

    The table is never gathered. Each device holds some columns of all V rows, reads them for the tokens of all its
    `fsdp` and `tensor` peers, and the rows found (far less than a table) are exchanged: first along `tensor`, since XLA
    replicates an array that it is to move along both at once.
    """
    if not mesh_sizes():
        return table[tokens]
    columns = _cutting(("fsdp", "tensor"))
    rows = jax.typeof(tokens).sharding.spec[0]
    tokens = gathered(tokens, "fsdp")
    table = jax.reshard(table, PartitionSpec(None, columns))
    found = table.at[tokens].get(out_sharding=PartitionSpec(jax.typeof(tokens).sharding.spec[0], None, columns))
    return jax.reshard(gathered(found, "tensor"), PartitionSpec(rows, None, None))
