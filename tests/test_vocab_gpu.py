"""The first gate of the vocabulary's GPU kernel: values in interpret mode (the second is in tests/aot/).

What a copy reads past the end of an array is nan there, and zero on the chip.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from test_vocab import inputs, log_softmax, reference_confidence
from test_vocab_tpu import seeds_of

from cdlm_jax.config import InputError
from cdlm_jax.kernels.vocab import confidence, gpu, ops, xla
from cdlm_jax.kernels.vocab.cost import on_gpu
from cdlm_jax.kernels.vocab.gpu import Engine, Tiles, choose
from cdlm_jax.mesh.chips import HOPPER_SHARED

DREAM, LLADA = (3584, 152064), (4096, 126464)


def engine(rows, columns, splits, stages=2, **options):
    params = InterpretGPUParams(out_of_bounds_reads="uninitialized", **options)
    return Engine(interpret=params, tiles=Tiles(rows=rows, columns=columns, splits=splits, stages=stages))


def run(engine, hidden, head, forbidden=(), temperature=0.0, seeds=None):
    return jax.jit(partial(ops.confidence, engine), static_argnums=(2, 3))(hidden, head, forbidden, temperature, seeds)


def bfloat16_inputs(n, d, vocab, scale):
    hidden, _, head, *_ = inputs(n=n, d=d, vocab=vocab, scale=scale)
    return jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)


@pytest.mark.parametrize(
    ("n", "d", "vocab", "temperature", "forbidden", "engine"),
    [
        (5, 128, 56, 0.0, (3, 55), engine(64, 32, 1, detect_races=True)),
        pytest.param(  # 2 warpgroups; splits of 3 tiles and of 2
            *(70, 128, 76, 0.7, (7,), engine(128, 16, 2, stages=3)), marks=pytest.mark.slow
        ),
    ],
)
def test_confidence_is_the_reference_s(n, d, vocab, temperature, forbidden, engine):
    hidden, head = bfloat16_inputs(n, d, vocab, 0.3)
    seeds = seeds_of(n) if temperature else None
    got = run(engine, hidden, head, forbidden, temperature, seeds)
    plain = reference_confidence(hidden, head, forbidden, temperature, seeds)
    assert got.token.dtype == jnp.int32
    np.testing.assert_array_equal(got.token, plain.token)
    np.testing.assert_array_equal(got.token, run(xla.Engine(64), hidden, head, forbidden, temperature, seeds).token)
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_ties_go_to_the_lowest_id(splits):
    """Within a tile of columns, within and between the parts that are counted apart, between tiles and splits."""
    z = np.zeros((5, 128), np.float32)
    z[0, [80, 81, 127]] = 2
    z[1, [31, 32, 100]] = 3
    z[2, [5, 90]] = 1
    z[3, [18, 9, 26]] = 1
    got = run(engine(64, 16, splits), jnp.asarray(z, jnp.bfloat16), jnp.eye(128, dtype=jnp.bfloat16), (5,))
    np.testing.assert_array_equal(got.token, [80, 31, 90, 9, 0])
    np.testing.assert_array_equal(got.margin[jnp.array([0, 1, 3, 4])], [0, 0, 0, 0])


def test_error_in_bfloat16():
    """Against float64, at most twice that of plain bfloat16."""
    hidden, head = bfloat16_inputs(n=64, d=64, vocab=512, scale=0.5)
    log_p = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64))
    plain = jax.nn.log_softmax((hidden @ head).astype(jnp.float32))

    def numbers(log_p):
        p = np.exp(np.asarray(log_p, np.float64))
        ordered = np.sort(p)
        return ordered[:, -1], ordered[:, -1] - ordered[:, -2], -(p * np.asarray(log_p)).sum(-1)

    got = run(engine(64, 32, 2), hidden, head)
    for mine, xla_s, exact in zip(got[1:], numbers(plain), numbers(log_p), strict=True):
        assert np.abs(mine - exact).max() <= 2 * np.abs(xla_s - exact).max()


# ---- where it runs -------------------------------------------------------------------------------------------------


class Device:
    platform = "gpu"

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "d", "vocab", "dtype", "reason"),
    [
        ("NVIDIA B200", 64, 128, jnp.bfloat16, "it needs Hopper's wgmma, which the NVIDIA B200 has not"),
        ("NVIDIA A100-SXM4-80GB", 64, 128, jnp.bfloat16, "wgmma, which the NVIDIA A100-SXM4-80GB has not"),
        ("NVIDIA H100 80GB HBM3", 64, 128, jnp.float32, "hidden is float32 and head float32, not both bfloat16"),
        ("NVIDIA GH200 480GB", 60, 128, jnp.bfloat16, r"piece of the head is \[60, 128\], not multiples of 64"),
        ("NVIDIA H200", 64, 1001, jnp.bfloat16, r"piece of the head is \[64, 1001\], not multiples of 64"),
    ],
)
def test_what_the_kernel_refuses(monkeypatch, kind, d, vocab, dtype, reason):
    monkeypatch.setattr("cdlm_jax.mesh.sharding.device", lambda: Device(kind))
    hidden, head = jnp.ones((2, d), dtype), jnp.ones((d, vocab), dtype)
    with pytest.raises(InputError, match=f"implementation 'gpu' cannot run here: .*{reason}; allowed: 'xla'"):
        confidence(hidden, head, implementation="gpu")
    np.testing.assert_array_equal(confidence(hidden, head).token, [0, 0])  # XLA's


def test_an_h100_gets_the_kernel(monkeypatch):
    monkeypatch.setattr("cdlm_jax.mesh.sharding.device", lambda: Device("NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr("cdlm_jax.kernels.vocab.api.gpu.Engine", lambda: engine(64, 16, 1))
    monkeypatch.setattr(xla.Engine, "statistics", None)
    assert confidence(jnp.ones((2, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)).token.tolist() == [0, 0]


# ---- tiles and cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 32, 64, 65, 1024, 16384])
@pytest.mark.parametrize("op", ["confidence", "confidence, drawn"])
@pytest.mark.parametrize("sizes", [DREAM, LLADA])
def test_tiles_fill_the_chip_and_fit_it(n, op, sizes):
    tiles = choose(n, sizes[1], op != "confidence", 132)
    programs = tiles.splits * math.ceil(n / tiles.rows)
    assert 0.85 * 132 <= programs <= 132
    most = math.ceil(math.ceil(sizes[1] / tiles.columns) / tiles.splits) * tiles.columns  # columns of a program
    assert most * tiles.splits <= 1.1 * sizes[1]
    assert tiles.stages >= 4
    assert on_gpu(op, n, *sizes).on_chip <= HOPPER_SHARED


@pytest.mark.parametrize("n", [32, 1024])
@pytest.mark.parametrize("op", ["confidence", "confidence, drawn"])
@pytest.mark.parametrize("sizes", [DREAM, LLADA])
def test_a_block_s_confidence_reads_everything_once(n, op, sizes):
    assert on_gpu(op, n, *sizes).ratio <= 1.05


def test_the_cost_is_that_of_the_kernel(monkeypatch):
    """Copies into shared memory as they happen, and what is reserved there and written, as the kernel asks for it."""
    made, copies = [], []
    name = "copy_gmem_to_smem"
    if not hasattr(gpu_callbacks, name):  # JAX 0.10
        name = "_execute_device_local_memory_transfer"
    copy, kernel = getattr(gpu_callbacks, name), gpu.plgpu.kernel
    monkeypatch.setattr(gpu_callbacks, name, lambda *args, **given: (copies.append(1), copy(*args, **given))[1])
    monkeypatch.setattr(gpu.plgpu, "kernel", lambda *args, **given: (made.append(given), kernel(*args, **given))[1])
    n, d, vocab, chosen = 66, 64, 40, engine(64, 16, 2)
    hidden, head = bfloat16_inputs(n, d, vocab, 0.3)
    got, plain = (each(hidden, head, (7,), 0.7, seeds_of(n)) for each in (partial(run, chosen), reference_confidence))
    np.testing.assert_array_equal(got.token, plain.token)
    for a, b in zip(got[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    cost = on_gpu("confidence, drawn", n, d, vocab, tiles=chosen.tiles)
    (options,) = made

    def size(x):
        return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize

    scratch = jax.tree.leaves(options["scratch_types"])
    barriers = [x for x in scratch if hasattr(x, "num_barriers")]
    reserved = sum(size(x) for x in scratch if x not in barriers)
    assert cost.on_chip == reserved + 8 * sum(int(np.prod(x.num_barriers)) for x in barriers)
    programs = math.prod(options["grid"])
    assert cost.fetched == (len(copies) - 3 * programs) // 2 * cost.tiles.stage
    assert cost.moved - cost.least == 2 * sum(map(size, options["out_type"]))
