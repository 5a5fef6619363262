"""Jobs that the tests of `inspector.jobs` submit, named after what they do to their worker."""

from __future__ import annotations

import os
import signal
import socket
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


def sleep(seconds: float, *, progress: Progress) -> None:
    time.sleep(seconds)


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


def allocate(size: int, *, progress: Progress) -> int:
    """The size of a block of memory that was asked for and not written to."""
    import numpy as np

    return np.empty(size, np.uint8).nbytes


_kept: list[bytes] = []


def keep(size: int, *, progress: Progress) -> int:
    """Leaves a block behind when it ends, as a cache does; gives the process."""
    _kept.append(b"x" * size)
    return os.getpid()


def expand(size: int, *, progress: Progress) -> None:
    """Has ONNX Runtime make a tensor of this many bytes."""
    import numpy as np
    from onnx import helper

    from inspector.runtime import open_session
    from tests.samples import array, model

    nodes = [helper.make_node("Expand", ["x", "shape"], ["y"], "expand")]
    shape = array("shape", np.array([size // 4], np.int64))
    made = model(nodes, [("x", [1])], [("y", ["n"])], [shape])
    open_session(made, optimized=False).run({"x": np.ones(1, np.float32)})


def spread(size: int, count: int, *, progress: Progress) -> None:
    """Has several processes hold a block of memory each, one process none too many."""
    code = f"import time; block = b'x' * {size}; time.sleep(60)"
    for process in [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]:
        process.wait()


def connect(address: tuple[str, int], *, progress: Progress) -> None:
    socket.create_connection(address, timeout=5).close()


def start(*, progress: Progress) -> int:
    """The id of a process that was started and left alone."""
    return subprocess.Popen(["sleep", "60"]).pid


def start_hidden(*, progress: Progress) -> int:
    """The id of a process whose parent has ended, so that it is nobody's child."""
    shell = ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
    return int(subprocess.run(shell, capture_output=True, check=True).stdout)


def start_and_sleep(file: Path, *, progress: Progress) -> None:
    process = subprocess.Popen(["sleep", "60"])
    file.write_text(str(process.pid))
    time.sleep(60)


def leave_the_group(*, progress: Progress) -> None:
    subprocess.Popen(["sleep", "60"], start_new_session=True)


def limits(*, progress: Progress) -> dict[str, Any]:
    import resource

    status = Path("/proc/self/status").read_text()
    return {
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "rights": status.split("NoNewPrivs:")[1].split()[0],
    }


def die_half_way(
    task: str, root: Path, *, progress: Progress, least: int = 0, **kwargs: Any
) -> None:
    """A task of the app, killed when it says that half of it is done and has kept some trials."""
    from inspector.web import tasks

    def dying(fraction: float, message: str) -> None:
        progress(fraction, message)
        kept = sum(len(file.read_bytes().splitlines()) for file in root.rglob("trials.jsonl"))
        if fraction >= 0.5 and kept >= least:
            os.kill(os.getpid(), signal.SIGKILL)

    getattr(tasks, task)(root, progress=dying, **kwargs)


def tell(task: str, *args: Any, progress: Progress, **kwargs: Any) -> list[str]:
    """What a task of the app says while it runs."""
    from inspector.web import tasks

    said: list[str] = []
    getattr(tasks, task)(*args, progress=lambda _, message: said.append(message), **kwargs)
    return said
