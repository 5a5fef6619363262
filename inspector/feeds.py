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

import difflib
import hashlib
import json
import lzma
import math
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from inspector.errors import FeedError
from inspector.model import Model, TensorInfo

Arrays = dict[str, NDArray[Any]]
Samples = Generator[Arrays, None, None]

# Largest array read at once, and most samples in one file: a header or a compressed member may
# claim anything, so it is judged before memory is reserved for it.
MAX_ARRAY_BYTES = 4 * 2**30
MAX_SAMPLES = 1_000_000
# Most calibration samples taken from the inputs when no calibration feeds are named, and the
# number of inputs below which all of them are taken.
MAX_DEFAULT_CALIBRATION = 100
MIN_SPLIT = 8

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
# Formats Pillow may try; without a list it would also try those that call other programs.
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_COMPANIONS = frozenset({"preprocess.json", "labels.json", "boxes.json"})
_FEED_KINDS = "expected .npz, .npy, ONNX test data (input_0.pb) or image files"

# Element types a numpy feed can carry. Others (string, bfloat16, 4-bit …) are refused.
_DTYPES = frozenset(
    {"float16", "float32", "float64", "bool"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)

# What reading a damaged file raises, from zip directory to array header to pixels.
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    SyntaxError,
    RuntimeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    Image.DecompressionBombError,
)


def _counted(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"


def _named(what: str, where: str) -> tuple[str, str]:
    """Singular and plural of what lies somewhere."""
    return f"{what} in {where}", f"{what}s in {where}"


def _listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shape_text(shape: Sequence[int | str | None]) -> str:
    dims = ["?" if d is None or (isinstance(d, int) and d < 1) else str(d) for d in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def _is_static(dim: int | str | None) -> bool:
    # Some exporters write 0 or -1 where they mean "dynamic".
    return isinstance(dim, int) and dim > 0


def _fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    return len(shape) == len(expected) and all(
        not _is_static(want) or have == want for have, want in zip(shape, expected, strict=True)
    )


@contextmanager
def _readable(shown: str, what: str, hint: str) -> Iterator[None]:
    """Turns what a damaged file raises into a `FeedError`."""
    try:
        yield
    except FeedError:
        raise
    except _BROKEN as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise FeedError(f"{shown} cannot be read as {what}: {reason}", hint=hint) from error


def _inputs(model: Model) -> tuple[TensorInfo, ...]:
    """The inputs a feed must give, all of an element type that numpy can carry."""
    if not model.inputs:
        raise FeedError(
            f"{model.name} has no inputs, expected at least one to feed",
            hint="Load a model whose graph has inputs.",
        )
    for info in model.inputs:
        if info.dtype not in _DTYPES:
            what = "is no tensor" if info.dtype == "unknown" else f"has element type {info.dtype}"
            raise FeedError(
                f"{model.name}: input {info.name!r} {what}, expected float, integer or bool",
                hint="Export the model without this input, e.g. starting behind its tokenizer.",
            )
    return model.inputs


# ---------------------------------------------------------------------------- one converted array


def _convert(
    array: NDArray[Any], info: TensorInfo, where: str, *, rounding: bool = False
) -> NDArray[Any]:
    """The array in the input's element type, native byte order and C order.

    float64 to float32 rounds; every other conversion must give back the same numbers.

    Args:
        array: what was read.
        info: the input it is for.
        where: sample and input, for messages.
        rounding: also round to float16 (pixels, which were never more exact).

    Raises:
        FeedError: a value would change.
    """
    target = np.dtype(info.dtype)
    if array.dtype == target:
        # ascontiguousarray would turn a scalar into shape (1,).
        return np.ascontiguousarray(array).reshape(array.shape)
    with np.errstate(all="ignore"):
        converted = array.astype(target, order="C")
        if array.dtype.kind == target.kind == "f" and (target.itemsize > 2 or rounding):
            lost = np.isinf(converted) & np.isfinite(array)
        else:
            # Casting out of range is undefined, so a round trip alone proves nothing.
            back = converted.astype(array.dtype)
            lost = (back != array) & ~((array != array) & (converted != converted))
            lost |= ~_in_range(array, target) | ~_in_range(converted, array.dtype)
    if lost.any():
        example = array[lost].flat[0]
        raise FeedError(
            f"{where} is {array.dtype.name} and holds {example}, "
            f"which does not fit the {info.dtype} that the model expects",
            hint=f"If the change is meant, save array.astype(np.{info.dtype}) instead.",
        )
    return converted


def _in_range(array: NDArray[Any], target: np.dtype[Any]) -> NDArray[np.bool_]:
    """Where a value lies in an integer type's range; everywhere for floating point."""
    if target.kind == "f":
        return np.ones(array.shape, np.bool_)
    low, high = _integer_limits(target)
    if array.dtype.kind == "f":
        # high + 1 is a power of two, which float64 holds; high itself may round up to it.
        real = array.astype(np.float64)
        return np.asarray((real >= low) & (real < float(high + 1)))
    own_low, own_high = _integer_limits(array.dtype)
    return np.asarray((array >= max(low, own_low)) & (array <= min(high, own_high)))


def _integer_limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def _value_dependent(source: np.dtype[Any], info: TensorInfo) -> bool:
    """Whether the conversion may be refused for some values."""
    return not np.can_cast(source, np.dtype(info.dtype), "safe")


def _check_kind(dtype: np.dtype[Any], where: str, info: TensorInfo) -> None:
    if dtype.hasobject:
        raise FeedError(
            f"{where} holds pickled Python objects, expected an array of {info.dtype}",
            hint=f"Save it as numbers: np.asarray(array, dtype=np.{info.dtype}); "
            "pickles are never opened.",
        )
    if dtype.kind not in "fiub":
        raise FeedError(
            f"{where} is {dtype.name}, expected {info.dtype}",
            hint=f"Save it as numbers with array.astype(np.{info.dtype}).",
        )


def _check_shape(
    shape: tuple[int, ...], info: TensorInfo, where: str, *, stackable: str = ""
) -> None:
    """Raises where one sample's array does not fit its input.

    `stackable`: the name of a single-file form in which a leading sample axis would be right.
    """
    expected = info.shape
    if shape and shape[0] == 0:
        raise FeedError(
            f"{where} is a zero-size batch {_shape_text_of(shape)}, expected at least one sample",
            hint="Remove this file or save it with its data.",
        )
    if expected is None or _fits(shape, expected):
        return
    found, wanted = _shape_text_of(shape), _shape_text(expected)
    if len(shape) != len(expected):
        hint = f"Reshape it to {wanted} and save it again."
        if _fits((1, *shape), expected):
            hint = "Add the batch axis with array[np.newaxis] and save it again."
        elif len(shape) == len(expected) + 1 and stackable:
            hint = (
                f"Load {stackable} itself instead of its folder: its leading axis is then samples."
            )
        raise FeedError(
            f"{where} has {_counted(len(shape), 'axis', 'axes')} {found}, "
            f"expected {len(expected)} {wanted}",
            hint=hint,
        )
    hint = f"Resize or pad it to {wanted} and save it again."
    for order in ((0, 3, 1, 2), (0, 2, 3, 1)):
        if len(shape) == 4 and _fits(tuple(shape[i] for i in order), expected):
            hint = f"Move the channels with np.transpose(array, {order}) and save it again."
    if stackable and shape[0] > 1 and _fits((1, *shape[1:]), expected):
        hint = f"Load {stackable} itself instead of its folder: its leading axis is then samples."
    raise FeedError(f"{where} has shape {found}, expected {wanted}", hint=hint)


def _shape_text_of(shape: Sequence[int]) -> str:
    return str(tuple(int(d) for d in shape))


# ------------------------------------------------------------------------------ arrays in a file


class _Array:
    """An array in an open file: its header, and its values when asked."""

    def __init__(self, stream: IO[bytes], shown: str, size: int) -> None:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"its .npy format {version[0]}.{version[1]} is not for plain numbers")
        self.shape, self.fortran, self.dtype = header
        self.shown = shown
        self._stream = stream
        self._start = stream.tell()
        self._whole: NDArray[Any] | None = None
        if min(self.shape, default=0) < 0:
            raise ValueError(f"its header names the shape {self.shape}")
        claimed = math.prod(self.shape) * self.dtype.itemsize
        if not self.dtype.hasobject and claimed != size - self._start:
            raise FeedError(
                f"{shown} is damaged: its header {_shape_text_of(self.shape)} {self.dtype.name} "
                f"needs {claimed:,} bytes, the file has {size - self._start:,}",
                hint="Save or download it again.",
            )

    def read(self, first: int = 0, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """`shape` values starting with row `first` of the leading axis; all of them by default."""
        whole = shape is None
        shape = self.shape if shape is None else shape
        if self.fortran and not whole:
            # Samples are interleaved in this order: there is no reading one without the others.
            if self._whole is None:
                self._whole = self.read()
            rows = max(1, math.prod(shape) // max(1, math.prod(self.shape[1:])))
            return self._whole[first : first + rows].reshape(shape).copy()
        size = math.prod(shape) * self.dtype.itemsize
        if size > MAX_ARRAY_BYTES:
            raise FeedError(
                f"{self.shown} claims {size / 2**30:,.1f} GiB {_shape_text_of(shape)}, "
                f"expected at most {MAX_ARRAY_BYTES / 2**30:g} GiB at once",
                hint="Save smaller samples, one .npz each.",
            )
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._stream.seek(self._start + first * row)
        values = np.empty(math.prod(shape), self.dtype)
        target = values.view(np.uint8).data
        done = 0
        while done < size:
            part = self._stream.read(min(size - done, 1 << 20))
            if not part:
                raise EOFError(f"it ends after {done:,} of {size:,} bytes")
            target[done : done + len(part)] = part
            done += len(part)
        return values.reshape(shape, order="F" if self.fortran and whole else "C")


@contextmanager
def _opened(path: Path, inputs: Sequence[TensorInfo], shown: str) -> Iterator[dict[str, _Array]]:
    """The arrays of one ``.npz`` or ``.npy`` by input name; exactly the model's inputs."""
    hint = "Save it again with np.savez or np.save."
    with ExitStack() as stack:
        if path.suffix.lower() == ".npy":
            with _readable(shown, "an .npy array", hint):
                stream = stack.enter_context(path.open("rb"))
                found = {inputs[0].name: _Array(stream, shown, path.stat().st_size)}
        else:
            with _readable(shown, "an .npz archive", hint):
                archive = stack.enter_context(zipfile.ZipFile(path))
                members = {
                    i.filename.removesuffix(".npy"): i for i in archive.infolist() if not i.is_dir()
                }
            _check_keys(members, inputs, shown)
            found = {}
            for info in inputs:
                where = f"{shown}: {info.name!r}"
                with _readable(where, "an array", hint):
                    member = members[info.name]
                    part = stack.enter_context(archive.open(member))
                    found[info.name] = _Array(part, where, member.file_size)
        for info in inputs:
            _check_kind(found[info.name].dtype, f"{shown}: {info.name!r}", info)
        yield found


def _check_keys(keys: Iterable[str], inputs: Sequence[TensorInfo], shown: str) -> None:
    keys = list(keys)
    names = [i.name for i in inputs]
    # The whole statement, so that following the hint is copying it.
    call = ", ".join(f"{name!r}: ..." for name in names[:4]) + (", ..." if len(names) > 4 else "")
    hint = f"Save it with np.savez({shown.rsplit('/', 1)[-1]!r}, **{{{call}}})."
    if not keys:
        raise FeedError(f"{shown} holds no arrays, expected {_listed(names)}", hint=hint)
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=3, cutoff=0.0)
            raise FeedError(
                f"{shown} has the key {key!r}, which is no input of the model; "
                f"nearest {'input is' if len(near) == 1 else 'inputs are'} {_listed(near)}",
                hint=hint,
            )
    for name in names:
        if name not in keys:
            raise FeedError(
                f"{shown} lacks the input {name!r}, found {_listed(keys)}, "
                f"expected {_listed(names, most=8)}",
                hint=hint,
            )


# ---------------------------------------------------------------------------------------- sources


class _Source(Protocol):
    """Where samples come from; plain data, so that it can be pickled."""

    def samples(self, indices: Sequence[int]) -> Samples:
        """The samples with these indices, one at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ArrayFiles:
    """One sample per ``.npz`` or ``.npy``."""

    files: tuple[Path, ...]
    inputs: tuple[TensorInfo, ...]

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            path = self.files[index]
            feed: Arrays = {}
            with _opened(path, self.inputs, path.name) as arrays:
                for info in self.inputs:
                    where = f"{path.name}: {info.name!r}"
                    _check_shape(arrays[info.name].shape, info, where)
                    with _readable(where, "an array", "Save it again with np.savez or np.save."):
                        array = arrays[info.name].read()
                    feed[info.name] = _convert(array, info, where)
            yield feed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """How one input's samples lie in a stacked file.

    Attributes:
        info: the input.
        shape: of one sample.
        step: rows of the leading axis per sample; 0 where all samples share the array.
        samples: how many there are; None where shared.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    step: int
    samples: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stack:
    """Many samples along the leading axis of the arrays of one file."""

    file: Path
    slots: tuple[_Slot, ...]

    def samples(self, indices: Sequence[int]) -> Samples:
        inputs = [slot.info for slot in self.slots]
        with _opened(self.file, inputs, self.file.name) as arrays:
            for index in indices:
                feed: Arrays = {}
                for slot in self.slots:
                    name = slot.info.name
                    where = f"{self.file.name}: {name!r} of sample {index}"
                    with _readable(where, "an array", "Save it again with np.savez or np.save."):
                        array = arrays[name].read(index * slot.step, slot.shape)
                    feed[name] = _convert(array, slot.info, where)
                yield feed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Protos:
    """One sample per folder of ``input_*.pb``, in input order."""

    sets: tuple[tuple[Path, ...], ...]
    inputs: tuple[TensorInfo, ...]

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            feed: Arrays = {}
            for path, info in zip(self.sets[index], self.inputs, strict=True):
                where = f"{path.parent.name}/{path.name}: {info.name!r}"
                array = _read_proto(path, where, info)
                _check_shape(array.shape, info, where)
                feed[info.name] = _convert(array, info, where)
            yield feed


def _read_proto(path: Path, where: str, info: TensorInfo) -> NDArray[Any]:
    hint = "Write it with onnx.numpy_helper.from_array(array).SerializeToString()."
    tensor = onnx.TensorProto()
    with _readable(where, "an ONNX tensor", hint):
        if path.stat().st_size > MAX_ARRAY_BYTES:
            raise ValueError(f"it has more than {MAX_ARRAY_BYTES / 2**30:g} GiB")
        try:
            tensor.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ValueError("it is no TensorProto") from error
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its values lie in another file")
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise ValueError("it names no element type (a sequence or optional is no tensor)")
        # Checked before to_array: an empty tensor may claim any number of elements.
        if math.prod(tensor.dims) > 8 * path.stat().st_size:
            raise ValueError(f"it claims the shape {tuple(tensor.dims)} but is much smaller")
        try:
            array: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        except TypeError as error:
            raise ValueError(str(error)) from error
    _check_kind(array.dtype, where, info)
    return array


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """One sample per image."""

    files: tuple[Path, ...]
    info: TensorInfo
    preprocess: Preprocess

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            path = self.files[index]
            array = self.preprocess.apply(open_image(path))
            if self.info.shape is not None and len(self.info.shape) == 3:
                array = array[0]
            where = f"{path.name}: {self.info.name!r}"
            yield {self.info.name: _convert(array, self.info, where, rounding=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Noise:
    """What is drawn for one input.

    Attributes:
        info: the input.
        shape: without dynamic dimensions.
        low, high: range of integers, both included.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    low: int
    high: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Random:
    """Seeded noise; a sample depends on the seed and its index only."""

    noises: tuple[_Noise, ...]
    seed: int

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            rng = np.random.default_rng([self.seed, index])
            feed: Arrays = {}
            for noise in self.noises:
                dtype = np.dtype(noise.info.dtype)
                if dtype.kind == "f":
                    array: Any = rng.standard_normal(noise.shape).astype(dtype)
                elif dtype.kind == "b":
                    array = rng.integers(0, 2, noise.shape).astype(dtype)
                else:
                    array = rng.integers(
                        noise.low, noise.high, noise.shape, dtype=dtype, endpoint=True
                    )
                feed[noise.info.name] = np.asarray(array)
            yield feed


# ------------------------------------------------------------------------------------------ Feeds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What one pass over a sample tells: its digest and its NaN and infinite elements by input."""

    digest: str
    nonfinite: tuple[tuple[str, int], ...]


class Feeds:
    """Model inputs, one dict of arrays per sample, read again on every pass.

    Made by `load_feeds`, `image_feeds` and `random_feeds`; can be pickled and iterated any number
    of times. Iterating raises `FeedError` where a file changed or breaks off.

    Attributes:
        names: sample names: file names, or "sample 0", "sample 1" …
        random: the samples are seeded noise, not data.
        labels: class of each sample; None where there are none.
        notes: what was converted, assumed or ignored, one sentence each.
        description: e.g. "7 .npz files", "8 random feeds (seed 0)".
    """

    def __init__(
        self,
        source: _Source,
        *,
        names: Sequence[str],
        kind: tuple[str, str],
        suffix: str = "",
        random: bool = False,
        labels: Sequence[int] | None = None,
        notes: Iterable[str] = (),
        available: int | None = None,
        indices: Sequence[int] | None = None,
        facts: dict[int, _Facts] | None = None,
    ) -> None:
        self._source = source
        self._kind = kind
        self._suffix = suffix
        self._indices = tuple(range(len(names)) if indices is None else indices)
        self._available = len(names) if available is None else available
        # Shared with every subset, so that a sample is hashed once.
        self._facts: dict[int, _Facts] = {} if facts is None else facts
        self.names: tuple[str, ...] = tuple(names)
        self.random = random
        self.labels: tuple[int, ...] | None = None if labels is None else tuple(labels)
        self.notes: tuple[str, ...] = tuple(notes)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Arrays]:
        with closing(self._source.samples(self._indices)) as samples:
            yield from samples

    def __getitem__(self, index: int) -> Arrays:
        """One sample; IndexError where there is none."""
        with closing(self._source.samples([self._indices[index]])) as samples:
            return next(samples)

    def __repr__(self) -> str:
        return f"Feeds({self.description})"

    @property
    def description(self) -> str:
        count = f"{len(self):,} of " if len(self) != self._available else ""
        return f"{count}{_counted(self._available, *self._kind)}{self._suffix}"

    def subset(self, indices: Iterable[int]) -> Feeds:
        """The samples with these indices, in this order; repeats are allowed."""
        indices = list(indices)
        return Feeds(
            self._source,
            names=[self.names[i] for i in indices],
            kind=self._kind,
            suffix=self._suffix,
            random=self.random,
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            notes=self.notes,
            available=self._available,
            indices=[self._indices[i] for i in indices],
            facts=self._facts,
        )

    def _known(self) -> Generator[_Facts, None, None]:
        """Facts of every sample in order; each sample is read at most once, ever."""
        missing = [i for i in dict.fromkeys(self._indices) if i not in self._facts]
        with closing(self._source.samples(missing)) as samples:
            for index in self._indices:
                if index not in self._facts:
                    self._facts[index] = _facts_of(next(samples))
                yield self._facts[index]

    def sample_digest(self, index: int) -> str:
        """sha256 of one sample: names, element types, shapes and values as the model gets them."""
        own = self._indices[index]
        if own not in self._facts:
            self._facts[own] = _facts_of(self[index])
        return self._facts[own].digest

    @cached_property
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
        if len(self) < 2:
            return False
        with closing(self._known()) as known:
            first = next(known).digest
            return all(facts.digest == first for facts in known)

    @property
    def pictures(self) -> bool:
        """Whether the samples are images, which `picture` shows."""
        return isinstance(self._source, _Images)

    def picture(self, index: int) -> NDArray[np.uint8] | None:
        """An image sample as the model gets it, uint8 RGB (height, width, 3).

        None for feeds that are not images.
        """
        if not isinstance(self._source, _Images):
            return None
        path = self._source.files[self._indices[index]]
        return self._source.preprocess.picture(open_image(path))


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
    path = Path(path)
    inputs = _inputs(model)
    if not path.exists():
        raise FeedError(f"{path} does not exist", hint="Check the path and its spelling.")
    if path.is_dir():
        feeds = _load_folder(path, _entries(path), model, inputs, preprocess, limit)
    else:
        feeds = _load_file(path, model, inputs, preprocess, limit)
    return _noted_if_identical(feeds)


def _noted_if_identical(feeds: Feeds) -> Feeds:
    if feeds.identical():
        feeds.notes += (
            f"all {len(feeds):,} samples hold the same values, so figures say nothing about others",
        )
    return feeds


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name."""
    with _readable(_shown(folder), "a folder", "Check the folder's permissions."):
        return sorted(folder.iterdir(), key=lambda entry: entry.name)


def _shown(folder: Path) -> str:
    """The folder's name, also of ``.`` and ``..``."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name or str(folder)


def _proto_inputs(entries: Iterable[Path]) -> tuple[Path, ...]:
    """The ``input_*.pb`` among the entries, by number."""
    return tuple(
        sorted(
            (e for e in entries if re.fullmatch(r"input_\d+\.pb", e.name) and e.is_file()),
            key=lambda e: int(e.stem.removeprefix("input_")),
        )
    )


def _natural(path: Path) -> tuple[Any, ...]:
    # test_data_set_10 comes after test_data_set_2.
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name))


def _load_folder(
    folder: Path,
    entries: Sequence[Path],
    model: Model,
    inputs: tuple[TensorInfo, ...],
    preprocess: Path | Preprocess | None,
    limit: int | None,
) -> Feeds:
    shown = _shown(folder)
    if not entries:
        raise FeedError(
            f"{shown} is an empty folder, {_FEED_KINDS}",
            hint="Put one .npz per sample into it, keyed by input name: "
            f"{_listed([i.name for i in inputs], most=8)}.",
        )
    files = [e for e in entries if e.is_file()]
    by_suffix = {
        suffix: [f for f in files if f.suffix.lower() == suffix] for suffix in (".npz", ".npy")
    }
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    folders = [e for e in entries if e.is_dir()]
    sets = sorted((f for f in folders if f.name.startswith("test_data_set_")), key=_natural)
    protos = _proto_inputs(entries)
    taken: list[Path]
    kind: str
    if by_suffix[".npz"] or by_suffix[".npy"]:
        kind = ".npz" if by_suffix[".npz"] else ".npy"
        taken = by_suffix[kind]
        labels, notes = _labels(folder / "labels.json", len(taken), _named(f"{kind} file", shown))
        feeds = _array_files(taken[:limit], len(taken), inputs, kind, shown)
    elif sets or protos:
        kind = "ONNX test data"
        taken = [*sets, *protos] if sets else list(protos)
        chosen = sets or [folder]
        labels, notes = _labels(folder / "labels.json", len(chosen), _named("test data set", shown))
        taken += [f for f in files if re.fullmatch(r"output_\d+\.pb", f.name)]
        feeds = _proto_sets(chosen[:limit], len(chosen), inputs)
    elif images:
        return _image_folder(folder, entries, model, preprocess, limit)
    else:
        raise _no_feeds(folder, shown, files, folders)
    notes += _stray(shown, entries, taken, kind)
    if preprocess is not None:
        notes.append(f"preprocessing is for images and not applied to the {kind} in {shown}")
    return _with(feeds, labels, notes)


def _stray(shown: str, entries: Sequence[Path], taken: Sequence[Path], kind: str) -> list[str]:
    known = {e.name for e in taken} | _COMPANIONS
    stray = [e.name + ("/" if e.is_dir() else "") for e in entries if e.name not in known]
    if not stray:
        return []
    verb = "is" if len(stray) == 1 else "are"
    return [f"{shown}: {_listed(stray)} {verb} not {kind} and {verb} ignored"]


def _with(feeds: Feeds, labels: Sequence[int] | None, notes: Iterable[str]) -> Feeds:
    if labels is not None:
        feeds.labels = tuple(labels[: len(feeds)])
    feeds.notes += tuple(notes)
    return feeds


def _no_feeds(
    folder: Path, shown: str, files: Sequence[Path], folders: Sequence[Path]
) -> FeedError:
    suffixes = {".npz", ".npy", ".pb", *IMAGE_SUFFIXES}
    for inner in folders:
        held = [f for f in _entries(inner) if f.suffix.lower() in suffixes]
        if held:
            return FeedError(
                f"{shown} holds no feeds itself; its subfolder {inner.name} has "
                f"{_counted(len(held), 'file', 'files')} that may be feeds",
                hint=f"Name the subfolder: {folder / inner.name}",
            )
    found = _listed([e.name for e in (*files, *folders)])
    return FeedError(
        f"{shown} holds no feeds: found {found}, {_FEED_KINDS}",
        hint="Name the folder or file that holds the feeds.",
    )


def _load_file(
    path: Path,
    model: Model,
    inputs: tuple[TensorInfo, ...],
    preprocess: Path | Preprocess | None,
    limit: int | None,
) -> Feeds:
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        if suffix == ".npy":
            _one_input(inputs, path.name)
        feeds = _stacked(path, inputs, limit)
    elif suffix in IMAGE_SUFFIXES:
        feeds = _image_files([path], 1, model, _recipe(path.parent, preprocess))
    elif suffix == ".pb":
        if len(inputs) != 1:
            raise FeedError(
                f"{path.name} is one tensor, but the model has {len(inputs)} inputs",
                hint=f"Name the folder that holds input_0.pb to input_{len(inputs) - 1}.pb.",
            )
        feeds = Feeds(
            _Protos(sets=((path,),), inputs=inputs),
            names=[path.name],
            kind=("ONNX test tensor", "ONNX test tensors"),
            notes=_proto_notes([(path,)], inputs),
        )
    else:
        raise FeedError(
            f"{path.name} is no feed, {_FEED_KINDS}",
            hint="Unpack archives and name the folder; save arrays with np.savez.",
        )
    notes = []
    if suffix not in IMAGE_SUFFIXES and preprocess is not None:
        notes.append(f"preprocessing is for images and not applied to {path.name}")
    labels_file = path.parent / "labels.json"
    if not labels_file.is_file():
        return _with(feeds, None, notes)
    siblings = [e for e in _entries(path.parent) if e.suffix.lower() == suffix and e != path]
    labels, more = _labels(
        labels_file, feeds._available, _named("sample", path.name), alone=not siblings
    )
    return _with(feeds, labels, notes + more)


def _labels(
    path: Path, expected: int, what: tuple[str, str], *, alone: bool = True
) -> tuple[list[int] | None, list[str]]:
    """The labels beside the feeds, and notes; None where there are none.

    `alone`: False where other files lie beside a single one, so that labels of another number
    are theirs and no fault.
    """
    if not path.is_file():
        return None, []
    values = _read_json(path, "labels")
    if not isinstance(values, list):
        raise FeedError(
            f"labels.json holds {_json_kind(values)}, expected a list of integers",
            hint="Write one class number per sample in sorted file order, e.g. [3, 0, 7].",
        )
    if len(values) != expected:
        if not alone:
            return None, [
                f"labels.json has {_counted(len(values), 'label', 'labels')} for other files and "
                f"is not used for the {_counted(expected, *what)}"
            ]
        raise FeedError(
            f"labels.json has {_counted(len(values), 'label', 'labels')}, "
            f"expected {expected:,}: as many as {what[1]}",
            hint="Write one class number per sample in sorted file order, or remove labels.json.",
        )
    for index, label in enumerate(values):
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise FeedError(
                f"labels.json has {json.dumps(label)} at position {index}, "
                "expected an integer of 0 or more",
                hint="Write one class number per sample in sorted file order, e.g. [3, 0, 7].",
            )
    return values, []


def _read_json(path: Path, what: str) -> Any:
    with _readable(path.name, what, "Write it as JSON, e.g. with json.dump."):
        return json.loads(path.read_text("utf-8-sig"))


def _json_kind(value: Any) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), f"the value {json.dumps(value)}")


def _one_input(inputs: Sequence[TensorInfo], shown: str) -> None:
    if len(inputs) != 1:
        raise FeedError(
            f"{shown} is an array without a name, but the model has {len(inputs)} inputs: "
            f"{_listed([i.name for i in inputs], most=8)}",
            hint="Save one .npz keyed by input name instead of .npy.",
        )


def _conversion_note(info: TensorInfo, source: str, count: int, total: int) -> str:
    where = "" if count == total else f" in {count:,} of {total:,} files"
    return f"input {info.name!r} is {source}{where} and was converted to {info.dtype}"


def _check_values(feeds: Feeds) -> None:
    """Reads every sample once, so that a lossy conversion is refused before anything runs."""
    for _ in feeds._known():
        pass


def _array_files(
    files: Sequence[Path], total: int, inputs: tuple[TensorInfo, ...], kind: str, folder: str
) -> Feeds:
    if kind == ".npy":
        _one_input(inputs, f"{folder}/{files[0].name}")
    conversions: Counter[tuple[int, str]] = Counter()
    risky = False
    for path in files:
        with _opened(path, inputs, path.name) as arrays:
            for position, info in enumerate(inputs):
                array = arrays[info.name]
                where = f"{path.name}: {info.name!r}"
                _check_shape(array.shape, info, where, stackable=path.name)
                if array.dtype.name != info.dtype:
                    conversions[position, array.dtype.name] += 1
                    risky |= _value_dependent(array.dtype, info)
    feeds = Feeds(
        _ArrayFiles(files=tuple(files), inputs=inputs),
        names=[f.name for f in files],
        kind=(f"{kind} file", f"{kind} files"),
        available=total,
        notes=[
            _conversion_note(inputs[position], source, count, len(files))
            for (position, source), count in sorted(conversions.items())
        ],
    )
    if risky:
        _check_values(feeds)
    return feeds


def _slot(array: _Array, info: TensorInfo, where: str) -> _Slot:
    """How the samples of one input lie in an array with a leading sample axis.

    One axis more than the input has: each row is a sample. As many axes: rows are taken as
    batches of the input's own batch size (1 where dynamic). A scalar is shared by all samples.
    """
    shape, expected = array.shape, info.shape
    if shape and shape[0] == 0:
        raise FeedError(
            f"{where} holds no samples: its shape is {_shape_text_of(shape)}",
            hint="Save it with at least one sample.",
        )
    if expected is None:
        expected = (None,) * len(shape)
    if len(shape) == len(expected) + 1 and _fits(shape[1:], expected):
        return _Slot(info=info, shape=shape[1:], step=1, samples=shape[0])
    if len(shape) == len(expected) and _fits(shape[1:], expected[1:]):
        if not shape:
            return _Slot(info=info, shape=(), step=0, samples=None)
        batch = expected[0] if isinstance(expected[0], int) and expected[0] > 0 else 1
        if batch == 1 or shape[0] % batch == 0:
            count = shape[0] // batch
            shared = batch > 1 and count == 1
            return _Slot(
                info=info,
                shape=(batch, *shape[1:]),
                step=0 if shared else batch,
                samples=None if shared else count,
            )
    wanted = _shape_text(expected)
    stacked = _shape_text(("samples", *expected))
    hint = f"Save it with a leading sample axis: {stacked}."
    if shape and _fits(shape, expected[1:]):
        hint = "Add the sample axis with array[np.newaxis] and save it again."
    raise FeedError(
        f"{where} has shape {_shape_text_of(shape)}, expected samples of {wanted} "
        "along its leading axis",
        hint=hint,
    )


def _stacked(path: Path, inputs: tuple[TensorInfo, ...], limit: int | None) -> Feeds:
    shown = path.name
    notes = []
    risky = False
    with _opened(path, inputs, shown) as arrays:
        slots = tuple(_slot(arrays[info.name], info, f"{shown}: {info.name!r}") for info in inputs)
        for info in inputs:
            dtype = arrays[info.name].dtype
            if dtype.name != info.dtype:
                notes.append(_conversion_note(info, dtype.name, 1, 1))
                risky |= _value_dependent(dtype, info)
    counts = {slot.info.name: slot.samples for slot in slots if slot.samples is not None}
    total = next(iter(counts.values()), 1)
    for name, count in counts.items():
        if count != total:
            first = next(iter(counts))
            raise FeedError(
                f"{shown}: {name!r} has {_counted(count, 'sample', 'samples')} and "
                f"{first!r} {total:,}, expected as many of each",
                hint="Save all arrays with the same leading sample axis.",
            )
    if total > MAX_SAMPLES:
        raise FeedError(
            f"{shown} claims {total:,} samples, expected at most {MAX_SAMPLES:,}",
            hint="Split it into smaller files.",
        )
    if total > 1:
        for slot in slots:
            # A dynamic batch could also take them all at once: this is a choice, so it is said.
            if slot.step and slot.info.shape and len(slot.info.shape) == len(slot.shape):
                dim = slot.info.shape[0]
                if slot.shape[0] == 1 and not _is_static(dim):
                    notes.append(
                        f"{shown}: {slot.info.name!r} is taken as {total:,} samples of "
                        f"{_shape_text_of(slot.shape)}, not as one batch"
                    )
        shared = [repr(s.info.name) for s in slots if s.samples is None]
        if shared:
            notes.append(f"{shown}: all samples share {_listed(shared, most=8)}")
    taken = min(total, limit or total)
    feeds = Feeds(
        _Stack(file=path, slots=slots),
        names=[f"sample {i}" for i in range(taken)],
        kind=_named("sample", shown),
        available=total,
        notes=notes,
    )
    if risky:
        _check_values(feeds)
    return feeds


def _proto_sets(folders: Sequence[Path], total: int, inputs: tuple[TensorInfo, ...]) -> Feeds:
    sets = []
    for folder in folders:
        files = _proto_inputs(_entries(folder))
        found = _listed([f.name for f in files], most=8)
        wanted = [f"input_{i}.pb" for i in range(len(inputs))]
        if [f.name for f in files] != wanted:
            raise FeedError(
                f"{_shown(folder)} has {found or 'no input_*.pb'}, "
                f"expected {_listed(wanted, most=8)}: one per input of the model",
                hint=f"Write them in input order: {_listed([i.name for i in inputs], most=8)}.",
            )
        sets.append(files)
    return Feeds(
        _Protos(sets=tuple(sets), inputs=inputs),
        names=[_shown(folder) for folder in folders],
        kind=("ONNX test data set", "ONNX test data sets"),
        available=total,
        notes=_proto_notes(sets, inputs),
    )


def _proto_notes(sets: Sequence[Sequence[Path]], inputs: tuple[TensorInfo, ...]) -> list[str]:
    """Reads and checks every set (a .pb has no header to judge by); says what is converted."""
    conversions: Counter[tuple[int, str]] = Counter()
    for files in sets:
        for position, (path, info) in enumerate(zip(files, inputs, strict=True)):
            where = f"{path.parent.name}/{path.name}: {info.name!r}"
            array = _read_proto(path, where, info)
            _check_shape(array.shape, info, where)
            _convert(array, info, where)
            if array.dtype.name != info.dtype:
                conversions[position, array.dtype.name] += 1
    return [
        _conversion_note(inputs[position], source, count, len(sets))
        for (position, source), count in sorted(conversions.items())
    ]


# ----------------------------------------------------------------------------------------- images

_RESIZES = ("stretch", "letterbox", "center_crop")
_LAYOUTS = ("NCHW", "NHWC")
_COLORS = ("RGB", "BGR", "GRAY")
_PRESET_EXAMPLE = '{"preset": "yolo"}'
# What each field takes, and an example that works.
_FIELDS = {
    "preset": ("one of yolo, torchvision, tf, bgr", '"yolo"'),
    "resize": (f"one of {', '.join(_RESIZES)}", '"letterbox"'),
    "size": ("[height, width] in pixels", "[224, 224]"),
    "pad_color": ("three numbers of 0..255", "[114, 114, 114]"),
    "layout": (f"one of {', '.join(_LAYOUTS)}", '"NCHW"'),
    "color": (f"one of {', '.join(_COLORS)}", '"RGB"'),
    "scale": ("a number other than 0", "0.00392156862745098"),
    "mean": ("one number, or one per channel", "0"),
    "std": ("one number other than 0, or one per channel", "1"),
    "crop_fraction": ("a number above 0 and at most 1", "0.875"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """What turns a picture into the model's input: ``x = (pixel * scale - mean) / std``.

    Attributes:
        resize: "stretch" to the size; "letterbox" (fit inside, pad); "center_crop" (cover, cut).
        size: (height, width) of the model's picture; None takes the model's own.
        pad_color: RGB 0..255, the letterbox's border.
        layout: "NCHW" or "NHWC"; None takes what the model's input shape says.
        color: "RGB", "BGR" or "GRAY": the order of the model's channels.
        scale: factor on pixels of 0..255.
        mean, std: one number, or one per channel in the model's order.
        crop_fraction: share of the covering picture's shorter side that "center_crop" keeps;
            torchvision's resize to 256 and crop to 224 is 0.875.

    Raises:
        FeedError: a field has a value that means nothing.
    """

    resize: str = "stretch"
    size: tuple[int, int] | None = None
    pad_color: tuple[int, int, int] = (114, 114, 114)
    layout: str | None = None
    color: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        most = Image.MAX_IMAGE_PIXELS or math.inf
        good = {
            "resize": self.resize in _RESIZES,
            "size": self.size is None
            or (len(self.size) == 2 and min(self.size) > 0 and math.prod(self.size) <= most),
            "pad_color": len(self.pad_color) == 3 and all(0 <= c <= 255 for c in self.pad_color),
            "layout": self.layout in (None, *_LAYOUTS),
            "color": self.color in _COLORS,
            "scale": math.isfinite(self.scale) and self.scale != 0,
            "mean": len(self.mean) in (1, self.channels) and all(map(math.isfinite, self.mean)),
            "std": len(self.std) in (1, self.channels)
            and all(math.isfinite(s) and s != 0 for s in self.std),
            "crop_fraction": 0 < self.crop_fraction <= 1,
        }
        for name, is_good in good.items():
            if not is_good:
                raise _bad_field(name, getattr(self, name), f" for {self.color}")

    @property
    def channels(self) -> int:
        return 1 if self.color == "GRAY" else 3

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """The recipe an object of these fields says; ``"preset"`` names one to start from.

        Raises:
            FeedError: an unknown field or a value that means nothing.
        """
        values = dict(data)
        base = cls()
        if "preset" in values:
            preset = values.pop("preset")
            if not isinstance(preset, str) or preset not in PRESETS:
                raise _bad_field("preset", preset)
            base = PRESETS[preset]
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, ["preset", *known], n=3, cutoff=0.0)
                raise FeedError(
                    f"preprocess has the unknown field {name!r}; nearest are {_listed(near)}",
                    hint=f"Use only preset, {', '.join(known)}.",
                )
        return replace(base, **{name: _field(name, value) for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def fitted(self, model: Model) -> Preprocess:
        """This recipe with the model's own size and layout where it leaves them open.

        Raises:
            FeedError: the model has no single picture input, or takes another size, layout or
                number of channels.
        """
        return _fit(self, _image_input(model))

    def picture(self, image: Image.Image) -> NDArray[np.uint8]:
        """The picture as the model gets it, uint8 RGB (height, width, 3) whatever `color` says.

        Raises:
            ValueError: `size` is None (see `fitted`), or the pixels have no known range.
        """
        return np.asarray(self._resized(image).convert("RGB"), np.uint8)

    def apply(self, image: Image.Image) -> NDArray[np.float32]:
        """The model's input, float32 of shape (1, C, H, W) or (1, H, W, C).

        Raises:
            ValueError: `size` is None (see `fitted`), or the pixels have no known range.
        """
        pixels = np.asarray(self._resized(image), np.float32)
        if pixels.ndim == 2:
            pixels = pixels[..., np.newaxis]
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        values = (pixels * np.float32(self.scale) - mean) / std
        if self.layout != "NHWC":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values[np.newaxis], np.float32)

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            raise ValueError("size is None; use fitted(model) first")
        image = _upright(image)
        mode = "L" if self.color == "GRAY" else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        height, width = self.size
        bilinear = Image.Resampling.BILINEAR
        if self.resize == "stretch":
            return image.resize((width, height), bilinear)
        if self.resize == "letterbox":
            ratio = min(height / image.height, width / image.width)
            inner = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            pad = Image.new("RGB", (1, 1), self.pad_color).convert(mode).getpixel((0, 0))
            canvas = Image.new(mode, (width, height), pad)
            # Half a pixel too much goes to the right and the bottom, as YOLO's own letterbox does.
            left = max(0, round((width - inner[0]) / 2 - 0.1))
            top = max(0, round((height - inner[1]) / 2 - 0.1))
            canvas.paste(image.resize(inner, bilinear), (left, top))
            return canvas
        return self._cropped(image, height, width)

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        # Sizes round as torchvision's Resize and CenterCrop do. Only the part that is kept is
        # computed: the covering picture of a very long image would not fit in memory.
        tall = max(height, round(height / self.crop_fraction))
        wide = max(width, round(width / self.crop_fraction))
        if tall * image.width >= wide * image.height:
            cover = (max(wide, tall * image.width // image.height), tall)
        else:
            cover = (wide, max(tall, wide * image.height // image.width))
        across, down = image.width / cover[0], image.height / cover[1]
        left, top = round((cover[0] - width) / 2), round((cover[1] - height) / 2)
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


PRESETS: dict[str, Preprocess] = {
    "yolo": Preprocess(resize="letterbox", scale=1 / 255),
    "torchvision": Preprocess(
        resize="center_crop",
        crop_fraction=0.875,
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "bgr": Preprocess(color="BGR"),
}


def _bad_field(name: str, found: Any, channels: str = "") -> FeedError:
    expected, example = _FIELDS[name]
    return FeedError(
        f"preprocess has {name} {json.dumps(found)}, expected {expected}"
        f"{channels if name in ('mean', 'std') else ''}",
        hint=f'Write e.g. "{name}": {example}.',
    )


def _field(name: str, value: Any) -> Any:
    """A JSON value as the field's Python value."""

    def number(item: Any) -> bool:
        return isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < 1e300

    if value is None and name in ("size", "layout"):
        return None
    if name == "resize" and isinstance(value, str):
        return value.lower().replace("-", "_").replace("centre", "center")
    if name in ("layout", "color") and isinstance(value, str):
        return value.upper().replace("GREY", "GRAY")
    if name in ("scale", "crop_fraction") and number(value):
        return float(value)
    if name in ("size", "pad_color", "mean", "std"):
        items = value if isinstance(value, list | tuple) else [value]
        if not isinstance(value, list | tuple):
            items = items * {"size": 2, "pad_color": 3}.get(name, 1)
        whole = name in ("size", "pad_color")
        if all(number(i) and (not whole or float(i).is_integer()) for i in items):
            return tuple(int(i) if whole else float(i) for i in items)
    raise _bad_field(name, value)


def read_preprocess(path: str | os.PathLike[str]) -> Preprocess:
    """The recipe in a JSON file: the fields of `Preprocess`, or ``{"preset": "yolo"}`` and changes.

    Raises:
        FeedError: no such file, not JSON, an unknown field or a value that means nothing.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder, expected a file" if path.is_dir() else "does not exist"
        raise FeedError(
            f"the preprocess file {path} {found}",
            hint=f"Write a file with one of the presets, e.g. {_PRESET_EXAMPLE}.",
        )
    data = _read_json(path, "preprocessing")
    if not isinstance(data, dict):
        raise FeedError(
            f"{path.name} holds {_json_kind(data)}, expected an object",
            hint=f"Write e.g. {_PRESET_EXAMPLE}.",
        )
    try:
        return Preprocess.from_json(data)
    except FeedError as error:
        raise FeedError(f"{path.name}: {error.message}", hint=error.hint) from error


def _recipe(folder: Path, preprocess: Path | Preprocess | None) -> Preprocess:
    if isinstance(preprocess, Preprocess):
        return preprocess
    if preprocess is not None:
        return read_preprocess(preprocess)
    beside = folder / "preprocess.json"
    if not beside.is_file():
        raise FeedError(
            f"{_shown(folder)} holds images but no preprocess.json, "
            "which says how pixels become the model's input",
            hint=f"Write preprocess.json beside them, e.g. {_PRESET_EXAMPLE} "
            f"(presets: {', '.join(PRESETS)}).",
        )
    return read_preprocess(beside)


def _image_input(model: Model) -> TensorInfo:
    inputs = _inputs(model)
    if len(inputs) != 1 or inputs[0].shape is None or len(inputs[0].shape) not in (3, 4):
        found = _listed(
            [f"{i.name} {'?' if i.shape is None else _shape_text(i.shape)}" for i in inputs], most=8
        )
        raise FeedError(
            f"{model.name} takes {found}, expected one picture of 3 or 4 axes for image feeds",
            hint="Save the inputs as .npz, one file per sample, keyed by input name.",
        )
    return inputs[0]


def _fit(preprocess: Preprocess, info: TensorInfo) -> Preprocess:
    shape = info.shape or ()
    dims = shape if len(shape) == 4 else (1, *shape)
    shown = f"input {info.name!r} {_shape_text(shape)}"
    if _is_static(dims[0]) and dims[0] != 1:
        raise FeedError(
            f"{shown} takes {dims[0]} pictures at once, expected a batch of 1 for image feeds",
            hint="Export the model with batch size 1 or a dynamic batch.",
        )
    channels = preprocess.channels
    axes = {"NCHW": (1, 2, 3), "NHWC": (3, 1, 2)}
    possible = [k for k, a in axes.items() if dims[a[0]] == channels] or [
        k for k, a in axes.items() if not _is_static(dims[a[0]])
    ]
    if not possible:
        other = {1: "GRAY", 3: "RGB"}.get(next((d for d in dims[1:] if d in (1, 3)), 0))
        raise FeedError(
            f"{shown} has no axis of {channels}, which color {preprocess.color} gives",
            hint=f'Write "color": "{other}".'
            if other
            else "Save the inputs as .npz, one file per sample, keyed by input name.",
        )
    layout = preprocess.layout or possible[0]
    if layout not in possible:
        raise FeedError(
            f"preprocess says layout {layout}, but {shown} is {possible[0]}",
            hint=f'Write "layout": "{possible[0]}".',
        )
    _, vertical, horizontal = axes[layout]
    own = (dims[vertical], dims[horizontal])
    size = preprocess.size or tuple(d for d in own if isinstance(d, int) and d > 0)
    if len(size) != 2:
        raise FeedError(
            f"{shown} leaves the picture's size open, and preprocess names none",
            hint='Write the size as [height, width], e.g. "size": [640, 640].',
        )
    if not _fits(size, own):
        raise FeedError(
            f"preprocess has size {list(size)}, expected [height, width] {_shape_text(own)} "
            f"of {shown}",
            hint='Leave "size" out, or write the model\'s own.',
        )
    return replace(preprocess, size=(size[0], size[1]), layout=layout)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file: first frame, upright, mode L or RGB.

    Raises:
        FeedError: it is no picture, damaged, has pixels of an unknown range, or more of them than
            Pillow's MAX_IMAGE_PIXELS.
    """
    path = Path(path)
    with (
        _readable(path.name, "a picture", "Save or download it again."),
        _image_header(path) as image,
    ):
        image.load()
        return _upright(image)


def _image_header(path: Path) -> Image.Image:
    shown = path.name
    hint = "Save it as PNG or JPEG, or remove it from the folder."
    with _readable(shown, "a picture", hint), warnings.catch_warnings():
        # Pillow warns above its limit and refuses above twice of it; both are refused here.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=_IMAGE_FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise FeedError(
                f"{shown} has more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS:,}",
                hint="Make the picture smaller.",
            ) from error
        except UnidentifiedImageError as error:
            raise ValueError("its content is of no known format") from error
    if image.mode == "F":
        image.close()
        raise FeedError(
            f"{shown} has floating-point pixels, expected 8 or 16 bits",
            hint="Save these inputs as .npz, one file per sample, keyed by input name.",
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says, in mode L or RGB; transparency is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(f"its pixels are {deep.min()}..{deep.max()}, expected 8 or 16 bits")
        return Image.fromarray((deep >> 8).astype(np.uint8))
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "PA"):
        # By way of RGBA: Pillow warns about palettes whose transparency is a table.
        image = image.convert("RGBA")
    return image.convert("RGB")


def image_feeds(folder: str | os.PathLike[str], model: Model, preprocess: Preprocess) -> Feeds:
    """One sample per image in a folder, sorted by name, turned into the model's input.

    `folder` may also be one image.

    Raises:
        FeedError: no images, a damaged one, or a recipe that does not fit the model.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix.lower() in IMAGE_SUFFIXES:
        return load_feeds(folder, model, preprocess=preprocess)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise FeedError(
            f"{folder} {found}, expected a folder of images or one image",
            hint="Check the path and its spelling.",
        )
    feeds = _image_folder(folder, _entries(folder), model, preprocess, None)
    return _noted_if_identical(feeds)


def _image_folder(
    folder: Path,
    entries: Sequence[Path],
    model: Model,
    preprocess: Path | Preprocess | None,
    limit: int | None,
) -> Feeds:
    shown = _shown(folder)
    images = [e for e in entries if e.suffix.lower() in IMAGE_SUFFIXES and e.is_file()]
    if not images:
        raise FeedError(
            f"{shown} holds no images, expected {_listed(sorted(IMAGE_SUFFIXES), 12)}",
            hint="Name the folder that holds the images.",
        )
    labels, notes = _labels(folder / "labels.json", len(images), _named("image", shown))
    feeds = _image_files(images[:limit], len(images), model, _recipe(folder, preprocess))
    return _with(feeds, labels, notes + _stray(shown, entries, images, "images"))


def _image_files(files: Sequence[Path], total: int, model: Model, preprocess: Preprocess) -> Feeds:
    info = _image_input(model)
    recipe = _fit(preprocess, info)
    traits: Counter[str] = Counter()
    for path in files:
        with _image_header(path) as image:
            if image.mode.startswith("I"):
                traits["have 16 bits per pixel, of which the upper 8 are used"] += 1
            if "A" in image.getbands() or "transparency" in image.info:
                traits["are partly transparent, which is dropped"] += 1
            if getattr(image, "n_frames", 1) > 1:
                traits["have several frames, of which the first is used"] += 1
    return Feeds(
        _Images(files=tuple(files), info=info, preprocess=recipe),
        names=[f.name for f in files],
        kind=("image", "images"),
        available=total,
        notes=[f"{count:,} of {len(files):,} images {what}" for what, count in traits.items()],
    )


# ----------------------------------------------------------------------------------- random feeds

# Operators that hand values on unchanged, and the inputs they take them from (None: all).
_PASSES: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        ("Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose",
         "Expand", "Slice", "Split", "Tile", "Pad", "Clip", "Dropout", "Gather", "GatherElements",
         "GatherND", "Trilu"),
        (0,),
    ),
    "Concat": None,
    "Where": (1, 2),
}  # fmt: skip

# Operators that look rows up: position of the indices, position of the table.
_LOOKUPS: dict[str, tuple[tuple[int, int], ...]] = {
    "Gather": ((1, 0),),
    "GatherElements": ((1, 0),),
    "GatherND": ((1, 0),),
    "Scatter": ((1, 0),),
    "ScatterElements": ((1, 0),),
    "ScatterND": ((1, 0),),
    "GatherBlockQuantized": ((1, 0),),
    "EmbedLayerNormalization": ((0, 2), (1, 4)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A node of the graph or of a body in it, as far as indices are followed."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axis: int


class _Graph:
    """Which table an integer input indexes, bodies of If, Loop and Scan included."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._consumers: dict[str, list[_Step]] = {}
        self._producers: dict[str, _Step] = {}
        self._local: dict[str, onnx.TensorProto] = {}
        self._walk(model.proto.graph)

    def _walk(self, graph: onnx.GraphProto) -> None:
        self._local.update({i.name: i for i in graph.initializer})
        for node in graph.node:
            axis = next((int(a.i) for a in node.attribute if a.name in ("axis", "gather_axis")), 0)
            step = _Step(
                name=node.name,
                op_type=node.op_type,
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                axis=axis,
            )
            for name in dict.fromkeys(node.input):
                self._consumers.setdefault(name, []).append(step)
            self._producers.update(dict.fromkeys(node.output, step))
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._local[node.output[0]] = attribute.t
                for body in (attribute.g, *attribute.graphs):
                    self._walk(body)

    def _constant(self, name: str) -> NDArray[Any] | None:
        if name in self._local:
            return np.asarray(onnx.numpy_helper.to_array(self._local[name]))
        return self._model.constant(name)

    def _shape(self, name: str) -> tuple[int | str | None, ...] | None:
        if name in self._local:
            return tuple(self._local[name].dims)
        shape = self._model.info(name).shape
        producer = self._producers.get(name)
        if shape is None and producer and producer.op_type in ("DequantizeLinear", "Cast"):
            return self._shape(producer.inputs[0])
        return shape

    def _rows(self, step: _Step, table: int) -> int:
        """How many rows the table has; 1 where unknown, since row 0 is always there."""
        shape = self._shape(step.inputs[table])
        if shape is None:
            return 1
        if step.op_type in ("GatherND", "ScatterND"):
            rows: Sequence[int | str | None] = shape
        elif step.op_type == "EmbedLayerNormalization":
            rows = shape[:1]
        else:
            rows = [shape[step.axis]] if -len(shape) <= step.axis < len(shape) else [None]
        return min((d if isinstance(d, int) and d > 0 else 1 for d in rows), default=1)

    def limits(self, tensor: str) -> tuple[int, int, str] | None:
        """Smallest and largest integer that every look-up this input reaches allows, and why.

        Without a look-up, the range of the constants it is compared with; None for neither.
        """
        inside: list[tuple[int, int, str]] = []
        compared: list[tuple[int, int, str]] = []
        # A tensor on the way, and what was added to the input's values so far (least, most).
        front: list[tuple[str, int, int]] = [(tensor, 0, 0)]
        visited = {tensor}
        while front:
            name, least, most = front.pop()
            for step in self._consumers.get(name, ()):
                for indices, table in _LOOKUPS.get(step.op_type, ()):
                    if step.inputs[indices] == name:
                        rows = self._rows(step, table)
                        why = f"the {rows:,} rows that {step.op_type} {step.name!r} reads"
                        inside.append((-least, rows - 1 - most, why))
                if step.op_type == "OneHot" and step.inputs[0] == name:
                    depth = self._constant(step.inputs[1])
                    if depth is not None and depth.size == 1:
                        inside.append(
                            (-least, int(depth.flat[0]) - 1 - most, f"OneHot {step.name!r}")
                        )
                added = self._added(step, name)
                if step.op_type == "Equal" and added is not None:
                    why = f"the constants that Equal {step.name!r} compares it with"
                    compared.append((added[0] - least, added[1] - most, why))
                    continue
                if step.op_type in ("Add", "Sub") and added is not None:
                    low, high = added
                    if step.op_type == "Sub":
                        if step.inputs[0] != name:
                            continue
                        low, high = -high, -low
                    onward = (least + low, most + high)
                elif step.op_type in _PASSES:
                    positions = _PASSES[step.op_type]
                    if positions is not None and name not in [
                        step.inputs[p] for p in positions if p < len(step.inputs)
                    ]:
                        continue
                    onward = (least, most)
                else:
                    continue
                for output in step.outputs:
                    if output and output not in visited:
                        visited.add(output)
                        front.append((output, *onward))
        for found in (inside, compared):
            if found:
                low = max(f[0] for f in found)
                high, _, why = min((f[1], i, f[2]) for i, f in enumerate(found))
                return low, max(low, high), why
        return None

    def _added(self, step: _Step, name: str) -> tuple[int, int] | None:
        """Range of a two-input node's other operand where that is an integer constant."""
        others = [i for i in step.inputs if i != name]
        if step.op_type not in ("Add", "Sub", "Equal") or len(others) != 1:
            return None
        value = self._constant(others[0])
        if value is None or value.size == 0 or value.dtype.kind not in "iu":
            return None
        return int(value.min()), int(value.max())


def _dynamic_size(info: TensorInfo, axis: int) -> int:
    """A size for a dynamic dimension that most models accept."""
    shape = info.shape or ()
    dim, rank = shape[axis], len(shape)
    label = dim.lower() if isinstance(dim, str) else ""
    if "batch" in label or label in ("n", "b", "bs"):
        return 1
    if "height" in label or "width" in label or label in ("h", "w"):
        return 224
    long = any(word in label for word in ("seq", "tok", "len", "time", "frame", "past"))
    if axis == 0 and not long:
        return 1
    if np.dtype(info.dtype).kind != "f":
        return 16
    if rank >= 4 and "past" not in label:
        last_is_channels = shape[-1] in (1, 3, 4)
        if axis == 1 and not last_is_channels:
            return 3
        return 224 if rank == 4 else 32
    # Two axes are most often audio (samples), three are features over time.
    return 512 if rank <= 2 else 16 if rank >= 4 else 64


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
    inputs = _inputs(model)
    graph = _Graph(model)
    sizes: dict[str, int] = {}
    for info in inputs:
        if info.shape is None:
            raise FeedError(
                f"{model.name}: input {info.name!r} names no shape, so no sample can be drawn",
                hint="Give real inputs, e.g. a folder with one .npz per sample.",
            )
        for axis, dim in enumerate(info.shape):
            if isinstance(dim, str):
                size = _dynamic_size(info, axis)
                sizes[dim] = min(size, sizes.get(dim, size))
    notes = [f"dynamic dimension {name!r} is {size} here" for name, size in sizes.items()]
    noises = []
    for info in inputs:
        shape = []
        for axis, dim in enumerate(info.shape or ()):
            if isinstance(dim, str):
                shape.append(sizes[dim])
            elif isinstance(dim, int) and dim > 0:
                shape.append(dim)
            else:
                shape.append(_dynamic_size(info, axis))
                notes.append(f"dynamic axis {axis} of input {info.name!r} is {shape[-1]} here")
        low, high = 0, 1
        dtype = np.dtype(info.dtype)
        if dtype.kind in "iu":
            limits = graph.limits(info.name)
            least, most = _integer_limits(dtype)
            why = ""
            if limits is not None:
                low, high, why = limits
            elif dtype.itemsize == 1:
                # Bytes that index nothing are pixels or quantized values.
                low, high = least, most
            low, high = max(low, least), min(high, most)
            high = max(low, high)
            because = f" (inside {why})" if why else ""
            notes.append(f"input {info.name!r} is random integers {low}..{high}{because}")
        noises.append(_Noise(info=info, shape=tuple(shape), low=low, high=high))
    return Feeds(
        _Random(noises=tuple(noises), seed=seed),
        names=[f"sample {i}" for i in range(samples)],
        kind=("random feed", "random feeds"),
        suffix=f" (seed {seed})",
        random=True,
        notes=notes,
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
