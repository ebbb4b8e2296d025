"""The rule that chooses a student's threshold."""

from hypothesis import given
from hypothesis import strategies as st

from cdlm_jax.evaluation.harness import Score
from cdlm_jax.evaluation.operating_point import TOLERANCE, headline


def point(accuracy: float, forwards: float) -> Score:
    return Score(problems=1000, accuracy=accuracy, forwards=forwards, tokens=10.0, tokens_per_forward=10 / forwards)


POINTS = st.dictionaries(
    st.floats(0, 1),
    st.builds(lambda right, forwards: point(right / 1000, forwards), st.integers(0, 1000), st.integers(1, 48)),
    min_size=1,
    max_size=8,
)


@given(POINTS, st.randoms())
def test_fewest_forwards_within_half_a_point_of_the_best(points, random):
    chosen = headline(points)
    right = {tau: round(1000 * score.accuracy) for tau, score in points.items()}
    near = [tau for tau in points if right[tau] >= max(right.values()) - 1000 * TOLERANCE]
    assert chosen in near
    assert points[chosen].forwards == min(points[tau].forwards for tau in near)
    shuffled = random.sample(list(points), len(points))
    assert headline({tau: points[tau] for tau in shuffled}) == chosen, "the order of the points does not matter"


def test_ties():
    assert headline({0.9: point(0.8, 3), 0.95: point(0.804, 3)}) == 0.95
    assert headline({0.9: point(0.8, 3), 0.95: point(0.8, 3)}) == 0.95
    assert headline({0.9: point(0.8, 3), 0.95: point(0.805, 4)}) == 0.9, "0.5 points are within 0.5 points"
