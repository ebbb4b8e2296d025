"""The planner: what it reads off compiled programs, what it refuses, and a tiny model compiled for a TPU slice."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

from cdlm_jax.config import InputError, build
from cdlm_jax.decoding.progress import switch
from cdlm_jax.models.hf import abstract
from cdlm_jax.planning import hlo, report, stages, topology
from cdlm_jax.planning.collectives import replica_groups
from cdlm_jax.planning.cost import Collective, cost, product_flops
from cdlm_jax.planning.sweep import candidates
from cdlm_jax.recipes.recipe import Recipe
from cdlm_jax.training.flops import distill_flops

ROOT = Path(__file__).parent.parent
VOCAB = 6151  # prime, and no other size of the tiny model: found in a shape, it is the vocabulary


def compiled(function, *shapes) -> str:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


# ---- FLOPs and loops -----------------------------------------------------------------------------------------------


def products(x, w, times):
    """x @ w, `times` times over, in a scan."""
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=times)[0]


def test_a_product_is_counted():
    assert cost(compiled(jnp.dot, (8, 16), (16, 32))).flops == 2 * 8 * 16 * 32
    batched = partial(jnp.einsum, "bij,bjk->bik")
    assert cost(compiled(batched, (3, 8, 16), (3, 16, 32))).flops == 3 * 2 * 8 * 16 * 32


def test_scans_are_multiplied_out():
    one = 2 * 8 * 16 * 16
    assert cost(compiled(partial(products, times=7), (8, 16), (16, 16))).flops == 7 * one

    def nested(x, w):
        x = jax.lax.fori_loop(0, 5, lambda _, x: products(x, w, 3), x)
        return products(x, w, 2) @ w

    assert cost(compiled(nested, (8, 16), (16, 16))).flops == (5 * 3 + 2 + 1) * one


def test_the_backward_pass_of_a_scan_is_multiplied_out():
    def loss(x, w):
        return products(x, w, 6).sum()

    one = 2 * 8 * 16 * 16
    assert cost(compiled(jax.grad(loss, argnums=(0, 1)), (8, 16), (16, 16))).flops == 3 * 6 * one


def test_a_loop_whose_length_is_data_runs_as_often_as_it_is_told():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.tanh(x @ w), x)

    text = compiled(until, (8, 16), (16, 16))
    assert cost(text).flops == 2 * 8 * 16 * 16
    assert cost(text, lambda loop: 11).flops == 11 * 2 * 8 * 16 * 16


def test_a_counter_that_starts_elsewhere():
    text = compiled(lambda x, w: jax.lax.fori_loop(3, 9, lambda _, x: x @ w, x), (8, 16), (16, 16))
    assert cost(text).flops == 6 * 2 * 8 * 16 * 16


def test_of_a_conditional_the_heavier_branch_counts():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda x: products(x, w, 4), lambda x: x @ w, x)

    assert cost(compiled(either, (8, 16), (16, 16))).flops == 4 * 2 * 8 * 16 * 16


def test_of_a_switch_the_heaviest_forward_counts_once():
    def chosen(x, w):
        forwards = [lambda x, carry, count=count: (products(x, w, count), carry) for count in (1, 4, 2)]
        return switch(x[0, 0].astype(jnp.int32), forwards, x, x)

    text = compiled(chosen, (8, 16), (16, 16))
    assert cost(text, lambda loop: 11).flops == 4 * 2 * 8 * 16 * 16


@pytest.mark.parametrize("place", ['backend_config={"cost_estimate":', "frontend_attributes={cost_estimate="])
def test_a_kernel_costs_what_it_says(place):
    estimate = place + '{"flops":"100","transcendentals":"7","bytes_accessed":"40"}}'
    text = """
HloModule kernel

ENTRY main (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %k = f32[4,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", ESTIMATE
}
"""
    assert cost(text.replace(", ESTIMATE", ", " + estimate))[:2] == (100, 40)
    assert cost(text.replace(", ESTIMATE", ""))[:2] == (0, 2 * 64)


LOOP = """
HloModule counted

body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}

condition (p: (s32[], f32[4,4])) -> pred[] {
  %q = (s32[], f32[4,4]{1,0}) parameter(0)
  %n = s32[] constant(28)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY main (x: f32[4,4]) -> f32[4,4] {
  %x0 = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %start = (s32[], f32[4,4]{1,0}) tuple(%copied, %x0)
  %loop = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_without_a_known_trip_count():
    """A TPU's programs do not say how often a loop runs: it is in the condition."""
    assert cost(LOOP).flops == 28 * 2 * 4 * 4 * 4
    assert cost(LOOP.replace("constant(0)", "constant(8)")).flops == 20 * 2 * 4 * 4 * 4
    unrolled = LOOP.replace("constant(1)", "constant(3)")
    assert cost(unrolled).flops == 10 * 2 * 4 * 4 * 4  # the tenth starts at 27
    assert cost(LOOP.replace("direction=LT", "direction=NE"), lambda loop: 3).flops == 3 * 2 * 4 * 4 * 4


def instruction(text: str, *operands: str) -> tuple[hlo.Computation, hlo.Instruction]:
    lines = [f"  %p{number} = {shape} parameter({number})" for number, shape in enumerate(operands)]
    program = hlo.parse("\n".join(["ENTRY main () -> f32[] {", *lines, f"  ROOT %r = {text}", "}"]))
    computation = program.computations["main"]
    return computation, computation.instructions["r"]


def test_what_follows_a_kernel_is_counted():
    """A kernel's metadata may go over lines, of which the last one starts like the end of a computation."""
    text = """ENTRY main () -> f32[] {
  %p0 = f32[8,16] parameter(0)
  %k = f32[8,16] custom-call(%p0), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="k"}
  %p1 = f32[16,32] parameter(1)
  ROOT %r = f32[8,32] dot(%k, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    found = cost(text)
    assert found.flops == 2 * 8 * 16 * 32
    assert found.bytes == 4 * (2 * 8 * 16 + 8 * 16 + 16 * 32 + 8 * 32)


def test_convolutions_of_a_tpu():
    """Products as a TPU writes them: plain, batched as a dilated window, and a contraction over two dimensions."""
    plain = "bf16[768,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf"
    assert product_flops(*instruction(plain, "bf16[768,3584]", "bf16[3584,32]")) == 2 * 768 * 3584 * 32
    window = "window={size=4x7 stride=3x1 pad=0_0x6_6 lhs_dilate=4x1 rhs_reversal=0x1}, dim_labels=f0b1_10oi->0b1f"
    batched = "bf16[4,128,7,768]{3,2,1,0} convolution(%p0, %p1), " + window
    got = product_flops(*instruction(batched, "bf16[768,4,128,1]", "bf16[7,4,768,768]"))
    assert got == 4 * 7 * 2 * 768 * 768 * 128
    window = "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=fb0_0oi->0fb"  # of one row with each of two
    rows = f"bf16[2,768,32]{{2,1,0}} convolution(%p0, %p1), {window}"
    assert product_flops(*instruction(rows, "bf16[3584,32,1]", "bf16[2,768,3584]")) == 2 * 2 * 768 * 3584 * 32


def test_shapes():
    arrays = hlo.arrays("(bf16[2,768]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}, pred[3]{0}, s32[]{:T(128)}, s4[8]{0:E(4)})")
    assert [array.bytes for array in arrays] == [2 * 768 * 2, 16, 3, 4, 4]
    assert [array.on_chip for array in arrays] == [True, False, False, False, False]


# ---- memory and network --------------------------------------------------------------------------------------------


def test_traffic_counts_slices_of_stacked_weights_once():
    """A scan over stacked weights reads each layer's once, not the whole stack in every step."""
    layers, d = 50, 64

    def run(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    stack_bytes = layers * d * d * 4
    moved = cost(compiled(run, (1, d), (layers, d, d))).bytes
    assert stack_bytes < moved < 4 * stack_bytes


RELABELED = """
relabel (a: bf16[28,64,32]) -> bf16[28,64,32] {
  %a = bf16[28,64,32]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %c = bf16[28,64,32]{2,1,0:T(8,128)(2,1)} copy(%a)
}

layer (b: bf16[28,64,32], i: s32[]) -> bf16[64,32] {
  %b = bf16[28,64,32]{2,1,0:T(16,128)(2,1)} parameter(0)
  %r = bf16[28,64,32]{2,1,0:T(8,128)(2,1)} fusion(%b), kind=kLoop, calls=%relabel
  %i = s32[] parameter(1)
  %o = s32[] constant(0)
  %s = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%r, %i, %o, %o), dynamic_slice_sizes={1,64,32}
  ROOT %l = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%s)
}

product (x: bf16[8,64], w: bf16[28,64,32], j: s32[]) -> bf16[8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[28,64,32]{2,1,0:T(16,128)(2,1)} parameter(1)
  %j = s32[] parameter(2)
  %m = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%w, %j), kind=kLoop, calls=%layer
  ROOT %d = bf16[8,32]{1,0} dot(%x, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY main (x: bf16[8,64], w: bf16[28,64,32], j: s32[]) -> bf16[8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[28,64,32]{2,1,0:T(16,128)(2,1)} parameter(1)
  %j = s32[] parameter(2)
  ROOT %one = bf16[8,32]{1,0} fusion(%x, %w, %j), kind=kOutput, calls=%product
}
"""


def test_traffic_counts_the_layer_behind_a_change_of_layout():
    """As for TPU7x: in a fusion, a copy of the whole stack says how to read the piece that is taken."""
    assert cost(RELABELED).bytes == 2 * (8 * 64 + 64 * 32 + 8 * 32) + 4


UPDATE = """
piece (a: f32[100,4], b: s32[2,1], c: f32[2,4]) -> f32[100,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %b = s32[2,1]{1,0} parameter(1)
  %c = f32[2,4]{1,0} parameter(2)
  ROOT %s = f32[100,4]{1,0} scatter(%a, %b, %c), to_apply=%pick
}

ENTRY main (x: f32[100,4], i: s32[2,1], y: f32[2,4]) -> f32[100,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %y = f32[2,4]{1,0} parameter(2)
  ROOT %one = f32[100,4]{1,0} fusion(%x, %i, %y), kind=kInput, calls=%piece
}
"""


def test_traffic_counts_what_an_update_in_place_changes():
    assert cost(UPDATE).bytes == 2 * 2 * 4 * 4 + 2 * 4  # the rows read and written, and where they go


def test_groups_are_read_in_every_notation():
    def groups(text: str, opcode: str = "all-gather"):
        return replica_groups(instruction(f"f32[8]{{0}} {opcode}(%p0), {text}", "f32[4]")[1])

    assert groups("replica_groups={{0,1},{2,3}}, dimensions={0}") == ((0, 1), (2, 3))
    assert groups("replica_groups=[2,2]<=[4], dimensions={0}") == ((0, 1), (2, 3))
    assert groups("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}") == ((0, 2), (1, 3))
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}") == ((0, 2), (1, 3))
    assert groups("source_target_pairs={{0,1},{1,0}}", "collective-permute") == ((0, 1), (1, 0))


def test_collectives_are_charged_to_the_axes_they_run_along():
    mesh = Mesh(np.array(jax.devices() * 8).reshape(2, 4, 1), ("data", "fsdp", "tensor"))
    found = [
        Collective("all-gather", ((0, 1, 2, 3), (4, 5, 6, 7)), 10.0),
        Collective("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 5.0),
        Collective("all-reduce", (tuple(range(8)),), 1.0),
        Collective("collective-permute", ((0, 1), (1, 2)), 2.0),
    ]
    assert report.by_axes(found, mesh) == {
        "fsdp": {"all-gather": 10.0, "collective-permute": 2.0},
        "data": {"all-reduce": 5.0},
        "data+fsdp": {"all-reduce": 1.0},
    }


SPREAD = """
piece (a: f32[4], b: f32[8]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  ROOT %g = f32[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

ENTRY main (x: f32[4], y: f32[8]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %one = f32[8]{0} fusion(%x, %y), kind=kOutput, calls=%piece
  ROOT %two = f32[8]{0} fusion(%x, %one), kind=kOutput, calls=%piece
}
"""


def test_pieces_of_one_collective_count_once():
    assert cost(SPREAD).collectives == [Collective("all-gather", ((0, 1),), 16.0)]


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "v9:2x2", "v5e", "v5e:", "v5e:4x4x4", "v5e:0x4", "v5p:4x4", "v5e:32x32", "h100:9"]
)
def test_unknown_topologies_are_refused_with_those_known(name):
    with pytest.raises(
        InputError, match=r"unknown topology .*known: v4:2x2x1 to 16x16x16, v5e:2x2 to 16x16.*h100:1 to 8"
    ):
        topology.load(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "plan"), ("h100:8", "cuda13")])
def test_a_missing_compiler_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=rf"needs its compiler: pip install 'cdlm_jax\[{extra}\]'"):
        topology.load(name)


def test_links_at_a_corner():
    def network(chip_kind, dims):
        return topology.Topology("", topology.chips.find(chip_kind), [], dims).network

    assert network("TPU v5 lite", (4, 4)) == 2 * 50e9  # no ring below 16
    assert network("TPU v5 lite", (16, 16)) == 4 * 50e9
    assert network("TPU v5", (4, 4, 4)) == 6 * 100e9
    assert network("TPU7x", (2, 2, 1)) == 2 * 100e9 / 2  # shared by two devices
    assert network("NVIDIA H100 80GB HBM3", ()) == 450e9


# ---- stages --------------------------------------------------------------------------------------------------------


def config_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def tiny_recipe(**architecture) -> Recipe:
    config = config_of("dream_7b")
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_size": 256,
    }
    ids = {"mask_token_id": 6000, "eos_token_id": 6001, "pad_token_id": 6001}
    config.architecture.update(sizes | ids | architecture)
    config.prompt_length, config.gen_length, config.block_size = 24, 32, 8
    config.distill.update(batch_size=8, accumulate=1, lora_rank=4)
    config.collect.batch_size = 8
    return build(Recipe, config, "config")


def test_an_unknown_stage_and_a_recipe_without_sizes_are_refused():
    with pytest.raises(InputError, match="unknown stage 'train', known: distill, collect, generate"):
        stages.stage("train", tiny_recipe())
    with pytest.raises(InputError, match=r"needs config\.architecture"):
        stages.stage("distill", dataclasses.replace(tiny_recipe(), architecture=None))


def cpu(count: int = 1) -> topology.Topology:
    return topology.Topology("cpu", topology.chips.find("TPU v5 lite"), jax.devices()[:count], ())


def largest_with_vocabulary(text: str, vocab: int = VOCAB) -> int:
    """Entries of the largest array that has the vocabulary for a dimension."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)}
    return max(np.prod(shape) for shape in shapes if vocab in shape)


# Of so small a model the vocabulary is the most; a decode step counts as one that commits a block and refines another.
RATIOS = {"distill": 1.4, "collect": 1.1, "generate": 2.0}


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_stage_compiles_for_this_machine(stage):
    """The same path as for a pod, on one CPU device: FLOPs near what the work needs, and no [rows, L, V]."""
    plan, text = report.compiled(tiny_recipe(), cpu(), stage)
    assert plan.fits and plan.memory["parameters"] > 0 and plan.sent == {}
    assert 0.8 < plan.ratio < RATIOS[stage]
    assert plan.json()["fits"] and json.loads(json.dumps(plan.json()))["stage"] == stage
    if stage == "distill":
        assert largest_with_vocabulary(text) < VOCAB * 8 * 32


def test_what_the_compiler_wanted_is_read_off_its_refusal():
    assert report._wanted("Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.") == 17.5 * 2**30
    assert report._wanted("total memory required for HLO temporaries (400.00G) exceeds available HBM") == 400 * 2**30
    assert report._wanted("out of memory") is None


def test_a_plan_that_does_not_fit_is_told_and_ranked_last():
    plan = report.Plan(
        topology="v5e:2x2",
        chip="TPU v5e",
        devices=4,
        stage="collect",
        mesh={"data": 4, "fsdp": 1, "tensor": 1},
        rows=8,
        tokens=100,
        memory={"parameters": 15 * 2**30},
        peak=17 * 2**30,
        hbm=16 * 2**30,
        analytic=1.0,
        compile_seconds=1.0,
    )
    fast, slow = (
        dataclasses.replace(plan, peak=2**30, flops=1.0, bytes=1.0, seconds={"compute": seconds, "memory": 0.1})
        for seconds in (1.0, 2.0)
    )
    assert not plan.fits and plan.json()["flops"] is None and fast.fits and fast.tokens_per_second == 100
    assert report.ranked([plan, slow, fast]) == [fast, slow, plan]
    console = Console(width=120, record=True, file=io.StringIO())
    for table in (report.table(plan), report.ranking([plan, fast])):
        console.print(table)
    text = console.export_text()
    assert "17.00 GiB of 16.00 GiB: DOES NOT FIT" in text and "4 x 1 x 1" in text


@pytest.mark.parametrize("name", ["dream_7b", "llada_8b"])
def test_configs_build_and_need_what_their_sizes_say(name):
    recipe = build(Recipe, config_of(name), "config")
    model = abstract(recipe.architecture, "bfloat16")
    assert 7.5e9 < sum(x.size for x in jax.tree.leaves(model)) < 8.1e9
    seq_len, rows = 512 + 256, 64
    assert (recipe.prompt_length, recipe.gen_length, recipe.block_size) == (512, 256, 32)
    assert recipe.distill.batch_size == rows
    # Three forwards, a backward through two of them without weight gradients, and their recomputation: 7 times 2 N.
    weights = sum(x.size for x in jax.tree.leaves(model.layers))
    need = distill_flops(recipe.architecture, recipe.distill, recipe.row, rematerialized=True)
    assert need == pytest.approx(7 * 2 * weights * rows * seq_len, rel=0.15)


def test_a_sweep_keeps_the_rows_of_an_update():
    recipe = tiny_recipe()
    machine = dataclasses.replace(cpu(), devices=jax.devices() * 8)
    found = list(candidates(recipe, machine, "distill"))
    shapes = {(each.mesh.data, each.mesh.fsdp, each.mesh.tensor) for each in found}
    assert shapes >= {(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)} and all(np.prod(shape) == 8 for shape in shapes)
    assert {each.distill.batch_size for each in found} == {8}
    assert {each.collect.batch_size for each in candidates(recipe, machine, "collect")} > {8, 32}


# ---- a TPU that is not there ---------------------------------------------------------------------------------------

has_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.slow
@has_libtpu
@pytest.mark.parametrize(
    ("recipe", "topology", "devices", "most_flops", "most_entries"),
    [
        # A device holds a quarter of the embedding and the head (d 128), and 2 rows of 32 positions. The vocabulary
        # is prime, and more than the columns of the head that are put together at a time (`vocab.mesh`).
        ("tiny_recipe(vocab_size=16411)", "v5e:2x2", 4, RATIOS["distill"], 16411 * 64),
        # And here a sixteenth of the embedding's 3,584 columns, and 4 rows of 256 positions in the response.
        ('build(Recipe, config_of("dream_7b"), "config")', "v5e:4x4", 16, 1.15, 152_064 * 4 * 256),
    ],
)
def test_a_training_step_fits_a_tpu_slice(recipe, topology, devices, most_flops, most_entries):
    """In a process of its own: no replicated array, no [rows, L, V], nothing on stderr; the figures add up.

    Dream-7B by LoRA, 64 rows of 512 + 256 tokens, on sixteen chips of 16 GB: what the recipe promises.
    """
    script = f"""
import json
from test_planning import Recipe, build, config_of, largest_with_vocabulary, report, tiny_recipe
from cdlm_jax.planning.topology import load
recipe = {recipe}
plan, text = report.compiled(recipe, load("{topology}"), "distill")
print(json.dumps([plan.json(), int(largest_with_vocabulary(text, recipe.architecture.vocab_size))]))
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
        "TF_CPP_MIN_LOG_LEVEL": "0",
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    plan, largest = json.loads(done.stdout.splitlines()[-1])
    assert "nvoluntary full rematerialization" not in done.stderr
    assert plan["fits"] and plan["devices"] == devices and plan["mesh"] == {"data": 1, "fsdp": devices, "tensor": 1}
    assert 0.8 < plan["flops_over_analytic"] < most_flops
    assert plan["sent"]["fsdp"]["all-gather"] > 0
    assert largest < most_entries
