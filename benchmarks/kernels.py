"""What the kernels cost: on a TPU or GPU measured, elsewhere as the cost model has it.

    python benchmarks/kernels.py            the report, and on a TPU or GPU values and times
    python benchmarks/kernels.py --tune     there: also tries tiles, and writes the best into tuning.json

The values are checked first. A time is of the kernel alone: many calls chained inside one program, less what the same
loop takes without the call. It is compared with XLA's attention and a library's: on a TPU JAX's paged attention kernel,
which takes one query for each row and key head group (a block of Q queries is Q * G heads to it), on a GPU cuDNN's.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from cdlm_jax.chips import CHIPS
from cdlm_jax.kernels.block_attention import gpu, gpu_tiles, tiles, tpu, xla
from cdlm_jax.kernels.block_attention.cost import Cost, cost, gpu_cost
from cdlm_jax.kernels.block_attention.gpu_tiles import GpuTiles
from cdlm_jax.kernels.block_attention.tiles import TUNED, Tiles, shape_name

ROWS, BLOCK, PAGE = 32, 32, 128
MODELS = {"Dream-7B": (28, 4), "LLaDA-8B": (32, 32)}  # heads, key heads of 128
CONTEXTS = (1024, 4096, 32768)
CALLS = 50  # in a timed program


def shapes(model: str, context: int, rows: int = ROWS) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    heads, kv_heads = MODELS[model]
    slots = context + BLOCK
    q = jax.ShapeDtypeStruct((rows, BLOCK, heads, 128), jnp.bfloat16)
    return q, jax.ShapeDtypeStruct((1, rows, slots, kv_heads, 128), jnp.bfloat16)


def ends_of(context: int, rows: int = ROWS) -> np.ndarray:
    """What the queries of a block see: a context that differs a little from row to row, and the block itself."""
    ends = context - np.arange(rows) % BLOCK + BLOCK
    return np.repeat(ends[:, None], BLOCK, axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What differs between the two. chips: names of those it is for. memory: what its tiles lie in.
    choose(device_kind, q, k) -> tiles, candidates(q, k) -> the fields of tiles that `--tune` tries,
    library(q, keys, values, ends), of which keys and values are made by prepare(k)."""

    name: str
    chips: tuple[str, ...]
    memory: str
    run: Callable[..., jax.Array]
    cost: Callable[..., Cost]
    choose: Callable[[str, jax.Array, jax.Array], Any]
    candidates: Callable[[jax.Array, jax.Array], list]
    library: Callable[..., jax.Array]
    prepare: Callable[[jax.Array], jax.Array]

    def with_tiles(self, tiles):
        zero = jnp.zeros((), jnp.int32)
        return lambda q, k, v, ends: self.run(q, k, v, visible_end=ends, layer=zero, scale=128**-0.5, tiles=tiles)


def report(kernel: Kernel) -> None:
    found = [chip for chip in CHIPS if chip.name in kernel.chips]
    print(f"Block attention on {kernel.name}, {ROWS} rows, {BLOCK} queries each, bfloat16: cost model")
    names = "  ".join(f"{chip.name:>9}" for chip in found)
    title = f"{kernel.memory} KiB"
    print(f"{'model':10} {'context':>8} {'moved / least':>14} {'FLOPs/byte':>11} {title:>10}  {names}  (bound, us)")
    for model in MODELS:
        for context in CONTEXTS:
            q, k = shapes(model, context)
            cost = kernel.cost(q, k, ends_of(context), kernel.choose("", q, k))
            bounds = "  ".join(f"{1e6 * cost.seconds(chip):9.0f}" for chip in found)
            figures = f"{cost.ratio:14.3f} {cost.intensity:11.1f} {cost.buffers / 2**10:10.0f}"
            print(f"{model:10} {context:8} {figures}  {bounds}")


def seconds(call, q: jax.Array, *arguments: jax.Array) -> float:
    """One call's time on the device: a chain of calls in one program, less the loop around them."""

    @functools.partial(jax.jit, static_argnames="step")
    def chain(q, arguments, step):
        return jax.lax.fori_loop(0, CALLS, lambda _, q: step(q, *arguments), q)

    def best(step):
        chain(q, arguments, step).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            chain(q, arguments, step).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times) / CALLS

    return best(call) - best(lambda q, *_: q * 1)


def on_xla(q, k, v, ends):
    return xla.block_attention(q, k[0], v[0], visible_end=ends)


def on_pages(q, k, v, ends):
    """JAX's paged attention, its pages made beforehand: k, v [kv_heads, pages, page_size, D]."""
    rows, queries, heads, head_dim = q.shape
    kv_heads = k.shape[0]
    folded = q.reshape(rows, queries, kv_heads, -1, head_dim).swapaxes(1, 2).reshape(rows, -1, head_dim)
    table = jnp.arange(k.shape[1], dtype=jnp.int32).reshape(rows, -1)
    out = paged_attention(folded * head_dim**-0.5, k, v, ends[:, 0], table, pages_per_compute_block=4)
    return out.reshape(rows, kv_heads, queries, -1, head_dim).swapaxes(1, 2).reshape(q.shape)


def paged(x: jax.Array) -> jax.Array:
    """One layer [1, rows, S, K, D] as pages [K, rows * pages, PAGE, D], rows padded to whole pages (to groups of 4)."""
    x = jnp.pad(x[0], ((0, 0), (0, -x.shape[2] % (4 * PAGE)), (0, 0), (0, 0)))
    return x.reshape(-1, PAGE, *x.shape[2:]).transpose(2, 0, 1, 3)


def on_cudnn(q, k, v, ends):
    return jax.nn.dot_product_attention(q, k[0], v[0], key_value_seq_lengths=ends[:, 0], implementation="cudnn")


def tpu_candidates(q, k) -> list[Tiles]:
    """The heuristic's tiles and their neighbours."""
    first = tiles.heuristic(q, k, False)
    return [
        Tiles(rows=rows, queries=first.queries, keys=keys, chunk=chunk)
        for rows in sorted({1, first.rows, 2 * first.rows})
        for keys in sorted({128, first.keys, 2 * first.keys})
        for chunk in (16, 32, 64)
    ]


def gpu_candidates(q, k) -> list[GpuTiles]:
    """The heuristic's tiles and their neighbours."""
    first = gpu_tiles.heuristic(q, k)
    return [
        gpu_tiles.heuristic(q, k, queries=queries, keys=keys, stages=stages)
        for queries in sorted({first.queries, max(8, first.queries // 16 * 8)})
        for keys in (64, 128)
        for stages in (2, 3, 4, 6)
    ]


KERNELS = {
    "tpu": Kernel(
        name="TPU",
        chips=tuple(chip.name for chip in CHIPS if chip.torus),
        memory="VMEM",
        run=tpu.block_attention,
        cost=cost,
        choose=lambda kind, q, k: tiles.choose(kind, q, k, False),
        candidates=tpu_candidates,
        library=on_pages,
        prepare=paged,
    ),
    "gpu": Kernel(
        name="GPU",
        chips=("H100", "H200"),
        memory="shared",
        run=gpu.block_attention,
        cost=gpu_cost,
        choose=gpu_tiles.choose,
        candidates=gpu_candidates,
        library=on_cudnn,
        prepare=lambda x: x,
    ),
}


def measure(kernel: Kernel, tune: bool) -> None:
    kind = jax.devices()[0].device_kind
    print(f"\nMeasured on one {kind}, us a call")
    print(f"{'model':10} {'context':>8} {'kernel':>9} {'XLA':>9} {'library':>9} {'GB/s':>7}  tiles")
    tuned = json.loads(TUNED.read_text())
    for model in MODELS:
        for context in CONTEXTS[:2]:
            q, k = shapes(model, context)
            keys = jax.random.split(jax.random.key(0), 3)
            q, k, v = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (q, k, k), strict=True))
            ends = jnp.asarray(ends_of(context))
            chosen = kernel.choose(kind, q, k)
            expected = jax.jit(on_xla)(q, k, v, ends).astype(jnp.float32)
            worst = jnp.abs(jax.jit(kernel.with_tiles(chosen))(q, k, v, ends).astype(jnp.float32) - expected).max()
            if not worst < 0.02:
                raise SystemExit(f"wrong values on {kind}: {model} at {context} is off by {worst}")
            if tune:
                timed = {}
                for each in dict.fromkeys(kernel.candidates(q, k)):
                    try:
                        timed[each] = seconds(kernel.with_tiles(each), q, k, v, ends)
                    except (jax.errors.JaxRuntimeError, ValueError) as error:  # most likely more memory than there is
                        print(f"  {each}: {str(error).splitlines()[0][:80]}")
                chosen = min(timed, key=timed.get)
                fields = {name: size for name, size in vars(chosen).items() if name != "splits"}  # depends on the rows
                tuned.setdefault(kind, {})[shape_name(q, k)] = fields
            ours = seconds(kernel.with_tiles(chosen), q, k, v, ends)
            library = seconds(kernel.library, q, kernel.prepare(k), kernel.prepare(v), ends)
            others = seconds(on_xla, q, k, v, ends), library
            moved = kernel.cost(q, k, np.asarray(ends), chosen).moved
            figures = " ".join(f"{1e6 * each:9.1f}" for each in (ours, *others))
            print(f"{model:10} {context:8} {figures} {moved / ours / 1e9:7.0f}  {chosen}")
    if tune:
        TUNED.write_text(json.dumps(tuned, indent=2, sort_keys=True) + "\n")
        print(f"wrote {TUNED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try tiles and write the best into tuning.json")
    tune = parser.parse_args().tune
    for kernel in KERNELS.values():
        report(kernel)
        print()
    if (backend := jax.default_backend()) in KERNELS:
        measure(KERNELS[backend], tune)
    else:
        print(f"No TPU or GPU here, only {backend}: nothing was measured.")


if __name__ == "__main__":
    main()
