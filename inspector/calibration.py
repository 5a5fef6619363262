"""The ranges that activations take on calibration feeds, and their cache on disk.

`observers` gathers what ONNX Runtime's calibrators would, in the memory of one sample and for
samples of any shapes; where the installed version does not agree with it on a small model, that
version's own calibrators run instead. This module refuses samples that would silently spoil the
ranges (NaN, infinity) and keeps the result under a key of our own. ONNX Runtime checks its cache
file for the method only and takes ranges of another model without a word, so our key covers the
model's bytes, the feeds' contents and every option that changes a range.

The file is the one `quantize_static(..., calibration_cache_path=...)` reads: re-quantizing with
other exclusions runs no sample, and one run over the samples serves all methods.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as cached
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
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
from inspector.model_files import load_model
from inspector.observers import DEFAULT_PERCENTILE, RangeMethod, Samples, observe, passes_over
from inspector.runtime import ORT_ERRORS, Feed, Progress, no_progress, part_of, runtime_version

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
        equal_shapes: refuse a sample whose shapes differ from the first one's; only ONNX Runtime's
            own calibrators for entropy and percentile need it.
        purpose: what this run is for, behind the progress of each sample.
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
        purpose: str = "",
        progress: Progress = no_progress,
    ) -> None:
        self._feeds = feeds
        self._input_names = frozenset(input_names)
        self._count = len(feeds) if limit is None else min(limit, len(feeds))
        self._iterator: Iterator[Feed] = islice(iter(feeds), self._count)
        self._equal_shapes = equal_shapes
        self._purpose = purpose
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
            f"calibrating: sample {self.handed + 1} of {len(self)}{self._purpose}"
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

    Samples may differ in shape, and memory does not grow with their number. "minmax" runs every
    sample once, the others twice.

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
        CalibrationError: no feeds, a sample that is not finite or that the model does not run on,
            or infinity inside the model where a histogram is needed.
    """
    found = calibrate_many(
        model,
        feeds,
        methods=[method],
        percentile=percentile,
        op_types=op_types,
        limit=limit,
        cache=cache,
        progress=progress,
    )[method]
    if isinstance(found, CalibrationError):
        raise found
    return found


def calibrate_many(
    model: Model,
    feeds: Feeds | None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    percentile: float | None = None,
    op_types: Sequence[str] = (),
    limit: int | None = None,
    cache: Path,
    progress: Progress = no_progress,
) -> dict[str, Calibration | CalibrationError]:
    """The ranges by several methods, all from the same two runs over the feeds.

    Each method's file is the one that `calibrate` writes, under the same key. Files that are there
    already are taken, and only the others' samples are run.

    Args:
        model, feeds, percentile, op_types, limit, cache, progress: as for `calibrate`.
        methods: out of `METHODS`.

    Returns:
        By method, in the order asked for: its ranges, or the error that it alone ends in (a
        histogram cannot hold infinity, MinMax takes it).

    Raises:
        CalibrationError: what no method can do without: no feeds, a sample that is not finite or
            that the model does not run on.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown calibration method {method!r}, expected one of {[*METHODS]}")
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile!r}, expected a number from 0 to 100")
    if model.path is None:
        raise ValueError("calibration needs a model loaded from a file")
    count = 0 if feeds is None else min(len(feeds), len(feeds) if limit is None else limit)
    if feeds is None or count == 0:
        raise CalibrationError(
            "static quantization needs calibration feeds, and there are none",
            hint="Name some with --calibration or --inputs, or quantize with --format dynamic.",
        )
    found: dict[str, Calibration | CalibrationError] = {}
    missing: dict[str, Path] = {}
    for method in dict.fromkeys(methods):
        key = calibration_key(
            model, feeds, method=method, percentile=percentile, op_types=op_types, limit=limit
        )
        path = cache / "calibration" / f"{key}.json"
        kept = _read(path, method)
        if kept is None:
            missing[method] = path
        else:
            found[method] = Calibration(path=path, samples=count, reused=True, notes=_notes(kept))
    if not missing:
        progress(1.0, "calibration reused from the cache")
        return {method: found[method] for method in methods}
    kept_percent = DEFAULT_PERCENTILE if percentile is None else percentile
    observed = _observed(
        model,
        partial(FeedReader, feeds, [i.name for i in model.inputs], limit=limit),
        [RangeMethod(name=method, percentile=kept_percent) for method in missing],
        list(op_types) or list(STATIC_OP_TYPES),
        progress,
    )
    for (method, path), tensors in zip(missing.items(), observed, strict=True):
        if isinstance(tensors, CalibrationError):
            found[method] = tensors
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors_data(tensors, path)
        found[method] = Calibration(path=path, samples=count, reused=False, notes=_notes(tensors))
    return {method: found[method] for method in methods}


def _observed(
    model: Model,
    readers: Callable[..., FeedReader],
    methods: Sequence[RangeMethod],
    op_types: Sequence[str],
    progress: Progress,
) -> list[TensorsData | CalibrationError]:
    """What `observe` gives, or ONNX Runtime's calibrators for methods it does not agree on.

    `readers` takes the options of `FeedReader` that differ from one run over the feeds to the next.
    """
    own = [method for method in methods if _contract(method.name)]
    runs = (passes_over(own) if own else 0) + len(methods) - len(own)
    reader: FeedReader | None = None
    run = 0

    def next_reader(**options: Any) -> FeedReader:
        nonlocal reader, run
        part = part_of(progress, run / runs, (run + 1) / runs)
        reader = readers(progress=part, **options)
        run += 1
        return reader

    def samples() -> Samples:
        for feed in next_reader(purpose=", again for the histograms" if run else ""):
            yield reader.current if reader else "", feed

    def failure(error: Exception, method: str) -> CalibrationError:
        return _failure(error, reader.current if reader else "", method)

    results: dict[RangeMethod, TensorsData | CalibrationError] = {}
    if own:
        try:
            with hushed():
                found = observe(model, samples, own, op_types=op_types)
        except CALIBRATOR_ERRORS as error:
            raise failure(error, own[0].name) from error
        results.update(zip(own, found, strict=True))
    for method in methods:
        if method in results:
            continue
        try:
            results[method] = _by_onnxruntime(
                model, next_reader(equal_shapes=method.bins > 0), method, op_types
            )
        except CalibrationError as error:
            results[method] = error
        except CALIBRATOR_ERRORS as error:
            results[method] = failure(error, method.name)
    return [results[method] for method in methods]


def _by_onnxruntime(
    model: Model, reader: CalibrationDataReader, method: RangeMethod, op_types: Sequence[str]
) -> TensorsData:
    """The ranges by the calibrators that `quantize_static` uses."""
    options: dict[str, Any] = {}
    if method.name == "percentile":
        options["percentile"] = method.percentile
    if method.symmetric is not None:
        options["symmetric"] = method.symmetric
    assert model.path is not None
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
        folder = Path(name)
        private = copy_model(model.path, folder)
        with hushed():
            calibrator = create_calibrator(
                private,
                list(op_types),
                augmented_model_path=str(folder / "augmented.onnx"),
                calibrate_method=METHODS[method.name],
                use_external_data_format=private.with_name(f"{private.name}.data").exists(),
                extra_options=options,
            )
            calibrator.collect_data(reader)
            tensors: TensorsData = calibrator.compute_data()
            # Its session holds the file open.
            del calibrator
    return tensors


class _Listed(CalibrationDataReader):  # type: ignore[misc]
    """Samples in memory."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


@cached
def _contract(method: str) -> bool:
    """Whether `observe` gives what the installed ONNX Runtime's calibrator does by default.

    Both calibrate a small model on two samples, once per process. `observe` relies on the names
    and the meaning of ONNX Runtime's HistogramCollector, on the options that `quantize_static`
    leaves at their defaults, and on which tensors are observed; none of that is promised.
    """
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "w"], ["m"], name="matmul"),
            helper.make_node("Neg", ["m"], ["y"], name="neg"),
        ],
        "contract",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor("w", TensorProto.FLOAT, [8, 8], np.linspace(-1, 2, 64))],
    )
    generator = np.random.default_rng(0)
    feeds = [{"x": generator.standard_normal((64, 8)).astype(np.float32)} for _ in range(2)]
    # Values on the edges of bins.
    feeds[1]["x"][0] = np.array([0, -0.0, 4, -4, 2, -2, 1, 0.5], np.float32)
    how = RangeMethod(name=method)
    op_types = ["MatMul", "Relu"]
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
        path = Path(name) / "contract.onnx"
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
            path,
        )
        model = load_model(path)
        try:
            with hushed():
                (found,) = observe(
                    model, lambda: ((str(i), f) for i, f in enumerate(feeds)), [how],
                    op_types=op_types,
                )  # fmt: skip
                if isinstance(found, CalibrationError):
                    return False
                wanted = _by_onnxruntime(model, _Listed(feeds), how, op_types)
                for at, tensors in enumerate((found, wanted)):
                    save_tensors_data(tensors, Path(name) / f"{at}.json")
        except CALIBRATOR_ERRORS:
            return False
        texts = [(Path(name) / f"{at}.json").read_text(encoding="utf-8") for at in range(2)]
        return bool(json.loads(texts[0]) == json.loads(texts[1]))


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


def _failure(error: Exception, sample: str, method: str) -> CalibrationError:
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
    where = f"on sample {sample!r}" if sample else "before the first sample"
    return CalibrationError(
        f"calibration fails {where}: {text}",
        hint="Check the sample against the model's inputs (`quant-inspector show`).",
    )
