"""Everything that opens a model, in a worker process: submit, progress, cancel, result.

One long-lived process runs jobs one after another, so models and libraries stay warm, the web
process stays quick, and a crash or a lack of memory costs one job and nothing else.

The process is started with `subprocess`, not `multiprocessing`: the latter runs the caller's main
script a second time, and under Streamlit that is the app. The two sides talk through the child's
standard input and output, a private pipe that nobody else can reach, so pickles are safe here. The
child moves both away at once: what a job prints goes to standard error.

Nothing outlives the caller: the child ends when its input ends (and, on Linux, by a signal from
the kernel, for when it is deep inside a library). That signal belongs to the *thread* that started
the process, which is why one thread of our own starts it, and never the caller's. What a job
starts is in the child's process group, and ends with the job.

Limits hold for what is not to be trusted: the child limits itself before it imports anything
(`confinement`), and the caller watches what it cannot limit there, the time and what all
processes of a job hold together.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
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
from dataclasses import dataclass
from typing import IO, Any, Self

from inspector import logs
from inspector.confinement import (
    Confinement,
    confine,
    die_with_parent,
    end_children,
    resident_bytes,
)
from inspector.errors import Cancelled, InspectorError, RunError

CANCEL_SECONDS = 2.0
PROGRESS_SECONDS = 0.05
# With what they returned, which may be a megabyte.
KEPT_JOBS = 40
MEMORY_LOOK_SECONDS = 0.25

# States of a job that has not ended.
ACTIVE = ("queued", "running")
_FINISHED = frozenset({"done", "failed", "cancelled"})
# What libraries say where Python says MemoryError.
_NO_MEMORY = (
    *("bad_alloc", "bad allocation", "Failed to allocate memory", "not enough memory"),
    "Cannot allocate memory",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A job as it stood when it was asked for.

    Attributes:
        state: "queued", "running", "done", "failed" or "cancelled".
        fraction: the finished share, 0..1, as the job tells it.
        message: what the job is doing, as the job tells it.
        result: what the function returned; None before, and once it was taken.
        error: why it failed; None otherwise.
        seconds: since it left the queue, until it ended.
        remaining_seconds: an estimate from the share and the time it took; None until a
            twentieth is done.
        ahead: how many jobs have to end before it starts; 0 once it has.
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
    ahead: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    id: str
    title: str
    call: bytes
    on_end: Callable[[JobStatus], None] | None = None
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
    ends_at: float = math.inf  # by the limit of time
    over: InspectorError | None = None  # the limit for which it is being stopped

    def status(self, ahead: int = 0) -> JobStatus:
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
            ahead=ahead,
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
        memory_bytes: the most the process may use; a job that needs more fails. None for no limit.
        seconds: the longest a job may take from its start; None for no limit.
        network: whether the process may open connections; see `confinement` for what that means.
    """

    def __init__(
        self,
        *,
        niceness: int = 0,
        preload: Sequence[str] = (),
        memory_bytes: int | None = None,
        seconds: float | None = None,
        network: bool = True,
    ) -> None:
        self._memory_bytes, self._seconds, self._network = memory_bytes, seconds, network
        self._arguments = json.dumps(
            {
                "niceness": niceness,
                "preload": list(preload),
                "memory_bytes": memory_bytes,
                "network": network,
            }
        )
        # Guards everything below, and tells of every change.
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._current: _Job | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._start_asked = False
        self._closed = False
        self._keeper: threading.Thread | None = None
        self._confinement: Confinement | None = None
        self._ended: deque[_Job] = deque()  # whose `on_end` is still to be called

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

    @property
    def resident_bytes(self) -> int:
        """What its process and all it has started hold; 0 without, or off Linux."""
        with self._changed:
            process = self._process
        return 0 if process is None else resident_bytes(process.pid)

    @property
    def confinement(self) -> Confinement | None:
        """What holds for its process; None until one has started."""
        with self._changed:
            return self._confinement

    def start(self) -> None:
        """Starts the process now, so that it is warm when the first job comes."""
        with self._changed:
            self._start_asked = True
            self._wake()

    def submit(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        title: str = "",
        job_id: str = "",
        on_end: Callable[[JobStatus], None] | None = None,
        **kwargs: Any,
    ) -> str:
        """The id of a new job at the end of the queue.

        Args:
            function: defined at the top of an importable module, called as
                ``function(*args, progress=progress, **kwargs)``; ``progress(fraction, message)``
                reports, and raises `Cancelled` when the job is asked to stop.
            title: what the job is, for people; the function's name by default.
            job_id: the id, where the caller has one for it already.
            on_end: called once when the job has ended, by a thread of the worker's; not for what
                `close` puts an end to.

        Raises:
            ValueError: the function cannot be found by name in another process.
        """
        call = pickle.dumps((*_address(function), args, kwargs))
        job = _Job(
            id=job_id or uuid.uuid4().hex,
            title=title or function.__name__.replace("_", " "),
            call=call,
            on_end=on_end,
        )
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
            return self._status(self._existing(job_id))

    def find(self, job_id: str) -> JobStatus | None:
        """As `status`; None where there is no such job, or it ended long ago."""
        with self._changed:
            job = self._jobs.get(job_id)
            return None if job is None else self._status(job)

    def take(self, job_id: str, timeout: float = 0.0) -> JobStatus:
        """As `wait`; what the function returned is the caller's from then on, and not kept here.

        Results are kept for many jobs, and may be large.
        """
        with self._changed:
            job = self._existing(job_id)
            status = self._wait(job, timeout)
            if status.state in _FINISHED:
                job.result = None
            return status

    def jobs(self) -> tuple[JobStatus, ...]:
        """All jobs in order of submission; of those that ended, the last 40."""
        with self._changed:
            return tuple(map(self._status, self._jobs.values()))

    def cancel(self, job_id: str) -> None:
        """Asks a job to stop; it is stopped by force when it does not within 2 seconds.

        A job that has ended meanwhile stays as it is.
        """
        with self._changed:
            job = self._existing(job_id)
            if job.state == "queued":
                self._queue.remove(job)
                self._finish(job, "cancelled")
            elif job.state == "running" and not job.cancel:
                self._stop(job)

    def wait(self, job_id: str, timeout: float | None = None) -> JobStatus:
        """How the job stands when it has ended or the time is over, whichever is first."""
        with self._changed:
            return self._wait(self._existing(job_id), timeout)

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
                _kill(self._process)
            self._changed.notify_all()
            keeper = self._keeper
        atexit.unregister(self.close)
        if keeper is not None:
            keeper.join()

    def _wait(self, job: _Job, timeout: float | None) -> JobStatus:
        self._changed.wait_for(lambda: job.state in _FINISHED, timeout)
        return self._status(job)

    def _status(self, job: _Job) -> JobStatus:
        if job.state != "queued":
            return job.status()
        return job.status(self._queue.index(job) + (self._current is not None))

    def _stop(self, job: _Job) -> None:
        job.cancel = True
        job.kill_at = time.monotonic() + CANCEL_SECONDS
        self._changed.notify_all()

    def _existing(self, job_id: str) -> _Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise RunError(
                f"there is no job {job_id!r}; a program remembers the last ones while it runs",
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
        if job.on_end is not None and not self._closed:
            self._ended.append(job)
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
                while (order := self._next_order()) is None and not self._ended:
                    if self._closed and self._process is None:
                        return
                    self._changed.wait(self._patience())
                process = self._process
                ended = [(job.on_end, job.status()) for job in self._ended]
                self._ended.clear()
            # Outside the lock: neither they nor a long argument must stop callers from asking how
            # things are.
            for on_end, status in ended:
                assert on_end is not None
                try:
                    on_end(status)
                except Exception:  # whatever it does, the next job is to be handed out
                    _log.exception("the end of %s was not taken in", status.title)
            # A process that has just ended is noticed by its reader.
            if order is not None and process is not None and process.stdin is not None:
                with suppress(OSError, ValueError):
                    pickle.dump(order, process.stdin)
                    process.stdin.flush()

    def _patience(self) -> float | None:
        """Seconds until something is to be done of which nobody tells; None for never."""
        job = self._current
        if job is None:
            return None
        seconds = max(0.0, min(job.kill_at, job.ends_at) - time.monotonic())
        if self._memory_bytes is not None:
            return min(seconds, MEMORY_LOOK_SECONDS)
        return None if math.isinf(seconds) else seconds

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
            if self._seconds is not None:
                job.ends_at = job.started + self._seconds
            self._changed.notify_all()
            return ("run", job.id, job.call)
        if time.monotonic() >= job.ends_at:
            job.ends_at = math.inf
            if not job.cancel:
                job.over = _too_long(job.title, self._seconds or 0.0)
                self._stop(job)
        if job.cancel and not job.cancel_sent:
            job.cancel_sent = True
            return ("cancel", job.id, b"")
        limit = self._memory_bytes
        # The process limits itself; this is for what it has started, and what it shares.
        if limit is not None and not job.over and resident_bytes(self._process.pid) > limit:
            job.over = _too_large(job.title, limit)
            job.kill_at = 0.0
        if time.monotonic() >= job.kill_at:
            job.kill_at = math.inf
            _kill(self._process)
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
                    self._arguments,
                ],
                # Not a session of its own: Linux gives each an equal share, whatever its niceness.
                process_group=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # What ONNX Runtime writes there quotes models.
                stderr=subprocess.DEVNULL if logs.is_json() else None,
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
        _kill(process)  # nothing more can be heard from it
        code = process.wait()
        process.stdout.close()
        with suppress(OSError):  # what was not yet sent cannot be any more
            process.stdin.close()
        with self._changed:
            job, self._current = self._current, None
            self._process = None
            if job is not None and job.over is not None:
                self._finish(job, "failed", error=job.over)
                self._start_asked = not self._closed
            elif job is not None and job.cancel:
                self._finish(job, "cancelled")
                self._start_asked = not self._closed  # killed by us: be warm for the next job
            elif job is not None and not job.begun and job.tries == 1:
                # It was handed to a process that was about to end for another reason.
                job.state, job.started, job.ends_at = "queued", None, math.inf
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
            except Exception as problem:  # unpickling runs code of any type
                kind, content = "crashed", ("a result that cannot be read", *_told(problem))
        with self._changed:
            if kind == "confined":
                self._confinement = content
                _say(content, wanted=self._network)
                return
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
            if kind == "cancelled" and job.over is None:
                self._finish(job, "cancelled")
                return
            if kind == "done":
                result = content
            elif kind == "cancelled":
                error = job.over
            elif kind == "failed":
                error = content
            elif kind == "starved":
                error = _too_large(job.title, self._memory_bytes or 0)
            else:
                what, trace, places = content
                safe = {"message": "a job stopped on an exception", "exception": places}
                _log.error(
                    "%s stopped on %s\n%s", job.title, what, trace, extra={logs.INSTEAD: safe}
                )
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


@functools.cache  # once for all workers
def _say(found: Confinement, wanted: bool) -> None:
    if found.network and not wanted:
        _log.warning("workers can reach the network: this system has no way of closing it to them")
    memory = "no limit" if found.memory_bytes is None else f"{found.memory_bytes / 1e9:.3g} GB"
    _log.info("workers: network %s, memory %s", "open" if found.network else "closed", memory)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it has started, unless it is known to have ended."""
    if process.returncode is not None:
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _too_long(title: str, seconds: float) -> RunError:
    amount = f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} seconds"
    return RunError(
        f"{title} was stopped after {amount}, the longest that a job may take here",
        hint="Use fewer samples or a smaller model.",
    )


def _too_large(title: str, memory_bytes: int) -> RunError:
    return RunError(
        f"{title} needed more than {memory_bytes / 1e9:.3g} GB of memory, the most that a job may "
        "use here",
        hint="Use fewer or smaller samples, or a smaller model.",
    )


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
    orders, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # Ctrl-C is for the parent; it ends this process when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    options = json.loads(sys.argv[1])
    if hasattr(os, "nice"):
        os.nice(options["niceness"])
    memory_bytes = options["memory_bytes"]
    confined = confine(memory_bytes=memory_bytes, network=options["network"])
    answers = _Answers(told)  # from here on there are threads
    answers.send(("confined", "", confined))

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
    for module in options["preload"]:
        try:
            importlib.import_module(module)
        except Exception:  # the job that needs it will say so
            _log.exception("the worker cannot import %s", module)
    served = False
    while True:
        job_id, call = calls.get()
        if served and memory_bytes is not None and resident_bytes(os.getpid()) > memory_bytes / 2:
            os._exit(0)  # what earlier jobs left behind is not this one's: a new process gets it
        answers.send(("begun", job_id, None))
        answer = _run(job_id, call, answers, cancelled, limited=memory_bytes is not None)
        end_children()
        answers.send(answer)
        if answer[0] == "starved":
            os._exit(0)  # how much of it comes back is not certain
        cancelled.discard(job_id)
        served = True


def _run(
    job_id: str, call: bytes, answers: _Answers, cancelled: set[str], *, limited: bool
) -> tuple[str, str, Any]:
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
    except BaseException as error:  # a job must not end the process, not even by sys.exit
        if limited and _lacked_memory(error):
            return ("starved", job_id, None)
        return _failure(job_id, error)


def _lacked_memory(error: BaseException) -> bool:
    """Whether an error comes of memory that was asked for in vain."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in _NO_MEMORY):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _failure(job_id: str, error: BaseException) -> tuple[str, str, Any]:
    if isinstance(error, InspectorError):
        kind: type[BaseException] = type(error)
        # A class that only this process knows would not be found by the other.
        known = kind.__module__ == InspectorError.__module__
        plain = error if known else RunError(error.message, hint=error.hint)
        return ("failed", job_id, pickle.dumps(plain))
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return ("crashed", job_id, (what, *_told(error)))


def _told(error: BaseException) -> tuple[str, list[dict[str, Any]]]:
    """An exception's traceback as Python writes it, and without what may be in a model."""
    return "".join(traceback.format_exception(error)), logs.trace_of(error)
