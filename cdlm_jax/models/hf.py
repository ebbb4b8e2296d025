"""Hugging Face folders of LLaDA, Dream, Qwen2.5, Llama (config.json, safetensors) <-> Transformer, without PyTorch."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from safetensors.numpy import save_file

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.distributed import fetch, is_main
from cdlm_jax.mesh.progress import progress
from cdlm_jax.models.hf_config import config_text, read_config, read_metadata
from cdlm_jax.models.lora import merge
from cdlm_jax.models.stored import INDEX, SINGLE, STORED_DTYPES, check_shapes, check_tied, open_folder, read_parameter
from cdlm_jax.models.transformer import Transformer

__all__ = ["abstract", "export_hf", "fingerprint", "load_model", "read_config", "read_metadata"]

# Our parameter -> the checkpoint's tensor; {} is the layer. Kernels are [in, out] here and [out, in] there.
TENSORS = {
    "llada": {
        "embed": "model.transformer.wte.weight",
        "layers.attention_norm.weight": "model.transformer.blocks.{}.attn_norm.weight",
        "layers.q.kernel": "model.transformer.blocks.{}.q_proj.weight",
        "layers.q.bias": "model.transformer.blocks.{}.q_proj.bias",
        "layers.k.kernel": "model.transformer.blocks.{}.k_proj.weight",
        "layers.k.bias": "model.transformer.blocks.{}.k_proj.bias",
        "layers.v.kernel": "model.transformer.blocks.{}.v_proj.weight",
        "layers.v.bias": "model.transformer.blocks.{}.v_proj.bias",
        "layers.out.kernel": "model.transformer.blocks.{}.attn_out.weight",
        "layers.mlp_norm.weight": "model.transformer.blocks.{}.ff_norm.weight",
        "layers.gate.kernel": "model.transformer.blocks.{}.ff_proj.weight",
        "layers.up.kernel": "model.transformer.blocks.{}.up_proj.weight",
        "layers.down.kernel": "model.transformer.blocks.{}.ff_out.weight",
        "final_norm.weight": "model.transformer.ln_f.weight",
        "lm_head.kernel": "model.transformer.ff_out.weight",
    },
    "dream": {
        "embed": "model.embed_tokens.weight",
        "layers.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.q.kernel": "model.layers.{}.self_attn.q_proj.weight",
        "layers.q.bias": "model.layers.{}.self_attn.q_proj.bias",
        "layers.k.kernel": "model.layers.{}.self_attn.k_proj.weight",
        "layers.k.bias": "model.layers.{}.self_attn.k_proj.bias",
        "layers.v.kernel": "model.layers.{}.self_attn.v_proj.weight",
        "layers.v.bias": "model.layers.{}.self_attn.v_proj.bias",
        "layers.out.kernel": "model.layers.{}.self_attn.o_proj.weight",
        "layers.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
        "layers.up.kernel": "model.layers.{}.mlp.up_proj.weight",
        "layers.down.kernel": "model.layers.{}.mlp.down_proj.weight",
        "final_norm.weight": "model.norm.weight",
        "lm_head.kernel": "lm_head.weight",
    },
}
TENSORS["qwen2"] = TENSORS["llama"] = TENSORS["dream"]


class Place(NamedTuple):
    """Where a stored tensor lives: a parameter, its layer (None: not stacked), the stored shape, and whether turned."""

    parameter: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def abstract(config: ModelConfig, dtype) -> Transformer:
    """A Transformer of `jax.ShapeDtypeStruct` leaves: every shape, no memory."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype))


def load_model(folder: str | Path, *, dtype=None) -> Transformer:
    """The Transformer in a Hugging Face folder, single or sharded; parameters as stored, or cast to `dtype`.

    dtype: float32 or bfloat16. Under a mesh (`jax.set_mesh`) parameters go straight to their places on it
    (`sharding.parameter_specs`); each process reads only what its own devices hold. Beside that, host memory holds one
    piece of one tensor at a time (`models.stored`). Shown as it goes (`mesh.progress`).
    Raises InputError, by name, for: a config that cannot be expressed (`read_config`); a missing, unexpected, doubled
    or wrongly shaped tensor; a truncated or foreign file; an index that disagrees with its files; a stored dtype other
    than float32 and bfloat16; mixed stored dtypes when `dtype` is None; sizes that the mesh does not divide.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = abstract(config, jnp.float32)
    shardings = sharding.parameter_shardings(model)
    places = tensor_places(model)
    with contextlib.ExitStack() as stack:
        stored = open_folder(folder, stack)
        head = TENSORS[config.family]["lm_head.kernel"]
        if config.tie_embeddings and head in stored:
            check_tied(stored, head, TENSORS[config.family]["embed"])
            del stored[head]
        check_shapes(stored, {name: place.shape for name, place in places.items()}, folder)
        dtype = _one_dtype({name: tensor.dtype for name, tensor in stored.items()}, dtype)
        tensors: dict[str, list[str]] = {}
        for name, place in places.items():
            tensors.setdefault(place.parameter, []).append(name)
        # On the error stream: what a command prints stays clean.
        console = Console(stderr=True, quiet=not is_main())
        bar = stack.enter_context(progress(f"loading {folder.name}", len(places), transient=True, console=console))
        leaves = [
            read_parameter(
                [stored[name] for name in tensors[parameter]],
                leaf.shape,
                dtype,
                stacked=places[tensors[parameter][0]].layer is not None,
                transposed=places[tensors[parameter][0]].transposed,
                sharding=where,
                progress=bar.advance,
            )
            for (parameter, leaf), where in zip(_parameters(model).items(), shardings, strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def export_hf(
    model: Transformer,
    folder: str | Path,
    *,
    dtype=None,
    metadata: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors with the family's original names, LoRA merged: `load_model` in reverse.

    dtype: float32 or bfloat16 (None: as the parameters are). metadata goes under `cdlm` in config.json. Weights above
    max_shard_bytes are split, with an index. The folder appears whole or not at all; one that exists and is not empty
    is refused, as is a model that the family's config.json cannot describe (InputError).
    Of several processes all take part, and the first one writes.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; export to a new or empty folder")
    model = merge(model)
    parameters, places = _parameters(model), tensor_places(model)
    dtype = _one_dtype({name: leaf.dtype for name, leaf in parameters.items()}, dtype)
    config = config_text(model.config, dtype.name, metadata)
    shards = _to_store(parameters, places, dtype, max_shard_bytes)
    if not is_main():
        for _ in shards:  # takes part in gathering what the first process writes
            pass
        return
    partial = folder.with_name(f".{folder.name}.partial")  # of an export that died, too
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, shards)
        (partial / "config.json").write_text(config, encoding="utf-8")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def tensor_places(model: Transformer) -> dict[str, Place]:
    """Every tensor that a checkpoint of this model holds, by its stored name."""
    names, places = TENSORS[model.config.family], {}
    for parameter, leaf in _parameters(model).items():
        stacked, transposed = parameter.startswith("layers."), parameter.endswith(".kernel")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transposed else shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            places[names[parameter].format(layer)] = Place(parameter, layer, shape, transposed)
    return places


def _parameters(model: Transformer) -> dict[str, Any]:
    """Leaves by dotted path, in the order of the pytree."""
    leaves, _ = jax.tree.flatten_with_path(model)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def _one_dtype(dtypes: dict[str, np.dtype], dtype) -> np.dtype:
    """`dtype` if given, else the dtype that all named tensors share."""
    allowed = " or ".join(known.name for known in STORED_DTYPES.values())
    if dtype is None:
        examples = {value.name: name for name, value in dtypes.items()}
        if len(examples) > 1:
            mixed = ", ".join(f"{value} ({name})" for value, name in sorted(examples.items()))
            raise InputError(f"mixed dtypes: {mixed}; choose one with dtype={allowed}")
        (dtype,) = examples
    try:
        chosen = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype must be {allowed}, got {dtype!r}") from error
    if chosen not in STORED_DTYPES.values():
        raise InputError(f"dtype must be {allowed}, got {chosen.name}")
    return chosen


# Writing


def _to_store(
    parameters: dict[str, jax.Array], places: dict[str, Place], dtype: np.dtype, max_shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file, gathered from wherever their pieces are."""
    shards: list[list] = [[]]
    room = max_shard_bytes
    for name, place in places.items():
        size = math.prod(place.shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    for names in shards:
        tensors = {}
        for name in names:
            place = places[name]
            parameter = parameters[place.parameter]
            tensor = fetch((parameter if place.layer is None else parameter[place.layer]).astype(dtype))
            tensors[name] = np.ascontiguousarray(tensor.T if place.transposed else tensor)
        yield tensors


def _write_weights(folder: Path, shards: Iterator[dict[str, np.ndarray]]) -> None:
    weight_map: dict[str, int] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        save_file(tensors, folder / f"{number}.part", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, number)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if number == 1:
        (folder / "1.part").rename(folder / SINGLE)
        return
    # The names hold the number of files, which is known only now.
    files = {i: f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)}
    for i, file in files.items():
        (folder / f"{i}.part").rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for name, i in weight_map.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fingerprint(model: Transformer) -> str:
    """16 hex digits that change with any weight or any part of the configuration; the mesh has no part in it."""
    parameters = dict(sorted(_parameters(model).items()))
    digest = hashlib.blake2b(repr(dataclasses.replace(model.config, source="")).encode(), digest_size=8)
    for (name, array), sums in zip(parameters.items(), jax.device_get(_checksums([*parameters.values()])), strict=True):
        digest.update(f"{name} {array.shape} {array.dtype} {sums.tolist()}".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    """Two sums modulo 2^32 per array, uint32 [2], of every value's bits mixed with its place.

    Computed where the pieces are, a layer at a time: a model may be larger than a host. Integer sums do not depend on
    their order, so neither on the mesh.
    """

    def mixed(x):  # the finalizer of MurmurHash3
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return x ^ (x >> 16)

    def sums(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        for axis, size in enumerate(x.shape):
            at = jnp.arange(size, dtype=jnp.uint32).reshape([-1 if axis == other else 1 for other in range(x.ndim)])
            bits = mixed(bits ^ mixed(at + jnp.uint32(0x9E3779B9 + axis)))
        return jnp.stack([bits.sum(dtype=jnp.uint32), mixed(~bits).sum(dtype=jnp.uint32)])

    def of_array(x):
        if x.ndim < 3:
            return sums(x)
        layers = jax.lax.map(sums, x)  # [layers, 2]
        return jnp.stack([sums(layers[:, 0]), sums(layers[:, 1])])[:, 0]

    return [of_array(x) for x in arrays]
