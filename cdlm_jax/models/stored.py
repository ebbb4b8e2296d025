"""Tensors in a folder of safetensors files: opened, checked, and read piece by piece to the devices that need them.

A checkpoint may be larger than a host's memory: each process reads only the pieces that its own devices hold, and
beside them keeps one piece and `STEP` bytes. (`jax.make_array_from_callback` reads a piece once per device and keeps
all until the last is read; Orbax gives tensors as they are stored, so stacking and turning them would hold them twice.)
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from cdlm_jax.config import InputError
from cdlm_jax.files import check_regular
from cdlm_jax.models.hf_config import read_json

STORED_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16")}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STEP = 8 * 2**20  # bytes that are read at once; layers that are smaller together go to the devices together

Index = tuple[slice, ...]


class Stored(NamedTuple):
    """A tensor in an open file, not read yet."""

    file: Any
    file_name: str
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def stored_dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    @property
    def dtype(self) -> np.dtype:
        return STORED_DTYPES[self.stored_dtype]

    def read(self, index: Index) -> Iterator[tuple[slice, np.ndarray]]:
        """tensor[index] in order, as (its rows, their values) of at most about `STEP` bytes."""
        rows, *columns = (range(*each.indices(size)) for each, size in zip(index, self.shape, strict=True))
        count = max(1, STEP // (self.dtype.itemsize * math.prod(map(len, columns))))
        source = self.file.get_slice(self.name)
        for start in range(0, len(rows), count):
            at = slice(start, min(start + count, len(rows)))
            taken = [slice(rows.start + at.start, rows.start + at.stop), *(slice(c.start, c.stop) for c in columns)]
            yield at, source[*taken]

    def equals(self, other: "Stored") -> bool:
        """Whether both hold the same values."""
        everything = (slice(None),) * len(self.shape)
        if self.shape != other.shape:
            return False
        pairs = zip(self.read(everything), other.read(everything), strict=False)
        return all(np.array_equal(mine, theirs) for (_, mine), (_, theirs) in pairs)


# ---- opening and checking ------------------------------------------------------------------------------------------


def open_folder(folder: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Open the folder's safetensors files, and check the index against what they hold."""
    single, index_path = folder / SINGLE, folder / INDEX
    if single.exists() and index_path.exists():
        raise InputError(f"{folder} holds both {SINGLE} and {INDEX}; keep one of them")
    if not single.exists() and not index_path.exists():
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    if single.exists():
        return _open_files([single], stack)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index_path}: weight_map must map tensor names to file names")
    present = {path.name for path in folder.iterdir()}
    for name, file in weight_map.items():
        if file not in present:
            raise InputError(
                f"{index_path}: tensor {name} is said to be in {file!r:.80}, which is not a file of this folder"
            )
    stored = _open_files([folder / file for file in sorted(set(weight_map.values()))], stack)
    for name, file in weight_map.items():
        if name not in stored or stored[name].file_name != file:
            raise InputError(f"{index_path}: tensor {name} is said to be in {file}, which does not hold it")
    for name, tensor in stored.items():
        if name not in weight_map:
            raise InputError(f"{index_path}: tensor {name} of {tensor.file_name} is not listed")
    return stored


def _open_files(paths: Iterable[Path], stack: contextlib.ExitStack) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in paths:
        check_regular(path)
        try:
            file = stack.enter_context(safe_open(path, "numpy"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from error
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            if name in stored:
                raise InputError(f"tensor {name} is stored twice, in {stored[name].file_name} and in {path.name}")
            stored[name] = Stored(file, path.name, name)
    return stored


def check_shapes(stored: dict[str, Stored], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Exactly the expected names, each with its shape and a dtype that we read."""
    for problem, names in (("missing", shapes.keys() - stored.keys()), ("unexpected", stored.keys() - shapes.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{folder}: {problem} tensor {min(names)}{more}")
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise InputError(f"{folder}: tensor {name} has shape {list(stored[name].shape)}, expected {list(shape)}")
        _check_dtype(stored[name])


def _check_dtype(tensor: Stored) -> None:
    if tensor.stored_dtype not in STORED_DTYPES:
        allowed = " and ".join(STORED_DTYPES)
        raise InputError(f"tensor {tensor.name} is stored as {tensor.stored_dtype}; readable are {allowed}")


def check_tied(stored: dict[str, Stored], head: str, embed: str) -> None:
    """A tied checkpoint may repeat its embedding as the lm_head, and nothing else."""
    if embed in stored:
        for name in (head, embed):
            _check_dtype(stored[name])
        if not stored[head].equals(stored[embed]):
            raise InputError(f"config.json ties the embeddings, but tensor {head} differs from {embed}")


# ---- to the devices ------------------------------------------------------------------------------------------------


def read_parameter(
    tensors: list[Stored],
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    stacked: bool,
    transposed: bool,
    sharding: Sharding | None,
    progress: Callable[[int], None],
) -> jax.Array:
    """A parameter from its tensors, one per layer if stacked, cast and (transposed) turned on the way.

    sharding: where it shall live, layers whole; None is JAX's default device. progress is told of tensors done.
    """
    if not stacked:
        whole = _on_devices(tensors, shape, dtype, transposed, sharding, stacked=False)
        progress(1)
        return whole
    together = max(1, STEP // (dtype.itemsize * math.prod(shape[1:])))
    parameter: jax.Array | None = None
    for first in range(0, len(tensors), together):
        group = tensors[first : first + together]
        part = _on_devices(group, (len(group), *shape[1:]), dtype, transposed, sharding, stacked=True)
        if len(group) < len(tensors):
            part = _with_layers(_zeros(shape, dtype, sharding) if parameter is None else parameter, part, first)
        parameter = jax.block_until_ready(part)
        progress(len(group))
    assert parameter is not None, "a stack has layers"
    return parameter


def _on_devices(
    tensors: list[Stored],
    shape: tuple[int, ...],
    dtype: np.dtype,
    transposed: bool,
    sharding: Sharding | None,
    *,
    stacked: bool,
) -> jax.Array:
    """An array of whole tensors, each device's piece read once and put there before the next one is read."""

    def read(index: Index) -> np.ndarray:
        index = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=True))
        piece = _aligned([each.stop - each.start for each in index], dtype)
        of_tensor = index[1:] if stacked else index
        for tensor, to in zip(tensors, piece if stacked else [piece], strict=True):
            for at, values in tensor.read(of_tensor[::-1] if transposed else of_tensor):
                (to.T if transposed else to)[at] = values
        return piece

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    devices: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "an array of this shape has no piece there"
        devices.setdefault(tuple((each.start, each.stop) for each in index), []).append(device)
    pieces = []
    for place, holders in devices.items():
        piece = read(tuple(slice(*each) for each in place))
        pieces += jax.block_until_ready([jax.device_put(piece, device) for device in holders])
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory, not set, that a CPU device takes as its own: it would copy what is not aligned to 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    return jnp.zeros(shape, dtype) if sharding is None else jnp.zeros(shape, dtype, device=sharding)


@partial(jax.jit, donate_argnums=0)
def _with_layers(parameter: jax.Array, layers: jax.Array, first: int) -> jax.Array:
    """In place: the parameter is never held twice."""
    return jax.lax.dynamic_update_slice_in_dim(parameter, layers, first, axis=0)
