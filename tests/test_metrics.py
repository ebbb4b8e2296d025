"""AUP as published, sums over groups, and arithmetic intensity against counts made by hand."""

import dataclasses
import json
import math

import jax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_hf import DREAM_7B, LLADA_8B

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.evaluation.harness import Score
from cdlm_jax.evaluation.metrics import (
    Measured,
    aup,
    decoding_work,
    forward_work,
    groups_of,
    overall,
    series_aup,
    series_points,
)
from cdlm_jax.models.hf import abstract


def measured(name: str, scores: dict[str, Score], series: str = "", **more) -> Measured:
    given = {"settings": {}, "compile_seconds": 2.0, "latency_ms": None, "throughput": {}} | more
    return Measured(name=name, series=series or name, scores=scores, **given)


def score(accuracy: float, per_forward: float, problems: int = 100, tokens: float = 20) -> Score:
    return Score(problems, accuracy, tokens / per_forward, tokens, per_forward)


# ---- accuracy under parallelism ------------------------------------------------------------------------------------


def test_one_point_is_a_product():
    assert aup([(1.5, 80.0)]) == 120.0
    assert aup([(1.5, 80.0)], best=100.0) == 120.0  # the first point is not weighted


def test_aup_of_published_points():
    """d3LLM-Dream on GSM8K-CoT: (1, 83.47) and (4.94, 81.36), the best of all methods there being 83.94."""
    # W = exp(-3 * 0.47 / 83.94) = 0.983343 and exp(-3 * 2.58 / 83.94) = 0.911915
    by_hand = 1 * 83.47 + (4.94 - 1) * (83.47 * 0.983343 + 81.36 * 0.911915) / 2
    assert aup([(1.0, 83.47), (4.94, 81.36)], best=83.94) == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx(391.33, abs=0.01)


def test_three_points_by_hand():
    # W(80) = 1, W(78) = exp(-3 * 2 / 80) = 0.927743, W(76) = exp(-3 * 4 / 80) = 0.860708
    by_hand = 0.5 * 80 + 1.5 * (80 + 78 * 0.927743) / 2 + 2 * (78 * 0.927743 + 76 * 0.860708) / 2
    assert aup([(2, 78), (4, 76), (0.5, 80)]) == pytest.approx(by_hand, rel=1e-6)


def test_points_more_than_five_below_the_first_are_left_out():
    assert aup([(1, 80), (2, 74.99)]) == 80
    assert aup([(1, 80), (2, 75)]) > 80
    # one in the middle: the trapezoid spans the gap
    assert aup([(1, 80), (2, 10), (3, 80)]) == 80 + 2 * 80
    # the first point is the least parallel one, not the best one
    assert aup([(1, 70), (2, 80), (3, 66)]) == pytest.approx(
        70 + (70 * math.exp(-3 / 8) + 80) / 2 + (80 + 66 * math.exp(-3 * 14 / 80)) / 2
    )


def test_no_point_counts_more_than_in_full():
    assert aup([(1, 80), (2, 80)], best=50) == 160


def test_points_of_equal_parallelism_keep_their_order():
    assert aup([(1, 80), (1, 70)]) == 80
    assert aup([(1, 70), (1, 80)]) == 70
    assert aup([(1, 80), (2, 80), (2, 78), (3, 78)], best=100) == pytest.approx(
        80 + 80 * math.exp(-0.6) + 78 * math.exp(-0.66)
    )


def test_nothing_right_is_worth_nothing():
    assert aup([(1, 0), (5, 0)]) == 0
    assert aup([(0, 50), (1, 50)]) == 50


POINTS = st.lists(
    st.tuples(st.floats(0.1, 20), st.floats(0, 100)), min_size=1, max_size=6, unique_by=lambda point: point[0]
)


@given(POINTS, st.randoms(use_true_random=False))
def test_the_order_of_points_does_not_matter(points, random):
    shuffled = random.sample(points, len(points))
    assert aup(shuffled) == aup(points)


@given(POINTS, st.floats(0, 100))
def test_aup_is_bounded_and_falls_with_the_competition(points, best):
    assume(best >= max(accuracy for _, accuracy in points))
    area = max(parallelism for parallelism, _ in points) * max(accuracy for _, accuracy in points)
    assert 0 <= aup(points, best) <= aup(points) * (1 + 1e-9) <= area * (1 + 2e-9)


@pytest.mark.parametrize(
    "points", [[(-1, 50)], [(1, 101)], [(1, -1)], [(math.nan, 50)], [(1, math.nan)], [(math.inf, 50)]], ids=str
)
def test_impossible_points_are_refused(points):
    with pytest.raises(InputError, match=r"tokens per forward >= 0 and percent in 0\.\.100, got \("):
        aup(points)


def test_aup_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one point"):
        aup([])
    with pytest.raises(InputError, match="percent"):
        aup([(1, 50)], best=101)


# ---- results -------------------------------------------------------------------------------------------------------

RESULTS = [
    measured("slow", {"chain": score(0.9, 1)}),
    measured("fast 2", {"chain": score(0.78, 4)}, "fast"),
    measured("fast 1", {"chain": score(0.8, 2)}, "fast"),
]


def test_series_are_compared_to_the_best_of_all():
    assert series_points(RESULTS, "chain") == {"slow": [(1, 90)], "fast": [(2, 80), (4, 78)]}
    found = series_aup(RESULTS, "chain")
    assert found["slow"] == 90
    assert found["fast"] == aup([(2, 80), (4, 78)], best=90) < aup([(2, 80), (4, 78)])


def test_overall_is_a_macro_mean_of_accuracy_and_a_sum_of_the_rest():
    found = overall([Score(100, 0.9, 48.0, 24.0, 0.5), Score(300, 0.5, 40.0, 10.0, 0.25)])
    assert found == Score(400, pytest.approx(0.7), 42.0, 13.5, pytest.approx(5400 / 16800))
    assert overall([found]) == found


def test_results_must_be_of_the_same_groups():
    assert groups_of(RESULTS) == ["chain"]
    with pytest.raises(InputError, match="'odd' was scored on sort, but 'slow' on chain"):
        groups_of([*RESULTS, measured("odd", {"sort": score(1, 1)})])
    for nothing in ([], [measured("x", {})]):
        with pytest.raises(InputError, match="no results"):
            groups_of(nothing)


def test_results_go_to_json():
    result = measured("x", {"chain": score(0.5, 2)}, latency_ms=(3.0, 2.0, 4.0), throughput={16: (9.0, 8.0, 10.0)})
    read = json.loads(json.dumps(dataclasses.asdict(result)))
    assert read["scores"]["chain"]["accuracy"] == 0.5
    assert read["throughput"] == {"16": [9.0, 8.0, 10.0]} and read["latency_ms"] == [3.0, 2.0, 4.0]


def test_bad_results_are_refused():
    for bad, message in (
        (score(99, 2), "accuracy of 'x' must be in 0..1, got 99"),
        (Score(1, 1.0, 0.0, 9.0, 9.0), "forwards of 'x' must be positive, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            measured("x", {"chain": score(0.5, 2), "sort": bad})
    with pytest.raises(InputError, match="latency_ms of 'x' must be positive, got 0"):
        measured("x", {}, latency_ms=(0.0, 0.0, 0.0))


# ---- arithmetic intensity ------------------------------------------------------------------------------------------


def config(vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, mlp_size) -> ModelConfig:
    rest = {"mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_length": 4096}
    sizes = dict(zip(("vocab_size", "hidden_size", "num_layers"), (vocab_size, hidden_size, num_layers), strict=True))
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "mlp_size": mlp_size}
    return ModelConfig(rope_theta=10000.0, norm_eps=1e-5, **sizes, **heads, **rest)


def llada(c):
    return config(c["vocab_size"], c["d_model"], c["n_layers"], c["n_heads"], c["n_kv_heads"], c["mlp_hidden_size"])


def qwen(c):
    sizes = (c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], c["intermediate_size"])
    return config(c["vocab_size"], c["hidden_size"], *sizes)


TINY = config(10, 4, 2, 2, 1, 6)


def test_work_counted_by_hand():
    """d 4, two layers, two heads of 2, one of them for keys, feed-forward 6, vocabulary 10."""
    weights = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6) + 4 * 10
    found = forward_work(TINY, queries=3, context=5, rows=2, itemsize=4)
    products = 2 * 2 * (2 * 2 * 5)  # two layers, scores and weighted sum: 2 heads x 2 channels x 5 positions
    assert found.flops == 2 * 3 * 2 * (weights + products)
    layer = (
        (4 + 4 + 2 + 2)  # q, k and v of the stream
        + (4 + 2) * 2  # rotary embedding of q and k
        + 4 + 2 * 5  # scores of q, two heads
        + 2 * 5 * 2  # softmax
        + 2 * 5 + 4  # weighted sum
        + 4 + 4  # output projection
        + 4 + 6 + 6  # gate and up
        + 6 + 6 + 6  # their product
        + 6 + 4  # down
    )  # fmt: skip
    cache = 2 * 2 * 2 * 5  # two layers, keys and values of 2 channels, 5 positions
    assert found.bytes == 4 * (weights + 2 * cache + 2 * 3 * (2 * layer + 4 + 10))
    assert found.intensity == found.flops / found.bytes


@pytest.mark.parametrize("shape", [TINY, config(64, 32, 3, 4, 2, 48)])
def test_weights_are_those_of_the_model(shape):
    leaves = jax.tree_util.tree_leaves_with_path(abstract(shape, "float32"))
    kernels = sum(leaf.size for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path))
    assert forward_work(shape, queries=1, context=0).flops == 2 * kernels


def test_intensities_of_the_paper():
    """About 1, 439 and 31 at batch 1 with bfloat16: LLaDA-8B, prompt 512 and response 256, blocks of 32."""
    work = decoding_work(llada(LLADA_8B), context=512 + 256, block_size=32)
    assert list(work) == ["naive", "block of 32", "autoregressive"]
    naive, block, one = (each.intensity for each in work.values())
    assert naive == pytest.approx(439, rel=0.005)
    assert round(block) == 31 and round(one, 1) == 1.0
    naive, block, one = (each.intensity for each in decoding_work(qwen(DREAM_7B), context=768, block_size=32).values())
    assert naive == pytest.approx(439, rel=0.03) and 31 <= block < 32 and round(one, 1) == 1.0


def test_batches_share_the_weights_and_small_values_are_cheaper():
    one, many = (decoding_work(llada(LLADA_8B), context=768, block_size=32, rows=rows) for rows in (1, 16))
    for name in one:
        assert many[name].flops == 16 * one[name].flops
        assert one[name].bytes < many[name].bytes < 16 * one[name].bytes
    wide = decoding_work(llada(LLADA_8B), context=768, block_size=32, itemsize=4)
    assert wide["naive"].intensity == one["naive"].intensity / 2
