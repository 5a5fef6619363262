"""Latency of models on this machine: interleaved, with spread, all optimisations on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inspector.runtime import Feed, Session


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySample:
    """Timed runs of one session.

    Attributes:
        median_seconds: lower is better.
        spread_seconds: interquartile range.
        runs: how many runs were timed.
    """

    median_seconds: float
    spread_seconds: float
    runs: int


def measure_latency(
    sessions: Sequence[Session],
    feeds: Sequence[Feed],
    *,
    budget_seconds: float = 0.3,
    least_runs: int = 5,
    most_runs: int = 50,
) -> tuple[LatencySample, ...]:
    """Median and spread of each session on one feed of its own.

    The sessions take turns, so that whatever else the machine does falls on all of them alike.

    Args:
        sessions: opened with optimisations on.
        feeds: one feed per session.
        budget_seconds: time to spend in total, after one warm-up run of each.
        least_runs: runs of each even beyond the budget.
        most_runs: runs of each at most.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for session, feed in zip(sessions, feeds, strict=True):
        session.run(feed)
    start = time.perf_counter()
    for done in range(most_runs):
        if done >= least_runs and time.perf_counter() - start > budget_seconds:
            break
        for spent, session, feed in zip(times, sessions, feeds, strict=True):
            begin = time.perf_counter()
            session.run(feed)
            spent.append(time.perf_counter() - begin)
    return tuple(
        LatencySample(
            median_seconds=float(np.median(spent)),
            spread_seconds=float(np.subtract(*np.percentile(spent, [75, 25]))),
            runs=len(spent),
        )
        for spent in times
    )
