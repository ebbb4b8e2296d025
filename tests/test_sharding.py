"""The mesh: what is refused, where parameters live, and that a mesh changes no result."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from devices import environment
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from mesh_cases import CASES
from tiny import TINY

from cdlm_jax.config import InputError
from cdlm_jax.mesh import sharding
from cdlm_jax.mesh.sharding import AXES, MeshConfig, make_mesh
from cdlm_jax.models import lora
from cdlm_jax.models.hf import abstract, read_config
from cdlm_jax.models.transformer import Transformer

TESTS = Path(__file__).parent
# Every axis at once, and a `tensor` that does not divide the key heads: a model, a decoder, a gradient.
FAST = {
    "2x2x2": ("forward", "cdlm, shifted, sampled, separate commits", "distilled, LoRA"),
    "1x2x4": ("forward", "collected", "optimized, Muon"),
}
# Every case on both; on meshes of one axis what is special about them: rows in many pieces, weights in many pieces.
FEW = ("forward", "autoregressive, sampled", "distilled, LoRA")
ALL = ({"2x2x2": tuple(CASES), "8x1x1": FEW}, {"1x2x4": tuple(CASES), "1x8x1": FEW})  # two processes, for two cores
LARGEST_DIFFERENCE = 1e-5


def on(data: int, fsdp: int, tensor: int):
    """A mesh without devices: enough for shapes and refusals."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((data, fsdp, tensor), AXES, (AxisType.Explicit,) * 3))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "must have positive sizes, of which one may be -1"),
        ({"data": -1}, "must have positive sizes, of which one may be -1"),  # fsdp is -1 already
        ({"data": 3, "fsdp": 1}, "mesh data 3 x fsdp 1 x tensor 1 does not fit 1 devices"),
        ({"tensor": 2}, "mesh data 1 x fsdp -1 x tensor 2 does not fit 1 devices"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])


def test_the_devices_left():
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_meshes_by_name():
    assert MeshConfig.parse("2x-1x4") == MeshConfig(data=2, fsdp=-1, tensor=4)
    for text in ("2x4", "axbxc", "", "1x2x3x4", "1x--2x1"):
        with pytest.raises(InputError, match="a mesh is given as dataxfsdpxtensor, such as 2x4x1; got "):
            MeshConfig.parse(text)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ((1, 1, 8), {}, "num_heads 4 must be a multiple of the mesh's tensor 8"),
        ((1, 1, 4), {"mlp_size": 26}, "mlp_size 26 must be a multiple of the mesh's tensor 4"),
        ((1, 1, 4), {"vocab_size": 41}, "vocab_size 41 must be a multiple of the mesh's tensor 4"),
        ((1, 8, 4), {}, r"hidden_size 16 must be a multiple of the mesh's fsdp 8 \* tensor 4"),
    ],
)
def test_models_that_a_mesh_does_not_divide(mesh, changes, message):
    model = abstract(dataclasses.replace(TINY, **changes), jnp.float32)
    with on(*mesh), pytest.raises(InputError, match=message):
        sharding.parameter_specs(model)


def test_rows_that_a_mesh_does_not_divide():
    with on(2, 3, 1):
        sharding.check_rows(12)
        with pytest.raises(InputError, match=r"8 rows must be a multiple of the mesh's data 2 \* fsdp 3"):
            sharding.check_rows(8)


def test_another_mesh_is_refused():
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("x",), (AxisType.Explicit,))),
        pytest.raises(InputError, match=r"must be one of sharding.make_mesh \(Explicit data, fsdp, tensor\)"),
    ):
        sharding.mesh_sizes()


# ---- where parameters live -----------------------------------------------------------------------------------------


def specs_of(config):
    model = nnx.eval_shape(
        lambda: lora.attach(
            Transformer(dataclasses.replace(config, qkv_bias=True), rngs=nnx.Rngs(0)),
            rank=2,
            alpha=1.0,
            key=jax.random.key(0),
        )
    )
    with on(2, 2, 2):
        found = sharding.parameter_specs(model)
    leaves = jax.tree.leaves_with_path(found)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): spec for path, spec in leaves
    }


def test_the_rule_table():
    specs = specs_of(TINY)
    assert specs["embed"] == P("tensor", "fsdp")
    assert specs["lm_head.kernel"] == P("fsdp", "tensor")
    assert (
        specs["layers.q.kernel"] == specs["layers.k.kernel"] == specs["layers.up.kernel"] == P(None, "fsdp", "tensor")
    )
    assert specs["layers.out.kernel"] == specs["layers.down.kernel"] == P(None, "tensor", "fsdp")
    assert specs["layers.q.bias"] == P(None, "tensor")
    assert specs["layers.down.adapter.a"] == P(None, "tensor", None)
    assert specs["layers.down.adapter.b"] == P(None, None, "fsdp")
    assert specs["layers.mlp_norm.weight"] == P(None, None) and specs["final_norm.weight"] == P(None)


def test_key_heads_are_whole_where_tensor_does_not_divide_them():
    specs = specs_of(dataclasses.replace(TINY, num_kv_heads=1))
    assert specs["layers.k.kernel"] == P(None, "fsdp", None) and specs["layers.q.kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers.v.bias"] == P(None, None) and specs["layers.v.adapter.b"] == P(None, None, None)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_real_layouts_have_a_place(family):
    model = abstract(read_config(GOLDEN / family / "model"), jnp.float32)
    with on(1, 2, 2):
        specs = jax.tree.leaves(sharding.parameter_specs(model))
    for leaf, spec in zip(jax.tree.leaves(model), specs, strict=True):
        assert leaf.ndim == len(spec)
        assert leaf.size < 1000 or {"fsdp", "tensor"} <= set(spec)  # only norms are whole


def test_without_a_mesh_nothing_changes():
    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.put(x, "rows") is x and sharding.by_rows(x) is x and sharding.gathered(x, "fsdp") is x
    assert sharding.pieces(x, 0) == 1
    placed = sharding.place({"x": np.ones((3, 2), np.int32)})
    assert isinstance(placed["x"], jax.Array)
    np.testing.assert_array_equal(sharding.local_rows(placed["x"]), 1)


# ---- on eight devices ----------------------------------------------------------------------------------------------


def start(*arguments):
    env = environment(8) | {"TF_CPP_MIN_LOG_LEVEL": "0"}  # or XLA's notes are not written
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*processes) -> list[str]:
    """What each wrote, once all are done."""
    written = [process.communicate() for process in processes]
    for process, (_, err) in zip(processes, written, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert "rematerialization" not in err, err[-3000:]  # XLA's note that it replicates an array in order to move it
    return [out for out, _ in written]


def check(plans) -> None:
    processes = [start(TESTS / "mesh_cases.py", json.dumps(plan)) for plan in plans]
    found = [json.loads(out) for out in finish(*processes)]
    for plan, differences in zip(plans, found, strict=True):
        assert {mesh: set(names) for mesh, names in plan.items()} == {m: set(cases) for m, cases in differences.items()}
        for mesh, cases in differences.items():
            assert max(cases.values()) < LARGEST_DIFFERENCE, (mesh, cases)


def test_a_mesh_changes_no_result():
    check([FAST])


@pytest.mark.slow
def test_no_mesh_changes_any_result():
    check(ALL)


ON_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from cdlm_jax import load_model
from cdlm_jax.mesh import sharding
from cdlm_jax.config import InputError
from cdlm_jax.decoding import naive
from cdlm_jax.models import stored
from cdlm_jax.models.hf import export_hf, fingerprint

for family, dtype, stored.STEP in (("llada", None, 2**24), ("dream", "bfloat16", 2**12)):
    folder = f"{sys.argv[1]}/{family}/model_sharded"
    plain = load_model(folder, dtype=dtype)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))):
        model = load_model(folder, dtype=dtype)
        specs = jax.tree.leaves(sharding.parameter_specs(model))
        for ours, expected, spec in zip(jax.tree.leaves(model), jax.tree.leaves(plain), specs, strict=True):
            assert ours.sharding.spec == spec and ours.dtype == expected.dtype
            np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(expected, np.float32))
        assert fingerprint(model) == fingerprint(plain)
        export_hf(model, f"{sys.argv[2]}/{family}")
        assert fingerprint(load_model(f"{sys.argv[2]}/{family}")) == fingerprint(plain)

with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(fsdp=8))):
    try:
        naive.generate(model, jnp.ones((3, 2), int), jnp.ones(3, int), naive.Config(gen_length=2, block_size=1))
    except InputError as error:
        print(error)
"""


def test_loading_on_a_mesh(tmp_path):
    (tmp_path / "script.py").write_text(ON_DEVICES)
    (out,) = finish(start(tmp_path / "script.py", GOLDEN, tmp_path))
    assert out.strip() == "3 rows must be a multiple of the mesh's data 1 * fsdp 8"
