"""Jobs that the tests of `inspector.jobs` submit, named after what they do to their worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from inspector.errors import FeedError, InspectorError

Progress = Callable[[float, str], None]


def process_id(*, progress: Progress) -> int:
    return os.getpid()


def variables(*, progress: Progress) -> list[str]:
    return sorted(os.environ)


def add(left: Any, right: Any, *, progress: Progress) -> Any:
    return left + right


def append_line(file: Path, line: str, *, progress: Progress) -> None:
    with file.open("a") as writer:
        writer.write(f"{line}\n")


def touch_and_sleep(file: Path, seconds: float, *, progress: Progress) -> int:
    """Shows by a file that it has begun, then sleeps without ever asking whether to stop."""
    file.write_text(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def step_until_cancelled(file: Path, *, progress: Progress) -> NoReturn:
    file.touch()
    while True:
        progress(0.5, "stepping")
        time.sleep(0.01)


def report_often(count: int, *, progress: Progress) -> None:
    for index in range(count):
        progress(index / count, f"step {index}")


def report_then_sleep(fraction: float, seconds: float, *, progress: Progress) -> None:
    time.sleep(seconds)
    progress(fraction, "half way")
    time.sleep(60)


def fail_with_hint(*, progress: Progress) -> NoReturn:
    raise FeedError("images has shape 3x3, expected 1x3", hint="Add the batch axis.")


class PrivateError(InspectorError):
    """Only this module knows it, and its arguments are not those of its parent."""

    def __init__(self) -> None:
        super().__init__("a private trouble", hint="Do the private thing.")
        self.lock = threading.Lock()


def fail_privately(*, progress: Progress) -> NoReturn:
    raise PrivateError


def fail_unexpectedly(*, progress: Progress) -> NoReturn:
    raise KeyError("conv_1")


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__(threading.Lock())


def fail_unpicklably(*, progress: Progress) -> NoReturn:
    raise UnpicklableError


def return_a_lock(*, progress: Progress) -> Any:
    return threading.Lock()


def _refuse_to_load() -> NoReturn:
    raise ModuleNotFoundError("only the worker can load this")


class Poison:
    def __reduce__(self) -> tuple[object, ...]:
        return (_refuse_to_load, ())


def return_poison(*, progress: Progress) -> Poison:
    return Poison()


def call_exit(*, progress: Progress) -> NoReturn:
    sys.exit(3)


def die(signal_number: int, *, progress: Progress) -> None:
    os.kill(os.getpid(), signal_number)
    signal.pause()


def print_and_read(*, progress: Progress) -> str:
    print("printed by the job")
    subprocess.run(["echo", "printed by its own child"], check=True)
    return sys.stdin.read()


def loaded_modules(*, progress: Progress) -> set[str]:
    return set(sys.modules)


def main_file(*, progress: Progress) -> str | None:
    return getattr(sys.modules["__main__"], "__file__", None)


def niceness(*, progress: Progress) -> int:
    return os.nice(0)
