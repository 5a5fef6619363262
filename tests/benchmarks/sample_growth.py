"""How the time and the peak memory of a comparison grow with the samples.

Each comparison is in a process of its own. Memory must stay, time grow by the same per sample.

python -m tests.benchmarks sample_growth
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.against_debugger import MEGABYTE, our_comparison
from tests.benchmarks.harness import Figure, in_child
from tests.benchmarks.networks import Pair, resnet50_pair, transformer_pair
from tests.benchmarks.subjects import RESNET50

NAME = "sample_growth"
REQUIRED_PERCENT = 3.0


def figures_of(
    subject: str, pair: Pair, counts: Sequence[int], required: float | None
) -> list[Figure]:
    """The lines of one pair; growth is from the first to the last of `counts`."""
    found = {n: in_child(our_comparison, *map(str, pair), n) for n in counts}
    first, last = found[counts[0]], found[counts[-1]]
    lines = [
        Figure(
            benchmark=NAME, subject=subject, unit="%", required=required,
            what=f"peak memory of a comparison, growth from {counts[0]} to {counts[-1]} samples",
            measured=100 * (last.peak_bytes / first.peak_bytes - 1),
        )
    ]  # fmt: skip
    lines += [
        Figure(
            benchmark=NAME, subject=subject, what=f"whole comparison, {count} samples", unit="s",
            measured=child.result[0], note=f"peak memory {child.peak_bytes / MEGABYTE:,.0f} MB",
        )
        for count, child in found.items()
    ]  # fmt: skip
    return lines


def measure(*, quick: bool) -> list[Figure]:
    if quick:
        return figures_of(RESNET50, resnet50_pair(), (4, 16), None)
    found = figures_of(RESNET50, resnet50_pair(), (8, 32, 128), REQUIRED_PERCENT)
    return found + figures_of("transformer", transformer_pair(), (8, 32, 128), REQUIRED_PERCENT)
