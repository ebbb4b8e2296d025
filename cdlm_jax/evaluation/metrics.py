"""What a benchmark's numbers mean: one method's measurements, accuracy under parallelism, arithmetic intensity."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import Answer, Score, Spread, Timing, by_group, spread


@dataclasses.dataclass(frozen=True)
class Measured:
    """One decoder at one setting.

    series: points of one decoder with its knob turned share it; settings: what it was run with, `decoder` its name;
    scores: by problem group; compile_seconds: on top of a later call; latency_ms: one sequence alone (batch 1);
    throughput: batch size -> tokens before the first EOS per second, empty where not measured.
    """

    name: str
    series: str
    settings: dict[str, Any]
    scores: dict[str, Score]
    compile_seconds: float
    latency_ms: Spread | None
    throughput: dict[int, Spread]

    @classmethod
    def of(
        cls,
        name: str,
        series: str,
        options: Options,
        found: Sequence[Answer],
        timing: Timing,
        throughput: dict[int, Spread] | None = None,
    ) -> "Measured":
        """From the answers to all problems, and the seconds of single ones."""
        return cls(
            name=name,
            series=series,
            settings=options.given(),
            scores=by_group(found),
            compile_seconds=timing.compile,
            latency_ms=spread([1000 * seconds for seconds in timing.calls]),
            throughput=throughput or {},
        )

    def __post_init__(self):
        for score in self.scores.values():
            if not 0 <= score.accuracy <= 1:
                raise InputError(f"accuracy of {self.name!r} must be in 0..1, got {score.accuracy}")
            if not score.forwards > 0:
                raise InputError(f"forwards of {self.name!r} must be positive, got {score.forwards}")
        if self.latency_ms and not self.latency_ms[0] > 0:
            raise InputError(f"latency_ms of {self.name!r} must be positive, got {self.latency_ms[0]}")


def groups_of(results: Sequence[Measured]) -> list[str]:
    """The problem groups, which must be the same for all."""
    if not results or not results[0].scores:
        raise InputError("there are no results to compare")
    groups = list(results[0].scores)
    for result in results:
        if set(result.scores) != set(groups):
            raise InputError(
                f"{result.name!r} was scored on {', '.join(result.scores) or 'nothing'}, "
                f"but {results[0].name!r} on {', '.join(groups)}: a comparison needs the same problems"
            )
    return groups


def overall(scores: Iterable[Score]) -> Score:
    """Several groups as one: accuracy is the mean over groups (macro), the rest as if all problems were one group."""
    scores = list(scores)
    problems = np.array([score.problems for score in scores])
    forwards, tokens = (np.array([getattr(score, name) for score in scores]) for name in ("forwards", "tokens"))
    return Score(
        problems=int(problems.sum()),
        accuracy=float(np.mean([score.accuracy for score in scores])),
        forwards=float(np.average(forwards, weights=problems)),
        tokens=float(np.average(tokens, weights=problems)),
        tokens_per_forward=float((problems * tokens).sum() / (problems * forwards).sum()),
    )


# ---- accuracy under parallelism ------------------------------------------------------------------------------------

PENALTY = 3.0  # alpha
TOLERATED_LOSS = 5.0  # points of accuracy


def aup(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism of one decoder on one task: d3LLM (arXiv 2601.07568), `get_aup` of its leaderboard.

    points: (tokens per forward, accuracy in percent), in any order. Sorted by tokens per forward (points of equal
    tokens per forward keep their order), the accuracy of the first, least parallel one is the reference: points more
    than 5 below it are left out. Of the rest,

        AUP = rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2,
        W(y) = min(exp(-3 (1 - y / best)), 1).

    best: the highest accuracy of any method on the task, by default of these points. Upstream refuses a series whose
    most parallel point is left out; here the definition applies to it as to any other. All series published so begin
    at one token per forward: one that begins elsewhere takes its own first point, unweighted, for reference.
    """
    if not points:
        raise InputError("AUP needs at least one point")
    best = max(accuracy for _, accuracy in points) if best is None else best
    for parallelism, accuracy in (*points, (0, best)):
        if not (0 <= parallelism < math.inf and 0 <= accuracy <= 100):
            raise InputError(f"AUP needs tokens per forward >= 0 and percent in 0..100, got {(parallelism, accuracy)}")

    def weighted(accuracy: float) -> float:
        return accuracy * min(math.exp(-PENALTY * (1 - accuracy / best)), 1.0) if best else 0.0

    ordered = sorted(points, key=lambda point: point[0])
    kept = [point for point in ordered if point[1] >= ordered[0][1] - TOLERATED_LOSS]
    rho, y = zip(*kept, strict=True)
    return rho[0] * y[0] + float(np.trapezoid([weighted(accuracy) for accuracy in y], rho))


def series_points(results: Sequence[Measured], group: str) -> dict[str, list[tuple[float, float]]]:
    """(tokens per forward, accuracy in percent) of every series on a problem group, least parallel first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        score = result.scores[group]
        found.setdefault(result.series, []).append((score.tokens_per_forward, 100 * score.accuracy))
    return {series: sorted(points, key=lambda point: point[0]) for series, points in found.items()}


def series_aup(results: Sequence[Measured], group: str) -> dict[str, float]:
    """The AUP of every series on a problem group, against the best accuracy of any method there."""
    points = series_points(results, group)
    best = max(accuracy for line in points.values() for _, accuracy in line)
    return {series: aup(line, best) for series, line in points.items()}


# ---- arithmetic intensity ------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a forward costs: floating-point operations, and bytes moved between memory and chip."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes


def forward_work(config: ModelConfig, *, queries: int, context: int, rows: int = 1, itemsize: int = 2) -> Work:
    """One forward of `rows` sequences, `queries` positions of each, which attend to `context` positions.

    itemsize: bytes of a stored value, weight or activation.

    FLOPs: two per weight and query, and the two products of attention. Bytes: every weight once; the keys and values
    of the context; and the activations, counted as operators run one by one: projections, rotary embedding, scores,
    softmax, weighted sum and gated product each read their inputs and write their result, norms and residual sums ride
    along with a projection. So LLaDA-8B at context 512 + 256 comes to 1.0, 440 and 31.0 FLOPs per byte with 1, all
    and 32 queries; the paper's own count gives about 1, 439 and 31.
    """
    d, kv, mlp = config.hidden_size, config.num_kv_heads * config.head_dim, config.mlp_size
    weights = config.num_layers * (2 * d * (d + kv) + 3 * d * mlp) + d * config.vocab_size
    flops = rows * queries * (2 * weights + 4 * config.num_layers * d * context)
    projections = 6 * d + 2 * kv + 3 * mlp  # q, k and v share one read of the stream, gate and up too
    attention = 2 * (d + kv) + 2 * d + 4 * config.num_heads * context  # rotary; queries in, result out; scores
    activations = config.num_layers * (projections + attention + 3 * mlp) + d + config.vocab_size
    moved = weights + rows * (config.num_layers * 2 * kv * context + queries * activations)
    return Work(flops, itemsize * moved)


def decoding_work(
    config: ModelConfig, *, context: int, block_size: int, rows: int = 1, itemsize: int = 2
) -> dict[str, Work]:
    """`forward_work` of the three ways to decode: everything again at every step, a block of tokens, one token."""
    queries = {"naive": context, f"block of {block_size}": block_size, "autoregressive": 1}
    return {
        name: forward_work(config, queries=count, context=context, rows=rows, itemsize=itemsize)
        for name, count in queries.items()
    }
