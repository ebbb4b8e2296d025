"""The benchmark of the kernels, as far as it can be tested without a chip: its comparisons are of the same values."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # where `python benchmarks/kernels.py` looks

import block_attention_cases
import cases
import kernels
import vocab_cases

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import gpu_tiles
from cdlm_jax.kernels.block_attention import tiles as attention_tiles
from cdlm_jax.kernels.vocab import ops, tpu
from cdlm_jax.kernels.vocab import tiles as vocab_tiles
from cdlm_jax.kernels.vocab.cost import sizes_of

# ---- block attention -----------------------------------------------------------------------------------------------


def block_step(dtype="bfloat16"):
    """q, k, v and what the queries of two rows see; several query heads and a row that does not fill its last page."""
    q = jax.ShapeDtypeStruct((2, 32, 4, 128), dtype)
    k = jax.ShapeDtypeStruct((1, 2, 200, 2, 128), dtype)
    ends = np.repeat(np.array([[150], [70]], np.int32), 32, axis=1)
    return *block_attention_cases.normal(q, k, k), jnp.asarray(ends)


right = jax.jit(block_attention_cases.right)


def is_right(call, prepare, dtype="bfloat16") -> bool:
    arguments = block_step(dtype)
    return cases.error(jax.jit(call)(*prepare(*arguments)), right(*arguments)) < 0.01


def test_the_block_step_on_xla_and_paged_attention():
    for name in ("XLA", "paged"):
        with pltpu.force_tpu_interpret_mode():
            assert is_right(*block_attention_cases.LIBRARIES["tpu"][name])


def test_the_block_step_on_splash():
    assert is_right(partial(block_attention_cases.on_splash, interpret=True), block_attention_cases.for_splash)


def test_the_block_step_on_ragged_paged_attention(monkeypatch):
    """On its own reference: interpret mode does not know the reshape of a reference that its kernel makes."""

    def in_plain_jax(*arguments, num_kv_pages_per_block, num_queries_per_block, **options):
        return ragged.ref_ragged_paged_attention(*arguments, **options)

    monkeypatch.setattr(block_attention_cases, "ragged_paged_attention", in_plain_jax)
    call, prepare = block_attention_cases.LIBRARIES["tpu"]["ragged paged"]
    arguments = block_step()
    assert cases.error(call(*prepare(*arguments)), right(*arguments)) < 0.01


def test_the_block_step_with_searched_tiles():
    q, k, *_ = block_step()
    found = block_attention_cases.candidates(q, k, platform="tpu")
    assert attention_tiles.heuristic(q, k, False) in found and len(set(found)) == len(found) > 8
    with pltpu.force_tpu_interpret_mode():
        assert is_right(*cases.Compared(block_attention_cases.with_tiles(found[0], platform="tpu")), dtype="float32")


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_every_step_fits_its_cache_and_has_tiles_of_its_own(platform):
    """What its queries see, in the order of its blocks; and no entry is written by two of them."""
    steps = {step: step.shapes("Dream-7B") for step in block_attention_cases.STEPS}
    for step, (q, k) in steps.items():
        ends = step.ends()
        assert ends.shape == q.shape[:2] and ends.min() > step.context - 32 and ends.max() == k.shape[2]
        assert (np.diff(ends, axis=1) >= 0).all()
    refined = next(step for step in steps if step.name == "commit and refine").ends()
    assert (refined[:, 32:] == refined[:, :32] + 32).all()
    tuned = [case.tuning.shape for case in block_attention_cases.cases(platform) if case.tuning]
    assert len(set(tuned)) == len(tuned)
    assert {shape.split("x")[0] for shape in tuned} == {"32", "64", "1024"}
    long = next(step for step in steps if step.rows == 1)
    assert gpu_tiles.heuristic(*steps[long]).splits > 1


def test_training_with_gradients():
    keys = block_attention_cases.normal(*(jax.ShapeDtypeStruct((2, 40, heads, 64), jnp.float32) for heads in (4, 2, 2)))
    ends = jnp.full((2, 40), 33)
    (case,) = (each for each in block_attention_cases.cases("tpu") if each.name == "Dream-7B, training, 4 x 768")
    assert [x.shape for x in jax.eval_shape(case.make)] == [(4, 768, 28, 128), *[(4, 768, 4, 128)] * 2, (4, 768)]
    found = jax.jit(case.others["XLA"].call)(*keys, ends)
    assert [x.shape for x in found] == [keys[0].shape, *(x.shape for x in keys)]
    assert cases.error(found, jax.jit(case.expected)(*keys, ends)) < 1e-5


# ---- the vocabulary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["confidence", "drawn", "KL", "NLL"])
def test_the_vocabulary_on_xla_is_what_its_logits_say(op):
    arguments = vocab_cases.arguments(op, 12, 16, 1000)
    found = jax.jit(vocab_cases.on(op, implementation="xla", tile=256))(*arguments)
    expected = jax.jit(vocab_cases.with_logits(op))(*arguments)
    assert cases.error(found, expected) < 0.01
    if op in vocab_cases.KERNELS["gpu"]:
        np.testing.assert_array_equal(found.token, expected.token)


def test_tuned_tiles_are_found_by_the_sizes_of_the_call(monkeypatch):
    """The benchmark writes them under the name by which the kernel looks for them."""
    asked = []
    monkeypatch.setattr(tpu, "tuned", lambda kind, sizes: asked.append((kind, sizes.name)))
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 256), (256, 1024)))
    engine = tpu.Engine(interpret=True)
    jax.eval_shape(lambda *given: ops.confidence(engine, *given, vocab_cases.FORBIDDEN, 0.0, None), hidden, head)
    assert asked == [(jax.devices()[0].device_kind, sizes_of("confidence", 32, 256, 1024)["statistics"].name)]


def test_tuned_tiles_of_the_vocabulary_are_taken(monkeypatch):
    sizes, best = sizes_of("confidence", 32, 256, 1024)["statistics"], vocab_tiles.Tiles(rows=32, columns=256)
    monkeypatch.setattr(vocab_tiles, "_tuned", lambda: {"TPU v9": {sizes.name: dataclasses.asdict(best)}})
    assert vocab_tiles.tuned("TPU v9", sizes) == best and vocab_tiles.tuned("TPU v8", sizes) is None


# ---- values, times, tiles ------------------------------------------------------------------------------------------


def product_case(call) -> cases.Case:
    def make():
        return jnp.ones((300, 300)), jnp.eye(300)

    return cases.Case(name="product", make=make, call=call, expected=jnp.dot, others={}, least=1)


def test_wrong_values_end_the_benchmark():
    right = product_case(jnp.dot)
    cases.check(right, right.make())
    wrong = dataclasses.replace(right, others={"XLA": cases.Compared(lambda a, b: 1.1 * a @ b)})
    with pytest.raises(SystemExit, match="wrong values: product, XLA, is off by 0.1 "):
        cases.check(wrong, wrong.make())
    nan = product_case(lambda a, b: jnp.nan * a @ b)
    with pytest.raises(SystemExit, match="product, kernel, is off by inf"):
        cases.check(nan, nan.make())


def test_a_time_is_of_the_call():
    case = product_case(jnp.dot)
    one = cases.seconds(case.call, case.make())
    ten = cases.seconds(lambda a, b: tuple(a @ (b + i) for i in range(10)), case.make())
    assert 0 < one < ten  # all ten are computed, though no later call takes all of their results


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int


def test_the_fastest_tiles_are_written(monkeypatch, tmp_path):
    def timed(rows, arguments):
        if rows == 3:
            raise jax.errors.JaxRuntimeError("no room\non the chip")
        return {1: 2.0, 2: 1.0}[rows]

    file = tmp_path / "tuning.json"
    file.write_text('{"TPU v9": {"other": {"rows": 7}}}')
    tuning = cases.Tuning(
        candidates=lambda: [Tiles(1), Tiles(2), Tiles(3)], call=lambda tiles: tiles.rows, file=file, shape="32x4"
    )
    monkeypatch.setattr(cases, "seconds", timed)
    best, times = cases.search(tuning, ())
    assert best == Tiles(2) and times == {Tiles(1): 2.0, Tiles(2): 1.0, Tiles(3): math.inf}
    tuning.write("TPU v9", best)
    assert json.loads(file.read_text()) == {"TPU v9": {"other": {"rows": 7}, "32x4": {"rows": 2}}}


def tuning_of(file: Path, call) -> cases.Tuning:
    file.write_text("{}")
    return cases.Tuning(candidates=lambda: [Tiles(1), Tiles(2)], call=call, file=file, shape="32x4")


def test_tiles_of_wrong_values_are_not_written(monkeypatch, tmp_path):
    """Though the heuristic's are right, and they are the fastest."""
    times = iter([2.0, 1.0] * 2)
    monkeypatch.setattr(cases, "seconds", lambda call, arguments: next(times))
    file = tmp_path / "tuning.json"
    right = dataclasses.replace(product_case(jnp.dot), tuning=tuning_of(file, lambda tiles: jnp.dot))
    cases.tune(right, right.make(), "TPU v9")
    assert json.loads(file.read_text()) == {"TPU v9": {"32x4": {"rows": 2}}}
    wrong = dataclasses.replace(right, tuning=tuning_of(file, lambda tiles: lambda a, b: tiles.rows * a @ b))
    with pytest.raises(SystemExit, match=r"wrong values: product, Tiles\(rows=2\), kernel, is off by 1 "):
        cases.tune(wrong, wrong.make(), "TPU v9")
    assert file.read_text() == "{}"


def test_nothing_is_written_if_no_tiles_can_run(tmp_path, capsys):
    def refused(tiles):
        def call(a, b):
            raise ValueError("no room on the chip")

        return call

    file = tmp_path / "tuning.json"
    case = dataclasses.replace(product_case(jnp.dot), tuning=tuning_of(file, refused))
    assert cases.tune(case, case.make(), "TPU v9") is case.call
    assert file.read_text() == "{}"
    assert "product: none of these tiles can run, nothing is written" in capsys.readouterr().out


def readable(file: Path, kinds: dict[str, Callable]) -> bool:
    """Whether a tuning.json has what the tiles of each platform are made of."""
    for device_kind, shapes in json.loads(file.read_text()).items():
        platform = "tpu" if device_kind.startswith("TPU") else "gpu"
        for fields in shapes.values():
            try:
                kinds[platform](**fields)
            except (KeyError, TypeError):
                return False
    return True


def test_what_was_tuned_can_be_read(tmp_path):
    q, k, *_ = block_step()
    of_attention = {"tpu": attention_tiles.Tiles, "gpu": partial(gpu_tiles.heuristic, q, k)}
    assert readable(attention_tiles.TUNED, of_attention) and readable(vocab_tiles.TUNED, {"tpu": vocab_tiles.Tiles})
    gpu_s = {"NVIDIA H200": {"x": {"queries": 32, "keys": 64, "stages": 4}}}
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps(gpu_s))
    assert readable(file, of_attention)
    file.write_text(json.dumps({"TPU v9": gpu_s["NVIDIA H200"]}))
    assert not readable(file, of_attention)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_measuring_prints_the_kernel_and_what_it_is_compared_with(monkeypatch, capsys):
    others = {"XLA": cases.Compared(lambda a, b: a @ b)}
    file = Path("unused")
    tuning = cases.Tuning(candidates=list, call=lambda tiles: jnp.matmul, file=file, shape="")
    case = dataclasses.replace(product_case(jnp.dot), others=others, tuning=tuning)
    monkeypatch.setattr(kernels, "cases", lambda platform: [case])
    kernels.measure("cpu", search=False)
    assert re.search(r"^product: [\d.]+ \(\d+ GB/s of what has to move\); XLA [\d.]+$", capsys.readouterr().out, re.M)


def test_without_a_chip_it_says_so_and_what_the_compilers_would_need(monkeypatch, capsys):
    def absent(machine):
        raise InputError("compiling for a TPU needs its compiler")

    monkeypatch.setattr(kernels.topology, "load", absent)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--chips=v5e,v6e"])
    kernels.main()
    out = capsys.readouterr().out
    assert out.startswith("No chip with a kernel here, only cpu: nothing is measured.")
    assert re.findall(r"not compiled for (\S+): compiling for a TPU needs", out) == ["v5e:2x2", "v6e:2x2"]
    assert re.search(r"^Dream-7B +block +1024 +1\.012 ", out, re.M) and "confidence, 32 rows" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--chips=v9", "unknown chip v9, known: v4, v5e"),
        ("--tune", "there is no kernel for cpu, nothing to tune"),
        ("--profile=traces", "there is no kernel for cpu"),
    ],
)
def test_what_cannot_be_done_is_refused(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", option])
    with pytest.raises(SystemExit) as stopped:
        kernels.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_trace_of_each_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "cases", lambda platform: [product_case(jnp.dot)])
    kernels.profile("cpu", tmp_path)
    assert list((tmp_path / "product").rglob("*.xplane.pb"))


def test_memory_on_the_chip_is_read_off_the_program():
    text = """
  %a = f32[] custom-call(), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"2277376"}]}
  %b = f32[] custom-call(), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[]}
"""  # noqa: E501
    assert kernels.on_chip(text) == [2277376, 0]


def test_tables_are_aligned():
    assert kernels.table(["op", "us"], [["one", "5"], ["three", "10"]]) == "op     us\none     5\nthree  10"
