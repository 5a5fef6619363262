"""Files that browsers send in parts, on disk until a form takes them into a workspace.

Apart from the routes, which only speak HTTP, and from the form, which only shows them. An inbox
holds the files of one field of a form in one browser tab; it lies in the workspace's `temporary/`,
so a finished file is taken by a new name instead of a copy. What nobody sends any more is removed:
a part after some minutes without a byte, an inbox some minutes after its tab was closed, what a
killed server left behind at the next start.

    temporary/upload-<id>/parts/<id>     what has come so far
    temporary/upload-<id>/files/<name>   whole files
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inspector.errors import InspectorError
from inspector.render import format_bytes
from inspector.store import safe_name

if sys.platform != "win32":
    import fcntl

PREFIX = "upload-"
# Files in one inbox, and inboxes of one user.
MOST_FILES = 2000
MOST_INBOXES = 64
# Seconds without a byte after which an unfinished file is removed, and without a connection of its
# tab after which an inbox is.
IDLE_SECONDS = 300.0
TIDY_SECONDS = 20.0

_ID = re.compile(r"[0-9a-f]{8,64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_POINTER = b"version https://git-lfs"

_log = logging.getLogger("inspector.web")


class Refused(Exception):
    """An upload that is not taken.

    Args:
        status: of the HTTP answer.
        text: what is wrong and what to do, for whoever uploads.
        offset: how many bytes of the file are here; None where that does not help.
    """

    def __init__(self, status: int, text: str, offset: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.offset = offset


_UNKNOWN = "This upload is not known: begin again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Uploaded:
    """A whole file in an inbox.

    Attributes:
        id: as its sender calls it.
        name: safe to be a file's name.
        size_bytes: of the file.
        path: where it lies.
    """

    id: str
    name: str
    size_bytes: int
    path: Path


@dataclass(slots=True, kw_only=True)
class _File:
    """A file on its way. `lock` is held while its bytes or its place change."""

    id: str
    name: str
    size: int
    path: Path
    touched: float
    offset: int = 0
    turn: int = 0
    done: bool = False
    gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The right to add bytes to a file; a later turn of the same file ends it."""

    file: _File
    number: int


class Inbox:
    """The files of one field of a form in one tab. All methods may be called from any thread.

    Args:
        temporary: the workspace's folder for unfinished things.
        session: the id of the tab's session.
        limit_bytes: the largest file.
        check_quota: raises InspectorError where the user may not store what the inboxes of this
            user are still to receive.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        temporary: Path,
        *,
        session: str = "",
        limit_bytes: int,
        check_quota: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self.limit_bytes = limit_bytes
        self.folder = temporary / f"{PREFIX}{secrets.token_hex(16)}"
        self.seen = clock()
        # How often the whole files have changed: others may lie under the same names since.
        self.changes = 0
        self._check_quota = check_quota
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._mark = -1

    def files(self) -> tuple[Uploaded, ...]:
        """The whole files, in the order in which they were begun."""
        with self._lock:
            found = [each for each in self._files.values() if each.done and not each.gone]
        return tuple(
            Uploaded(id=each.id, name=each.name, size_bytes=each.size, path=each.path)
            for each in found
            # A stored file goes with the pair it was stored for.
            if each.path.is_file()
        )

    def missing_bytes(self) -> int:
        """What is still to come of the files that were begun."""
        with self._lock:
            return sum(each.size - each.offset for each in self._files.values() if not each.gone)

    def offset(self, file_id: str) -> tuple[int, bool]:
        """How many bytes of a file are here, and whether it is whole and was found good.

        Raises:
            Refused: there is no such file.
        """
        found = self._find(file_id)
        return found.offset, found.done

    def begin(self, file_id: str, name: str, size: int, offset: int) -> Turn:
        """The right to add bytes to a file at an offset. The first one, at 0, makes the file.

        A turn that is under way ends: its connection may be dead without anybody knowing.

        Args:
            file_id: 8 to 64 hexadecimal digits that the sender made up.
            name: as the sender calls the file.
            size: bytes of the whole file.
            offset: of the first byte to be added.

        Raises:
            Refused: the file is empty, too large or one too many, its name is taken, there is no
                space for it, or the bytes before the offset are not here.
        """
        if not _ID.fullmatch(file_id):
            raise Refused(400, "The id of an upload is 8 to 64 hexadecimal digits")
        with self._lock:
            known = self._files.get(file_id)
        if known is None or known.gone:
            known = self._make(file_id, safe_name(name), size, offset)
        with known.lock:
            if known.gone:
                raise Refused(404, _UNKNOWN)
            if (known.name, known.size) != (safe_name(name), size):
                raise Refused(400, "An upload keeps its name and its size")
            if offset != known.offset:
                raise Refused(409, f"{known.offset} bytes are here", known.offset)
            known.turn += 1
            known.touched = self._clock()
            return Turn(file=known, number=known.turn)

    def _make(self, file_id: str, name: str, size: int, offset: int) -> _File:
        if offset:
            raise Refused(404, _UNKNOWN)
        if size == 0:
            raise Refused(422, "The file is empty (0 bytes): export or download it again")
        if size > self.limit_bytes:
            most = format_bytes(self.limit_bytes)
            raise Refused(413, f"{format_bytes(size)} is more than the {most} this server takes")
        with self._writing():
            self._make_folder()
        with self._lock:
            same = self._files.get(file_id)
            if same is not None and not same.gone:
                return same
            others = [each for each in self._files.values() if not each.gone]
            if len(others) >= MOST_FILES:
                raise Refused(413, f"More than {MOST_FILES:,} files: pack them into one .npz")
            if any(each.name == name for each in others):
                raise Refused(409, "A file of this name is here already: remove or rename one")
            made = _File(
                id=file_id,
                name=name,
                size=size,
                path=self.folder / "parts" / file_id,
                touched=self._clock(),
            )
            self._files[file_id] = made
        # Judged with this file in: of two that come at once, both count.
        try:
            self._check_quota()
            with self._writing():
                if shutil.disk_usage(self.folder).free < self.missing_bytes():
                    raise OSError(errno.ENOSPC, "no space")
        except InspectorError as error:
            self._discard(made)
            raise Refused(413, f"{error.message}. {error.hint}") from error
        except Refused:
            self._discard(made)
            raise
        return made

    def _make_folder(self) -> None:
        with self._lock:
            for name in ("parts", "files"):
                (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._mark < 0:
                self._mark = _marked(self.folder)

    def touch(self, turn: Turn) -> None:
        """Says that bytes are coming, although they are not written yet."""
        turn.file.touched = self._clock()

    def add(self, turn: Turn, block: bytes | bytearray) -> tuple[int, bool]:
        """Appends bytes: how many are here now, and whether the file is whole. Waits for the disk.

        Raises:
            Refused: the turn has ended, there are more bytes than the file was said to have, the
                disk is full, or the whole file is not what it should be; except where only the
                turn has ended, nothing is left of the file.
        """
        found = turn.file
        with found.lock:
            if found.gone:
                raise Refused(404, _UNKNOWN)
            if found.turn != turn.number:
                raise Refused(409, "Another connection goes on with this upload", found.offset)
            try:
                if found.offset + len(block) > found.size:
                    raise Refused(413, f"More than the {found.size} bytes that were announced")
                if block:
                    with self._writing(), found.path.open("ab") as part:
                        part.write(block)
                    found.offset += len(block)
                    found.touched = self._clock()
                if found.offset == found.size and not found.done:
                    self._finish(found)
            except Refused:
                self._discard(found)
                raise
            return found.offset, found.done

    def _finish(self, found: _File) -> None:
        with self._writing():
            with found.path.open("rb") as part:
                head = part.read(len(_POINTER))
            if head == _POINTER:
                raise Refused(
                    422, "This is a Git LFS pointer: run git lfs pull and upload the file again"
                )
            target = self.folder / "files" / found.name
            os.replace(found.path, target)
        found.path = target
        found.done = True
        self.changes += 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:  # removed meanwhile
            raise Refused(404, _UNKNOWN) from error
        except OSError as error:
            if error.errno not in _FULL:
                _log.error("an upload cannot be written: %s", error.strerror)
                raise Refused(507, "The server cannot store the file") from error
            raise Refused(507, "The server's disk has no space for the file") from error

    def _discard(self, found: _File) -> None:
        found.gone = True
        self.changes += 1
        if found.path.is_relative_to(self.folder):
            found.path.unlink(missing_ok=True)
        with self._lock:
            if self._files.get(found.id) is found:
                del self._files[found.id]

    def _find(self, file_id: str) -> _File:
        with self._lock:
            found = self._files.get(file_id)
        if found is None or found.gone:
            raise Refused(404, _UNKNOWN)
        return found

    def remove(self, file_id: str) -> None:
        """Removes a file, whole or not.

        Raises:
            Refused: there is no such file.
        """
        found = self._find(file_id)
        with found.lock:
            self._discard(found)

    def stored(self, places: dict[str, Path]) -> None:
        """Says where files lie from now on, by their ids: a workspace has taken them."""
        with self._lock:
            files = [self._files[each] for each in places if each in self._files]
        for each in files:
            with each.lock:
                each.path = places[each.id]

    def gather(self) -> None:
        """Copies stored files back beside those that came later: together they are one upload.

        Raises:
            OSError: there is no space, for example.
        """
        with self._lock:
            files = [each for each in self._files.values() if each.done]
        stored = [each for each in files if not each.path.is_relative_to(self.folder)]
        if not stored or len(stored) == len(files):
            return
        for each in stored:
            with each.lock, contextlib.suppress(FileNotFoundError):
                target = self.folder / "files" / each.name
                shutil.copyfile(each.path, target)
                each.path = target

    def tidy(self) -> None:
        """Removes the files of which no byte came for `IDLE_SECONDS`."""
        with self._lock:
            if self._mark >= 0:
                with contextlib.suppress(OSError):
                    os.utime(self.folder)  # the workspace removes what looks a day old
            oldest = self._clock() - IDLE_SECONDS
            idle = [e for e in self._files.values() if not e.done and e.touched < oldest]
        for each in idle:
            with each.lock:
                if not each.done:
                    self._discard(each)

    def clear(self) -> None:
        """Removes every file, whole or not, and the folder; files may come again."""
        with self._lock:
            files = list(self._files.values())
        for each in files:
            with each.lock:
                self._discard(each)
        with self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._mark >= 0:
                os.close(self._mark)
                self._mark = -1


def _marked(folder: Path) -> int:
    """A descriptor that marks a folder as in use for as long as this process lives."""
    if sys.platform == "win32":
        return 0
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a disk without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def remove_leftovers(workspaces: Iterable[Path]) -> int:
    """Removes the inboxes that servers which are no more have left in workspaces; how many.

    Those of another server that runs on the same folder stay.
    """
    removed = 0
    for root in workspaces:
        for folder in (root / "temporary").glob(f"{PREFIX}*"):
            if folder.is_dir() and not folder.is_symlink() and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed


def _is_left(folder: Path) -> bool:
    if sys.platform == "win32":
        return True
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


class Inboxes:
    """All inboxes of this process, by user and token.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._users: dict[str, dict[str, Inbox]] = {}
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None

    def open(self, user_key: str, inbox: Inbox) -> str:
        """The token under which the inbox is known to the user's browser, and to no other's.

        The user's inbox that was used longest ago goes where there are more than `MOST_INBOXES`.
        """
        token = secrets.token_urlsafe(32)
        dropped: list[Inbox] = []
        with self._lock:
            own = self._users.setdefault(user_key, {})
            own[token] = inbox
            while len(own) > MOST_INBOXES:
                oldest = min(own, key=lambda each: own[each].seen)
                dropped.append(own.pop(oldest))
        for each in dropped:
            each.clear()
        return token

    def find(self, user_key: str, token: str) -> Inbox | None:
        """The inbox of this token and this user; None where there is none."""
        with self._lock:
            found = self._users.get(user_key, {}).get(token)
        if found is not None:
            found.seen = self._clock()
        return found

    def missing_bytes(self, user_key: str) -> int:
        """What is still to come of the user's files that were begun."""
        with self._lock:
            own = list(self._users.get(user_key, {}).values())
        return sum(each.missing_bytes() for each in own)

    def tidy(self, is_open: Callable[[str], bool]) -> None:
        """Removes what nobody sends any more.

        Args:
            is_open: whether the session of this id has a tab.
        """
        oldest = self._clock() - IDLE_SECONDS
        closed: list[Inbox] = []
        with self._lock:
            for own in self._users.values():
                for token, inbox in list(own.items()):
                    if is_open(inbox.session):
                        inbox.seen = self._clock()
                    elif inbox.seen < oldest:
                        closed.append(own.pop(token))
            kept = [each for own in self._users.values() for each in own.values()]
        for inbox in closed:
            inbox.clear()
        for inbox in kept:
            inbox.tidy()

    def keep_tidy(self, is_open: Callable[[str], bool]) -> None:
        """Calls `tidy` from now on, in a thread of its own, until `close`."""

        def keep() -> None:
            while not self._stop.wait(TIDY_SECONDS):
                self.tidy(is_open)

        with self._lock:
            if self._keeper is None:
                self._stop.clear()
                self._keeper = threading.Thread(target=keep, name="uploads keeper", daemon=True)
                self._keeper.start()

    def close(self) -> None:
        """Removes every inbox."""
        self._stop.set()
        with self._lock:
            inboxes = [each for own in self._users.values() for each in own.values()]
            self._users.clear()
            keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.join()
        for each in inboxes:
            each.clear()


@functools.cache
def inboxes() -> Inboxes:
    """Those of this server."""
    return Inboxes()
