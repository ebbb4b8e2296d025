"""Block attention: the calls of a cached decoder, and whole sequences with gradients, against JAX's library kernels."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, Compared, Tuning
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from cdlm_jax.kernels.block_attention import (
    block_attention,
    gpu,
    gpu_tiles,
    reference,
    tiles,
    tpu,
    training_attention,
    xla,
)
from cdlm_jax.kernels.block_attention.cost import Cost, cost, gpu_cost
from cdlm_jax.kernels.block_attention.gpu_tiles import GpuTiles
from cdlm_jax.kernels.block_attention.tiles import TUNED, Tiles, shape_name
from cdlm_jax.mesh.chips import Chip
from cdlm_jax.visibility import visible_end

BLOCK, PAGE, HEAD_DIM = 32, 128, 128
PAGES_AT_ONCE = 4
KERNELS: dict[str, Any] = {"tpu": tpu.block_attention, "gpu": gpu.block_attention}
MODELS = {"Dream-7B": (28, 4), "LLaDA-8B": (32, 32)}  # heads, key heads
TRAINED = {"rows": 4, "prompt": 512, "response": 256}


class Step(NamedTuple):
    """A call of the decoder: blocks behind a context, or as many queries as the context has, which is its prefill.
    tuned: whether its tiles are searched. One step of each number of queries, since entries are found by that."""

    name: str
    context: int
    rows: int = 32
    queries: int = BLOCK
    tuned: bool = False

    def shapes(self, model: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """q [rows, queries, heads, D] and one layer's keys [1, rows, slots, kv_heads, D]."""
        heads, kv_heads = MODELS[model]
        slots = self.context if self.queries == self.context else self.context + self.queries
        q = jax.ShapeDtypeStruct((self.rows, self.queries, heads, HEAD_DIM), jnp.bfloat16)
        return q, jax.ShapeDtypeStruct((1, self.rows, slots, kv_heads, HEAD_DIM), jnp.bfloat16)

    def ends(self) -> np.ndarray:
        """What each query sees: a context that differs a little from row to row, and behind it the blocks up to its
        own."""
        contexts = self.context - np.arange(self.rows)[:, None] % BLOCK
        blocks = np.arange(self.queries) // BLOCK + 1
        return (contexts + BLOCK * (self.queries != self.context) * blocks).astype(np.int32)


STEPS = (
    Step("block", 1024),
    Step("block", 4096, tuned=True),
    Step("block, one row", 32768, rows=1),  # which a GPU splits and merges
    Step("commit and refine", 4096, queries=2 * BLOCK, tuned=True),
    Step("prefill", 1024, rows=4, queries=1024, tuned=True),
)
LONG = Step("block", 32768)  # of the cost model alone: the keys of LLaDA are 17 GB


def normal(*found: jax.ShapeDtypeStruct) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(found))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, found, strict=True)]


# ---- the cached steps: q [rows, Q, H, D], k and v [1, rows, S, K, D], ends [rows, Q] ---------------------------


def on_kernel(q, k, v, ends, *, implementation):
    return block_attention(q, k, v, visible_end=ends, layer=jnp.int32(0), implementation=implementation)


def with_tiles(chosen: Tiles | GpuTiles, *, platform: str):
    options: dict[str, Any] = {"layer": jnp.int32(0), "scale": HEAD_DIM**-0.5, "tiles": chosen}
    return lambda q, k, v, ends: KERNELS[platform](q, k, v, visible_end=ends, **options)


def right(q, k, v, ends):
    return reference.block_attention(q, k[0], v[0], visible_end=ends)[0]


def on_xla(q, k, v, ends):
    return xla.block_attention(q, k[0], v[0], visible_end=ends)


def on_cudnn(q, k, v, ends):
    lengths = jnp.full(q.shape[:1], q.shape[1], jnp.int32), ends[:, 0]
    return jax.nn.dot_product_attention(
        q, k[0], v[0], query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1], implementation="cudnn"
    )


# The library kernels for TPU take one query for each row: a block of Q queries is Q times as many heads to them.


def folded(q, kv_heads):
    """[rows, Q, H, D] -> [rows, H * Q, D], the queries of each key head side by side."""
    rows, queries, _, head_dim = q.shape
    return q.reshape(rows, queries, kv_heads, -1, head_dim).swapaxes(1, 2).reshape(rows, -1, head_dim)


def unfolded(out, q, kv_heads):
    rows, queries, _, head_dim = q.shape
    return out.reshape(rows, kv_heads, queries, -1, head_dim).swapaxes(1, 2).reshape(q.shape)


def pages(x):
    """One layer [1, rows, S, K, D] as pages [rows * pages, PAGE, K, D], rows padded to PAGES_AT_ONCE whole ones."""
    x = jnp.pad(x[0], ((0, 0), (0, -x.shape[2] % (PAGES_AT_ONCE * PAGE)), (0, 0), (0, 0)))
    return x.reshape(-1, PAGE, *x.shape[2:])


def table(rows: int, num_pages: int):
    return jnp.arange(num_pages, dtype=jnp.int32).reshape(rows, -1)


def for_pages(q, k, v, ends):
    """Pages [K, pages, PAGE, D]."""
    return q, *(pages(x).transpose(2, 0, 1, 3) for x in (k, v)), ends[:, 0]


def on_pages(q, k, v, lengths):
    kv_heads, num_pages = k.shape[:2]
    scaled = folded(q, kv_heads) * HEAD_DIM**-0.5
    found = paged_attention(scaled, k, v, lengths, table(q.shape[0], num_pages), pages_per_compute_block=PAGES_AT_ONCE)
    return unfolded(found, q, kv_heads)


def for_ragged_pages(q, k, v, ends):
    """Pages [pages, PAGE, 2 * K, D], a key head followed by its values."""
    both = jnp.stack([pages(k), pages(v)], axis=3)
    return q, both.reshape(*both.shape[:2], -1, both.shape[-1]), ends[:, 0]


def on_ragged_pages(q, kv, lengths):
    rows, kv_heads = q.shape[0], kv.shape[2] // 2
    found = ragged_paged_attention(
        folded(q, kv_heads),
        kv,
        lengths,
        table(rows, kv.shape[0]),
        jnp.arange(rows + 1, dtype=jnp.int32),
        jnp.array([rows], jnp.int32),
        sm_scale=HEAD_DIM**-0.5,
        num_kv_pages_per_block=PAGES_AT_ONCE,
        num_queries_per_block=1,
    )
    return unfolded(found, q, kv_heads)


def for_splash(q, k, v, ends):
    """k and v by head, [rows, K, S, D], rows padded to whole tiles."""
    k, v = (jnp.pad(x[0], ((0, 0), (0, -x.shape[2] % 512), (0, 0), (0, 0))).swapaxes(1, 2) for x in (k, v))
    return q, k, v, ends[:, 0]


def on_splash(q, k, v, lengths, *, interpret=False):
    rows, kv_heads, slots, head_dim = k.shape
    queries = q.shape[1] * q.shape[2] // kv_heads
    sees_all = MultiHeadMask([FullMask((queries, slots))] * kv_heads)
    sizes = BlockSizes(block_q=queries, block_kv=512)
    kernel = make_splash_mha_single_device(sees_all, block_sizes=sizes, interpret=interpret)
    segments = SegmentIds(
        q=jnp.ones((rows, queries), jnp.int32), kv=(jnp.arange(slots) < lengths[:, None]).astype(jnp.int32)
    )
    by_head = (folded(q, kv_heads) * HEAD_DIM**-0.5).reshape(rows, kv_heads, queries, head_dim)
    return unfolded(jax.vmap(kernel)(by_head, k, v, segments), q, kv_heads)


LIBRARIES = {
    "tpu": {
        "XLA": Compared(on_xla),
        "paged": Compared(on_pages, for_pages),
        "ragged paged": Compared(on_ragged_pages, for_ragged_pages),
        "splash": Compared(on_splash, for_splash),
    },
    "gpu": {"XLA": Compared(on_xla), "cuDNN": Compared(on_cudnn)},
}


def candidates(q, k, *, platform: str) -> list[Tiles] | list[GpuTiles]:
    """The heuristic's tiles and their neighbours."""
    if platform == "gpu":
        first = gpu_tiles.heuristic(q, k)
        fewer = max(gpu_tiles.ALIGNED, first.queries // 16 * 8)
        every = (
            gpu_tiles.heuristic(q, k, queries=queries, keys=keys, stages=stages)
            for queries in (first.queries, fewer)
            for keys in (64, 128)
            for stages in (2, 3, 4, 6)
        )
        return [*dict.fromkeys(every)]  # stages are as many as there is room for
    start = tiles.heuristic(q, k, False)
    return [
        Tiles(rows=rows, queries=start.queries, keys=keys, chunk=chunk)
        for rows in sorted({1, start.rows, 2 * start.rows})
        for keys in sorted({128, start.keys, 2 * start.keys})
        for chunk in (16, 32, 64)
    ]


def cost_of(platform: str, model: str, step: Step) -> Cost:
    """With the heuristic's tiles."""
    q, k = step.shapes(model)
    if platform == "gpu":
        return gpu_cost(q, k, step.ends(), gpu_tiles.heuristic(q, k))
    return cost(q, k, step.ends(), tiles.heuristic(q, k, False))


def step_case(platform: str, model: str, step: Step) -> Case:
    q, k = step.shapes(model)
    tuning = Tuning(
        candidates=partial(candidates, q, k, platform=platform),
        call=partial(with_tiles, platform=platform),
        file=TUNED,
        shape=shape_name(q, k),
        fields=("queries", "keys", "stages") if platform == "gpu" else (),  # splits depend on the number of rows
    )
    # The libraries' kernels have one length for each row; those for TPU have few queries.
    others = LIBRARIES[platform] if step.queries == BLOCK else {"XLA": LIBRARIES[platform]["XLA"]}
    return Case(
        name=f"{model}, {step.name}, context {step.context}",
        make=lambda: (*normal(q, k, k), jnp.asarray(step.ends())),
        call=partial(on_kernel, implementation=platform),
        expected=right,
        others=others,
        least=cost_of(platform, model, step).least,
        tuning=tuning if step.tuned else None,
    )


# ---- whole sequences: q [rows, S, H, D], k and v [rows, S, K, D], ends [rows, S] ------------------------------------


def with_gradients(attention):
    """(result, gradients of its sum)."""

    def both(q, k, v, ends):
        out, pull_back = jax.vjp(lambda *qkv: attention(*qkv, visible_end=ends), q, k, v)
        return out, *pull_back(jnp.ones_like(out))

    return both


def training_case(model: str) -> Case:
    heads, kv_heads = MODELS[model]
    rows, seq_len = TRAINED["rows"], TRAINED["prompt"] + TRAINED["response"]
    q, k = (jax.ShapeDtypeStruct((rows, seq_len, each, HEAD_DIM), jnp.bfloat16) for each in (heads, kv_heads))
    prompts = TRAINED["prompt"] - 7 * jnp.arange(rows)
    return Case(
        name=f"{model}, training, {rows} x {seq_len}",
        make=lambda: (*normal(q, k, k), visible_end(prompts, seq_len, BLOCK)),
        call=with_gradients(partial(training_attention, implementation="splash")),
        expected=with_gradients(lambda *qkv, **rule: reference.block_attention(*qkv, **rule)[0]),
        others={"XLA": Compared(with_gradients(partial(training_attention, implementation="xla")))},
        least=sum(4 * x.size * x.dtype.itemsize for x in (q, k)),  # q, out and k, v; their gradients
    )


# ---- what the benchmark asks for ------------------------------------------------------------------------------------


def cases(platform: str) -> list[Case]:
    """Those of a platform that has a kernel."""
    if platform not in KERNELS:
        return []
    steps = [step_case(platform, model, step) for model in MODELS for step in STEPS]
    return steps + ([training_case(model) for model in MODELS] if platform == "tpu" else [])


def cost_model(chips: list[Chip]) -> tuple[list[str], list[list[str]]]:
    """A table, its head and its rows: a kernel's bytes and bounds for each step, on chips of one kind."""
    platform, on_chip, unit = ("tpu", "VMEM MiB", 2**20) if chips[0].torus else ("gpu", "shared KiB", 2**10)
    head = [
        "attention",
        "step",
        "context",
        "moved / least",
        "FLOPs/byte",
        on_chip,
        *(f"{chip.name}, us" for chip in chips),
    ]
    lines = []
    for model in MODELS:
        for step in (*STEPS, LONG):
            found = cost_of(platform, model, step)
            figures = [f"{found.ratio:.3f}", f"{found.intensity:.1f}", f"{found.on_chip / unit:.1f}"]
            lines.append(
                [model, step.name, str(step.context), *figures, *(f"{1e6 * found.seconds(chip):.0f}" for chip in chips)]
            )
    return head, lines
