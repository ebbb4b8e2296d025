"""Attention of whole sequences, forward and backward, against float64; splash in interpret mode.

tests/aot/test_aot_splash_tpu.py holds the chips' compiler against it.
"""

import functools
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from devices import environment
from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import reference, splash, training, training_attention, xla
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import MeshConfig
from cdlm_jax.visibility import Span, dense_mask, packed, visible_end

BLOCK = 32


class Values(NamedTuple):
    """The result [rows, S, H, D], and the gradients of its product with a cotangent."""

    out: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def arrays(rows=3, seq_len=280, heads=4, kv_heads=2, head_dim=64, dtype="float32", seed=0):
    """q, k, v and the result's cotangent. (Few shapes, for few compilations.)"""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=(rows, seq_len, each, head_dim)), dtype)
        for each in (heads, kv_heads, kv_heads, heads)
    ]


def rule(kind: str, prompt_lengths, seq_len: int) -> dict:
    """Arguments by which queries see keys."""
    lengths = jnp.asarray(prompt_lengths, jnp.int32)
    if kind == "block-causal":
        return {"visible_end": visible_end(lengths, seq_len, BLOCK)}
    if kind == "bidirectional":
        return {"visible_end": visible_end(lengths, seq_len, None)}
    if kind == "left padding":
        return {"visible_end": jnp.full((len(lengths), seq_len), seq_len), "valid_start": lengths}
    if kind == "packed":
        layout = packed(lengths, seq_len - 3 * BLOCK, 3 * BLOCK, BLOCK)
        own = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(lengths), seq_len)), layout.own)
        return {"visible_end": layout.visible_end, "own": own}
    raise ValueError(kind)


def float64_values(q, k, v, cotangent, rule) -> Values:
    """By hand, in NumPy."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    group = q.shape[2] // k.shape[2]
    mask = np.asarray(dense_mask(num_keys=k.shape[1], **rule))[:, None]
    keys, values = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = q.shape[3] ** -0.5
    scores = np.where(mask, np.einsum("rqhd,rkhd->rhqk", q, keys) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = np.einsum("rqhd,rkhd->rhqk", cotangent, values)
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))

    def of_key_heads(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3)

    return Values(
        np.einsum("rhqk,rkhd->rqhd", weights, values),
        np.einsum("rhqk,rkhd->rqhd", d_scores, keys),
        of_key_heads(np.einsum("rhqk,rqhd->rkhd", d_scores, q)),
        of_key_heads(np.einsum("rhqk,rqhd->rkhd", weights, cotangent)),
    )


@functools.partial(jax.jit, static_argnames="attention")
def values(attention, q, k, v, cotangent, rule) -> Values:
    out, pull_back = jax.vjp(lambda *qkv: attention(*qkv, **rule), q, k, v)
    return Values(out, *pull_back(cotangent))


on_splash = functools.partial(splash.block_attention, interpret=True)


def errors(found, expected) -> np.ndarray:
    """Largest one of each array, relative to its largest value."""
    pairs = zip(found, expected, strict=True)
    return np.array([np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs])


@pytest.mark.parametrize("kind", ["block-causal", "bidirectional", "left padding", "packed"])
@pytest.mark.parametrize("attention", [on_splash, xla.block_attention], ids=["splash", "xla"])
def test_values_and_gradients(attention, kind):
    given = arrays()
    seen = rule(kind, [37, 150, 1], 280)
    assert errors(values(attention, *given, seen), float64_values(*given, seen)).max() < 3e-6


def test_several_tiles():
    """Some of which are skipped, and ones that all queries see; a row that does not fill its last one."""
    given = arrays(2, 600, heads=2, kv_heads=1, head_dim=128)
    seen = rule("block-causal", [70, 450], 600)
    assert errors(values(on_splash, *given, seen), float64_values(*given, seen)).max() < 3e-6


def test_what_is_skipped():
    """Tiles that no query of a tile sees; they are not fetched either, nor are any of another row."""
    ends = jnp.minimum(rule("block-causal", [70, 800], 1100)["visible_end"], 1100)
    active = splash._active(ends, None, None, 384, 1152)
    assert active[0].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]  # a block reaches over its tile's end
    assert active[1].tolist() == [[1, 1, 1]] * 3
    padded = splash._active(ends, jnp.array([0, 400]), None, 384, 1152)
    assert padded[1].tolist() == [[0, 1, 1]] * 3
    by_query, by_key = (splash._tiles(padded, None, of_keys=each) for each in (False, True))
    assert by_query.data_next[0].tolist() == [[0, 1, 0], [0, 1, 2], [0, 1, 2]] + [[4, 4, 5]] * 3
    assert by_key.data_next[0].tolist() == [[0, 0, 1, 3, 3, 3], [1, 1, 1, 3, 4, 4], [2, 2, 2, 3, 5, 5]]
    assert by_key.block_mask[0].tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]]


@examples(3, 6)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["visible_end", "own", "valid_start"]))
def test_any_ranges(seed, option):
    """Any of which every query sees something."""
    rows, seq_len = 3, 280
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, seq_len + 40, (rows, seq_len))
    seen = {}
    if option == "own":  # some are empty
        start = rng.integers(0, seq_len, (rows, seq_len))
        stop = np.where(rng.random((rows, seq_len)) < 0.3, start, rng.integers(start, seq_len) + 1)
        seen["own"] = Span(*(jnp.asarray(x, jnp.int32) for x in (start, stop)))
    if option == "valid_start":
        start = rng.integers(0, 60, rows)
        seen["valid_start"] = jnp.asarray(start, jnp.int32)
        ends = np.maximum(ends, start[:, None] + 1)
    seen["visible_end"] = jnp.asarray(ends, jnp.int32)
    given = arrays(seed=1)
    assert errors(values(on_splash, *given, seen), float64_values(*given, seen)).max() < 3e-6


def test_queries_that_see_nothing():
    """Their results are finite, and the others' gradients what they would be without them."""
    given = arrays()
    ends = jnp.tile(jnp.where(jnp.arange(280) < 5, 0, 60), (3, 1))
    blind = np.asarray(ends == 0)[..., None, None]
    given[3] = jnp.where(blind, 0, given[3])
    found = values(on_splash, *given, {"visible_end": ends})
    assert all(np.isfinite(x).all() for x in found)
    expected = float64_values(*given, {"visible_end": jnp.maximum(ends, 1)})
    seeing = [np.where(blind, 0, x[0]) for x in (found, expected)]
    assert errors((seeing[0], *found[1:]), (seeing[1], *expected[1:])).max() < 3e-6


def test_bfloat16_is_no_worse_than_on_xla():
    given = arrays(dtype="bfloat16")
    seen = rule("block-causal", [37, 150, 1], 280)
    expected = float64_values(*given, seen)
    ours, theirs = (errors(values(each, *given, seen), expected) for each in (on_splash, xla.block_attention))
    assert (ours <= 2 * theirs).all()


def test_the_reference_agrees():
    given = arrays()
    seen = rule("block-causal", [37, 150, 1], 280)
    found = values(lambda *qkv, **rule: reference.block_attention(*qkv, **rule)[0], *given, seen)
    assert errors(found, float64_values(*given, seen)).max() < 3e-6


# ---- the public function -------------------------------------------------------------------------------------------


def test_the_default_here_is_xla():
    """Also on a mesh, whose devices are no TPUs."""
    given = arrays()
    seen = rule("block-causal", [37, 150, 1], 280)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        placed, ends = jax.tree.map(jnp.array, (given, seen))
        found = values(training_attention, *placed, ends)
    assert errors(found, float64_values(*given, seen)).max() < 3e-6


MESHES = [MeshConfig(fsdp=2, tensor=2), MeshConfig(data=1, fsdp=1, tensor=4), MeshConfig(data=2, fsdp=2, tensor=1)]


def errors_on_meshes() -> list[float]:
    """Of splash as a TPU's mesh of four devices would call it; two key heads, which `tensor` may not divide."""
    training._refusal = lambda q, own: None
    training.splash.block_attention = on_splash
    given = arrays(rows=4, seq_len=140)
    seen = rule("packed", [20, 31, 7, 1], 140)
    expected = float64_values(*given, seen)
    found = []
    for config in MESHES:
        with jax.set_mesh(sharding.make_mesh(config)):
            q, k, v, cotangent = (
                sharding.put(x, "rows", None, name, None, kv_heads=x.shape[2])
                for x, name in zip(given, ("heads", "kv_heads", "kv_heads", "heads"), strict=True)
            )
            placed = sharding.by_rows(seen)
            found.append(errors(values(training_attention, q, k, v, cotangent, placed), expected).max())
    return found


@pytest.mark.slow
def test_every_device_has_its_rows_and_heads():
    script = "import test_training_attention as here; print(*here.errors_on_meshes())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(4), capture_output=True, text=True, check=True)
    found = [float(each) for each in done.stdout.split()]
    assert len(found) == len(MESHES) and max(found) < 3e-6


Q, K = np.zeros((2, 5, 4, 64), np.float32), np.zeros((2, 5, 2, 64), np.float32)
ENDS = np.ones((2, 5), np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "splash"}, r"'splash' cannot run here: the device is a cpu; allowed: 'xla'"),
        ({"implementation": "tpu"}, r"unknown implementation 'tpu' of training_attention, allowed: 'splash', 'xla'"),
        ({"k": K[:, :4]}, r"k, v \[rows, S, kv_heads, D\], with kv_heads a divisor of heads, got \(2, 5, 4, 64\)"),
        ({"q": Q[:, :, :3]}, "a divisor of heads"),
        ({"k": K[0]}, "a divisor of heads"),
        ({"visible_end": ENDS[:, :2]}, r"visible_end must be \[rows, S\] = \(2, 5\)"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        training_attention(**({"q": Q, "k": K, "v": K, "visible_end": ENDS} | changes))


@pytest.mark.parametrize(
    ("seq_len", "head_dim", "dtype", "own", "rows", "message"),
    [
        (768, 128, "float16", False, 4, "q is float16, not bfloat16 or float32"),
        (768, 96, "float32", False, 4, "head_dim is 96, not 64 or 128"),
        (1025, 128, "bfloat16", True, 4, "rows with own have 1025 positions, more than 1024"),
        (32768, 128, "bfloat16", False, 16, "16 rows of 32768 positions are 1024 tiles on a device, more than 512"),
        (1025, 128, "bfloat16", False, 4, None),
        (1024, 64, "float32", True, 4, None),
    ],
)
def test_what_splash_takes(seq_len, head_dim, dtype, own, rows, message):
    q = jax.ShapeDtypeStruct((rows, seq_len, 4, head_dim), dtype)
    reason = splash.refusal(q, Span(ENDS, ENDS) if own else None, rows)
    assert (reason is None) if message is None else re.match(message, reason)
