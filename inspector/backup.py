"""A data folder in one file, and back: taken while the server runs, put only into an empty folder.

Apart from `store`, which knows what one workspace means; here files are only files. They can be
read while others write, because each of them gets its name when it is whole; only the index, which
changes in place, is copied by SQLite itself. Records come before what they name, and the files of
one folder are opened together: what is deleted meanwhile is left out, and what is made meanwhile
may be in it or not. A blob and its hard links are stored once.

An archive that is restored is not trusted: nothing but files and hard links among them, under names
that stay inside, and everything named by its content has to have that content.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO

from inspector.errors import ReportError
from inspector.index import FILE_NAME, Index

HEAD = "backup.json"
FORMAT = "quant-inspector/backup"
VERSION = 1
# What can be computed again, and what is not finished: of the folder and of each workspace.
_PASSING = frozenset({"cache", "temporary"})
_FOREIGN = frozenset({"lost+found"})
# In a workspace, what names comes before what is named; a rest comes between.
_ORDER = {"current.json": 0, "runs": 1, "pairs": 2, "feeds": 4, "models": 5, "blobs": 6}
_REST = 3
_OPEN_AT_ONCE = 200
_LONGEST_HEAD = 10_000
_BLOCK = 1 << 20

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backup:
    """What an archive holds.

    Attributes:
        files: how many, hard links included.
        size_bytes: of their contents, each stored content once.
        users: workspaces; 1 for that of local mode.
        runs: of all workspaces.
        left_out: files that were deleted while the archive was made; 0 of one that is restored.
        created: when, ISO 8601, UTC.
    """

    files: int
    size_bytes: int
    users: int
    runs: int
    left_out: int
    created: str


# ---------------------------------------------------------------------------------- making one


def back_up(data: Path, output: Path, *, progress: Progress = lambda *_: None) -> Backup:
    """Writes an archive of a data folder, all of it or nothing; the server may go on meanwhile.

    Args:
        data: the folder of a portal, or of local mode.
        output: the file to write, outside of the folder; readable by its owner alone.
        progress: is told the finished share and what is written.

    Raises:
        ReportError: it is no data folder, or the file cannot be written.
    """
    data = data.resolve()
    if not data.is_dir():
        raise ReportError(
            f"{data} is not a folder", hint="Name the folder that QUANT_INSPECTOR_DATA names."
        )
    if output.resolve().is_relative_to(data):
        raise ReportError(
            f"{output} lies in the folder that is backed up", hint="Write it to another disk."
        )
    total = max(1, sum(size for group in _groups(data) for size in map(_size, group)))
    with _failing(f"{output} cannot be written"):
        part_file, part = tempfile.mkstemp(prefix=".part-", dir=output.parent or Path())
        try:
            with os.fdopen(part_file, "wb") as file:
                made = _Writer(data, file, total, progress).write()
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, output)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    return made


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _groups(folder: Path, depth: int = 0) -> Iterator[list[Path]]:
    """The files below a folder, those of one folder together, in the order they are stored."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: (_ORDER.get(e.name, _REST), e.name))
    except FileNotFoundError:
        return
    # A name that begins with a dot belongs to a file that is not finished.
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    if depth == 0:
        entries = [
            e for e in entries if not e.name.startswith(FILE_NAME) and e.name not in _FOREIGN
        ]
    if depth == 0 or (depth == 2 and folder.parent.name == "users"):
        entries = [entry for entry in entries if entry.name not in _PASSING]
    files = [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
    for start in range(0, len(files), _OPEN_AT_ONCE):
        yield files[start : start + _OPEN_AT_ONCE]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _groups(Path(entry.path), depth + 1)


class _Writer:
    """One archive while it is written."""

    def __init__(self, data: Path, file: IO[bytes], total: int, progress: Progress) -> None:
        self._data, self._file, self._total, self._progress = data, file, total, progress
        # Where a content with several names was stored. Time and size belong to it, because the
        # number of a deleted file is given to a new one.
        self._stored: dict[tuple[int, int, int, int], str] = {}
        self._files = self._bytes = self._left_out = self._seen = 0
        self._users: set[str | None] = set()
        self._runs = 0

    def write(self) -> Backup:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with tarfile.open(
            fileobj=self._file, mode="w:gz", compresslevel=1, format=tarfile.PAX_FORMAT
        ) as tar:
            head = {"format": FORMAT, "version": VERSION, "created": created}
            self._add_bytes(tar, HEAD, json.dumps(head).encode())
            if (self._data / FILE_NAME).is_file():
                self._add_bytes(tar, FILE_NAME, _copy_of_index(self._data / FILE_NAME))
            for group in _groups(self._data):
                self._add_group(tar, group)
        return Backup(
            files=self._files,
            size_bytes=self._bytes,
            users=len(self._users - {None}),
            runs=self._runs,
            left_out=self._left_out,
            created=created,
        )

    def _add_bytes(self, tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o600
        info.mtime = int(datetime.now(UTC).timestamp())
        tar.addfile(info, io.BytesIO(content))

    def _add_group(self, tar: tarfile.TarFile, group: list[Path]) -> None:
        with ExitStack() as stack:
            try:
                opened = [(path, stack.enter_context(path.open("rb"))) for path in group]
            except FileNotFoundError:
                if any(path.exists() for path in group):
                    # One file of a folder that stays: the others are not to go with it.
                    self._add_each(tar, group)
                else:
                    self._left_out += len(group)
                return
            for path, file in opened:
                self._add_file(tar, path, file)

    def _add_each(self, tar: tarfile.TarFile, group: list[Path]) -> None:
        for path in group:
            try:
                with path.open("rb") as file:
                    self._add_file(tar, path, file)
            except FileNotFoundError:
                self._left_out += 1

    def _add_file(self, tar: tarfile.TarFile, path: Path, file: IO[bytes]) -> None:
        facts = os.fstat(file.fileno())
        parts = path.relative_to(self._data).parts
        info = tarfile.TarInfo("/".join(parts))
        info.mode, info.mtime = facts.st_mode & 0o777, facts.st_mtime
        key = (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if facts.st_nlink > 1 and key in self._stored:
            info.type, info.linkname = tarfile.LNKTYPE, self._stored[key]
            tar.addfile(info)
        else:
            info.size = facts.st_size
            tar.addfile(info, file)
            self._stored[key] = info.name
            self._bytes += facts.st_size
        self._files += 1
        self._seen += facts.st_size
        self._users.add(_workspace_of(parts))
        self._runs += parts[-1] == "run.json"
        self._progress(min(1.0, self._seen / self._total), info.name)


def _workspace_of(parts: Sequence[str]) -> str | None:
    """Whose workspace a file is in: a user's key, "" for that of local mode; None for nobody's."""
    if parts[0] == "users":
        return parts[1] if len(parts) > 2 else None
    return "" if parts[0] in ("current.json", "runs", "pairs", "feeds", "models") else None


def _copy_of_index(path: Path) -> bytes:
    """The index as it was at one moment, whoever writes to it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / FILE_NAME
        with (
            closing(sqlite3.connect(path, timeout=60)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")
        return copy.read_bytes()


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise ReportError(
            f"{what}: {why}", hint="Check the free space on the disk and the folder's permissions."
        ) from error


# ---------------------------------------------------------------------------------- restoring one


def restore(archive: Path, data: Path, *, progress: Progress = lambda *_: None) -> Backup:
    """Puts an archive into an empty folder, which is made where it is missing, and checks it.

    Folders are then open to their owner alone, files as well. Nobody's workspace expires for not
    having been opened since the backup was made. Where anything is wrong, the folder is left empty.

    Args:
        archive: from `back_up`.
        data: the folder.
        progress: is told the share of the archive that was read, and what is restored.

    Raises:
        ReportError: the folder is not empty, or the archive is not a whole and sound one.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ReportError(
            "this Python cannot unpack archives safely", hint="Use Python 3.11.4 or later."
        )
    with _failing(f"{data} cannot be written"):
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(entry.name not in _FOREIGN for entry in data.iterdir()):
            raise ReportError(f"{data} is not empty", hint="Restore into a new folder.")
        data.chmod(0o700)
    try:
        with _reading(archive), archive.open("rb") as file:
            found = _Reader(data.resolve(), file, archive, progress).read()
        if (data / FILE_NAME).is_file():
            with closing(Index(data)) as index:
                index.begin_anew()
    except BaseException:
        for entry in data.iterdir():
            if entry.is_dir() and entry.name not in _FOREIGN:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name not in _FOREIGN:
                entry.unlink(missing_ok=True)
        raise
    return found


def _refused(archive: Path, why: str) -> ReportError:
    return ReportError(
        f"{archive} is not a sound backup: {why}",
        hint="Use another file that `quant-inspector backup` has written.",
    )


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    broken = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError)
    try:
        yield
    except broken as error:
        raise _refused(archive, str(error) or "it ends too early") from error
    except OSError as error:
        raise ReportError(
            f"{archive} cannot be restored: {error.strerror or error}",
            hint="Check the path, the free space on the disk and the folder's permissions.",
        ) from error


class _Reader:
    """One archive while it is restored."""

    def __init__(self, data: Path, file: IO[bytes], archive: Path, progress: Progress) -> None:
        self._data, self._file, self._archive, self._progress = data, file, archive, progress
        self._names: set[str] = set()
        self._length = max(1, os.fstat(file.fileno()).st_size)

    def read(self) -> Backup:
        size = 0
        # Not "r|gz": that would not look at the checksum.
        with (
            gzip.GzipFile(fileobj=self._file, mode="rb") as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            members = iter(tar)
            created = self._read_head(tar, next(members, None))
            for info in members:
                self._check(info)
                tar.extract(info, self._data, filter="data")
                path = self._data / info.name
                # What is never to change again stays so.
                path.chmod(0o600 if info.mode & 0o200 else 0o400)
                if info.isreg() and info.name != FILE_NAME:
                    size += info.size
                self._names.add(info.name)
                self._progress(min(1.0, self._file.tell() / self._length), info.name)
            while plain.read(_BLOCK):  # its end holds the checksum
                continue
        for folder, _, _ in os.walk(self._data):
            os.chmod(folder, 0o700)
        self._check_contents()
        parts = [PurePosixPath(name).parts for name in self._names]
        users = set(map(_workspace_of, parts)) - {None}
        return Backup(
            files=len(self._names - {FILE_NAME}),
            size_bytes=size,
            users=len(users),
            runs=sum(p[-1] == "run.json" for p in parts),
            left_out=0,
            created=created,
        )

    def _read_head(self, tar: tarfile.TarFile, info: tarfile.TarInfo | None) -> str:
        if info is None or info.name != HEAD or not info.isreg() or info.size > _LONGEST_HEAD:
            raise _refused(self._archive, f"it does not begin with {HEAD}")
        file = tar.extractfile(info)
        assert file is not None
        try:
            head = json.loads(file.read())
        except ValueError:
            head = None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise _refused(self._archive, f"its {HEAD} is not one of ours")
        if head.get("version") != VERSION:
            raise ReportError(
                f"{self._archive} has version {head.get('version')!r}, expected {VERSION}",
                hint="Use the version of Quant Inspector that made it.",
            )
        return str(head.get("created", ""))[:40]

    def _check(self, info: tarfile.TarInfo) -> None:
        """Refuses what no backup holds."""
        shown = ascii(info.name[:100])
        if not (info.isreg() or info.islnk()):
            raise _refused(self._archive, f"{shown} is neither a file nor a hard link")
        for name in (info.name, info.linkname) if info.islnk() else (info.name,):
            if not _stays_inside(name):
                raise _refused(self._archive, f"{name[:100]!a} leads out of the folder")
        if info.name in self._names:
            raise _refused(self._archive, f"{shown} is there twice")
        if info.islnk() and info.linkname not in self._names:
            raise _refused(self._archive, f"{shown} links to what is not there")
        free = shutil.disk_usage(self._data).free
        if info.isreg() and info.size > free:
            raise ReportError(
                f"{shown} has {info.size} bytes, and the disk has {free} left",
                hint="Restore to a larger disk.",
            )

    def _check_contents(self) -> None:
        """Refuses what is named by a content that it does not have."""
        digests: dict[int, str] = {}

        def digest(path: Path) -> str:
            number = path.stat().st_ino
            if number not in digests:
                with path.open("rb") as file:
                    digests[number] = hashlib.file_digest(file, "sha256").hexdigest()
            return digests[number]

        blobs = self._data / "blobs"
        for blob in _children(blobs):
            if blob.is_file() and digest(blob) != blob.name:
                raise _refused(self._archive, f"blobs/{blob.name} has another content")
        for root in (self._data, *_children(self._data / "users")):
            for folder in (*_children(root / "models"), *_children(root / "feeds")):
                found = {
                    path.relative_to(folder).as_posix(): digest(path)
                    for path in folder.rglob("*")
                    if path.is_file()
                }
                whole = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
                if folder.name not in (whole, *(found.values() if len(found) == 1 else ())):
                    where = folder.relative_to(self._data)
                    raise _refused(self._archive, f"{where} has another content")
        index = self._data / FILE_NAME
        if index.is_file():
            try:
                with closing(sqlite3.connect(index)) as connection:
                    sound = connection.execute("PRAGMA integrity_check").fetchone()
            except sqlite3.Error as error:
                raise _refused(self._archive, f"{FILE_NAME}: {error}") from error
            if sound != ("ok",):
                raise _refused(self._archive, f"{FILE_NAME} is damaged")


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _stays_inside(name: str) -> bool:
    """Whether a name is one that a backup gives: relative, and without hidden parts."""
    parts = name.split("/")
    return all(part and not part.startswith(".") and "\0" not in part for part in parts)
