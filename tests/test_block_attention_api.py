"""The public block attention with the TPU kernel in it, interpreted: what is completed, checked and split around it."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES as MESH_CASES
from attention_cases import as_on_tpu
from devices import TESTS, environment
from test_block_attention import CASES, check, make_call, worst

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import block_attention


@pytest.fixture
def on_tpu():
    with as_on_tpu():
        yield


def random_ends(case):
    return np.random.default_rng(0).integers(0, case.slots + 1, (case.rows, case.queries), dtype=np.int32)


@pytest.mark.parametrize(
    "name",
    [
        *("ragged slots, many queries", "int8 pages"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("small pages", "int8")),
    ],
)
def test_values(on_tpu, name):
    """Of the device's own choice."""
    case = CASES[name]
    run = jax.jit(functools.partial(block_attention, return_lse=True))
    call = make_call(case, 0, random_ends(case))
    assert "pallas_call" in str(jax.make_jaxpr(run)(call.q, **call.poisoned))
    check(call, run)


def test_kv_length_and_one_layer(on_tpu):
    """Limits before and behind the row's end; without a stack of layers, with one given as a number."""
    case = CASES["two tiles"]
    call = make_call(case, 0, np.full((case.rows, case.queries), 40, np.int32))
    arguments = call.poisoned | {"visible_end": jnp.full((1, case.queries), 1000), "kv_length": jnp.full(case.rows, 40)}
    run = jax.jit(functools.partial(block_attention, implementation="tpu"))
    stack = functools.partial(block_attention, implementation="tpu", layer=1)
    found = jax.jit(stack)(call.q, **{name: x for name, x in arguments.items() if name != "layer"})
    alone = {name: x[1] if name in "kv" else x for name, x in arguments.items() if name != "layer"}
    assert worst(found, call.expected) < 5e-6
    np.testing.assert_array_equal(run(call.q, **alone), found)


FAST = ("int8, key heads that do not divide",)  # of the cases on a mesh


@pytest.mark.parametrize(
    "arguments",
    [
        ("tpu", "cache", *FAST),
        pytest.param(("tpu", "shard_map", *(name for name in MESH_CASES if name not in FAST)), marks=pytest.mark.slow),
        pytest.param(("xla", *MESH_CASES), marks=pytest.mark.slow),
    ],
    ids=["fast", "tpu", "xla"],
)
def test_values_on_a_mesh(arguments):
    """Rows over two devices times heads over two: pages, scales, log-sum-exps, key heads that do not divide."""
    done = subprocess.run(
        [sys.executable, TESTS / "attention_cases.py", *arguments],
        env=environment(4),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_a_gradient_is_refused_with_what_to_do(on_tpu):
    case = dataclasses.replace(CASES["two tiles"], rows=1, slots=16)
    call = make_call(case, 0, random_ends(case))
    with pytest.raises(InputError, match="'tpu' has no gradient: use training_attention, or 'xla'"):
        jax.eval_shape(jax.grad(lambda q: block_attention(q, **call.finite).sum()), call.q)
    gradient = jax.jit(jax.grad(lambda q: block_attention(q, **call.finite, implementation="xla").sum()))
    assert jnp.isfinite(gradient(call.q)).all()


def test_what_does_not_fit_runs_on_xla(on_tpu):
    """Vector memory: float32 of 64 key heads. Scalar memory: a large page table."""
    shape = jax.ShapeDtypeStruct
    q, k = shape((2, 16, 64, 128), jnp.float32), shape((2, 64, 64, 128), jnp.float32)
    ends = shape((2, 16), jnp.int32)
    pages = shape((2, 2**16), jnp.int32)
    for arguments, message in (
        ((q, k, k, ends), "64 heads of 128 in float32 and 64 key heads in float32 take 23.6 MiB of vector memory"),
        ((q.update(shape=(2, 16, 4, 128)), *[k.update(shape=(9, 8, 4, 128))] * 2, ends, pages), "are 131074 numbers"),
    ):
        run = lambda q, k, v, end, table=None, **options: block_attention(  # noqa: E731
            q, k, v, visible_end=end, page_table=table, **options
        )
        assert "pallas_call" not in str(jax.make_jaxpr(run)(*arguments))
        with pytest.raises(InputError, match=message):
            jax.eval_shape(functools.partial(run, implementation="tpu"), *arguments)
