"""Everything that opens a model, in a worker process: submit, progress, cancel, result.

One long-lived process runs jobs one after another, so models and libraries stay warm, the web
process stays quick, and a crash or a lack of memory costs one job and nothing else.

The process is started with `subprocess`, not `multiprocessing`: the latter runs the caller's main
script a second time, and under Streamlit that is the app. The two sides talk through the child's
standard input and output, a private pipe that nobody else can reach, so pickles are safe here. The
child moves both away at once: what a job prints goes to standard error.

Nothing outlives the caller: the child ends when its input ends (and, on Linux, by a signal from
the kernel, for when it is deep inside a library). That signal belongs to the *thread* that started
the process, which is why one thread of our own starts it, and never the caller's.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Self

from inspector.errors import Cancelled, InspectorError, RunError

CANCEL_SECONDS = 2.0
PROGRESS_SECONDS = 0.05
KEPT_JOBS = 200

_FINISHED = frozenset({"done", "failed", "cancelled"})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A job as it stood when it was asked for.

    Attributes:
        state: "queued", "running", "done", "failed" or "cancelled".
        fraction: the finished share, 0..1, as the job tells it.
        message: what the job is doing, as the job tells it.
        result: what the function returned; None before.
        error: why it failed; None otherwise.
        seconds: since it left the queue, until it ended.
        remaining_seconds: an estimate from the share and the time it took; None until a
            twentieth is done.
    """

    id: str
    title: str
    state: str
    fraction: float
    message: str
    result: Any
    error: InspectorError | None
    seconds: float
    remaining_seconds: float | None


@dataclass(slots=True, eq=False)
class _Job:
    title: str
    call: bytes
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: str = "queued"
    fraction: float = 0.0
    message: str = ""
    result: Any = None
    error: InspectorError | None = None
    started: float | None = None
    begun: bool = False  # the process has said that it has it
    tries: int = 0
    progressed: float = 0.0
    finished: float | None = None
    cancel: bool = False
    cancel_sent: bool = False
    kill_at: float = math.inf

    def status(self) -> JobStatus:
        now = time.monotonic()
        seconds = 0.0 if self.started is None else (self.finished or now) - self.started
        remaining = None
        if self.state == "running" and self.started is not None and self.fraction > 0.05:
            # From the last report on, the clock runs down instead of the estimate growing.
            whole = (self.progressed - self.started) / self.fraction
            remaining = max(0.0, whole - seconds)
        return JobStatus(
            id=self.id,
            title=self.title,
            state=self.state,
            fraction=self.fraction,
            message=self.message,
            result=self.result,
            error=self.error,
            seconds=seconds,
            remaining_seconds=remaining,
        )

    def finish(
        self, state: str, *, result: Any = None, error: InspectorError | None = None
    ) -> None:
        self.state, self.result, self.error = state, result, error
        self.finished = time.monotonic()
        self.call = b""
        if state == "done":
            self.fraction = 1.0


class Worker:
    """One process that runs jobs one after another, in order of submission.

    All methods may be called from any thread. The process starts with the first job, or with
    `start`, and ends with `close` or with this program.

    Args:
        niceness: added to the process's own, so that the web process answers first.
        preload: modules the process imports when it starts, so that the first job is quick.
    """

    def __init__(self, *, niceness: int = 0, preload: Sequence[str] = ()) -> None:
        self._arguments = (str(niceness), *preload)
        # Guards everything below, and tells of every change.
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._current: _Job | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._start_asked = False
        self._closed = False
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What callers ask for.

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        with self._changed:
            return self._process is not None

    def start(self) -> None:
        """Starts the process now, so that it is warm when the first job comes."""
        with self._changed:
            self._start_asked = True
            self._wake()

    def submit(
        self, function: Callable[..., Any], /, *args: Any, title: str = "", **kwargs: Any
    ) -> str:
        """The id of a new job at the end of the queue.

        Args:
            function: defined at the top of an importable module, called as
                ``function(*args, progress=progress, **kwargs)``; ``progress(fraction, message)``
                reports, and raises `Cancelled` when the job is asked to stop.
            title: what the job is, for people; the function's name by default.

        Raises:
            ValueError: the function cannot be found by name in another process.
        """
        call = pickle.dumps((*_address(function), args, kwargs))
        job = _Job(title=title or function.__name__.replace("_", " "), call=call)
        with self._changed:
            self._jobs[job.id] = job
            self._queue.append(job)
            try:
                self._wake()
            except RuntimeError:
                del self._jobs[job.id]
                raise
        return job.id

    def status(self, job_id: str) -> JobStatus:
        """How the job stands.

        Raises:
            RunError: there is no such job, or it ended long ago.
        """
        with self._changed:
            return self._find(job_id).status()

    def jobs(self) -> tuple[JobStatus, ...]:
        """All jobs in order of submission; of those that ended, the last 200."""
        with self._changed:
            return tuple(job.status() for job in self._jobs.values())

    def cancel(self, job_id: str) -> None:
        """Asks a job to stop; it is stopped by force when it does not within 2 seconds.

        A job that has ended meanwhile stays as it is.
        """
        with self._changed:
            job = self._find(job_id)
            if job.state == "queued":
                self._queue.remove(job)
                self._finish(job, "cancelled")
            elif job.state == "running" and not job.cancel:
                job.cancel = True
                job.kill_at = time.monotonic() + CANCEL_SECONDS
                self._changed.notify_all()

    def wait(self, job_id: str, timeout: float | None = None) -> JobStatus:
        """How the job stands when it has ended or the time is over, whichever is first."""
        with self._changed:
            job = self._find(job_id)
            self._changed.wait_for(lambda: job.state in _FINISHED, timeout)
            return job.status()

    def result(self, job_id: str, timeout: float | None = None) -> Any:
        """What the function returned.

        Raises:
            InspectorError: the job failed.
            Cancelled: it was cancelled.
            TimeoutError: it has not ended in time.
        """
        status = self.wait(job_id, timeout)
        if status.state not in _FINISHED:
            raise TimeoutError(f"{status.title} has not ended within {timeout} seconds")
        if status.state == "cancelled":
            raise Cancelled(status.title)
        if status.error is not None:
            raise status.error.with_traceback(None)  # it may be asked for again and again
        return status.result

    def close(self) -> None:
        """Ends the process at once; jobs that have not ended are cancelled."""
        with self._changed:
            self._closed = True
            while self._queue:
                self._finish(self._queue.popleft(), "cancelled")
            if self._current is not None:
                self._current.cancel = True
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
            keeper = self._keeper
        atexit.unregister(self.close)
        if keeper is not None:
            keeper.join()

    def _find(self, job_id: str) -> _Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise RunError(
                f"there is no job {job_id!r}; jobs are forgotten when the program ends",
                hint="Start the job again.",
            ) from None

    def _finish(
        self,
        job: _Job,
        state: str,
        *,
        result: Any = None,
        error: InspectorError | None = None,
    ) -> None:
        job.finish(state, result=result, error=error)
        ended = [other.id for other in self._jobs.values() if other.state in _FINISHED]
        for old in ended[:-KEPT_JOBS]:
            del self._jobs[old]
        self._changed.notify_all()

    # The keeper: one thread that starts the process, hands out jobs and kills.

    def _wake(self) -> None:
        if self._closed:
            raise RuntimeError("the worker is closed")
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="worker keeper", daemon=True)
            self._keeper.start()
            atexit.register(self.close)
        self._changed.notify_all()

    def _keep(self) -> None:
        while True:
            with self._changed:
                while (order := self._next_order()) is None:
                    if self._closed and self._process is None:
                        return
                    deadline = self._current.kill_at if self._current else math.inf
                    left = max(0.0, deadline - time.monotonic())
                    self._changed.wait(None if math.isinf(left) else left)
                process = self._process
            # Outside the lock: a long argument must not stop callers from asking how things are.
            # A process that has just ended is noticed by its reader.
            if process is not None and process.stdin is not None:
                with suppress(OSError, ValueError):
                    pickle.dump(order, process.stdin)
                    process.stdin.flush()

    def _next_order(self) -> tuple[str, str, bytes] | None:
        """What the process is to be told now; None where there is nothing to say."""
        if self._closed:
            return None
        if self._process is None and (self._queue or self._start_asked):
            self._start_process()
        if self._process is None:
            return None
        job = self._current
        if job is None:
            if not self._queue:
                return None
            job = self._current = self._queue.popleft()
            job.state = "running"
            job.tries += 1
            job.started = job.progressed = time.monotonic()
            self._changed.notify_all()
            return ("run", job.id, job.call)
        if job.cancel and not job.cancel_sent:
            job.cancel_sent = True
            return ("cancel", job.id, b"")
        if time.monotonic() >= job.kill_at:
            job.kill_at = math.inf
            self._process.kill()
        return None

    def _start_process(self) -> None:
        self._start_asked = False
        paths = (path or os.getcwd() for path in sys.path)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    "from inspector.jobs import _serve; _serve()",
                    *self._arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**_environment(), "PYTHONPATH": os.pathsep.join(paths)},
            )
        except OSError as error:
            refused = RunError(
                f"the worker process cannot be started: {error.strerror or error}",
                hint="Close other programs to free memory, then try again.",
            )
            while self._queue:
                self._finish(self._queue.popleft(), "failed", error=refused)
            return
        threading.Thread(
            target=self._read, args=(self._process,), name="worker reader", daemon=True
        ).start()

    # The reader: one thread per process that takes in what it says, until it ends.

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stdin is not None
        # A process that was killed while it wrote leaves half a pickle.
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self._take_in(*pickle.load(process.stdout))
        process.kill()  # nothing more can be heard from it
        code = process.wait()
        process.stdout.close()
        with suppress(OSError):  # what was not yet sent cannot be any more
            process.stdin.close()
        with self._changed:
            job, self._current = self._current, None
            self._process = None
            if job is not None and job.cancel:
                self._finish(job, "cancelled")
                self._start_asked = not self._closed  # killed by us: be warm for the next job
            elif job is not None and not job.begun and job.tries == 1:
                # It was handed to a process that was about to end for another reason.
                job.state, job.started = "queued", None
                self._queue.appendleft(job)
            elif job is not None:
                self._finish(job, "failed", error=_ended(code, job.title))
            self._changed.notify_all()

    def _take_in(self, kind: str, job_id: str, content: Any) -> None:
        result = error = None
        # Only contents that may hold foreign types are pickled by themselves: when one of them
        # cannot be read here, the stream can.
        if kind in ("done", "failed"):
            try:
                content = pickle.loads(content)
            except Exception:  # unpickling runs code of any type
                kind, content = "crashed", ("a result that cannot be read", traceback.format_exc())
        with self._changed:
            job = self._current
            if job is None or job.id != job_id:
                return
            if kind == "begun":
                job.begun = True
                return
            if kind == "progress":
                job.fraction, job.message = content
                job.progressed = time.monotonic()
                self._changed.notify_all()
                return
            self._current = None
            if kind == "cancelled":
                self._finish(job, "cancelled")
                return
            if kind == "done":
                result = content
            elif kind == "failed":
                error = content
            else:
                what, trace = content
                _log.error("%s stopped on %s\n%s", job.title, what, trace)
                error = _crashed(job.title, what)
            self._finish(job, "done" if error is None else "failed", result=result, error=error)


def _environment() -> dict[str, str]:
    """The environment without the web server's secrets: models are not to be trusted."""
    return {name: value for name, value in os.environ.items() if "SECRET" not in name.upper()}


def _address(function: Callable[..., Any]) -> tuple[str, str]:
    """The module and name under which another process finds the function."""
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", "")
    if not module or not name or module == "__main__" or "." in name or "<" in name:
        raise ValueError(
            f"{function!r} is not a function of an importable module, so a worker cannot find it"
        )
    return module, name


def _ended(code: int, title: str) -> RunError:
    if code == -signal.SIGSEGV:
        hint = "Try again, and report the model with this message if it happens again."
    elif code == -9:
        hint = "Use fewer samples or close other programs: memory has most likely run out."
    else:
        hint = "Try again, and report it with the program's log if it happens again."
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return RunError(f"the worker process ended ({how}) while {title}", hint=hint)


def _crashed(title: str, what: str) -> RunError:
    if what.startswith("MemoryError"):
        hint = "Use fewer samples or close other programs: memory has run out."
    else:
        hint = "Report it with the traceback in the program's log."
    return RunError(f"{title} stopped on {what}", hint=hint)


# The child's side.


class _Answers:
    """What the child tells its parent; progress at most every 0.05 seconds, the last always."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._latest: tuple[str, str, Any] | None = None
        self._pending = threading.Event()
        threading.Thread(target=self._pace, daemon=True).start()

    def progress(self, job_id: str, fraction: float, message: str) -> None:
        with self._lock:
            self._latest = ("progress", job_id, (fraction, message))
        self._pending.set()

    def send(self, answer: tuple[str, str, Any]) -> None:
        with self._lock:
            self._send_latest()
            self._write(answer)

    def _pace(self) -> None:
        while True:
            self._pending.wait()
            self._pending.clear()
            with self._lock:
                self._send_latest()
            time.sleep(PROGRESS_SECONDS)

    def _send_latest(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None:
            self._write(latest)

    def _write(self, answer: tuple[str, str, Any]) -> None:
        try:
            pickle.dump(answer, self._stream)
            self._stream.flush()
        except OSError:  # nobody listens any more
            os._exit(1)


def _serve() -> None:
    """Runs in the child: takes orders from standard input until it ends."""
    orders = os.fdopen(os.dup(0), "rb")
    answers = _Answers(os.fdopen(os.dup(1), "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # Ctrl-C is for the parent; it ends this process when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        _die_with_parent()
    niceness, *preload = sys.argv[1:]
    if hasattr(os, "nice"):
        os.nice(int(niceness))

    calls: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    cancelled: set[str] = set()

    def listen() -> None:
        try:
            while True:
                kind, job_id, call = pickle.load(orders)
                if kind == "cancel":
                    cancelled.add(job_id)
                else:
                    calls.put((job_id, call))
        finally:  # the parent has closed the pipe, or is no more
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    for module in preload:
        try:
            importlib.import_module(module)
        except Exception:  # the job that needs it will say so
            _log.exception("the worker cannot import %s", module)
    while True:
        job_id, call = calls.get()
        answers.send(("begun", job_id, None))
        answers.send(_run(job_id, call, answers, cancelled))
        cancelled.discard(job_id)


def _run(job_id: str, call: bytes, answers: _Answers, cancelled: set[str]) -> tuple[str, str, Any]:
    def progress(fraction: float, message: str) -> None:
        if job_id in cancelled:
            raise Cancelled
        answers.progress(job_id, min(1.0, max(0.0, float(fraction))), str(message))

    try:
        module, name, args, kwargs = pickle.loads(call)
        function = getattr(importlib.import_module(module), name)
        return ("done", job_id, pickle.dumps(function(*args, progress=progress, **kwargs)))
    except Cancelled:
        return ("cancelled", job_id, None)
    except InspectorError as error:
        kind: type[BaseException] = type(error)
        # A class that only this process knows would not be found by the other.
        known = kind.__module__ == InspectorError.__module__
        plain = error if known else RunError(error.message, hint=error.hint)
        return ("failed", job_id, pickle.dumps(plain))
    except BaseException as error:  # a job must not end the process, not even by sys.exit
        text = " ".join(str(error).split())
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return ("crashed", job_id, (what, traceback.format_exc()))


def _die_with_parent() -> None:
    """Asks Linux for SIGKILL when the parent's thread ends, and to be its first choice when
    memory runs out, before the parent."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")
