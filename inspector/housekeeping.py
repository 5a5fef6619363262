"""What a portal removes by itself: workspaces nobody opens any more, and what nothing leads to.

Apart from the store, which knows one workspace and nobody else: here it is looked at all of them,
and at what lies between them. Everything is renamed away first and removed then, so whatever is
killed in between leaves nothing half; the next day's round goes on where this one was.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from inspector.audit import audit
from inspector.errors import InspectorError
from inspector.index import Index
from inspector.store import Workspace, new_id

ROUND_SECONDS = 24 * 3600.0
CACHE_DAYS = 30

# Not part of a backup, as its name begins with a dot.
LOCK = ".server.lock"

# By folder, the open file by which this process has it.
_held: dict[Path, int] = {}
_KEY = re.compile(r"[0-9a-f]{32}")
_BLOB = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tidied:
    """What a round removed.

    Attributes:
        expired: keys of the users whose workspaces are gone.
        blobs: how many files that no workspace has any more.
        bytes: of those files.
    """

    expired: tuple[str, ...] = ()
    blobs: int = 0
    bytes: int = 0


def make_private(data: Path) -> None:
    """Makes a portal's folders, which nobody but this server's user may look into.

    From now on the same holds for every file that this process and its children make.

    Raises:
        OSError: a folder cannot be made, or is not this user's.
    """
    os.umask(0o077)
    data.mkdir(parents=True, exist_ok=True)
    for name in ("users", "blobs", "temporary"):
        (data / name).mkdir(exist_ok=True)
        (data / name).chmod(0o700)


def hold(data: Path) -> bool:
    """Takes a folder for this server, until its process ends; False where another one has it.

    Raises:
        OSError: the folder cannot be written.
    """
    if data in _held or sys.platform == "win32":
        return True
    import fcntl

    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.open(data / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    _held[data] = file
    return True


def tidy(
    data: Path, expiry_days: int, *, is_busy: Callable[[Path], bool] = lambda root: False
) -> Tidied:
    """Removes what nobody needs from a portal's data folder.

    Those are workspaces whose users were not seen for `expiry_days`, with what they share; in the
    others what `Workspace.tidy` says, and cached results that nobody read for 30 days; blobs that
    no workspace has; and what killed processes left. A workspace whose user the index does not
    know counts from when its folders were changed last, or the index was made if that was later: a
    lost index lets nobody's workspace expire early.

    Args:
        data: `Settings.data`.
        expiry_days: `Settings.expiry_days`; 0 for never.
        is_busy: whether a worker is at work in a workspace's folder, which stays then.
    """
    expired = []
    index = Index(data)
    try:
        before = datetime.now(UTC) - timedelta(days=expiry_days)
        for root in _workspaces(data):
            try:
                if is_busy(root):
                    continue
                if expiry_days > 0 and _expire(index, data, root, before):
                    expired.append(root.name)
                    continue
                Workspace(root).tidy()
                _tidy_cache(root / "cache")
            except (InspectorError, OSError) as error:  # the others are tidied all the same
                _log.warning("a workspace was not tidied: %s", error)
    finally:
        index.close()
    blobs = [
        _remove_unused(blob) for blob in _entries(data / "blobs") if _BLOB.fullmatch(blob.name)
    ]
    removed = [size for size in blobs if size is not None]
    for entry in _entries(data / "temporary"):
        if _unused_since(entry) < time.time() - ROUND_SECONDS:
            _remove(entry)
    return Tidied(expired=tuple(expired), blobs=len(removed), bytes=sum(removed))


def keep_tidy(
    data: Path,
    expiry_days: int,
    *,
    is_busy: Callable[[Path], bool] = lambda root: False,
    every_seconds: float = ROUND_SECONDS,
) -> Callable[[], None]:
    """Calls `tidy` now and every day, in a thread of its own; returns what ends that.

    Args:
        data: see `tidy`.
        expiry_days: see `tidy`.
        is_busy: see `tidy`.
        every_seconds: from round to round.
    """
    stop = threading.Event()

    def keep() -> None:
        while True:
            try:
                done = tidy(data, expiry_days, is_busy=is_busy)
            except (InspectorError, OSError) as error:  # tomorrow it may go
                _log.error("housekeeping failed: %s", error)
            else:
                _log.info(
                    "housekeeping: %d workspaces expired, %d files removed, %d bytes",
                    len(done.expired),
                    done.blobs,
                    done.bytes,
                )
            if stop.wait(every_seconds):
                return

    threading.Thread(target=keep, name="housekeeping", daemon=True).start()
    return stop.set


def _workspaces(data: Path) -> Iterator[Path]:
    for entry in _entries(data / "users"):
        if _KEY.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            yield entry


def _expire(index: Index, data: Path, root: Path, before: datetime) -> bool:
    """Removes a workspace whose user was not seen since `before`; whether it did."""
    key, limit = root.name, before.isoformat(timespec="microseconds")
    address = index.address_of(key)
    if not address:
        changed = datetime.fromtimestamp(_unused_since(root), UTC)
        if max(changed, datetime.fromisoformat(index.since())) >= before:
            return False
    with index.leaving(key, limit) as gone:
        if gone:
            aside = data / "temporary" / new_id()
            aside.parent.mkdir(exist_ok=True, mode=0o700)
            os.replace(root, aside)
    if gone:
        audit("expire", user="", owner=address or key)
        _remove(aside)
    return gone


def _unused_since(entry: Path) -> float:
    """When a file, or a folder with what lies directly in it, was changed last."""
    inside = _entries(entry) if entry.is_dir() and not entry.is_symlink() else []
    times = []
    for each in (entry, *inside):
        with suppress(FileNotFoundError):
            times.append(each.lstat().st_mtime)
    return max(times, default=time.time())


def _tidy_cache(cache: Path) -> None:
    """Removes cached results that were neither made nor read lately."""
    before = time.time() - CACHE_DAYS * 24 * 3600
    for kind in _entries(cache):
        for entry in _entries(kind) if kind.is_dir() else [kind]:
            files = [entry, *entry.rglob("*")] if entry.is_dir() else [entry]
            facts = [file.lstat() for file in files if not file.is_dir()]
            if max((max(f.st_mtime, f.st_atime) for f in facts), default=0.0) < before:
                _remove(entry)


def _remove_unused(blob: Path) -> int | None:
    """The size of a file that only the blobs have, and that is removed; None where it stays.

    Whoever links it at this very moment keeps the file, and the next to add it makes a new blob.
    """
    try:
        facts = blob.lstat()
        if facts.st_nlink > 1:
            return None
        blob.unlink()
    except FileNotFoundError:
        return None
    return facts.st_size


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
