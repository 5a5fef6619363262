"""Runs the benchmarks and prints one table.

python -m tests.benchmarks [NAME...] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.harness import Figure, Unavailable, busy, print_table, write_json

BENCHMARKS = (
    "activation_pass",
    "against_debugger",
    "sample_growth",
    "requantize",
    "toggle",
    "click_to_preview",
    "sensitivity",
    "growth",
    "graph_panes",
    "search",
    "upload",
)


def benchmark(name: str) -> Callable[..., list[Figure]]:
    """The function that measures; imported when it is wanted."""
    found: Callable[..., list[Figure]] = importlib.import_module(f"tests.benchmarks.{name}").measure
    return found


def run(names: Sequence[str], *, quick: bool) -> list[Figure]:
    """The figures of some benchmarks; one that cannot run here gives a line that says why."""
    found: list[Figure] = []
    for name in names:
        begin = time.perf_counter()
        print(f"{name} …", end=" ", flush=True, file=sys.stderr)
        try:
            found += benchmark(name)(quick=quick)
        except Unavailable as missing:
            found.append(
                Figure(benchmark=name, subject="", what="skipped", measured=None, note=str(missing))
            )
        print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Runs the benchmarks and prints one table."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="fewer samples, sizes and rounds")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    busy_before = busy()
    if busy_before:
        print(busy_before, file=sys.stderr)
    figures = run(given.names or BENCHMARKS, quick=given.quick)
    print_table(figures)
    if given.json is not None:
        write_json(figures, given.json, quick=given.quick, busy_before=busy_before)


if __name__ == "__main__":
    main()
