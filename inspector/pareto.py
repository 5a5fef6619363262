"""Which of many choices are worth their price: the front that none beats, with its knee."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both, by rising price; of equal ones the first.

    Args:
        points: (price, worth) each; a lower price and a higher worth are better. A worth that is
            nan counts as lowest.
    """
    best, found = None, []
    for at in sorted(range(len(points)), key=lambda i: (points[i][0], -_worth(points[i]), i)):
        if best is None or _worth(points[at]) > best:
            best = _worth(points[at])
            found.append(at)
    return found


def knee_of(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the point of a front behind which more price buys little more.

    The point farthest above the straight line from the cheapest to the dearest one, both axes
    scaled to 0..1 (the knee of Satopää et al., "Finding a Kneedle in a Haystack", 2011). None for
    fewer than three points, and where none lies above the line.

    Args:
        points: a front: (price, worth) by rising price. Infinite and nan worths are left out.
    """
    finite = [i for i, (price, worth) in enumerate(points) if math.isfinite(price + worth)]
    if len(finite) < 3:
        return None
    (x0, y0), (x1, y1) = points[finite[0]], points[finite[-1]]
    if x1 <= x0 or y1 <= y0:
        return None
    above = {i: (points[i][1] - y0) / (y1 - y0) - (points[i][0] - x0) / (x1 - x0) for i in finite}
    best = max(finite, key=above.__getitem__)
    return best if above[best] > 1e-9 else None


def _worth(point: tuple[float, float]) -> float:
    return -math.inf if math.isnan(point[1]) else point[1]
