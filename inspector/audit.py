"""The audit trail of a portal: who signed in, shared, deleted or was refused, one line for each.

Apart from the log, because it is kept with the data, may name people, and is written to the disk
before the answer goes out. A line is a JSON object with `time`, `event`, `user` (an address) and
what belongs to the event; it never holds what is in a model. Nothing depends on it: where it cannot
be written, the log says so and the action goes on.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

FILE_NAME = "audit.jsonl"
LONGEST_FIELD = 300
# Refusals that are written for one user or sender within a period, and for all of them; the rest
# is counted, so that nobody fills the disk by asking.
PERIOD_SECONDS = 60.0
DENIED_OF_ONE = 10
DENIED_OF_ALL = 120

_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_log = logging.getLogger("inspector.audit")
_lock = threading.Lock()
_folder: Path | None = None

Field = str | int | float | bool | None


def keep_in(data: Path | None) -> None:
    """From now on lines are also appended to `audit.jsonl` in this folder; None for the log only.

    The file is opened anew for every line, so it may be renamed (rotated) at any time.

    Raises:
        OSError: it cannot be written.
    """
    global _folder
    if data is not None:
        os.close(os.open(data / FILE_NAME, _APPEND, 0o600))
    _folder = data


def audit(event: str, *, user: str, **fields: Field) -> None:
    """Writes one line to the logger `inspector.audit` and, in a portal, to the file.

    It waits for the disk: call it from a thread and not from the server's loop. It never raises
    because of the disk.

    Args:
        event: "sign-in", "sign-out", "share", "unshare", "delete" or "denied", or another word.
        user: the address of who did it; "" where nobody is signed in.
        fields: what belongs to it; texts are cut after `LONGEST_FIELD` characters.
    """
    skipped = 0
    if event == "denied":
        sender = user or str(fields.get("peer", ""))
        allowed, skipped = _denied.take(sender)
        if not allowed:
            return
    line: dict[str, Field] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "user": user,
        **{name: _short(value) for name, value in fields.items()},
        **({"left_out": skipped} if skipped else {}),
    }
    # JSON in ASCII: one line whatever stands in it.
    text = json.dumps(line)
    _log.info("%s", event, extra={"audit": line})
    folder = _folder
    if folder is None:
        return
    try:
        _append(folder / FILE_NAME, text)
    except OSError as error:
        _log.error("the audit line of %r cannot be written: %s", event, error.strerror)


def _short(value: Field) -> Field:
    if isinstance(value, str) and len(value) > LONGEST_FIELD:
        return value[:LONGEST_FIELD] + "…"
    return value


def _append(path: Path, text: str) -> None:
    with _lock:
        file = os.open(path, _APPEND, 0o600)
        try:
            size = os.fstat(file).st_size
            # A disk that was full may have kept the beginning of a line.
            broken = size and os.pread(file, 1, size - 1) != b"\n"
            content = (("\n" if broken else "") + text + "\n").encode("ascii")
            if os.write(file, content) != len(content):
                # Half a line is worse than none.
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise OSError(28, "No space left on device")
            os.fsync(file)
        finally:
            os.close(file)


class _Limit:
    """Says which refusals are still written, and counts the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._start = -PERIOD_SECONDS
        self._counts: dict[str, int] = {}
        self._written = 0
        self._skipped = 0

    def take(self, sender: str) -> tuple[bool, int]:
        """Whether one of the sender may be written, and how many were left out before it."""
        with self._lock:
            now = self._clock()
            if now - self._start >= PERIOD_SECONDS:
                self._start, self._written = now, 0
                self._counts.clear()
            count = self._counts.get(sender, 0)
            if count >= DENIED_OF_ONE or self._written >= DENIED_OF_ALL:
                self._skipped += 1
                return False, 0
            self._counts[sender] = count + 1
            self._written += 1
            skipped, self._skipped = self._skipped, 0
            return True, skipped


_denied = _Limit()
