"""The ranges that activations take on calibration feeds, and their cache on disk.

ONNX Runtime's own calibrators observe the ranges; this module feeds them one sample at a time,
refuses what they would silently spoil (NaN, infinity, ragged batches in a histogram), and keeps
the result under a key of our own. ONNX Runtime checks its cache file for the method only and takes
ranges of another model without a word, so our key covers the model's bytes, the feeds' contents
and every option that changes a range.

The file is the one `quantize_static(..., calibration_cache_path=...)` reads: re-quantizing with
other exclusions runs no sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    TensorsData,
    create_calibrator,
    load_tensors_data,
    save_tensors_data,
)
from onnxruntime.quantization.registry import (
    IntegerOpsRegistry,
    QDQRegistry,
    QLinearOpsRegistry,
)

from inspector.errors import CalibrationError
from inspector.feeds import Feeds
from inspector.model import Model
from inspector.runtime import ORT_ERRORS, Feed, Progress, no_progress, runtime_version

METHODS: dict[str, CalibrationMethod] = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
# What `quantize_static` calibrates where it is given no op types.
STATIC_OP_TYPES: tuple[str, ...] = tuple(sorted({*QLinearOpsRegistry, *QDQRegistry}))

SUPPORTED_OP_TYPES: dict[str, frozenset[str]] = {
    "qdq": frozenset({*QLinearOpsRegistry, *QDQRegistry}),
    "qoperator": frozenset(QLinearOpsRegistry),
    # Gemm is split into MatMul and Add before dynamic quantization.
    "dynamic": frozenset({*IntegerOpsRegistry, "Gemm"}),
}

# Change it whenever the meaning of a cached file changes.
_CACHE_VERSION = 1
# What ONNX Runtime's calibrators raise on feeds or graphs they cannot handle.
CALIBRATOR_ERRORS = (
    *ORT_ERRORS,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRange:
    """The observed real range of one tensor."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Ranges on disk.

    Attributes:
        path: the cache file, in the format of `quantize_static`'s `calibration_cache_path`.
        samples: how many feeds they were observed on.
        reused: they were on disk already and no sample was run.
        notes: what to know about them, one sentence each.
    """

    path: Path
    samples: int
    reused: bool
    notes: tuple[str, ...] = ()

    def ranges(self) -> dict[str, CalibrationRange]:
        """The observed range by tensor of the prepared model; infinite where calibration saw it."""
        tensors: TensorsData = load_tensors_data(self.path)
        found = {}
        for name, tensor in tensors.items():
            low, high = tensor.range_value
            found[name] = CalibrationRange(
                low=float(np.asarray(low).min()), high=float(np.asarray(high).max())
            )
        return found


class FeedReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds as ONNX Runtime's calibrators read them, one sample in memory at a time.

    Args:
        feeds: what to calibrate on.
        input_names: inputs of the model; other entries of a feed are left out.
        limit: at most as many samples.
        equal_shapes: refuse a sample whose shapes differ from the first one's.
        progress: called before each sample; what it raises ends the calibration.

    Attributes:
        current: name of the sample handed out last, "" before the first.
        handed: how many samples were handed out.
    """

    def __init__(
        self,
        feeds: Feeds,
        input_names: Sequence[str],
        *,
        limit: int | None = None,
        equal_shapes: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        self._feeds = feeds
        self._input_names = frozenset(input_names)
        self._count = len(feeds) if limit is None else min(limit, len(feeds))
        self._iterator: Iterator[Feed] = islice(iter(feeds), self._count)
        self._equal_shapes = equal_shapes
        self._progress = progress
        self._first: dict[str, tuple[int, ...]] = {}
        self.current = ""
        self.handed = 0

    def __len__(self) -> int:
        return self._count

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next sample by input name; None after the last.

        Raises:
            CalibrationError: NaN or infinity in it, or another shape where shapes have to agree.
        """
        self._progress(
            self.handed / max(self._count, 1),
            f"calibrating: sample {self.handed + 1} of {len(self)}"
            if self.handed < self._count
            else "calibrating: working out the ranges",
        )
        feed = next(self._iterator, None)
        if feed is None:
            return None
        self.current = self._feeds.names[self.handed]
        self.handed += 1
        sample = {k: np.asarray(v) for k, v in feed.items() if k in self._input_names}
        for name, array in sample.items():
            self._check(name, array)
        return sample

    def _check(self, name: str, array: NDArray[Any]) -> None:
        if array.dtype.kind == "f":
            bad = int(array.size - np.count_nonzero(np.isfinite(array)))
            if bad:
                raise CalibrationError(
                    f"sample {self.current!r}: input {name!r} holds {bad} NaN or infinite "
                    f"{'value' if bad == 1 else 'values'} of {array.size}, "
                    "expected finite numbers to calibrate on",
                    hint="Take this sample out of the calibration feeds or mend it.",
                )
        first = self._first.setdefault(name, array.shape)
        if self._equal_shapes and array.shape != first:
            raise CalibrationError(
                f"sample {self.current!r}: input {name!r} has shape {list(array.shape)}, the "
                f"samples before it {list(first)}; entropy and percentile need equal shapes",
                hint="Calibrate with --method minmax, or give calibration feeds of equal shape.",
            )


@contextlib.contextmanager
def hushed() -> Iterator[list[str]]:
    """What the block logs, as a list that fills; its printing and its warnings go nowhere.

    ONNX Runtime's Python tools log through the root logger, print to stdout and call numpy on
    empty slices. The root logger, stdout and the warning filters are as before afterwards.
    """
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    root = logging.getLogger()
    before = root.handlers[:]
    listener = Listener()
    for handler in before:
        root.removeHandler(handler)
    # With a handler in place, logging.warning() does not call basicConfig().
    root.addHandler(listener)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            np.errstate(all="ignore"),
        ):
            warnings.simplefilter("ignore")
            yield heard
    finally:
        root.removeHandler(listener)
        for handler in before:
            root.addHandler(handler)


def copy_model(path: Path, folder: Path) -> Path:
    """The path of a private copy of a model file (and its external data) in `folder`.

    ONNX Runtime writes "<name>-inferred.onnx" beside the file it is given.
    """
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder / path.name


def calibration_key(
    model: Model,
    feeds: Feeds,
    *,
    method: str,
    percentile: float | None = None,
    op_types: Sequence[str] = (),
    limit: int | None = None,
) -> str:
    """The name under which these ranges are kept: a SHA-256 over all that can change them."""
    count = len(feeds) if limit is None else min(limit, len(feeds))
    parts = [
        _CACHE_VERSION,
        model.sha256,
        feeds.digest,
        count,
        method,
        percentile if method == "percentile" else None,
        sorted(set(op_types)),
        runtime_version(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def calibrate(
    model: Model,
    feeds: Feeds | None,
    *,
    method: str = "minmax",
    percentile: float | None = None,
    op_types: Sequence[str] = (),
    limit: int | None = None,
    cache: Path,
    progress: Progress = no_progress,
) -> Calibration:
    """The ranges of a model's activations on some feeds, from the cache where they are there.

    Args:
        model: the prepared model, loaded from a file that nobody changes any more.
        feeds: what to observe.
        method: one of `METHODS`.
        percentile: share of values kept, in percent, for the method "percentile"; None takes
            ONNX Runtime's 99.999.
        op_types: only tensors that nodes of these types touch; empty for all the quantizer knows.
        limit: at most as many samples, from the front.
        cache: folder for caches.
        progress: called before every sample; what it raises ends the calibration.

    Raises:
        CalibrationError: no feeds, a sample that is not finite or of another shape, or a
            calibrator that gave up.
    """
    if method not in METHODS:
        raise ValueError(f"unknown calibration method {method!r}, expected one of {[*METHODS]}")
    if model.path is None:
        raise ValueError("calibration needs a model loaded from a file")
    count = 0 if feeds is None else min(len(feeds), len(feeds) if limit is None else limit)
    if feeds is None or count == 0:
        raise CalibrationError(
            "static quantization needs calibration feeds, and there are none",
            hint="Name some with --calibration or --inputs, or quantize with --format dynamic.",
        )
    key = calibration_key(
        model, feeds, method=method, percentile=percentile, op_types=op_types, limit=limit
    )
    path = cache / "calibration" / f"{key}.json"
    cached = _read(path, method)
    if cached is not None:
        progress(1.0, "calibration reused from the cache")
        return Calibration(path=path, samples=count, reused=True, notes=_notes(cached))

    reader = FeedReader(
        feeds,
        [i.name for i in model.inputs],
        limit=limit,
        equal_shapes=method != "minmax",
        progress=progress,
    )
    options = {"percentile": percentile} if method == "percentile" and percentile else {}
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
        folder = Path(name)
        private = copy_model(model.path, folder)
        try:
            with hushed():
                calibrator = create_calibrator(
                    private,
                    list(op_types) or list(STATIC_OP_TYPES),
                    augmented_model_path=str(folder / "augmented.onnx"),
                    calibrate_method=METHODS[method],
                    use_external_data_format=private.with_name(f"{private.name}.data").exists(),
                    extra_options=options,
                )
                calibrator.collect_data(reader)
                tensors: TensorsData = calibrator.compute_data()
                del calibrator
        except CALIBRATOR_ERRORS as error:
            raise _failure(error, reader, method) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors_data(tensors, path)
    return Calibration(path=path, samples=count, reused=False, notes=_notes(tensors))


def _read(path: Path, method: str) -> TensorsData | None:
    """The ranges in a cache file; None where there is none that can be read."""
    try:
        tensors = load_tensors_data(path)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        # Missing, half-written by a crash, or damaged: it is observed and written anew.
        return None
    return tensors if tensors.calibration_method == METHODS[method] else None


def _notes(tensors: TensorsData) -> tuple[str, ...]:
    endless = [
        name
        for name, tensor in tensors.items()
        if not all(np.all(np.isfinite(limit)) for limit in tensor.range_value)
    ]
    notes = []
    if endless:
        notes.append(
            f"calibration saw infinity or NaN in {len(endless)} of {len(tensors.keys())} tensors "
            f"(first {endless[0]!r}), which get no usable scale: leave the nodes around them in "
            "float"
        )
    zero = [n for n, t in tensors.items() if not any(np.any(limit) for limit in t.range_value)]
    if zero:
        notes.append(
            f"calibration saw nothing but zeros in {len(zero)} of {len(tensors.keys())} tensors "
            f"(first {zero[0]!r}): where they are quantized ONNX Runtime takes scale 1, whatever "
            "other samples hold"
        )
    return tuple(notes)


def _failure(error: Exception, reader: FeedReader, method: str) -> CalibrationError:
    text = " ".join(str(error).split()) or type(error).__name__
    if "inhomogeneous" in text or "could not broadcast" in text:
        return CalibrationError(
            f"calibration with method {method} fails: a tensor inside the model has another shape "
            f"in every sample ({text})",
            hint="Calibrate with --method minmax, which takes samples of any shape.",
        )
    if method != "minmax" and "finite" in text:
        return CalibrationError(
            f"calibration with method {method} fails: a tensor inside the model is infinite or "
            f"NaN on the calibration feeds ({text})",
            hint="Calibrate with --method minmax, and leave the nodes around that tensor in float.",
        )
    where = f"on sample {reader.current!r}" if reader.current else "before the first sample"
    return CalibrationError(
        f"calibration fails {where}: {text}",
        hint="Check the sample against the model's inputs (`quant-inspector show`).",
    )
