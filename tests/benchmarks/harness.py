"""How the benchmarks measure: side by side, interleaved, medians, memory in processes of their own.

Apart from the benchmarks, so that all of them time and report in the same way.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("QUANT_INSPECTOR_MODELS", ROOT.parent / "shared" / "models"))


class Unavailable(Exception):
    """A benchmark cannot be run here; the text says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of the table.

    Attributes:
        benchmark: which one it is of.
        subject: the model, or the pair of sizes.
        what: what was measured, with both sides of a ratio.
        measured: the number; None where it could not be measured.
        unit: of it, e.g. "s", "MB", "x" for a ratio; "" for a bare number.
        required: what it must reach; None where nothing is asked.
        at_least: `required` is the smallest good number, not the largest.
        note: what else to know, or why there is no number.
    """

    benchmark: str
    subject: str
    what: str
    measured: float | None
    unit: str = ""
    required: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it reaches what is required; None where one of the two numbers is missing.

        A number that is not finite reaches nothing.
        """
        if self.required is None or self.measured is None:
            return None
        if not math.isfinite(self.measured):
            return False
        if self.at_least:
            return self.measured >= self.required
        return self.measured <= self.required


# -- measuring ---------------------------------------------------------------------------------


class Seconds(NamedTuple):
    """How long one work took in each round.

    Attributes:
        wall: what a user waits.
        processor: what this process computed, on all its threads. It hardly changes with what else
            the machine does, so it tells whether a wall time can be trusted.
    """

    wall: list[float]
    processor: list[float]

    @property
    def median(self) -> float:
        """Of the wall times."""
        return statistics.median(self.wall)


def interleaved(works: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, Seconds]:
    """Seconds of each work in each round, by its name.

    In every other round the order is turned round, so that none always comes after the same one.

    Args:
        works: called with the number of the round.
        rounds: how often each is run.
    """
    seconds = {name: Seconds([], []) for name in works}
    for turn in range(rounds):
        names = list(works)
        for name in names if turn % 2 == 0 else names[::-1]:
            begin, computed = time.perf_counter(), time.process_time()
            works[name](turn)
            seconds[name].processor.append(time.process_time() - computed)
            seconds[name].wall.append(time.perf_counter() - begin)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of the rounds; what slows a whole round down cancels out.

    NaN where the clock saw no time below.
    """
    return statistics.median(a / b if b else math.nan for a, b in zip(above, below, strict=True))


def processor_note(above: Seconds, below: Seconds) -> str:
    """The same ratio in processor time, for the note of a ratio of wall times."""
    return f"{ratio(above.processor, below.processor):.3g} x in processor time"


def busy() -> str:
    """Says that the machine is busy with something else; "" where it is not, or cannot be told."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < cores / 4:
        return ""
    return f"the machine is busy (load {load:.1f} on {cores} cores): wall times are stretched"


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """k of the power law ``seconds = c * size**k`` that fits best (least squares of logarithms)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


class Child(NamedTuple):
    """What a process of its own gave.

    Attributes:
        result: what its function returned, through JSON.
        peak_bytes: the most memory it held at a time.
    """

    result: Any
    peak_bytes: int


def in_child(function: Callable[..., Any], *arguments: Any) -> Child:
    """Calls a function of a module of this package in a new process.

    Args:
        function: at the top level of its module.
        arguments: for it; like its result, what JSON can hold.

    Raises:
        RuntimeError: the process failed; the text is the end of what it wrote.
    """
    module = function.__module__
    if module == "__main__":
        raise ValueError(f"{function.__name__} is in the main program: a child cannot import it")
    done = subprocess.run(
        [sys.executable, "-m", __name__, module, function.__qualname__, json.dumps(arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module}.{function.__qualname__}: {done.stderr.strip()[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Child(answer["result"], answer["peak_bytes"])


def peak_bytes() -> int:
    """The most memory this process held at a time.

    Linux starts `ru_maxrss` of a new process with its parent's peak, so its own figure is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def library(name: str) -> ModuleType:
    """A module of the library.

    Raises:
        Unavailable: there is none of that name.
    """
    try:
        return importlib.import_module(f"inspector.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"inspector.{name}":
            raise
        raise Unavailable(f"inspector/{name}.py does not exist") from error


def shared_model(name: str) -> Path:
    """The folder of one of the real models.

    Raises:
        Unavailable: it is not there.
    """
    folder = MODELS / name
    if not folder.is_dir():
        raise Unavailable(f"no {name} at {MODELS} (set QUANT_INSPECTOR_MODELS)")
    return folder


# -- reporting ---------------------------------------------------------------------------------


def table(figures: Iterable[Figure]) -> Table:
    """The table that is printed: the required figure stands beside the measured one."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("benchmark", "subject", "what"):
        shown.add_column(column, overflow="fold")
    shown.add_column("measured", justify="right", no_wrap=True)
    shown.add_column("required", justify="right", no_wrap=True)
    shown.add_column("met", no_wrap=True)
    shown.add_column("note", overflow="fold")
    before = ""
    for figure in figures:
        if before and figure.benchmark != before:
            shown.add_section()
        required = ""
        if figure.required is not None:
            required = f"{'≥' if figure.at_least else '≤'} {number(figure.required, figure.unit)}"
        shown.add_row(
            "" if figure.benchmark == before else figure.benchmark,
            escape(figure.subject),
            escape(figure.what),
            "–" if figure.measured is None else number(figure.measured, figure.unit),
            required,
            {True: "yes", False: "NO", None: ""}[figure.met],
            escape(figure.note),
        )
        before = figure.benchmark
    return shown


def number(measured: float, unit: str) -> str:
    """A measured number to three digits, with its unit."""
    text = f"{measured:.3g}" if abs(measured) < 1000 else f"{measured:,.0f}"
    return f"{text} {unit}".strip()


def print_table(figures: Iterable[Figure], console: Console | None = None) -> None:
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
    # Texts are data: square brackets in them are no markup.
    console.print(table(figures), highlight=False)


def as_json(figures: Iterable[Figure], *, quick: bool, busy_before: str = "") -> dict[str, Any]:
    """What is written: the figures, and what they were measured with.

    Numbers that are not finite are the strings of the proto3 JSON mapping.

    Args:
        figures: all of them.
        quick: with few samples and rounds.
        busy_before: what `busy` said before the first one.
    """
    rows = []
    for figure in figures:
        row = asdict(figure) | {"met": figure.met}
        if figure.measured is not None and not math.isfinite(figure.measured):
            signs = "Infinity" if figure.measured > 0 else "-Infinity"
            row["measured"] = "NaN" if math.isnan(figure.measured) else signs
        rows.append(row)
    return {
        "quick": quick,
        "cpus": os.cpu_count(),
        "busy": busy_before,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "figures": rows,
    }


def write_json(
    figures: Iterable[Figure], path: Path, *, quick: bool, busy_before: str = ""
) -> None:
    text = json.dumps(
        as_json(figures, quick=quick, busy_before=busy_before),
        indent=2,
        allow_nan=False,
        ensure_ascii=False,
    )
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """The child's side of `in_child`."""
    module, name, arguments = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    result = function(*json.loads(arguments))
    print(json.dumps({"result": result, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
