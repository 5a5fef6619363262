"""Trials and recipes on a Dask cluster: models and feeds travel once per worker, by content hash.

Apart from `trials` and `recipe_table`, which decide what is run and what it means: here is only
where it runs. The caller opens everything once, as without a cluster, and sends what took work
(the prepared model, the ranges) along with models and feeds. A worker opens the same `Trials` from
these parts, keeps them open, and answers with sums, which the caller keeps as they come.

So the app's own worker process (`jobs`) stays what it is: a job there drives the cluster, and its
progress, cancelling and results are those of any job. What the caller holds is never lost with a
worker: Dask gives a task of a worker that ended to another, which is sent the parts it lacks.

Dask pickles a few lines of ours that find a function of this module by its name, so that the
scheduler needs nothing of it, and arguments, which are plain text, numbers and bytes. Models are
opened by `load_model` and arrays by `np.load` without pickles, as any other file. Who can reach the
scheduler can run code on all machines of a cluster: that is Dask's design.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import queue
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from inspector.arrays import CODED_DTYPES, Arrays, Samples
from inspector.calibration import calibrate
from inspector.comparison import Pin
from inspector.errors import InspectorError, RunError
from inspector.feeds import CalibrationSplit, Feeds
from inspector.model import Model, shown
from inspector.model_files import load_model, save_model
from inspector.prepare import prepare
from inspector.quantizer import UnplannableError
from inspector.recipe import QuantConfig
from inspector.recipe_table import Elsewhere as RecipesElsewhere
from inspector.recipe_table import RecipeResult, RecipeRow, recipe_trier, shared_percentile
from inspector.runtime import CPU, THREADS_VARIABLE, Progress, no_progress, part_of
from inspector.states import States
from inspector.task_metrics import METRICS, TaskMetric, comparable_outputs, parse_metric
from inspector.trials import LostError, Request, Sums, Trials, open_trials

CLUSTER_VARIABLE = "QUANT_INSPECTOR_CLUSTER"
CONNECT_SECONDS = 5.0
NOT_TIMED = "it was tried on a cluster, whose workers are not timed"
# Workers that end are started again by their nannies within a few seconds.
GONE_SECONDS = 30.0
_TICK_SECONDS = 0.2
_CHUNK_BYTES = 16 * 2**20
# So many workers that lack their parts may one task meet: a worker that ended is back without them.
_SENDINGS = 3
# Of a worker's memory limit: what may be taken before one more bench is opened, and from where on
# Dask gives it no more tasks (its own default).
_ROOM, _PAUSED = 0.4, 0.8
_KEPT_BENCHES = 4
# What figures depend on.
_PACKAGES = ("quant-inspector", "onnxruntime", "onnx", "numpy")
_ADDRESS = re.compile(r"[a-z]+://\S+:[0-9]{1,5}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def cluster_address() -> str:
    """`$QUANT_INSPECTOR_CLUSTER`, the scheduler that heavy work is sent to; "" for none."""
    return os.environ.get(CLUSTER_VARIABLE, "")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


# -- parts that travel -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What a worker needs to measure as the caller does.

    Attributes:
        digest: of the description, which names all other parts by theirs.
        blobs: the files with these contents, by SHA-256.
    """

    digest: str
    blobs: Mapping[str, Path]


class _Packer:
    """Puts parts into files of a folder under the digest of their content."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.blobs: dict[str, Path] = {}

    def bytes(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.blobs:
            path = self._folder / digest
            path.write_bytes(content)
            self.blobs[digest] = path
        return digest

    def file(self, path: Path) -> str:
        with path.open("rb") as reader:
            digest = hashlib.file_digest(reader, "sha256").hexdigest()
        self.blobs.setdefault(digest, path)
        return digest

    def model(self, model: Model) -> dict[str, Any]:
        """A model's private copy, whose nodes have the names that lists use."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        name = re.sub(r"[^\w.-]", "_", model.name, flags=re.ASCII).lstrip(".")[-100:] or "model"
        save_model(model, folder / name)
        return {
            "name": name,
            "sha256": model.sha256,
            "size_bytes": model.size_bytes,
            "files": {path.name: self.file(path) for path in sorted(folder.iterdir())},
        }

    def feeds(self, feeds: Feeds) -> dict[str, Any]:
        samples = []
        for feed in feeds:
            content, layout = _packed(feed)
            samples.append({"blob": self.bytes(content), "arrays": layout})
        return {
            "samples": samples,
            "names": list(feeds.names),
            "rows": list(feeds.rows),
            "labels": None if feeds.labels is None else list(feeds.labels),
            "random": feeds.random,
        }

    def bench(self, kind: str, **told: Any) -> Bench:
        """All parts, with a description of what they are."""
        told |= {"kind": kind, "versions": _versions()}
        digest = self.bytes(json.dumps(told, sort_keys=True).encode())
        return Bench(digest=digest, blobs=self.blobs)


def _packed(feed: Arrays) -> tuple[bytes, list[list[str]]]:
    """One sample as .npy files in a row, and (input, element type) of each."""
    import io

    stream, layout = io.BytesIO(), []
    for name, array in feed.items():
        kind = array.dtype.name
        if array.dtype.hasobject:
            # Texts: no pickles.
            kind = "string"
            text = json.dumps([list(array.shape), array.reshape(-1).tolist()])
            array = np.frombuffer(text.encode(), np.uint8)
        np.save(stream, array, allow_pickle=False)
        layout.append([name, kind])
    return stream.getvalue(), layout


def _unpacked(path: Path, layout: Sequence[Sequence[str]]) -> Arrays:
    """What `_packed` was given."""
    import ml_dtypes

    feed: Arrays = {}
    with path.open("rb") as reader:
        for name, kind in layout:
            array = np.load(reader, allow_pickle=False)
            if kind == "string":
                shape, texts = json.loads(array.tobytes())
                array = np.array(texts, object).reshape(shape)
            elif kind in CODED_DTYPES:
                # Saved as bare bytes: numpy does not know these types.
                array = array.view(getattr(ml_dtypes, kind))
            feed[name] = array
    return feed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    """Samples that came to a worker."""

    files: tuple[Path, ...]
    layouts: tuple[tuple[tuple[str, str], ...], ...]

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            yield _unpacked(self.files[index], self.layouts[index])


def _trials_bench(
    folder: Path,
    float_model: Model,
    config: QuantConfig,
    feeds: Feeds,
    split: CalibrationSplit,
    metric: str,
    *,
    cache: Path,
    quantized: Model | None,
    pins: Sequence[Pin],
    mask: str,
    states: States,
    types: Collection[str],
    beside: bool,
    expected: Path | None,
) -> Bench:
    """The parts of what `open_trials` makes of the same arguments, after it did."""
    packer = _Packer(folder)
    found: list[Path] = []
    if quantized is None:
        prepared = prepare(float_model, config, cache).model
        assert prepared.path is not None
        found = sorted(prepared.path.parent.iterdir())
        if config.static:
            ranges = calibrate(
                prepared, split.calibration, method=config.method, percentile=config.percentile,
                op_types=config.op_types, limit=config.calibration_samples, cache=cache,
            )  # fmt: skip
            found.append(ranges.path)
    return packer.bench(
        "trials",
        float_model=packer.model(float_model),
        quantized=None if quantized is None else packer.model(quantized),
        cache={path.relative_to(cache).as_posix(): packer.file(path) for path in found},
        config=config.to_json(),
        feeds=packer.feeds(feeds),
        calibration=packer.feeds(split.calibration),
        metric=metric,
        pins=[[pin.float_name, pin.quantized_name] for pin in pins],
        mask=mask,
        states=[list(pair) for pair in states],
        types=sorted(types),
        beside=beside,
        expected=None if expected is None else packer.file(expected),
    )


# -- the worker's side -------------------------------------------------------------------------


class _Lacking(Exception):
    """Parts are not here."""


@dataclass(slots=True)
class _Opened:
    """One bench of this process: what `_OPENERS` made of its parts, and these parts."""

    tools: Any
    digests: frozenset[str]


# Dask runs tasks in threads, and a session's switches serve one list at a time.
_busy = threading.Lock()
_benches: OrderedDict[str, _Opened] = OrderedDict()
_hashes: dict[str, Any] = {}


def _root(worker: Any) -> Path:
    """This worker's own folder, which Dask removes when the worker ends."""
    return Path(worker.local_directory) / "quant-inspector"


def _blob(root: Path, digest: str) -> Path:
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a SHA-256")
    return root / "blobs" / digest


def _far(function: Callable[..., Any]) -> Callable[..., Any]:
    """What calls a function of this module in a worker, with that worker as its first argument."""
    module, name = function.__module__, function.__name__

    # As no module has it, it is pickled as it is written here.
    def call(*arguments: Any, dask_worker: Any = None) -> Any:
        from importlib import import_module

        from distributed import get_worker

        worker = get_worker() if dask_worker is None else dask_worker
        return getattr(import_module(module), name)(worker, *arguments)

    return call


def _lacking(worker: Any, digests: Sequence[str]) -> list[str]:
    """Which of these parts this worker does not have."""
    root = _root(worker)
    return [digest for digest in digests if not _blob(root, digest).is_file()]


def _take(worker: Any, pieces: Sequence[tuple[str, bytes, bool]], sender: str) -> list[str]:
    """Takes in the next pieces of parts, and returns which turned out not to be what they are.

    Args:
        worker: this one.
        pieces: a part's digest, what comes next of it, and whether nothing comes after that.
        sender: tells those apart who send the same part at the same time.
    """
    damaged = []
    for digest, chunk, last in pieces:
        target = _blob(_root(worker), digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{digest}.{uuid.UUID(sender).hex}")
        hashed = _hashes.setdefault(part.name, hashlib.sha256())
        hashed.update(chunk)
        with part.open("ab") as writer:
            writer.write(chunk)
        if not last:
            continue
        del _hashes[part.name]
        if hashed.hexdigest() == digest:
            os.replace(part, target)
        else:
            part.unlink()
            damaged.append(digest)
    return damaged


def _measure(worker: Any, bench: str, request: str, samples: Sequence[int]) -> dict[str, Any]:
    """A task: what a request gives on some samples, as plain data; see `_at`."""

    def measure(trials: Trials) -> dict[str, Any]:
        found = trials.measure(Request.from_json(json.loads(request)), samples).sums
        return {"sums": {at: found[at].tolist() for at in samples}}

    return _at(worker, bench, measure)


def _try(worker: Any, bench: str, label: str, config: str) -> dict[str, Any]:
    """A task: what a recipe gives, as plain data; see `_at`."""

    def try_one(trier: Callable[[RecipeRow], RecipeResult]) -> dict[str, Any]:
        row = RecipeRow(config=QuantConfig.from_json(json.loads(config)), label=label)
        return {"row": trier(row).to_json()}

    return _at(worker, bench, try_one)


def _at(worker: Any, bench: str, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What some work with a bench gives.

    Returns:
        That; or {"lacks": this worker} where parts have to be sent first; or {"failed": …}, this
        work cannot be done; or {"refused": …}, none can.
    """
    with _busy:
        try:
            tools = _bench(bench, worker)
        except _Lacking:
            return {"lacks": worker.address}
        except (InspectorError, UnplannableError) as error:
            return {"refused": _told(error)}
        try:
            answer = work(tools)
        except (InspectorError, UnplannableError) as error:
            return {"failed": _told(error)}
        try:
            _check_room(bench, worker)
        except RunError as error:
            return {"refused": _told(error)}
        return answer


def _bench(digest: str, worker: Any) -> Any:
    """A bench's tools, opened where they are not.

    Raises:
        _Lacking: a part is not here.
        InspectorError: they cannot be opened here.
    """
    if digest in _benches:
        _benches.move_to_end(digest)
        return _benches[digest].tools
    root = _root(worker)
    part = partial(_blob, root)
    if not part(digest).is_file():
        raise _Lacking
    told = json.loads(part(digest).read_bytes())
    digests = {
        digest,
        *told["cache"].values(),
        *(d for model in _models(told) for d in model["files"].values()),
        *(s["blob"] for k in ("feeds", "calibration") for s in told[k]["samples"]),
        *([told["expected"]] if told["expected"] else ()),
    }
    if not all(part(d).is_file() for d in digests):
        raise _Lacking
    _check_versions(told["versions"], worker)
    limit = worker.memory_manager.memory_limit
    while len(_benches) >= _KEPT_BENCHES or (_benches and limit and _resident() > _ROOM * limit):
        _close(next(iter(_benches)), root, keep=digests)
    # One thread of Dask's, one of the runtime's: what a worker was started with is what it takes.
    os.environ.setdefault(THREADS_VARIABLE, str(worker.state.nthreads))
    folder = root / "benches" / digest
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in told["cache"].items():
        _link(part(content), folder / "cache", name)
    tools = _OPENERS[told["kind"]](told, part, folder)
    _benches[digest] = _Opened(tools=tools, digests=frozenset(digests))
    _check_room(digest, worker)
    return tools


def _models(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [told[k] for k in ("float_model", "quantized") if told[k] is not None]


def _open_trials(told: Mapping[str, Any], part: Callable[[str], Path], folder: Path) -> Trials:
    models = [_open_model(m, part, folder / str(at)) for at, m in enumerate(_models(told))]
    return open_trials(
        models[0],
        QuantConfig.from_json(told["config"]),
        _open_feeds(told["feeds"], part),
        CalibrationSplit(calibration=_open_feeds(told["calibration"], part), seen=()),
        told["metric"],
        cache=folder / "cache",
        quantized=models[1] if len(models) > 1 else None,
        pins=[Pin(float_name=a, quantized_name=b) for a, b in told["pins"]],
        mask=told["mask"],
        states=[(output, given) for output, given in told["states"]],
        types=told["types"],
        beside=told["beside"],
        expected=part(told["expected"]) if told["expected"] else None,
    )


def _open_recipes(
    told: Mapping[str, Any], part: Callable[[str], Path], folder: Path
) -> Callable[[RecipeRow], RecipeResult]:
    model = _open_model(told["float_model"], part, folder / "0")
    feeds = _open_feeds(told["feeds"], part)
    calibration = _open_feeds(told["calibration"], part)
    outputs = comparable_outputs(model)
    expected = part(told["expected"]) if told["expected"] else None
    return recipe_trier(
        model,
        feeds,
        CalibrationSplit(calibration=calibration, seen=tuple(told["seen"])),
        cache=folder / "cache",
        folder=folder / "made",
        mask=told["mask"],
        states=[(output, given) for output, given in told["states"]],
        provider=told["provider"],
        metrics=[parse_metric(text, outputs, feeds, expected=expected) for text in told["metrics"]],
        percentile=told["percentile"],
    )


_OPENERS: dict[str, Callable[[Mapping[str, Any], Callable[[str], Path], Path], Any]] = {
    "trials": _open_trials,
    "recipes": _open_recipes,
}


def _check_versions(wanted: Mapping[str, str], worker: Any) -> None:
    for name, version in _versions().items():
        if wanted.get(name) != version:
            raise RunError(
                f"the worker {worker.address} has {name} {version}, this program "
                f"{wanted.get(name)}: figures would differ",
                hint="Install the same versions on all machines.",
            )


def _check_room(bench: str, worker: Any) -> None:
    """Ends what fits the limit so tightly that Dask would give this worker no more tasks."""
    limit = worker.memory_manager.memory_limit
    used = _resident()
    if limit and used > _PAUSED * limit:
        _close(bench, _root(worker))
        raise RunError(
            f"the worker {worker.address} holds {used / 1e9:.2f} GB for these models and feeds, "
            f"and its limit is {limit / 1e9:.2f} GB",
            hint=f"Start workers with --memory-limit {used / _PAUSED / 1e9 + 0.1:.1f}GB or more, "
            "or use fewer samples.",
        )


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _close(bench: str, root: Path, *, keep: Collection[str] = ()) -> None:
    """Lets go of a bench, and of the parts that no other one has and that are not to be kept."""
    gone = _benches.pop(bench)
    shutil.rmtree(root / "benches" / bench, ignore_errors=True)
    kept = {digest for other in _benches.values() for digest in other.digests}.union(keep)
    for digest in gone.digests - kept:
        _blob(root, digest).unlink(missing_ok=True)


def _link(blob: Path, folder: Path, name: str) -> None:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is not inside a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(blob, target)
    except OSError:
        shutil.copyfile(blob, target)


def _open_model(told: Mapping[str, Any], part: Callable[[str], Path], folder: Path) -> Model:
    for name, content in told["files"].items():
        _link(part(content), folder, name)
    copy = load_model(folder / told["name"])
    # What was made of the caller's own file is kept under that file's digest.
    return Model(
        copy.proto,
        path=copy.path,
        sha256=told["sha256"],
        size_bytes=told["size_bytes"],
        external=copy.external,
        notes=copy.notes,
    )


def _open_feeds(told: Mapping[str, Any], part: Callable[[str], Path]) -> Feeds:
    samples = told["samples"]
    return Feeds(
        source=_Sent(
            files=tuple(part(sample["blob"]) for sample in samples),
            layouts=tuple(tuple((n, k) for n, k in sample["arrays"]) for sample in samples),
        ),
        indices=tuple(range(len(samples))),
        names=tuple(told["names"]),
        available=len(samples),
        what="samples",
        rows=tuple(told["rows"]),
        labels=None if told["labels"] is None else tuple(told["labels"]),
        random=told["random"],
    )


def _told(error: InspectorError | UnplannableError) -> list[str]:
    """An error as plain data."""
    hint = error.hint if isinstance(error, InspectorError) else ""
    return [type(error).__name__, str(error), hint]


def _untold(told: Sequence[str]) -> InspectorError | UnplannableError:
    """What `_told` was given."""
    kind, message, hint = told
    if kind == UnplannableError.__name__:
        return UnplannableError(message)
    kinds = {each.__name__: each for each in InspectorError.__subclasses__()}
    return kinds.get(kind, RunError)(message, hint=hint)


# -- the caller's side -------------------------------------------------------------------------


def _connect(kind: Any, address: str) -> Any:
    """A client of Dask's own kind, or what went wrong after that client is closed.

    Left to the garbage collector, a client that could not connect waits for a lock as it closes,
    and where it is collected while another one starts, that one holds the lock: neither goes on
    (Dask 2026.8).
    """
    client = kind.__new__(kind)
    try:
        client.__init__(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except BaseException:
        with suppress(OSError, TimeoutError, AttributeError):
            client.close()
        raise
    return client


class Cluster:
    """A connection to a Dask scheduler.

    Args:
        address: e.g. "tcp://127.0.0.1:8786". Certificates of "tls://" are those of Dask's own
            configuration.

    Attributes:
        sent: by (worker, part), how often it was sent.

    Raises:
        RunError: Dask is not installed, there is nothing at the address, or it has no worker.
    """

    def __init__(self, address: str) -> None:
        if not _ADDRESS.fullmatch(address):
            raise RunError(
                f"{shown(address)} is not the address of a Dask scheduler, expected "
                "tcp://HOST:PORT",
                hint="Give the address that `dask scheduler` prints, e.g. tcp://127.0.0.1:8786.",
            )
        try:
            import distributed
        except ImportError as error:
            raise RunError(
                f"work cannot be sent to {address}: Dask is not installed ({error})",
                hint='Install it: pip install "quant-inspector[cluster]".',
            ) from error
        # Everything that goes wrong is told by our own errors.
        for name in list(logging.root.manager.loggerDict):
            if name.partition(".")[0] == "distributed":
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.address = address
        self.sent: Counter[tuple[str, str]] = Counter()
        try:
            self._client = _connect(distributed.Client, address)
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise RunError(
                f"there is no Dask scheduler at {address}: {text}",
                hint="Give the address that `dask scheduler` prints, e.g. tcp://127.0.0.1:8786.",
            ) from error
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            self.close()
            raise self._no_worker() from error
        except BaseException:  # Ctrl-C above all
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; what is running is cancelled."""
        with suppress(OSError, TimeoutError):
            self._client.close()

    def workers(self) -> tuple[str, ...]:
        """The addresses of the workers that are there now.

        Raises:
            LostError: the connection is lost.
        """
        with self._connected():
            return tuple(self._client.nthreads())

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Tells what ends a connection as our own error."""
        from distributed.client import ClosedClientError

        try:
            yield
        except (OSError, TimeoutError, ClosedClientError) as error:
            raise self._lost() from error

    def _works(self) -> bool:
        """Whether there is a worker that Dask has not paused because its memory is full."""
        with suppress(OSError, TimeoutError):
            if self._client.status == "running":
                found = self._client.scheduler_info(n_workers=-1)["workers"].values()
                return any(worker["status"] == "running" for worker in found)
        return False

    def send(self, bench: Bench, workers: Sequence[str]) -> None:
        """Sends workers the parts of a bench that they do not have.

        A worker that ends meanwhile is left out.

        Raises:
            RunError: a part does not arrive as it was sent.
        """
        sender = str(uuid.uuid4())
        lacking: dict[str, list[str]] = {}
        for worker, digests in self._tell(workers, _lacking, list(bench.blobs)).items():
            for digest in digests:
                lacking.setdefault(digest, []).append(worker)
        by_takers: dict[tuple[str, ...], dict[str, Path]] = {}
        for digest, takers in lacking.items():
            self.sent.update((worker, digest) for worker in takers)
            by_takers.setdefault(tuple(takers), {})[digest] = bench.blobs[digest]
        for together, parts in by_takers.items():
            for pieces in _loads(parts):
                found = self._tell(together, _take, pieces, sender)
                for worker in (w for w, damaged in found.items() if damaged):
                    raise RunError(
                        f"a part of the models or feeds reached the worker {worker} damaged",
                        hint="Check this machine's disk and that worker's.",
                    )

    def _tell(
        self, workers: Sequence[str], function: Callable[..., Any], *arguments: Any
    ) -> dict[str, Any]:
        """What a function of this module returns in each worker that does not end meanwhile."""
        with self._connected():
            found = self._client.run(
                _far(function), *arguments, workers=list(workers), on_error="return"
            )
        for worker, answer in found.items():
            if isinstance(answer, Exception) and not isinstance(answer, OSError):
                raise self._broken(worker, answer) from answer
        return {w: answer for w, answer in found.items() if not isinstance(answer, Exception)}

    def answers(
        self,
        bench: Bench,
        function: Callable[..., dict[str, Any]],
        calls: Iterable[tuple[Any, ...]],
        *,
        width: int | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """What a function answers to each call, with the call's place, as answers come.

        Args:
            bench: what it works with.
            function: called as ``function(worker, bench.digest, *call)`` in a worker.
            calls: asked for the next as soon as one more may be under way.
            width: so many are under way at a time; None for all.
            tick: called at least several times a second; what it raises cancels the rest, as does
                closing this generator.

        Raises:
            LostError: the connection or all workers are lost, a task ended several workers, or a
                worker cannot work with this bench.
        """
        import distributed

        called = _far(function)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pending: dict[Any, tuple[int, tuple[Any, ...], int]] = {}

        def submit(at: int, call: tuple[Any, ...], sendings: int) -> None:
            with self._connected():
                future = self._client.submit(called, bench.digest, *call, pure=False)
            pending[future] = (at, call, sendings)
            future.add_done_callback(done.put)

        waiting = enumerate(calls)
        seen = time.monotonic()
        try:
            while True:
                while width is None or len(pending) < width:
                    following = next(waiting, None)
                    if following is None:
                        break
                    submit(*following, 0)
                if not pending:
                    return
                tick()
                try:
                    future = done.get(timeout=_TICK_SECONDS)
                except queue.Empty:
                    if self._works():
                        seen = time.monotonic()
                    elif time.monotonic() - seen > GONE_SECONDS:
                        connected = self._client.status == "running"
                        raise (self._no_worker() if connected else self._lost()) from None
                    continue
                at, call, sendings = pending.pop(future)
                if future.status == "error":
                    raise self._broken("", future.exception())
                if future.status != "finished":
                    # Its worker ended in the middle, or the scheduler did.
                    if self._client.status != "running" or sendings == _SENDINGS:
                        raise self._lost()
                    submit(at, call, sendings + 1)
                    continue
                try:
                    answer = future.result(timeout=CONNECT_SECONDS)
                except TimeoutError:
                    # Its worker ended before the answer was fetched: Dask runs it again.
                    pending[future] = (at, call, sendings)
                    future.add_done_callback(done.put)
                    continue
                except distributed.client.FutureCancelledError as error:
                    raise self._lost() from error
                seen = time.monotonic()
                if "refused" in answer:
                    raise LostError(answer["refused"][1], hint=answer["refused"][2])
                if "lacks" in answer:
                    if sendings == _SENDINGS:
                        raise self._ended()
                    self.send(bench, [answer["lacks"]])
                    submit(at, call, sendings + 1)
                    continue
                yield at, answer
        finally:
            if pending:
                # What is lost is told already, and needs no cancelling.
                with suppress(LostError), self._connected():
                    self._client.cancel(list(pending), force=True)

    def _no_worker(self) -> LostError:
        return LostError(
            f"the Dask scheduler at {self.address} has no workers, or none with memory to spare",
            hint=f"Start one: dask worker {self.address} --nthreads 1 --memory-limit 4GB",
        )

    def _ended(self) -> LostError:
        return LostError(
            "a trial ended several worker processes, one after the other, or they do not keep "
            "what they are sent",
            hint="Give workers more memory (--memory-limit), or use fewer samples.",
        )

    def _lost(self) -> LostError:
        return LostError(
            f"the connection to the Dask scheduler at {self.address} was lost",
            hint="Start the scheduler again and repeat the command with the same --state folder: "
            "what was measured is there.",
        )

    def _broken(self, worker: str, error: BaseException) -> LostError:
        import distributed

        if isinstance(error, distributed.KilledWorker):
            return self._ended()
        text = " ".join(str(error).split())[:500]
        if isinstance(error, ImportError):
            return LostError(
                f"a worker of {self.address} cannot import what it needs: {text}",
                hint='Install "quant-inspector[cluster]" on every machine of the cluster.',
            )
        where = f"the worker {worker}" if worker else "a worker"
        return LostError(
            f"{where} stopped on {type(error).__name__}: {text}",
            hint="Look at the worker's own log, and report it.",
        )


def _loads(parts: Mapping[str, Path]) -> Iterator[list[tuple[str, bytes, bool]]]:
    """Pieces of parts for `_take`, as many at a time as are sent in one go."""
    load: list[tuple[str, bytes, bool]] = []
    room = _CHUNK_BYTES
    for digest, path in parts.items():
        with path.open("rb") as reader:
            left = path.stat().st_size
            while True:
                chunk = reader.read(room)
                left -= len(chunk)
                load.append((digest, chunk, left <= 0))
                room -= len(chunk)
                if room <= 0:
                    yield load
                    load, room = [], _CHUNK_BYTES
                if left <= 0 or not chunk:
                    break
    if load:
        yield load


@contextmanager
def trials_at(
    address: str,
    float_model: Model,
    config: QuantConfig,
    feeds: Feeds,
    split: CalibrationSplit,
    metric: str,
    *,
    cache: Path,
    quantized: Model | None = None,
    pins: Sequence[Pin] = (),
    mask: str = "",
    states: States = (),
    types: Collection[str] = (),
    folder: Path | None = None,
    beside: bool = False,
    expected: Path | None = None,
    allow_code: bool = False,
    progress: Progress = no_progress,
) -> Iterator[Trials]:
    """The trials of `open_trials`, run by a cluster's workers where an address is given.

    Args:
        address: of a Dask scheduler; "" for this process.

    Raises:
        RunError: the cluster cannot be used.
        UnplannableError, InspectorError: see `open_trials`.
    """
    parts: dict[str, Any] = {
        "cache": cache, "quantized": quantized, "pins": pins, "mask": mask, "states": states,
        "types": types, "beside": beside, "expected": expected,
    }  # fmt: skip
    arguments = (float_model, config, feeds, split, metric)
    if not address:
        yield open_trials(
            *arguments, **parts, folder=folder, allow_code=allow_code, progress=progress
        )
        return
    _check_travels(metric)
    progress(0.0, f"connecting to {address}")
    with Cluster(address) as cluster, tempfile.TemporaryDirectory(prefix="quant-inspector-") as to:
        trials = open_trials(
            *arguments, **parts, folder=folder, progress=part_of(progress, 0.0, 0.8)
        )
        progress(0.8, "sending models and feeds to the workers")
        bench = _trials_bench(Path(to), *arguments, **parts)
        cluster.send(bench, cluster.workers())
        trials.elsewhere = partial(_run, cluster, bench, split_samples=not states)
        yield trials


def _check_travels(metric: str) -> None:
    """Refuses a metric that is a user's own code, before anything is opened.

    Raises:
        RunError: it is.
    """
    if re.fullmatch(r"[\w.]+:\w+", metric) and metric.partition(":")[0] not in METRICS:
        raise RunError(
            f"the metric {metric} is code on this machine, which is not sent to a cluster",
            hint="Take one of the metrics by name, or leave out the cluster.",
        )


def _run(
    cluster: Cluster,
    bench: Bench,
    wave: Sequence[tuple[Request, Sequence[int]]],
    keep: Callable[[Request, Sums], None],
    progress: Progress,
    *,
    split_samples: bool,
) -> None:
    """Runs requests on samples in the workers; see `trials.Elsewhere`."""
    count = max(1, len(cluster.workers()))
    # Fewer requests than workers: the samples of each are shared out.
    shares = -(-count // len(wave)) if split_samples else 1
    tasks = [
        (request, [int(at) for at in share])
        for request, samples in wave
        for share in np.array_split(np.asarray(samples), min(shares, len(samples)))
    ]
    calls = [(json.dumps(request.to_json()), share) for request, share in tasks]
    finished = 0
    failed: dict[int, InspectorError | UnplannableError] = {}

    def tick() -> None:
        progress(finished / len(calls), f"trial {finished + 1} of {len(calls)} on {count} workers")

    with closing(cluster.answers(bench, _measure, calls, tick=tick)) as answers:
        for at, answer in answers:
            finished += 1
            if "failed" in answer:
                failed[at] = _untold(answer["failed"])
                continue
            sums = {int(k): np.array(v, np.float64) for k, v in answer["sums"].items()}
            keep(tasks[at][0], sums)
    if failed:
        raise failed[min(failed)]


@contextmanager
def recipes_at(
    address: str,
    float_model: Model,
    feeds: Feeds,
    split: CalibrationSplit,
    *,
    rows: Sequence[RecipeRow],
    mask: str = "",
    states: States = (),
    provider: str = CPU,
    metrics: Sequence[TaskMetric] = (),
    expected: Path | None = None,
    progress: Progress = no_progress,
) -> Iterator[RecipesElsewhere | None]:
    """What `run_recipes` takes as `elsewhere`: a cluster's workers where an address is given.

    Every result says that it was not timed: workers differ, and are busy with each other's work.

    Args:
        address: of a Dask scheduler; "" for this process.
        float_model, feeds, split, rows, mask, states, provider, metrics: as for `run_recipes`.
        expected: the CSV file of the metric "expected".

    Raises:
        RunError: the cluster cannot be used.
    """
    if not address:
        yield None
        return
    for metric in metrics:
        _check_travels(metric.text)
    progress(0.0, f"connecting to {address}")
    with Cluster(address) as cluster, tempfile.TemporaryDirectory(prefix="quant-inspector-") as to:
        progress(0.0, "sending models and feeds to the workers")
        packer = _Packer(Path(to))
        bench = packer.bench(
            "recipes",
            float_model=packer.model(float_model),
            quantized=None,
            cache={},
            feeds=packer.feeds(feeds),
            calibration=packer.feeds(split.calibration),
            seen=list(split.seen),
            mask=mask,
            states=[list(pair) for pair in states],
            provider=provider,
            metrics=[metric.text for metric in metrics],
            expected=None if expected is None else packer.file(expected),
            percentile=shared_percentile(rows),
        )
        cluster.send(bench, cluster.workers())
        yield partial(_run_recipes, cluster, bench)


def _run_recipes(
    cluster: Cluster, bench: Bench, rows: Iterator[RecipeRow], progress: Progress
) -> Iterator[RecipeResult]:
    """Tries recipes in the workers; see `recipe_table.Elsewhere`."""
    taken: list[RecipeRow] = []
    count = max(1, len(cluster.workers()))

    def calls() -> Iterator[tuple[str, str]]:
        for row in rows:
            taken.append(row)
            yield row.label, json.dumps(row.config.to_json())

    def tick() -> None:
        progress(0.0, f"{taken[-1].label if taken else ''} on {count} workers")

    with closing(cluster.answers(bench, _try, calls(), width=count, tick=tick)) as answers:
        for at, answer in answers:
            row = taken[at]
            if "failed" in answer:
                yield RecipeResult(row=row, error=_untold(answer["failed"]).args[0])
                continue
            result = RecipeResult.from_json(row, answer["row"])
            yield result if result.error else replace(result, notes=(*result.notes, NOT_TIMED))
