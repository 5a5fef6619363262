"""The worker processes of a server: one per workspace and role, ended when they have been idle.

Apart from the session state, because they belong to workspaces and not to browser tabs, and
because their number is limited over all of them, and that of the jobs over all roles of one.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspector.errors import RunError
from inspector.jobs import ACTIVE, JobStatus, Worker

# A worker that was asked for just now is about to get a job, or a page to fetch what came of one,
# which on a busy server may take some seconds.
FRESH_SECONDS = 20.0
# Counted jobs whose end is remembered when their worker has been ended.
_KEPT_ENDS = 200


@dataclass(slots=True)
class _Entry:
    worker: Worker
    used: float


class Workers:
    """All workers of this process. All methods may be called from any thread.

    Args:
        make: makes a worker for a role; its process starts with its first job.
        clock: seconds that only grow.
    """

    def __init__(
        self, make: Callable[[str], Worker], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[tuple[Path, str], _Entry] = {}
        # Counted jobs by id, with whose they are: held while one is added, so that none slips in.
        self._submitting = threading.Lock()
        self._counted: dict[str, tuple[Path, Worker]] = {}
        self._ends: OrderedDict[str, JobStatus] = OrderedDict()
        self._keeper: threading.Thread | None = None
        self._stop = threading.Event()

    def get(self, root: Path, role: str) -> Worker:
        """The worker of a workspace for a role; a new one where it has none, or it was ended."""
        with self._lock:
            entry = self._entries.get((root, role))
            if entry is None:
                entry = self._entries[root, role] = _Entry(self._make(role), 0.0)
            entry.used = self._clock()
            return entry.worker

    def submit(
        self,
        root: Path,
        role: str,
        function: Callable[..., Any],
        *args: Any,
        most: int,
        title: str,
        on_begin: Callable[[str], None],
        on_end: Callable[[JobStatus], None],
        **kwargs: Any,
    ) -> str:
        """The id of a new job that counts, which questions put with `get` do not.

        Args:
            root: of the workspace.
            role: of its worker.
            function: as `Worker.submit` takes it, with `args` and `kwargs`.
            most: how many counted jobs of the workspace may be unfinished, this one included.
            title: of the job.
            on_begin: called with the id before the job is queued; what it raises is handed on, and
                there is no job.
            on_end: see `Worker.submit`.

        Raises:
            RunError: the workspace has as many unfinished jobs as it may have.
        """
        with self._submitting:
            unfinished = self.unfinished(root)
            if len(unfinished) >= most:
                running = sum(job.state == "running" for job in unfinished)
                waiting = len(unfinished) - running
                raise RunError(
                    f"{title} is not started: {len(unfinished)} of your jobs have not ended "
                    f"({running} running, {waiting} waiting), and {most} may be under way at once",
                    hint="Press Stop beside a job at the left, or wait until one has ended.",
                )
            job_id = uuid.uuid4().hex
            on_begin(job_id)
            worker = self.get(root, role)

            def end(job: JobStatus) -> None:
                self._remember(job)
                on_end(job)

            worker.submit(function, *args, title=title, job_id=job_id, on_end=end, **kwargs)
            self._counted[job_id] = (root, worker)
            return job_id

    def unfinished(self, root: Path) -> tuple[JobStatus, ...]:
        """The counted jobs of a workspace that have not ended, in order of submission."""
        found = []
        for job_id, (whose, worker) in list(self._counted.items()):
            job = worker.find(job_id)
            if job is None or job.state not in ACTIVE:
                self._counted.pop(job_id, None)
            elif whose == root:
                found.append(job)
        return tuple(found)

    def _remember(self, job: JobStatus) -> None:
        with self._lock:
            self._ends[job.id] = job
            while len(self._ends) > _KEPT_ENDS:
                self._ends.popitem(last=False)

    def ended(self, job_id: str) -> JobStatus | None:
        """How a counted job has ended, also when its worker is gone: a browser asks seldom for
        what is on a tab in the background. None where it has not, or ended long ago."""
        with self._lock:
            return self._ends.get(job_id)

    def holder(self, root: Path, job_id: str) -> Worker | None:
        """The worker of a workspace that has a job; None where it was forgotten."""
        with self._lock:
            for (whose, _), entry in self._entries.items():
                if whose == root and entry.worker.find(job_id) is not None:
                    entry.used = self._clock()
                    return entry.worker
        return None

    def is_busy(self, root: Path) -> bool:
        """Whether a process runs for a workspace, so that its files may be in use."""
        with self._lock:
            own = [entry.worker for (whose, _), entry in self._entries.items() if whose == root]
        return any(worker.is_alive for worker in own)

    def all(self) -> tuple[Worker, ...]:
        """Every worker there is now."""
        with self._lock:
            return tuple(entry.worker for entry in self._entries.values())

    def tidy(self, *, idle_seconds: float, most: int) -> int:
        """Ends idle workers: the unused, and while there are more than `most`, the least used.

        A worker with an unfinished job is never ended, so there may be more than `most` for as long
        as all of them work.

        Returns:
            how many were ended.
        """
        now = self._clock()
        ended: list[Worker] = []
        with self._lock:
            order = sorted(self._entries.items(), key=lambda item: item[1].used)
            running = sum(entry.worker.is_alive for _, entry in order)
            for key, entry in order:
                unused = now - entry.used
                surplus = entry.worker.is_alive and running > most
                if unused < FRESH_SECONDS or not (unused >= idle_seconds or surplus):
                    continue
                if any(job.state in ACTIVE for job in entry.worker.jobs()):
                    continue
                running -= entry.worker.is_alive
                ended.append(self._entries.pop(key).worker)
        for worker in ended:
            worker.close()
        return len(ended)

    def keep_tidy(self, *, idle_seconds: float, most: int, every_seconds: float = 10.0) -> None:
        """Calls `tidy` from now on, in a thread of its own, until `close`."""

        def keep() -> None:
            while not self._stop.wait(every_seconds):
                self.tidy(idle_seconds=idle_seconds, most=most)

        with self._lock:
            if self._keeper is None:
                self._stop.clear()
                self._keeper = threading.Thread(target=keep, name="workers keeper", daemon=True)
                self._keeper.start()

    def close(self) -> None:
        """Ends all of them; the next `get` makes new ones."""
        self._stop.set()
        with self._lock:
            entries, keeper = list(self._entries.values()), self._keeper
            self._entries.clear()
            self._keeper = None
        if keeper is not None:
            keeper.join()
        for entry in entries:
            entry.worker.close()
