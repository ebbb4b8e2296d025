"""What the kernels cost: on a TPU measured, elsewhere as the cost model has it.

    python benchmarks/kernels.py            the report, and on a TPU values and times
    python benchmarks/kernels.py --tune     on a TPU: also tries tiles, and writes the best into tuning.json

On a TPU the values are checked first. A time is of the kernel alone: many calls chained inside one program, less what
the same loop takes without the call. It is compared with XLA's attention and JAX's paged attention kernel, which takes
one query for each row and key head group: a block of Q queries is Q * G heads to it.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from cdlm_jax.chips import CHIPS
from cdlm_jax.kernels.block_attention import tpu, xla
from cdlm_jax.kernels.block_attention.cost import cost
from cdlm_jax.kernels.block_attention.tiles import TUNED, Tiles, choose, heuristic, shape_name

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


def report() -> None:
    print(f"Block attention, {ROWS} rows, {BLOCK} queries each, bfloat16: cost model")
    names = "  ".join(f"{chip.name:>9}" for chip in TPUS)
    print(f"{'model':10} {'context':>8} {'moved / least':>14} {'FLOPs/byte':>11} {'VMEM MiB':>9}  {names}  (bound, us)")
    for model in MODELS:
        for context in CONTEXTS:
            q, k = shapes(model, context)
            found = cost(q, k, ends_of(context), heuristic(q, k, False))
            bounds = "  ".join(f"{1e6 * found.seconds(chip):9.0f}" for chip in TPUS)
            figures = f"{found.ratio:14.3f} {found.intensity:11.1f} {found.buffers / 2**20:9.1f}"
            print(f"{model:10} {context:8} {figures}  {bounds}")


TPUS = [chip for chip in CHIPS if chip.torus]


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


def kernel(tiles: Tiles):
    zero = jnp.zeros((), jnp.int32)
    return lambda q, k, v, ends: tpu.block_attention(
        q, k, v, visible_end=ends, layer=zero, scale=128**-0.5, tiles=tiles
    )


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


def candidates(q, k) -> list[Tiles]:
    """The heuristic's tiles and their neighbours."""
    first = heuristic(q, k, False)
    return [
        Tiles(rows=rows, queries=first.queries, keys=keys, chunk=chunk)
        for rows in sorted({1, first.rows, 2 * first.rows})
        for keys in sorted({128, first.keys, 2 * first.keys})
        for chunk in (16, 32, 64)
    ]


def measure(tune: bool) -> None:
    kind = jax.devices()[0].device_kind
    print(f"\nMeasured on one {kind}, us a call")
    print(f"{'model':10} {'context':>8} {'kernel':>9} {'XLA':>9} {'paged':>9} {'GB/s':>7}  tiles")
    tuned = json.loads(TUNED.read_text())
    for model in MODELS:
        for context in CONTEXTS[:2]:
            q, k = shapes(model, context)
            keys = jax.random.split(jax.random.key(0), 3)
            q, k, v = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (q, k, k), strict=True))
            ends = jnp.asarray(ends_of(context))
            tiles = choose(kind, q, k, False)
            expected = jax.jit(on_xla)(q, k, v, ends).astype(jnp.float32)
            worst = jnp.abs(jax.jit(kernel(tiles))(q, k, v, ends).astype(jnp.float32) - expected).max()
            if not worst < 0.02:
                raise SystemExit(f"wrong values on {kind}: {model} at {context} is off by {worst}")
            if tune:
                timed = {}
                for each in candidates(q, k):
                    try:
                        timed[each] = seconds(kernel(each), q, k, v, ends)
                    except jax.errors.JaxRuntimeError as error:  # most likely more VMEM than there is
                        print(f"  {each}: {str(error).splitlines()[0][:80]}")
                tiles = min(timed, key=timed.get)
                tuned.setdefault(kind, {})[shape_name(q, k)] = vars(tiles)
            ours = seconds(kernel(tiles), q, k, v, ends)
            others = seconds(on_xla, q, k, v, ends), seconds(on_pages, q, paged(k), paged(v), ends)
            moved = cost(q, k, np.asarray(ends), tiles).moved
            figures = " ".join(f"{1e6 * each:9.1f}" for each in (ours, *others))
            print(f"{model:10} {context:8} {figures} {moved / ours / 1e9:7.0f}  {tiles}")
    if tune:
        TUNED.write_text(json.dumps(tuned, indent=2, sort_keys=True) + "\n")
        print(f"wrote {TUNED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try tiles and write the best into tuning.json")
    tune = parser.parse_args().tune
    report()
    if jax.default_backend() == "tpu":
        measure(tune)
    else:
        print(f"\nNo TPU here, only {jax.default_backend()}: nothing was measured.")


if __name__ == "__main__":
    main()
