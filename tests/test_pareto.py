"""Fronts and knees, against brute force and by construction."""

import math

from hypothesis import given
from hypothesis import strategies as st

from inspector.pareto import front_of, knee_of

numbers = st.floats(-100, 100, allow_nan=False) | st.sampled_from([math.inf, -math.inf, 0.0])
points = st.lists(st.tuples(numbers, numbers | st.just(math.nan)), max_size=12)


def worth(point: tuple[float, float]) -> float:
    return -math.inf if math.isnan(point[1]) else point[1]


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    as_good = a[0] <= b[0] and worth(a) >= worth(b)
    return as_good and (a[0] < b[0] or worth(a) > worth(b))


@given(points)
def test_the_front_is_what_no_other_point_beats(given_points: list[tuple[float, float]]) -> None:
    front = front_of(given_points)
    for at, point in enumerate(given_points):
        beaten = any(beats(other, point) for other in given_points)
        like = [i for i in front if given_points[i][0] == point[0]]
        twin = any(i < at and worth(given_points[i]) == worth(point) for i in like)
        assert beaten != (at in front or twin), (at, point)
    prices = [given_points[i][0] for i in front]
    assert prices == sorted(prices)


def test_the_knee_is_where_the_curve_bends() -> None:
    assert knee_of([(0.0, 1.0), (0.1, 18.0), (0.2, 20.0), (1.0, 24.0)]) == 1
    assert knee_of([(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]) is None, "a straight line has none"
    assert knee_of([(0.0, 0.0), (0.5, 0.1), (1.0, 1.0)]) is None, "it bends the other way"
    assert knee_of([(0.0, 0.0), (1.0, 5.0)]) is None
    assert knee_of([(0.0, -math.inf), (0.1, 2.0), (0.2, 9.0), (1.0, 10.0), (1.2, math.inf)]) == 2
