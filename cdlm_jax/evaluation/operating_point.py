"""At which confidence threshold a student is used: one rule, fixed before any final problem is looked at."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import NamedProblem, Score, answers, by_group, problem_cases
from cdlm_jax.evaluation.metrics import overall
from cdlm_jax.models.model_folder import ModelFolder

# 1 is left out: no confidence is above it, so a student would go token by token.
THRESHOLDS = (0.995, 0.99, 0.95, 0.9, 0.7, 0.5)
TOLERANCE = 0.005  # half a point of accuracy


def headline(points: Mapping[float, Score]) -> float:
    """The threshold of fewest forwards among those within TOLERANCE of the best accuracy.

    Of equal forwards the more accurate one, then the higher threshold.
    """
    enough = max(point.accuracy for point in points.values()) - TOLERANCE - 1e-9  # counted accuracies are rounded
    near = {tau: point for tau, point in points.items() if point.accuracy >= enough}
    return min(near, key=lambda tau: (near[tau].forwards, -near[tau].accuracy, -tau))


def sweep(
    folder: ModelFolder, problems: Sequence[NamedProblem], *, batch_size: int = 64
) -> Iterator[tuple[float, Score]]:
    """(threshold, score) of the folder's own decoder; accuracy is the mean over tasks."""
    assert folder.tokenizer is not None, "a recipe needs texts"
    cases = problem_cases(folder.tokenizer, problems)
    for tau in THRESHOLDS:
        decode = partial(Options(threshold=tau).resolve(folder.metadata).bind(), folder.model)
        width = folder.metadata["prompt_length"]  # of every run of the recipe: one program serves all
        found = answers(decode, folder.model.config, folder.tokenizer, cases, batch_size=batch_size, width=width)
        yield tau, overall(by_group(list(found)).values())
