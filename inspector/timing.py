"""Latency of models on this machine: interleaved, with spread, all optimisations on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inspector.runtime import Feed, Session

RUNS_A_TURN = 3


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
    least_turns: int = 2,
    most_turns: int = 20,
) -> tuple[LatencySample, ...]:
    """Median and spread of each session on one feed of its own.

    The sessions take turns, so that whatever else the machine does falls on all of them alike. A
    turn starts with a run that is not timed: the threads of the session before it still spin.

    Args:
        sessions: opened with optimisations on.
        feeds: one feed per session.
        budget_seconds: time to spend in total.
        least_turns: turns of each even beyond the budget.
        most_turns: turns of each at most.
    """
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    for done in range(most_turns):
        if done >= least_turns and time.perf_counter() - start > budget_seconds:
            break
        for spent, session, feed in zip(times, sessions, feeds, strict=True):
            session.run(feed)
            for _ in range(RUNS_A_TURN):
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
