"""Workspaces on disk: models and feeds by content, pairs, runs and what was computed for them.

One folder holds everything, and the web process and its worker use it at the same time. So there
is no index in memory and no lock: a file or folder is completed under a private name in
`temporary/` and then renamed into place, which either happened or did not. What cannot be read
(another program's file, a damaged disk) is left out of the lists and named by
`Workspace.unreadable`.

    models/<sha256>/<file>          private copies of uploaded models
    feeds/<sha256>/<files>          private copies of uploaded feeds
    pairs/<id>/pair.json            a float and a quantized model, and the feeds they are run on
    pairs/<id>/draft.json           exclusions ticked but not applied yet
    pairs/<id>/recipes.json         what each recipe gave, as far as they were tried
    pairs/<id>/search.json          the last search for a list, as far as it got
    pairs/<id>/trials/              every list that a search measured
    runs/<id>/run.json              a recipe, an exclusion list and the headline of what they gave
    runs/<id>/comparison.json       the whole comparison
    runs/<id>/<model file>          the quantized model this run made
    runs/<id>/note.json             what somebody wrote about it
    runs/<id>/details/<hash>.json   what was computed later, on request
    current.json                    the pair on screen
    cache/                          what can be computed again
    temporary/                      unfinished; entries older than a day are removed

Paths inside the folder are kept relative to it: it can be moved. The web process imports this
file, so it needs neither ONNX nor its runtime.

In a portal the workspaces of all users lie beside each other, and what several of them upload is
on disk once: files under `models/` and `feeds/` are hard links to `<data>/blobs/<sha256>`, where
the file system has such links, and copies where not. That is never a way to a file: a link is made
only for bytes that were given completely, and neither sizes nor times tell who else has them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from io import BufferedWriter
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, NoReturn, Self, TypeVar

import platformdirs

from inspector.comparison import Pin
from inspector.errors import QuotaError, ReportError
from inspector.render import format_bytes

BLOCK_BYTES = 1 << 20
TEMPORARY_SECONDS = 24 * 3600
LONGEST_NOTE = 20_000
FEED_KINDS = ("path", "stored", "random")
CPU_PROVIDER = "CPUExecutionProvider"

# The time that every blob has: whose upload was the first is nobody's business. 2000-01-01.
_BLOB_TIME = 946_684_800
_FOLDERS = ("pairs", "runs", "models", "feeds", "cache", "temporary")
_ID = re.compile(r"[0-9a-f-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"|?*]')
# Where records hold paths that may lie inside the workspace.
_PLACES = ("float_model", "quantized_model", "model", "inputs", "calibration")

_log = logging.getLogger(__name__)
_Record = TypeVar("_Record", "PairRecord", "RunRecord")


def default_root() -> Path:
    """`$QUANT_INSPECTOR_DATA` where it is set, else this user's cache folder."""
    chosen = os.environ.get("QUANT_INSPECTOR_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("quant-inspector", appauthor=False)


def new_id() -> str:
    """A fresh id for a pair or a run."""
    return uuid.uuid4().hex


def utc_now() -> str:
    """The time as the records write it: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


# Records.


def _unreadable(where: str, why: str) -> ReportError:
    return ReportError(
        f"{where} is not a readable record: {why}",
        hint="Delete this entry from the workspace's folder and load the models again.",
    )


class _Fields:
    """The checked fields of one JSON object; anything unexpected raises ReportError."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise _unreadable(where, f"it holds {_shown(data)}, expected an object")
        self._data = data
        self._where = where

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if key not in self._data:
            raise _unreadable(self._where, f"{key} is missing")
        value = self._data[key]
        if isinstance(value, bool) or not isinstance(value, kind):
            self.refuse(key, expected)
        return value

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise _unreadable(self._where, f"{key} is {_shown(self._data[key])}, expected {expected}")

    def is_null(self, key: str) -> bool:
        return key in self._data and self._data[key] is None

    def is_there(self, key: str) -> bool:
        """Whether the field is there at all: those of later versions are not in older files."""
        return key in self._data

    def text(self, key: str) -> str:
        return str(self._get(key, str, "text"))

    def integer(self, key: str) -> int:
        return int(self._get(key, int, "a whole number"))

    def number(self, key: str) -> float:
        return float(self._get(key, (int, float), "a number"))

    def mapping(self, key: str) -> dict[str, Any]:
        return dict(self._get(key, dict, "an object"))

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._get(key, (list, tuple), "a list of texts")
        if not all(isinstance(value, str) for value in values):
            self.refuse(key, "a list of texts")
        return tuple(values)

    def mappings(self, key: str) -> tuple[dict[str, Any], ...]:
        values = self._get(key, (list, tuple), "a list of objects")
        if not all(isinstance(value, dict) for value in values):
            self.refuse(key, "a list of objects")
        return tuple(values)

    def id(self, key: str) -> str:
        value = self.text(key)
        if not _ID.fullmatch(value):
            self.refuse(key, "an id of the characters 0-9, a-f and -")
        return value

    def time(self, key: str) -> str:
        value = self.text(key)
        try:
            datetime.fromisoformat(value)
        except ValueError:
            self.refuse(key, "an ISO 8601 time")
        return value

    def model(self, key: str) -> StoredModel:
        return StoredModel.from_json(self.mapping(key), where=f"{key} of {self._where}")

    def feeds(self, key: str) -> FeedSource:
        return FeedSource.from_json(self.mapping(key), where=f"{key} of {self._where}")

    def options(self, key: str) -> PairOptions:
        return PairOptions.from_json(self.mapping(key), where=f"{key} of {self._where}")

    def pairs_of_texts(self, key: str) -> tuple[tuple[str, str], ...]:
        values = self._get(key, (list, tuple), "a list of pairs of texts")
        for value in values:
            whole = isinstance(value, (list, tuple)) and len(value) == 2
            if not whole or not all(isinstance(each, str) for each in value):
                self.refuse(key, "a list of pairs of texts")
        return tuple((first, second) for first, second in values)

    def pins(self, key: str) -> tuple[Pin, ...]:
        found = []
        for at, value in enumerate(self.mappings(key)):
            fields = _Fields(value, f"{key}[{at}] of {self._where}")
            quantized = None
            if not fields.is_null("quantized_name"):
                quantized = fields.text("quantized_name")
            found.append(Pin(float_name=fields.text("float_name"), quantized_name=quantized))
        return tuple(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """A model file that belongs to a workspace.

    Attributes:
        name: the file's name.
        sha256: of the file's bytes; followed by those of its external data once a reader that
            knows their order has set it.
        size_bytes: the file and its external data.
        path: absolute; a private copy in the workspace, or the user's own file in local mode.
    """

    name: str
    sha256: str
    size_bytes: int
    path: Path

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    @classmethod
    def from_json(cls, data: Any, *, where: str = "the model") -> Self:
        """The record in a JSON object.

        Raises:
            ReportError: a field is missing or of another type; `where` names the object.
        """
        fields = _Fields(data, where)
        return cls(
            name=fields.text("name"),
            sha256=fields.text("sha256"),
            size_bytes=fields.integer("size_bytes"),
            path=Path(fields.text("path")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedSource:
    """Where feeds come from.

    Attributes:
        kind: ``"path"`` (the user's file or folder), ``"stored"`` (a private copy) or ``"random"``.
        path: of the file or folder; ``""`` for random feeds.
        preprocess: how pictures become tensors; None where the feeds are tensors already.
        samples: how many to use; None for all.
        seed: of random feeds.
        title: as shown.
    """

    kind: str
    path: str = ""
    preprocess: dict[str, Any] | None = None
    samples: int | None = None
    seed: int = 0
    title: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, *, where: str = "the feed source") -> Self:
        """The record in a JSON object.

        Raises:
            ReportError: a field is missing or of another type; `where` names the object.
        """
        fields = _Fields(data, where)
        if fields.text("kind") not in FEED_KINDS:
            fields.refuse("kind", f"one of {', '.join(FEED_KINDS)}")
        return cls(
            kind=fields.text("kind"),
            path=fields.text("path"),
            preprocess=None if fields.is_null("preprocess") else fields.mapping("preprocess"),
            samples=None if fields.is_null("samples") else fields.integer("samples"),
            seed=fields.integer("seed"),
            title=fields.text("title"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairOptions:
    """How the two models of a pair are run and compared, beyond their feeds.

    Attributes:
        mask: the float model's input whose zeros mark padding; ``""`` for none.
        states: (output, input) pairs of the float model that hand a state from sample to sample.
        device: file or folder of tensors dumped from a device; ``""`` for none.
        provider: ONNX Runtime's name of the execution provider of the deployed run.
        metric: text of the task metric that outputs are judged by as well; ``""`` for none.
    """

    mask: str = ""
    states: tuple[tuple[str, str], ...] = ()
    device: str = ""
    provider: str = CPU_PROVIDER
    metric: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "states": [list(each) for each in self.states]}

    @classmethod
    def from_json(cls, data: Any, *, where: str = "the options") -> Self:
        """The record in a JSON object; fields that are missing have their defaults.

        Raises:
            ReportError: a field is of another type; `where` names the object.
        """
        fields = _Fields({**cls().to_json(), **data} if isinstance(data, dict) else data, where)
        return cls(
            mask=fields.text("mask"),
            states=fields.pairs_of_texts("states"),
            device=fields.text("device"),
            provider=fields.text("provider"),
            metric=fields.text("metric"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecord:
    """A float and a quantized model that were loaded together.

    Attributes:
        quantized_model: None where only a float model was given.
        inputs: what the comparison runs on.
        calibration: what ranges are observed on; None for the first half of `inputs`.
        created: ISO 8601, UTC.
        options: how they are run and compared; files of earlier versions lack it.
    """

    id: str
    title: str
    float_model: StoredModel
    quantized_model: StoredModel | None
    inputs: FeedSource
    calibration: FeedSource | None
    created: str
    options: PairOptions = PairOptions()

    def to_json(self) -> dict[str, Any]:
        quantized, calibration = self.quantized_model, self.calibration
        return {
            "id": self.id,
            "title": self.title,
            "float_model": self.float_model.to_json(),
            "quantized_model": None if quantized is None else quantized.to_json(),
            "inputs": self.inputs.to_json(),
            "calibration": None if calibration is None else calibration.to_json(),
            "created": self.created,
            "options": self.options.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str = "the pair") -> Self:
        """The record in a JSON object.

        Raises:
            ReportError: a field is missing or of another type; `where` names the object.
        """
        fields = _Fields(data, where)
        return cls(
            id=fields.id("id"),
            title=fields.text("title"),
            float_model=fields.model("float_model"),
            quantized_model=(
                None if fields.is_null("quantized_model") else fields.model("quantized_model")
            ),
            inputs=fields.feeds("inputs"),
            calibration=None if fields.is_null("calibration") else fields.feeds("calibration"),
            created=fields.time("created"),
            options=fields.options("options") if fields.is_there("options") else PairOptions(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A recipe plus an exclusion list, and what they gave.

    Attributes:
        number: 0 is the loaded file.
        recipe: options of the quantizer, spelled as on the command line.
        exclusions: names of nodes in the float file.
        model: the quantized model.
        created: ISO 8601, UTC.
        parent: id of the run this one was changed from.
        seconds: how long it took.
        summary: headline numbers; non-finite ones as strings.
        effects: what each exclusion, and each type set for a tensor, really changed.
        pins: matches set by hand, in effect when it was last compared; files of earlier versions
            lack them.
    """

    id: str
    pair_id: str
    number: int
    title: str
    recipe: dict[str, Any]
    exclusions: tuple[str, ...]
    model: StoredModel
    created: str
    parent: str | None
    seconds: float
    summary: dict[str, Any]
    effects: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    pins: tuple[Pin, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "model": self.model.to_json()}

    @classmethod
    def from_json(cls, data: Any, *, where: str = "the run") -> Self:
        """The record in a JSON object.

        Raises:
            ReportError: a field is missing or of another type; `where` names the object.
        """
        fields = _Fields(data, where)
        return cls(
            id=fields.id("id"),
            pair_id=fields.id("pair_id"),
            number=fields.integer("number"),
            title=fields.text("title"),
            recipe=fields.mapping("recipe"),
            exclusions=fields.texts("exclusions"),
            model=fields.model("model"),
            created=fields.time("created"),
            parent=None if fields.is_null("parent") else fields.id("parent"),
            seconds=fields.number("seconds"),
            summary=fields.mapping("summary"),
            effects=fields.mappings("effects"),
            notes=fields.texts("notes"),
            pins=fields.pins("pins") if fields.is_there("pins") else (),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What somebody wrote about a run.

    Attributes:
        text: as written, with its lines.
        by: the writer's address; "" in local mode.
        written: ISO 8601, UTC.
    """

    text: str
    by: str
    written: str


# The keys under which the times of a run's nodes are kept, what each costs, and what is wrong.
PROFILE_KEY = "profile"
SENSITIVITY_KEY = "sensitivity"
FINDINGS_KEY = "findings"


def made_by_surgery(run: RunRecord) -> bool:
    """Its file is the loaded one with nodes freed, and not made by its recipe."""
    return run.summary.get("way") == "surgery"


def isolation_measured(run: RunRecord) -> bool:
    """Its comparison was made with isolated and added errors, whether or not there are any."""
    return run.summary.get("isolated") is True


def detail_key(kind: str, tensor: str, quantized_name: str) -> str:
    """The key under which one pair's values are kept: another partner has other values."""
    return f"{kind}:{tensor}={quantized_name}"


# Files.


def safe_name(name: str) -> str:
    """A file name without path parts, control characters or leading dots, at most 200 bytes.

    Spaces and letters of any script stay: a model finds its external data by name.
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    last = _UNSAFE.sub("_", last).strip(". ")
    stem, dot, suffix = last.rpartition(".")
    if not dot:
        stem, suffix = last, ""
    ending = (dot + suffix).encode("utf-8", "replace")[:40]
    kept = stem.encode("utf-8", "replace")[: 200 - len(ending)] + ending
    return kept.decode("utf-8", "ignore") or "file"


def _safe_path(name: str) -> Path:
    """A relative path whose parts are all safe names; it never leaves the folder it is put in."""
    parts = [part for part in name.replace("\\", "/").split("/") if part.strip(". ")]
    return Path(*(safe_name(part) for part in parts or [name]))


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(source, Path):
        if source.seekable():
            source.seek(0)
        yield source
        return
    try:
        reader = source.open("rb")
    except OSError as error:
        raise ReportError(
            f"{source} cannot be read: {error.strerror}",
            hint="Check the path, its spelling and its permissions.",
        ) from error
    with reader:
        yield reader


def _copy(source: Path | BinaryIO, target: Path, *, move: bool = False) -> tuple[str, int]:
    """The sha256 and size of what was copied; an open file is read from its start.

    Args:
        source: a file's path, or an open binary file.
        target: that does not exist yet.
        move: where it can be done, the source becomes the target, and nothing is copied.
    """
    # Not a link: what it leads to is not the caller's to give away.
    moved = move and isinstance(source, Path) and not source.is_symlink() and _moved(source, target)
    digest, size = hashlib.sha256(), 0
    if moved:
        with target.open("rb+") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
            os.fsync(file.fileno())
        return digest.hexdigest(), size
    with _opened(source) as reader, open(target, "xb", opener=_private) as writer:
        while block := reader.read(BLOCK_BYTES):
            writer.write(block)
            digest.update(block)
            size += len(block)
        _sync(writer)
    if move and isinstance(source, Path):
        source.unlink(missing_ok=True)
    return digest.hexdigest(), size


def _moved(source: Path, target: Path) -> bool:
    try:
        os.rename(source, target)
    except OSError:  # another disk, or no such file, which the copy says better
        return False
    target.chmod(0o600)
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(writer: BufferedWriter) -> None:
    writer.flush()
    os.fsync(writer.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise ReportError(
            f"{what} cannot be stored: {error.strerror or error}{file}",
            hint="Free disk space or set QUANT_INSPECTOR_DATA to a folder you may write to.",
        ) from error


def _is_older(entry: Path, seconds: float) -> bool:
    """Whether a file, or a folder with all that lies directly in it, was last changed so long ago.

    False where it is gone.
    """
    try:
        inside = entry.iterdir() if entry.is_dir() and not entry.is_symlink() else ()
        latest: float = max(each.lstat().st_mtime for each in (entry, *inside))
    except FileNotFoundError:
        return False
    return time.time() - latest > seconds


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not JSON")


class Workspace:
    """Everything one user loaded and computed, in one folder.

    Attributes:
        root: the folder; made when it does not exist.
        cache: a folder for what can be computed again.

    Raises:
        ReportError: an id that does not exist, an entry that cannot be read, or a folder that
            cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.cache = self.root / "cache"
        self._blobs: Path | None = None
        with _writing("the workspace"):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_folders()
        if self.root.parent.name == "users" and re.fullmatch(r"[0-9a-f]{32}", self.root.name):
            blobs = self.root.parents[1] / "blobs"
            with suppress(OSError):
                blobs.mkdir(exist_ok=True, mode=0o700)
                self._blobs = blobs
        self._sweep()

    def _make_folders(self) -> None:
        for name in _FOLDERS:
            (self.root / name).mkdir(exist_ok=True, mode=0o700)

    def _temporary(self) -> Path:
        """A new name in `temporary/`, which is there also where the workspace had expired."""
        if not (self.root / "temporary").is_dir():
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_folders()
        return self.root / "temporary" / new_id()

    def _sweep(self) -> None:
        """Removes what processes that were killed left behind."""
        for entry in (self.root / "temporary").iterdir():
            if _is_older(entry, TEMPORARY_SECONDS):
                _remove(entry)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the workspace's own disk, removed at the end."""
        with _writing("a temporary folder"):
            folder = self._temporary()
            folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def size_bytes(self) -> int:
        """What the workspace's files hold, each file once however often it is linked.

        Counted is all but `cache/`, which can be removed at any time; unfinished files count. A
        file that other users have as well counts in full, for each of them: what one may store
        does not depend on the others.
        """
        total, seen = 0, set()
        folders = [str(self.root)]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != "cache" or folder != str(self.root):
                            folders.append(entry.path)
                        continue
                    with suppress(FileNotFoundError):  # finished or removed meanwhile
                        facts = entry.stat(follow_symlinks=False)
                        if facts.st_nlink > 1:
                            if (facts.st_dev, facts.st_ino) in seen:
                                continue
                            seen.add((facts.st_dev, facts.st_ino))
                        total += facts.st_size
        return total

    # Models and feeds.

    def add_model(self, source: Path | BinaryIO, name: str, *, move: bool = False) -> StoredModel:
        """A private copy of a model without external data, kept by its sha256.

        Args:
            source: a file's path, or an open binary file (read from its start, in blocks).
            name: as the user calls the file; only its last part is used.
            move: the file is taken instead of copied: it is gone afterwards, and has to be one
                that nobody writes to any more. Takes no time on the workspace's own disk.
        """
        name = safe_name(name)
        with self.scratch() as scratch, _writing(name):
            sha256, size = _copy(source, scratch / name, move=move)
            self._deduplicate(scratch / name, sha256)
            path = self.root / "models" / sha256 / name
            path.parent.mkdir(exist_ok=True, mode=0o700)
            if path.exists():
                os.utime(path.parent)  # used again, however old it is
            else:
                self._publish(scratch / name, path)
        return StoredModel(name=name, sha256=sha256, size_bytes=size, path=path)

    def add_model_files(
        self, files: Mapping[str, Path | BinaryIO], main: str, *, move: bool = False
    ) -> StoredModel:
        """A private copy of a model with its external data, kept by their contents and names.

        The record's `sha256` is that of the main file alone: the order of the external data is
        known only to who reads the model.

        Args:
            files: sources by name, relative to the model's folder.
            main: the key of the model file in `files`.
            move: see `add_model`.
        """
        if main not in files:
            raise ValueError(f"{main!r} is not one of the files: {', '.join(files)}")
        folder, digests = self._add_folder("models", files, move=move)
        return StoredModel(
            name=safe_name(main),
            sha256=digests[main][0],
            size_bytes=sum(size for _, size in digests.values()),
            path=folder / _safe_path(main),
        )

    def add_feeds(self, files: Mapping[str, Path | BinaryIO], *, move: bool = False) -> Path:
        """The folder that holds private copies of the files, kept by their contents and names.

        Args:
            files: sources by name. Sub-folders (``test_data_set_0/input_0.pb``) are kept; a name
                cannot lead out of the folder.
            move: see `add_model`.
        """
        return self._add_folder("feeds", files, move=move)[0]

    def _add_folder(
        self, kind: str, files: Mapping[str, Path | BinaryIO], *, move: bool
    ) -> tuple[Path, dict[str, tuple[str, int]]]:
        if not files:
            raise ValueError("no files were given")
        digests: dict[str, tuple[str, int]] = {}
        contents: dict[str, str] = {}
        with self.scratch() as scratch:
            made = scratch / "files"
            made.mkdir(mode=0o700)
            for name, source in files.items():
                target = _safe_path(name)
                with _writing(name):
                    (made / target).parent.mkdir(parents=True, exist_ok=True)
                    if (made / target).exists():
                        raise ReportError(
                            f"two of the files are called {target.as_posix()}",
                            hint="Rename one of them.",
                        )
                    digests[name] = _copy(source, made / target, move=move)
                    self._deduplicate(made / target, digests[name][0])
                contents[target.as_posix()] = digests[name][0]
            key = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
            folder = self.root / kind / key
            with _writing(f"{len(files)} files"):
                self._publish(made, folder, same_content=True)
                os.utime(folder)  # used again, however old it is
        return folder, digests

    def _deduplicate(self, file: Path, sha256: str) -> None:
        """Makes a file of a scratch folder one with what the data folder has of the same content.

        Whatever another process does meanwhile, and wherever this one is killed, the file is whole
        and blobs hold what their name says. Where a link cannot be made, the file stays a copy.
        """
        if self._blobs is None:
            return
        blob, twin = self._blobs / sha256, file.with_name(f".{new_id()}")
        try:
            size = file.stat().st_size
            os.utime(file, (_BLOB_TIME, _BLOB_TIME))
            if os.name == "posix":  # elsewhere nobody could delete it any more
                file.chmod(0o444)
            try:
                os.link(file, blob)
            except FileExistsError:
                if blob.stat().st_size == size:
                    os.link(blob, twin)
                    os.replace(twin, file)
                else:  # a damaged disk
                    os.link(file, twin)
                    os.replace(twin, blob)
        except OSError as error:
            # No such links here, too many of them, or the blob was tidied away just now.
            _log.debug("%s stays a copy: %s", sha256, error)
        finally:
            twin.unlink(missing_ok=True)

    def _publish(self, made: Path, target: Path, *, same_content: bool = False) -> None:
        """Renames a finished file or folder into place.

        A folder that is there already stays; it counts as this one where names follow content.
        """
        for folder in (made, *made.rglob("*")):
            if folder.is_dir():
                _sync_folder(folder)
        try:
            os.replace(made, target)
        except OSError:
            if not (same_content and target.is_dir()):
                raise
        _sync_folder(target.parent)

    def tidy(self) -> None:
        """Removes what nothing leads to any more.

        That are temporary files, models and feeds that no pair or run names (of a pair that failed
        to load), all untouched for a day, and the runs of pairs that are gone. Where a record
        cannot be read, models and feeds stay: nobody knows what it names.
        """
        self._sweep()
        runs, _ = self._listed(RunRecord, "run")
        for run in runs:
            if not (self.root / "pairs" / run.pair_id).exists():
                self._discard([self.root / "runs" / run.id])
        entries = [entry for kind in ("models", "feeds") for entry in self._entries(kind)]
        old = [entry for entry in entries if _is_older(entry, TEMPORARY_SECONDS)]
        self._discard_unused(old)

    def _entries(self, kind: str) -> list[Path]:
        try:
            return sorted((self.root / kind).iterdir())
        except FileNotFoundError:  # the workspace had expired
            return []

    def _used(self) -> set[Path] | None:
        """The entries of `models/` and `feeds/` that pairs and runs name; None if not known."""
        pairs, unreadable_pairs = self._listed(PairRecord, "pair")
        runs, unreadable_runs = self._listed(RunRecord, "run")
        if unreadable_pairs or unreadable_runs:
            return None
        found = {entry for pair in pairs for entry in self._named_by(pair)}
        return found | {entry for run in runs for entry in self._entry_of(str(run.model.path))}

    def _named_by(self, pair: PairRecord) -> set[Path]:
        """The entries of `models/` and `feeds/` that a pair names."""
        models = (each for each in (pair.float_model, pair.quantized_model) if each is not None)
        feeds = (each for each in (pair.inputs, pair.calibration) if each is not None)
        paths = [*(str(m.path) for m in models), *(f.path for f in feeds), pair.options.device]
        return {entry for path in paths for entry in self._entry_of(path)}

    def _entry_of(self, path: str) -> list[Path]:
        """The entry of `models/` or `feeds/` that a path lies in; [] where it lies elsewhere."""
        inside = Path(path).is_relative_to(self.root) if path else False
        kind, name, *_ = (*(Path(path).relative_to(self.root).parts if inside else ()), "", "")
        named = kind in ("models", "feeds") and _SHA256.fullmatch(name)
        return [self.root / kind / name] if named else []

    def _discard(self, entries: Sequence[Path]) -> None:
        """Removes files or folders; each vanishes all at once, in the order given.

        Nothing is made for it, so that a full disk can be emptied.
        """
        aside = []
        with _writing("the removal"):
            try:
                for entry in entries:
                    with suppress(FileNotFoundError):  # somebody else was quicker
                        name = self._temporary()
                        os.replace(entry, name)
                        aside.append(name)
            finally:
                self._wipe(aside)

    def _discard_unused(self, entries: Sequence[Path]) -> None:
        """Removes those of some entries of `models/` and `feeds/` that no pair or run names."""
        used = self._used() if entries else None
        if used is None:
            return
        for entry in entries:
            if entry in used:
                continue
            aside = self._temporary()
            with _writing("the removal"), suppress(FileNotFoundError):
                os.replace(entry, aside)
                # A pair that was saved since `used` was looked up may name it: see `save_pair`.
                now = self._used()
                if now is None or entry in now:
                    self._publish(aside, entry, same_content=True)
                self._wipe([aside])

    def _wipe(self, entries: Sequence[Path]) -> None:
        """Removes what was set aside, with the blobs that nobody else has.

        Blobs that a killed process leaves are removed by `housekeeping`.
        """
        inodes: set[int] = set()
        for entry in entries:
            if self._blobs is not None:
                facts = [file.lstat() for file in entry.rglob("*")]
                inodes.update(f.st_ino for f in facts if S_ISREG(f.st_mode) and f.st_nlink > 1)
            _remove(entry)
        if self._blobs is None or not inodes:
            return
        with os.scandir(self._blobs) as blobs:
            for blob in blobs:
                # Whoever links it at this very moment keeps the file, without the blob.
                with suppress(FileNotFoundError):
                    if blob.inode() in inodes and os.lstat(blob.path).st_nlink == 1:
                        os.unlink(blob.path)

    def delete_everything(self) -> None:
        """Removes all pairs, models, feeds, runs and what can be computed again.

        The workspace stays usable, and jobs under way end with an error. What is unfinished in
        `temporary/` stays with those who work on it.
        """
        # The folders stay for others; pairs go first: without them nothing leads to the rest.
        for kind in _FOLDERS:
            if kind != "temporary":
                self._discard(self._entries(kind))
        self._discard([entry for entry in self.root.iterdir() if entry.name not in _FOLDERS])

    # Pairs.

    def save_pair(self, pair: PairRecord) -> None:
        """Saves a pair, or replaces the one of the same id.

        Raises:
            ReportError: also where one of its models or feeds was deleted meanwhile.
        """
        path = self._file("pair", pair.id)
        new = not path.parent.exists()
        if new:
            with self.scratch() as scratch, _writing(f"pair {pair.id}"):
                made = scratch / pair.id
                made.mkdir(mode=0o700)
                self._write_json(made / "pair.json", self._portable(pair.to_json()))
                self._publish(made, path.parent)
        else:
            self._write_json(path, self._portable(pair.to_json()))
        # Only now: whoever deletes them has seen this pair, or this sees that they are gone.
        lost = [entry for entry in self._named_by(pair) if not entry.exists()]
        if lost:
            if new:
                self._discard([path.parent])
            raise ReportError(
                f"a model or feeds of {pair.title} were deleted while it was loaded",
                hint="Load the models and their inputs again.",
            )

    def delete_pair(self, pair_id: str) -> None:
        """Removes a pair with its runs, and the models and feeds that no other pair needs.

        The pair vanishes all at once, and a job that still works on it ends with an error. Where
        some other record cannot be read, models and feeds stay until it is gone: it may name them.
        """
        path = self._existing("pair", pair_id)
        try:
            own = self._named_by(self._record(PairRecord, path))
        except ReportError:
            own = set()
        self._discard([path.parent])
        runs, _ = self._listed(RunRecord, "run")
        mine = [run for run in runs if run.pair_id == pair_id]
        self._discard([self.root / "runs" / run.id for run in mine])
        own |= {entry for run in mine for entry in self._entry_of(str(run.model.path))}
        self._discard_unused(sorted(own))

    def pair(self, pair_id: str) -> PairRecord:
        return self._record(PairRecord, self._existing("pair", pair_id))

    def pairs(self) -> tuple[PairRecord, ...]:
        """All readable pairs, newest first."""
        found, _ = self._listed(PairRecord, "pair")
        return tuple(sorted(found, key=lambda pair: (pair.created, pair.id), reverse=True))

    def draft(self, pair_id: str) -> dict[str, Any]:
        """What was ticked but not applied; empty where nothing was."""
        return self._optional(self._existing("pair", pair_id).with_name("draft.json")) or {}

    def save_draft(self, pair_id: str, draft: Mapping[str, Any]) -> None:
        self._write_json(self._existing("pair", pair_id).with_name("draft.json"), dict(draft))

    def recipes(self, pair_id: str) -> dict[str, Any]:
        """The table of recipes as far as it was tried; empty where none was."""
        return self._optional(self._existing("pair", pair_id).with_name("recipes.json")) or {}

    def save_recipes(self, pair_id: str, table: Mapping[str, Any]) -> None:
        """Replaces a pair's table of recipes: strict JSON."""
        self._write_json(self._existing("pair", pair_id).with_name("recipes.json"), dict(table))

    def search(self, pair_id: str) -> dict[str, Any]:
        """The last search for a list as far as it got; empty where there was none."""
        return self._optional(self._existing("pair", pair_id).with_name("search.json")) or {}

    def save_search(self, pair_id: str, found: Mapping[str, Any]) -> None:
        """Replaces a pair's search: strict JSON."""
        self._write_json(self._existing("pair", pair_id).with_name("search.json"), dict(found))

    def trials_folder(self, pair_id: str) -> Path:
        """Where searches of a pair keep their trials; made where there is none."""
        folder = self._existing("pair", pair_id).with_name("trials")
        with self._writing_of(folder, "trials"):
            folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def current_pair(self) -> str | None:
        """The id of the pair on screen; None where none was chosen or it is gone."""
        data = self._optional(self.root / "current.json") or {}
        pair_id = data.get("pair_id")
        if not isinstance(pair_id, str) or not _ID.fullmatch(pair_id):
            return None
        return pair_id if self._file("pair", pair_id).is_file() else None

    def set_current_pair(self, pair_id: str) -> None:
        self._existing("pair", pair_id)
        self._write_json(self.root / "current.json", {"pair_id": pair_id})

    # Runs.

    def save_run(
        self,
        run: RunRecord,
        comparison: Mapping[str, Any],
        model_file: Path | None = None,
        *,
        external_data: Sequence[Path] = (),
    ) -> RunRecord:
        """The run as saved, which happens all at once or not at all.

        Args:
            run: of an id that is not in use; its pair was saved before.
            comparison: strict JSON.
            model_file: the quantized model, copied into the run's folder; the returned record's
                `model.path` points there. None leaves `run.model.path` as it is.
            external_data: files beside `model_file` that belong to it.
        """
        path = self._file("run", run.id)
        if path.exists():
            raise ReportError(
                f"there is a run {run.id} already", hint="Save the run under a new id."
            )
        self._existing("pair", run.pair_id)
        with self.scratch() as scratch, _writing(f"run {run.id}"):
            made = scratch / run.id
            made.mkdir(mode=0o700)
            (made / "details").mkdir(mode=0o700)
            if model_file is not None:
                name = safe_name(run.model.name)
                if name in ("run.json", "comparison.json", "note.json", "details"):
                    name = f"{name}.onnx"
                _copy(model_file, made / name)
                for file in external_data:
                    _copy(file, made / file.name)
                run = replace(run, model=replace(run.model, path=path.parent / name))
            self._write_json(made / "run.json", self._portable(run.to_json()))
            self._write_json(made / "comparison.json", dict(comparison))
            self._publish(made, path.parent)
        # Only now: whoever deletes the pair has seen this run, or this sees that the pair is gone.
        if not self._file("pair", run.pair_id).is_file():
            self._discard([path.parent])
            self._existing("pair", run.pair_id)
        return run

    def replace_comparison(self, run: RunRecord, comparison: Mapping[str, Any]) -> None:
        """Replaces a saved run's comparison and record, e.g. after a match was set by hand.

        Each of the two files is whole at any time. The comparison goes first and names its own
        pins, so after a crash between the two the figures still say what they rest on.

        Args:
            run: the record to keep from now on; its id is that of a saved run.
            comparison: strict JSON.
        """
        path = self._existing("run", run.id)
        self._write_json(path.with_name("comparison.json"), dict(comparison))
        self._write_json(path, self._portable(run.to_json()))

    def run(self, run_id: str) -> RunRecord:
        return self._record(RunRecord, self._existing("run", run_id))

    def runs(self, pair_id: str) -> tuple[RunRecord, ...]:
        """The readable runs of a pair by number."""
        self._existing("pair", pair_id)
        found, _ = self._listed(RunRecord, "run")
        mine = (run for run in found if run.pair_id == pair_id)
        return tuple(sorted(mine, key=lambda run: (run.number, run.created)))

    def claim_number(self, pair_id: str) -> int:
        """The number of the pair's next run, which nobody else gets.

        It is taken for good: whoever makes a run at the same moment gets the next one, and one
        whose run was never saved, or was deleted, stays out of use.
        """
        taken = self._existing("pair", pair_id).with_name("numbers")
        number = max((run.number for run in self.runs(pair_id)), default=0)
        with self._writing_of(taken, "the number of a run"):
            taken.mkdir(exist_ok=True, mode=0o700)
            while True:
                number += 1
                with suppress(FileExistsError):
                    (taken / str(number)).touch(0o600, exist_ok=False)
                    return number

    def comparison(self, run_id: str) -> dict[str, Any]:
        return self._read_json(self._existing("run", run_id).with_name("comparison.json"))

    def comparison_stamp(self, run_id: str) -> tuple[int, int]:
        """What changes when a run is compared anew: time and size of its comparison."""
        path = self._existing("run", run_id).with_name("comparison.json")
        try:
            facts = path.stat()
        except OSError as error:
            where = path.relative_to(self.root).as_posix()
            raise _unreadable(where, error.strerror or str(error)) from error
        return facts.st_mtime_ns, facts.st_size

    def has_run(self, pair_id: str, run_id: str) -> bool:
        """Whether neither the run nor its pair was deleted."""
        return self._file("pair", pair_id).is_file() and self._file("run", run_id).is_file()

    def run_folder(self, run_id: str) -> Path:
        return self._existing("run", run_id).parent

    def delete_run(self, run_id: str) -> None:
        """Removes a run with its model; its files vanish all at once."""
        self._discard([self.run_folder(run_id)])

    def note(self, run_id: str) -> Note | None:
        """What was written about a run; None where nothing was."""
        kept = self._optional(self._existing("run", run_id).with_name("note.json")) or {}
        texts = [kept.get(key) for key in ("text", "by", "written")]
        text, by, written = (each if isinstance(each, str) else "" for each in texts)
        return Note(text=text, by=by, written=written) if text else None

    def save_note(self, run_id: str, text: str, by: str) -> None:
        """Replaces what was written about a run; an empty text takes it away.

        Args:
            run_id: the run.
            text: at most 20,000 characters.
            by: the writer's address; "" in local mode.
        """
        if len(text) > LONGEST_NOTE:
            raise ReportError(
                f"the note has {len(text)} characters, expected at most {LONGEST_NOTE}",
                hint="Shorten the note.",
            )
        path = self._existing("run", run_id).with_name("note.json")
        note = Note(text=text.strip(), by=by, written=utc_now())
        self._write_json(path, asdict(note))

    def detail(self, run_id: str, key: str) -> dict[str, Any] | None:
        """What `write_detail` kept under this key; None where it has to be computed."""
        kept = self._optional(self._detail_file(run_id, key))
        if kept is None or kept.get("key") != key or not isinstance(kept.get("detail"), dict):
            return None
        return dict(kept["detail"])

    def write_detail(self, run_id: str, key: str, detail: Mapping[str, Any]) -> None:
        """Keeps what was computed for a run.

        Args:
            key: any text, e.g. with a tensor's name in it.
            detail: strict JSON.
        """
        self._write_json(self._detail_file(run_id, key), {"key": key, "detail": dict(detail)})

    def _detail_file(self, run_id: str, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self.run_folder(run_id) / "details" / f"{name}.json"

    def unreadable(self) -> tuple[ReportError, ...]:
        """Why each entry that the lists leave out cannot be read."""
        return (*self._listed(PairRecord, "pair")[1], *self._listed(RunRecord, "run")[1])

    # Records and JSON on disk.

    def _file(self, kind: str, entry_id: str) -> Path:
        if not _ID.fullmatch(entry_id):
            raise ReportError(
                f"{_shown(entry_id)} is not the id of a {kind}, expected the characters "
                "0-9, a-f and -",
                hint="Open the page from its link or choose an entry from the list.",
            )
        return self.root / f"{kind}s" / entry_id / f"{kind}.json"

    def _existing(self, kind: str, entry_id: str) -> Path:
        path = self._file(kind, entry_id)
        if not path.is_file():
            raise ReportError(
                f"there is no {kind} {entry_id} in this workspace",
                hint="Open the latest run, or load the models again.",
            )
        return path

    @contextmanager
    def _writing_of(self, path: Path, what: str) -> Iterator[None]:
        """Tells a folder that was deleted meanwhile from one that cannot be written."""
        try:
            with _writing(what):
                yield
        except ReportError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not path.parent.is_dir():
                raise ReportError(
                    f"{what} cannot be kept: what it belongs to was deleted meanwhile",
                    hint="Open the latest run, or load the models again.",
                ) from error
            raise

    def _listed(self, kind: type[_Record], name: str) -> tuple[list[_Record], list[ReportError]]:
        records, refused = [], []
        for folder in self._entries(f"{name}s"):
            try:
                records.append(self._record(kind, folder / f"{name}.json"))
            except ReportError as error:
                refused.append(error)
        return records, refused

    def _record(self, kind: type[_Record], path: Path) -> _Record:
        where = path.relative_to(self.root).as_posix()
        record = kind.from_json(self._local(self._read_json(path)), where=where)
        if record.id != path.parent.name:
            raise _unreadable(where, f"id is {record.id}, expected its folder's name")
        return record

    def _portable(self, data: dict[str, Any]) -> dict[str, Any]:
        """The record with paths inside the workspace relative to it."""

        def relative(path: str) -> str:
            inside = Path(path).is_relative_to(self.root)
            return Path(path).relative_to(self.root).as_posix() if inside else path

        return _with_paths(data, relative)

    def _local(self, data: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `_portable`."""
        return _with_paths(data, lambda path: str(self.root / path) if path else path)

    def _read_json(self, path: Path) -> dict[str, Any]:
        where = path.relative_to(self.root).as_posix()
        try:
            data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        except OSError as error:
            raise _unreadable(where, error.strerror or str(error)) from error
        except (ValueError, RecursionError) as error:
            raise _unreadable(where, str(error)) from error
        if not isinstance(data, dict):
            raise _unreadable(where, f"it holds {_shown(data)}, expected an object")
        return data

    def _optional(self, path: Path) -> dict[str, Any] | None:
        """The object in a file whose loss costs little; None where it is missing or unreadable."""
        try:
            return self._read_json(path)
        except ReportError:
            return None

    def _write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        try:
            text = json.dumps(data, allow_nan=False)
        except ValueError as error:
            raise ReportError(
                f"{path.name} would hold NaN or infinity: {error}",
                hint='Write non-finite numbers as "NaN", "Infinity" or "-Infinity".',
            ) from error
        with self._writing_of(path, path.name):
            temporary = self._temporary()
            try:
                with open(temporary, "xb", opener=_private) as writer:
                    writer.write(text.encode("ascii"))
                    _sync(writer)
                os.replace(temporary, path)
                _sync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def _with_paths(data: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    changed = dict(data)
    for place in _PLACES:
        part = data.get(place)
        if isinstance(part, dict) and isinstance(part.get("path"), str):
            changed[place] = {**part, "path": change(part["path"])}
    return changed


def check_quota(workspace: Workspace, quota_bytes: int, more_bytes: int = 0) -> None:
    """Refuses what would not fit any more into what one user may store.

    Args:
        workspace: the user's.
        quota_bytes: `Settings.quota_bytes`.
        more_bytes: what is about to be stored.

    Raises:
        QuotaError: the workspace would hold more than the quota.
    """
    used = workspace.size_bytes()
    if used + more_bytes <= quota_bytes:
        return
    more = f", and {format_bytes(more_bytes)} more do not fit" if more_bytes else ""
    raise QuotaError(
        f"your workspace holds {format_bytes(used)} of the {format_bytes(quota_bytes)} that one "
        f"user may store{more}",
        hint="Delete pairs or runs that you no longer need.",
    )
