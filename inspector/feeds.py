"""Model inputs: found in files or drawn at random, checked, converted, iterated one at a time.

A `Feeds` holds file names and shapes, never arrays: each pass reads one sample, converts it and
lets go of it, so memory does not grow with the number of samples and a `Feeds` crosses to another
process as a few kilobytes. Headers of all files are checked when feeds are loaded, so that most
faults show before anything runs. Nothing is unpickled and no file is written.

Where samples come from, in the order in which a folder is searched: ``.npz`` (one sample each,
keyed by input name), ``.npy`` (one sample each, models with one input), ``test_data_set_*`` or
``input_*.pb`` (ONNX's own test data), images with a `Preprocess`. A single ``.npz`` or ``.npy``
holds many samples along its leading axis. ``onnx`` is imported here to parse ``.pb`` tensors only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from inspector.errors import FeedError
from inspector.images import (
    IMAGE_SUFFIXES,
    PRESETS,
    Preprocess,
    fits,
    image_losses,
    is_static,
    listed,
    nearest,
    open_image,
    read_json,
    read_preprocess,
    readable,
    shape_text,
)
from inspector.model import Model, TensorInfo
from inspector.random_feeds import Arrays, Samples, integer_limits, random_source

# Largest array read at once, and most samples in one file: a header or a compressed member may
# claim anything, so it is judged before memory is reserved for it.
MAX_ARRAY_BYTES = 4 * 2**30
MAX_SAMPLES = 1_000_000
# Most calibration samples taken from the inputs when no calibration feeds are named, and the
# number of inputs below which all of them are taken.
MAX_DEFAULT_CALIBRATION = 100
MIN_SPLIT = 8

_PB, _IMAGES = "ONNX test data", "images"
# What a file's suffix says about it.
_KINDS = {
    ".npz": ".npz",
    ".npy": ".npy",
    ".pb": _PB,
    **dict.fromkeys(IMAGE_SUFFIXES, _IMAGES),
}
_EXPECTED = ".npz, .npy, ONNX test data (input_0.pb) or image files"
_COMPANIONS = frozenset({"preprocess.json", "labels.json", "boxes.json"})
_LABELS_HINT = "Write one class number per sample in sorted file order, e.g. [3, 0, 7]."

# Element types a numpy feed can carry. Others (string, bfloat16, 4-bit …) are refused.
_DTYPES = frozenset(
    {"float16", "float32", "float64", "bool"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _inputs(model: Model) -> tuple[TensorInfo, ...]:
    """The inputs a feed must give, all of an element type that numpy can carry."""
    if not model.inputs:
        raise FeedError(
            f"{model.name} has no inputs, expected at least one to feed",
            hint="Load a model whose graph has inputs.",
        )
    for info in model.inputs:
        if info.dtype not in _DTYPES:
            raise FeedError(
                f"{model.name}: input {info.name!r} has element type {info.dtype}, "
                "expected float, integer or bool",
                hint="Export the model without this input, e.g. starting behind its tokenizer.",
            )
    return model.inputs


# ---------------------------------------------------------------------------- one converted array


def _convert(
    array: NDArray[Any], info: TensorInfo, where: str, *, rounding: bool = False
) -> NDArray[Any]:
    """The array in the input's element type, native byte order and C order.

    float64 to float32 rounds, and to float16 where `rounding` (pixels, which were never more
    exact); every other conversion must give back the same numbers.
    """
    target = np.dtype(info.dtype)
    with np.errstate(all="ignore"):
        converted = array.astype(target, order="C", copy=False)
        if array.dtype == target:
            return converted
        if array.dtype.kind == target.kind == "f" and (target.itemsize > 2 or rounding):
            lost = np.isinf(converted) & np.isfinite(array)
        else:
            # Casting out of range is undefined, so a round trip alone proves nothing.
            lost = converted.astype(array.dtype) != array
            lost &= ~(np.isnan(array) & np.isnan(converted))
            lost |= _outside(array, target) | _outside(converted, array.dtype)
    if lost.any():
        raise FeedError(
            f"{where} is {array.dtype.name} and holds {array[lost].flat[0]}, "
            f"which does not fit the {info.dtype} that the model expects",
            hint=f"If the change is meant, save array.astype(np.{info.dtype}) instead.",
        )
    return converted


def _outside(array: NDArray[Any], target: np.dtype[Any]) -> NDArray[np.bool_]:
    """Where a value lies outside an integer type's range; nowhere for floating point."""
    if target.kind == "f":
        return np.zeros(array.shape, np.bool_)
    low, high = integer_limits(target)
    if array.dtype.kind == "f":
        # high + 1 is a power of two, which float64 holds; high itself may round up to it.
        real = array.astype(np.float64)
        return np.asarray((real < low) | (real >= float(high + 1)))
    own_low, own_high = integer_limits(array.dtype)
    return np.asarray((array < max(low, own_low)) | (array > min(high, own_high)))


# -------------------------------------------------------------------------------- arrays in files


@dataclass(kw_only=True, slots=True)
class _Array:
    """An array in an open file: its header, and its values when asked.

    Attributes:
        where: file and input, for messages.
        stream, start: where its bytes are; None for one that is in memory.
        fortran: its leading axis varies fastest.
        whole: all of its values, once they had to be read.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: IO[bytes] | None = None
    start: int = 0
    fortran: bool = False
    whole: NDArray[Any] | None = None

    def read(self, first: int = 0, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """`shape` values starting with row `first` of the leading axis; all of them by default."""
        shape = self.shape if shape is None else shape
        offset, count = first * math.prod(self.shape[1:]), math.prod(shape)
        with readable(self.where, "an array", _SAVE_AGAIN):
            if self.fortran and self.whole is None:
                # Samples are interleaved in this order: no reading one without the others.
                values = self._values(0, math.prod(self.shape))
                self.whole = np.ascontiguousarray(values.reshape(self.shape, order="F"))
            if self.whole is None:
                return self._values(offset, count).reshape(shape)
            return self.whole.reshape(-1)[offset : offset + count].reshape(shape).copy()

    def _values(self, offset: int, count: int) -> NDArray[Any]:
        size = count * self.dtype.itemsize
        if size > MAX_ARRAY_BYTES:
            raise FeedError(
                f"{self.where} claims {size / 2**30:,.1f} GiB, "
                f"expected at most {MAX_ARRAY_BYTES / 2**30:g} GiB at once",
                hint="Save smaller samples, one .npz each.",
            )
        assert self.stream is not None
        self.stream.seek(self.start + offset * self.dtype.itemsize)
        content = self.stream.read(size)
        if len(content) != size:
            raise EOFError(f"it ends after {len(content):,} of {size:,} bytes")
        return np.frombuffer(content, self.dtype).copy()


_SAVE_AGAIN = "Save it again with np.savez or np.save."


def _npy(stream: IO[bytes], where: str, size: int) -> _Array:
    major, minor = np.lib.format.read_magic(stream)
    if major not in (1, 2):
        raise ValueError(f"its .npy format {major}.{minor} is not for plain numbers")
    read_header = getattr(np.lib.format, f"read_array_header_{major}_0")
    shape, fortran, dtype = read_header(stream)
    start = stream.tell()
    claimed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or claimed != size - start):
        raise ValueError(
            f"its header {shape} {dtype.name} needs {claimed:,} bytes, "
            f"the file has {size - start:,}"
        )
    return _Array(
        where=where, shape=shape, dtype=dtype, stream=stream, start=start, fortran=fortran
    )


def _proto(path: Path, where: str) -> _Array:
    tensor = onnx.TensorProto()
    hint = "Write it with onnx.numpy_helper.from_array(array).SerializeToString()."
    with readable(where, "an ONNX tensor", hint):
        size = path.stat().st_size
        try:
            tensor.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ValueError("it is no TensorProto") from error
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its values lie in another file")
        # Checked before to_array: an empty tensor may claim any number of elements.
        if math.prod(tensor.dims) > 8 * size:
            raise ValueError(f"it claims the shape {tuple(tensor.dims)} but is much smaller")
        try:
            values = np.asarray(onnx.numpy_helper.to_array(tensor))
        except TypeError as error:  # no element type: a sequence or optional is no tensor
            raise ValueError(str(error)) from error
    return _Array(where=where, shape=values.shape, dtype=values.dtype, whole=values)


@contextmanager
def _opened(
    files: Sequence[Path], inputs: Sequence[TensorInfo]
) -> Iterator[list[tuple[TensorInfo, _Array]]]:
    """Each of the model's inputs with its array in one ``.npz``, one ``.npy`` or some ``.pb``."""
    path, found = files[0], []
    with ExitStack() as stack:
        suffix = path.suffix.lower()
        if suffix == ".npz":
            with readable(path.name, "an .npz archive", _SAVE_AGAIN):
                archive = stack.enter_context(zipfile.ZipFile(path))
            members = {
                m.filename.removesuffix(".npy"): m for m in archive.infolist() if not m.is_dir()
            }
            _check_keys(list(members), [i.name for i in inputs], path.name)
        for index, info in enumerate(inputs):
            where = f"{path.name}: {info.name!r}"
            if suffix == ".pb":
                path = files[index]
                array = _proto(path, f"{path.parent.name}/{path.name}: {info.name!r}")
            else:
                with readable(where, "an array", _SAVE_AGAIN):
                    if suffix == ".npz":
                        size = members[info.name].file_size
                        stream = stack.enter_context(archive.open(members[info.name]))
                    else:
                        size = path.stat().st_size
                        stream = stack.enter_context(path.open("rb"))
                    array = _npy(stream, where, size)
            if array.dtype.hasobject or array.dtype.kind not in "fiub":
                what = "text or pickled objects" if array.dtype.hasobject else array.dtype.name
                raise FeedError(
                    f"{array.where} holds {what}, expected {info.dtype}",
                    hint=f"Save it as numbers: np.asarray(array, dtype=np.{info.dtype}); "
                    "pickles are never opened.",
                )
            found.append((info, array))
        yield found


def _check_keys(keys: list[str], names: list[str], shown: str) -> None:
    # The whole statement, so that following the hint is copying it.
    call = ", ".join(f"{name!r}: ..." for name in names[:4]) + (", ..." if len(names) > 4 else "")
    hint = f"Save it with np.savez({shown!r}, **{{{call}}})."
    unknown = [key for key in keys if key not in names]
    missing = [name for name in names if name not in keys]
    if unknown:
        found = f"has the key {unknown[0]!r}, which is no input of the model"
        raise FeedError(f"{shown} {found}; nearest: {nearest(unknown[0], names)}", hint=hint)
    if missing:
        found = f"lacks the input {missing[0]!r}, found {listed(keys) or 'nothing'}"
        raise FeedError(f"{shown} {found}, expected {listed(names, most=8)}", hint=hint)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """How one input's samples lie in an array.

    Attributes:
        shape: of one sample; None for the whole array, of whatever shape the file has.
        step: rows of the leading axis per sample; 0 where all samples share the array.
        samples: how many there are; None where shared.
        chosen: the model's batch is dynamic and could also take all of them at once.
    """

    shape: tuple[int, ...] | None = None
    step: int = 0
    samples: int | None = None
    chosen: bool = False


def _slot(array: _Array, info: TensorInfo, *, stacked: bool) -> _Slot:
    """How an array gives its input's samples.

    Stacked, it has a leading sample axis. One axis more than the input has: each row is a sample.
    As many axes: rows are taken as batches of the input's own batch size (1 where dynamic). A
    scalar and a single batch of several rows are shared by all samples.

    Raises:
        FeedError: the shapes do not fit.
    """
    shape = array.shape
    expected = (None,) * len(shape) if info.shape is None else info.shape
    if shape and shape[0] == 0:
        raise FeedError(
            f"{array.where} holds no samples: its shape is {shape}",
            hint="Save it with at least one sample.",
        )
    if fits(shape, expected) and (not stacked or not shape):
        return _Slot()
    if stacked and fits(shape[1:], expected):
        return _Slot(shape=shape[1:], step=1, samples=shape[0])
    if stacked and len(shape) == len(expected) and fits(shape[1:], expected[1:]):
        fixed = is_static(expected[0])
        batch = int(expected[0] or 1) if fixed else 1
        if batch > 1 and shape[0] == batch:
            return _Slot()
        if shape[0] % batch == 0:
            count = shape[0] // batch
            return _Slot(shape=(batch, *shape[1:]), step=batch, samples=count, chosen=not fixed)
    wanted = shape_text(("samples", *expected) if stacked else expected)
    hint = f"Reshape, resize or pad it to {wanted} and save it again."
    if fits((1, *shape), expected):
        hint = "Add the batch axis with array[np.newaxis] and save it again."
    elif not stacked and (fits(shape[1:], expected) or fits((1, *shape[1:]), expected)):
        hint = "Load the file itself instead of its folder: its leading axis is then samples."
    for order in ((0, 3, 1, 2), (0, 2, 3, 1)):
        if len(shape) == 4 and fits([shape[i] for i in order], expected):
            hint = f"Move the channels with np.transpose(array, {order}) and save it again."
    raise FeedError(f"{array.where} has shape {shape}, expected {wanted}", hint=hint)


# ---------------------------------------------------------------------------------------- sources


class _Source(Protocol):
    """Where samples come from; plain data, so that it can be pickled."""

    def samples(self, indices: Sequence[int]) -> Samples:
        """The samples with these indices, one at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """Arrays in files.

    Attributes:
        units: the files of each sample; of all of them where `slots` are given.
        inputs: the model's.
        slots: how the samples lie in one file, by input; None where each unit is one sample.
    """

    units: tuple[tuple[Path, ...], ...]
    inputs: tuple[TensorInfo, ...]
    slots: tuple[_Slot, ...] | None = None

    def samples(self, indices: Sequence[int]) -> Samples:
        with ExitStack() as stack:
            arrays: list[tuple[TensorInfo, _Array]] = []
            for index in indices:
                if self.slots is None or not arrays:
                    stack.close()
                    unit = self.units[index if self.slots is None else 0]
                    arrays = stack.enter_context(_opened(unit, self.inputs))
                feed: Arrays = {}
                for position, (info, array) in enumerate(arrays):
                    where = array.where
                    if self.slots is None:
                        slot = _slot(array, info, stacked=False)
                    else:
                        slot = self.slots[position]
                        where += f" of sample {index}"
                    feed[info.name] = _convert(
                        array.read(index * slot.step, slot.shape), info, where
                    )
                yield feed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pictures:
    """One sample per image."""

    files: tuple[Path, ...]
    info: TensorInfo
    preprocess: Preprocess

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            path = self.files[index]
            array = self.preprocess.apply(open_image(path))
            if len(self.info.shape or ()) == 3:
                array = array[0]
            where = f"{path.name}: {self.info.name!r}"
            yield {self.info.name: _convert(array, self.info, where, rounding=True)}


# ------------------------------------------------------------------------------------------ Feeds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What one pass over a sample tells: its digest and its NaN and infinite elements by input."""

    digest: str
    nonfinite: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Feeds:
    """Model inputs, one dict of arrays per sample, read again on every pass.

    Made by `load_feeds`, `image_feeds` and `random_feeds`; can be pickled and iterated any number
    of times. Iterating raises `FeedError` where a file changed or breaks off.

    Attributes:
        source: where the samples come from.
        indices: the samples of the source that these are.
        names: sample names: file names, or "sample 0", "sample 1" …
        available, what: how many samples the source has, and that in words.
        labels: class of each sample; None where there are none.
        notes: what was converted, assumed or ignored, one sentence each.
        random: the samples are seeded noise, not data.
        facts: what is known of the source's samples; shared with every subset, so that a sample
            is hashed once.
    """

    source: _Source
    indices: tuple[int, ...]
    names: tuple[str, ...]
    available: int
    what: str
    labels: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    random: bool = False
    facts: dict[int, _Facts] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Arrays]:
        with closing(self.source.samples(self.indices)) as samples:
            yield from samples

    def __getitem__(self, index: int) -> Arrays:
        """One sample; IndexError where there is none."""
        with closing(self.source.samples([self.indices[index]])) as samples:
            return next(samples)

    def __repr__(self) -> str:
        return f"Feeds({self.description})"

    @property
    def description(self) -> str:
        """E.g. "7 .npz files", "2 of 8 random feeds (seed 0)"."""
        part = "" if len(self) == self.available else f"{len(self):,} of "
        return part + self.what

    def subset(self, indices: Iterable[int]) -> Feeds:
        """The samples with these indices, in this order; repeats are allowed."""
        indices = list(indices)
        return replace(
            self,
            indices=tuple(self.indices[i] for i in indices),
            names=tuple(self.names[i] for i in indices),
            labels=self.labels and tuple(self.labels[i] for i in indices),
        )

    def _known(self) -> Generator[_Facts, None, None]:
        """Facts of every sample in order; each sample is read at most once, ever."""
        missing = [i for i in dict.fromkeys(self.indices) if i not in self.facts]
        with closing(self.source.samples(missing)) as samples:
            for index in self.indices:
                if index not in self.facts:
                    self.facts[index] = _facts_of(next(samples))
                yield self.facts[index]

    def sample_digest(self, index: int) -> str:
        """sha256 of one sample: names, element types, shapes and values as the model gets them."""
        return next(self.subset([index])._known()).digest

    @property
    def digest(self) -> str:
        """sha256 over all samples in order, as the model gets them (labels left out).

        Conversion and image preprocessing are part of it, file names are not.
        """
        total = hashlib.sha256()
        for facts in self._known():
            total.update(bytes.fromhex(facts.digest))
        return total.hexdigest()

    def nonfinite(self) -> list[tuple[str, str, int]]:
        """NaN and infinite elements as (sample, input, count), for inputs that hold any."""
        return [
            (name, key, count)
            for name, facts in zip(self.names, self._known(), strict=True)
            for key, count in facts.nonfinite
        ]

    def identical(self) -> bool:
        """True where there are several samples and all hold the same values.

        Stops reading at the first that differs.
        """
        with closing(self._known()) as known:
            first = next(known).digest if len(self) > 1 else ""
            return bool(first) and all(facts.digest == first for facts in known)

    @property
    def pictures(self) -> bool:
        """Whether the samples are images, which `picture` shows."""
        return isinstance(self.source, _Pictures)

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """An image sample as the model gets it, uint8 RGB (height, width, 3).

        None for feeds that are not images.
        """
        if not isinstance(self.source, _Pictures):
            return None
        path = self.source.files[self.indices[index]]
        return self.source.preprocess.picture(open_image(path))


def _facts_of(feed: Arrays) -> _Facts:
    digest = hashlib.sha256()
    nonfinite = []
    for name in sorted(feed):
        array = feed[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if array.dtype.kind == "f":
            count = int(array.size - np.count_nonzero(np.isfinite(array)))
            if count:
                nonfinite.append((name, count))
    return _Facts(digest=digest.hexdigest(), nonfinite=tuple(nonfinite))


# ---------------------------------------------------------------------------------------- loading


def load_feeds(
    path: str | os.PathLike[str],
    model: Model,
    *,
    preprocess: Path | Preprocess | None = None,
    limit: int | None = None,
) -> Feeds:
    """The feeds in a folder or file, checked against the model's inputs.

    Args:
        path: a folder of ``.npz``, ``.npy``, images or ONNX test data; or one such file. The
            leading axis of a single ``.npz`` or ``.npy`` is the sample axis.
        model: whose inputs they are for.
        preprocess: what to do with images, or the file that says it; by default the
            ``preprocess.json`` beside them.
        limit: take the first samples only.

    Raises:
        FeedError: there are none, or one does not fit the model.
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return _load(Path(path), model, preprocess, limit)


def image_feeds(folder: str | os.PathLike[str], model: Model, preprocess: Preprocess) -> Feeds:
    """One sample per image in a folder, sorted by name, turned into the model's input.

    `folder` may also be one image. Files of other kinds are ignored.

    Raises:
        FeedError: no images, a damaged one, or a recipe that does not fit the model.
    """
    return _load(Path(folder), model, preprocess, None, kinds=(_IMAGES,))


def _load(
    path: Path,
    model: Model,
    preprocess: Path | Preprocess | None,
    limit: int | None,
    kinds: Sequence[str] = (".npz", ".npy", _PB, _IMAGES),
) -> Feeds:
    inputs = _inputs(model)
    if not path.exists():
        raise FeedError(f"{path} does not exist", hint="Check the path and its spelling.")
    folder = path if path.is_dir() else path.parent
    entries = _entries(folder)
    kind, units = _found(path, entries, inputs, kinds)
    total, taken = len(units), tuple(units[:limit])
    names = [unit[0].name for unit in taken]
    noun, where, conversions = f"{kind} file", "", list[str]()
    source: _Source
    if kind == _IMAGES:
        noun = "image"
        source, notes = _pictures(taken, model, folder, preprocess)
    elif path.is_dir() or kind == _PB:
        if kind == _PB:
            noun = "ONNX test data set"
            names = [_shown(unit[0].parent) for unit in taken] if path.is_dir() else names
        source, notes = _Files(units=taken, inputs=inputs), []
        _, conversions = _slots(taken, inputs, stacked=False)
    else:
        noun, where = "sample", f" in {path.name}"
        source, total, conversions, notes = _stack(path, inputs)
        names = [f"sample {i}" for i in range(min(total, limit or total))]
    alone = path.is_dir() or all(e == path or e.suffix != path.suffix for e in entries)
    labels, more = _labels(folder / "labels.json", total, alone=alone)
    notes = conversions + notes + more
    if path.is_dir():
        notes += _strays(_shown(path), entries, units, kind)
    if preprocess is not None and kind != _IMAGES:
        notes.append(f"preprocessing is for images and is not applied to {kind}")
    feeds = Feeds(
        source=source,
        indices=tuple(range(len(names))),
        names=tuple(names),
        available=total,
        what=_counted(total, noun) + where,
        labels=labels and labels[: len(names)],
    )
    if conversions:
        # Reads every sample, so that a lossy conversion is refused before anything runs.
        feeds.nonfinite()
    if feeds.identical():
        notes.append(
            f"all {len(feeds):,} samples hold the same values, so figures say nothing about others"
        )
    return replace(feeds, notes=tuple(notes))


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name."""
    with readable(_shown(folder), "a folder", "Check the folder's permissions."):
        return sorted(folder.iterdir(), key=lambda entry: entry.name)


def _shown(folder: Path) -> str:
    return folder.absolute().name or str(folder)


def _found(
    path: Path, entries: Sequence[Path], inputs: Sequence[TensorInfo], kinds: Sequence[str]
) -> tuple[str, list[tuple[Path, ...]]]:
    """The first of the kinds of feeds in a folder, and the files of each unit; or of one file."""
    files = [path] if path.is_file() else [e for e in entries if e.is_file()]
    for kind in kinds:
        units: list[tuple[Path, ...]] = [
            (f,) for f in files if _KINDS.get(f.suffix.lower()) == kind
        ]
        if kind == _PB and path.is_dir():
            folders = [e for e in entries if e.is_dir() and e.name.startswith("test_data_set_")]
            if not folders and any(re.fullmatch(r"input_\d+\.pb", f.name) for f in files):
                folders = [path]
            units = [_test_data(e, inputs) for e in sorted(folders, key=_natural)]
        if units and kind in (".npy", _PB) and len(units[0]) < len(inputs):
            raise FeedError(
                f"{units[0][0].name} is one array without a name, but the model has "
                f"{len(inputs)} inputs: {listed([i.name for i in inputs], most=8)}",
                hint="Save one .npz per sample, keyed by input name.",
            )
        if units:
            return kind, units
    for inner in entries if path.is_dir() else ():
        held = inner.is_dir() and [e for e in _entries(inner) if e.suffix.lower() in _KINDS]
        if held:
            raise FeedError(
                f"{_shown(path)} holds no feeds itself; its subfolder {inner.name} has "
                f"{_counted(len(held), 'file')} that may be feeds",
                hint=f"Name the subfolder: {inner}",
            )
    wanted = "images" if kinds == (_IMAGES,) else _EXPECTED
    found = f"holds no feeds: found {listed([e.name for e in entries]) or 'nothing'}"
    raise FeedError(
        f"{_shown(path)} {found if path.is_dir() else 'is no feed'}, expected {wanted}",
        hint="Unpack archives and name the folder or file that holds the feeds.",
    )


def _test_data(folder: Path, inputs: Sequence[TensorInfo]) -> tuple[Path, ...]:
    """A test data set's input files, one per input of the model."""
    wanted = [folder / f"input_{i}.pb" for i in range(len(inputs))]
    found = sorted(folder.glob("input_*.pb"), key=_natural)
    if found != wanted:
        raise FeedError(
            f"{_shown(folder)} has {listed([f.name for f in found], 8) or 'no input_*.pb'}, "
            f"expected {listed([f.name for f in wanted], 8)}: one per input of the model",
            hint=f"Write them in input order: {listed([i.name for i in inputs], most=8)}.",
        )
    return tuple(wanted)


def _natural(path: Path) -> tuple[Any, ...]:
    # test_data_set_10 comes after test_data_set_2.
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name))


def _strays(
    shown: str, entries: Sequence[Path], units: Sequence[Sequence[Path]], kind: str
) -> list[str]:
    taken = {part for unit in units for file in unit for part in (file, file.parent)}
    stray = [
        e.name + ("/" if e.is_dir() else "")
        for e in entries
        if e not in taken
        and e.name not in _COMPANIONS
        and not (kind == _PB and re.fullmatch(r"output_\d+\.pb", e.name))
    ]
    verb = "is" if len(stray) == 1 else "are"
    return [f"{shown}: {listed(stray)} {verb} not {kind} and {verb} ignored"] if stray else []


def _labels(path: Path, expected: int, *, alone: bool) -> tuple[tuple[int, ...] | None, list[str]]:
    """The labels beside the feeds, None where there are none, and notes.

    `alone`: False for one file among others; labels of another number are then theirs and no fault.
    """
    if not path.is_file():
        return None, []
    values = read_json(path, "labels", list, _LABELS_HINT)
    if len(values) != expected:
        count = f"labels.json has {_counted(len(values), 'label')}"
        if not alone:
            return None, [f"{count} for {_counted(expected, 'sample')} and is not used"]
        raise FeedError(f"{count}, expected {expected:,}: one per sample", hint=_LABELS_HINT)
    for index, label in enumerate(values):
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            found = f"{json.dumps(label)} at position {index}"
            raise FeedError(
                f"labels.json has {found}, expected an integer of 0 or more", hint=_LABELS_HINT
            )
    return tuple(values), []


def _pictures(
    units: Sequence[tuple[Path, ...]],
    model: Model,
    folder: Path,
    preprocess: Path | Preprocess | None,
) -> tuple[_Pictures, list[str]]:
    beside = folder / "preprocess.json"
    if preprocess is None and not beside.is_file():
        raise FeedError(
            f"{_shown(folder)} holds images but no preprocess.json, "
            "which says how pixels become the model's input",
            hint='Write preprocess.json beside them, e.g. {"preset": "yolo"} '
            f"(presets: {', '.join(PRESETS)}).",
        )
    if not isinstance(preprocess, Preprocess):
        preprocess = read_preprocess(preprocess or beside)
    recipe = preprocess.fitted(model)
    files = tuple(file for (file,) in units)
    losses = Counter(what for file in files for what in image_losses(file))
    notes = [f"{count:,} of {len(files):,} images {what}" for what, count in losses.items()]
    return _Pictures(files=files, info=model.inputs[0], preprocess=recipe), notes


def _slots(
    units: Sequence[Sequence[Path]], inputs: Sequence[TensorInfo], *, stacked: bool
) -> tuple[list[_Slot], list[str]]:
    """How the last unit gives the inputs' samples, all being checked; what is converted."""
    slots: list[_Slot] = []
    converted: Counter[tuple[TensorInfo, str]] = Counter()
    for unit in units:
        with _opened(unit, inputs) as arrays:
            slots = [_slot(array, info, stacked=stacked) for info, array in arrays]
            converted.update((i, a.dtype.name) for i, a in arrays if a.dtype.name != i.dtype)
    notes = []
    for (info, found), count in converted.items():
        some = "" if count == len(units) else f" in {count:,} of {len(units):,} files"
        notes.append(f"input {info.name!r} is {found}{some} and was converted to {info.dtype}")
    return slots, notes


def _stack(path: Path, inputs: tuple[TensorInfo, ...]) -> tuple[_Files, int, list[str], list[str]]:
    """Samples along the leading axis; how many there are; what is converted; notes."""
    found, conversions = _slots([[path]], inputs, stacked=True)
    slots = {info.name: slot for info, slot in zip(inputs, found, strict=True)}
    counts = {name: slot.samples for name, slot in slots.items() if slot.samples is not None}
    first, total = next(iter(counts.items()), ("", 1))
    for name, count in counts.items():
        if count != total:
            raise FeedError(
                f"{path.name}: {name!r} has {_counted(count, 'sample')} and {first!r} {total:,}, "
                "expected as many of each",
                hint="Save all arrays with the same leading sample axis.",
            )
    if total > MAX_SAMPLES:
        raise FeedError(
            f"{path.name} claims {total:,} samples, expected at most {MAX_SAMPLES:,}",
            hint="Split it into smaller files.",
        )
    notes = [
        f"{path.name}: {name!r} is taken as {total:,} samples of {slot.shape}, not as one batch"
        for name, slot in slots.items()
        if slot.chosen and total > 1
    ]
    shared = [repr(name) for name, slot in slots.items() if slot.samples is None]
    if shared and total > 1:
        notes.append(f"{path.name}: all samples share {listed(shared, most=8)}")
    source = _Files(units=((path,),), inputs=inputs, slots=tuple(slots.values()))
    return source, total, conversions, notes


# ----------------------------------------------------------------------------------- random feeds


def random_feeds(model: Model, *, samples: int = 8, seed: int = 0) -> Feeds:
    """Seeded noise: floats standard normal, integers inside the tables they index, bools even.

    A sample depends on the seed and its index only, not on how many there are. Dynamic
    dimensions get a size, the same for the same symbol; what was assumed is in the notes.

    Raises:
        FeedError: an input has a type or rank that cannot be drawn.
        ValueError: `samples` is below 1, or `seed` is negative.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    source, notes = random_source(model, _inputs(model), seed)
    return Feeds(
        source=source,
        indices=tuple(range(samples)),
        names=tuple(f"sample {i}" for i in range(samples)),
        available=samples,
        what=f"{_counted(samples, 'random feed')} (seed {seed})",
        random=True,
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------- seen and unseen


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSplit:
    """Which feeds calibrate, and which of the evaluated ones are among them.

    Attributes:
        calibration: feeds to observe ranges on.
        seen: for each evaluated feed, whether a calibration feed has the same content.
    """

    calibration: Feeds
    seen: tuple[bool, ...]


def split_calibration(
    feeds: Feeds, calibration: Feeds | None = None, *, limit: int | None = None
) -> CalibrationSplit:
    """The calibration feeds, and which of `feeds` they have seen, judged by content.

    Without `calibration`, the first half of `feeds` calibrates, at most 100; with fewer than 8
    feeds all of them do.

    Args:
        feeds: what is evaluated.
        calibration: feeds of their own to calibrate on.
        limit: use at most so many of the calibration feeds; None for all.
    """
    if calibration is None:
        few = len(feeds) < MIN_SPLIT
        half = len(feeds) if few else min(len(feeds) // 2, MAX_DEFAULT_CALIBRATION)
        calibration = feeds.subset(range(half))
    if limit is not None and limit < len(calibration):
        calibration = calibration.subset(range(limit))
    contents = {facts.digest for facts in calibration._known()}
    return CalibrationSplit(
        calibration=calibration, seen=tuple(facts.digest in contents for facts in feeds._known())
    )
