"""The worker processes of a server: one per workspace and role, ended when they have been idle.

Apart from the session state, because they belong to workspaces and not to browser tabs, and
because their number is limited over all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inspector.jobs import Worker

# A worker that was asked for just now is about to get a job.
FRESH_SECONDS = 5.0
_UNFINISHED = ("queued", "running")


@dataclass(slots=True)
class _Entry:
    worker: Worker
    used: float


class Workers:
    """All workers of this process. All methods may be called from any thread.

    Args:
        make: makes a worker, whose process starts with its first job.
        clock: seconds that only grow.
    """

    def __init__(
        self, make: Callable[[], Worker], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[tuple[Path, str], _Entry] = {}
        self._keeper: threading.Thread | None = None
        self._stop = threading.Event()

    def get(self, root: Path, role: str) -> Worker:
        """The worker of a workspace for a role; a new one where it has none, or it was ended."""
        with self._lock:
            entry = self._entries.get((root, role))
            if entry is None:
                entry = self._entries[root, role] = _Entry(self._make(), 0.0)
            entry.used = self._clock()
            return entry.worker

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
                if any(job.state in _UNFINISHED for job in entry.worker.jobs()):
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
