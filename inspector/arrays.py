"""Arrays in files: opened without trust, judged by their headers, read within bounded memory.

A folder of feeds may come from anywhere, and what a header or an archive's directory claims is
checked against the size of the file before memory is reserved for it. Nothing is unpickled and
nothing in a header is evaluated. ``onnx`` is imported here to parse ``.pb`` tensors only.
"""

from __future__ import annotations

import difflib
import io
import json
import lzma
import math
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from inspector.errors import FeedError
from inspector.model import TensorInfo

Arrays = dict[str, NDArray[Any]]
Samples = Generator[Arrays, None, None]
# Time of the last change in nanoseconds, and size in bytes.
Stamp = tuple[int, int]

# Floating-point types that numpy lacks and onnx brings along; ONNX Runtime is given their codes.
CODED_DTYPES = frozenset(
    ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
)
# Largest array read at once: a header may claim anything.
MAX_ARRAY_BYTES = 4 * 2**30
# Labels of a million samples fit into this.
MAX_JSON_BYTES = 16 * 2**20
_MAX_PB_BYTES = 2**31 - 1
_MAX_HEADER_BYTES = 10_000
_MAX_AXES = 64
# An archive's directory is read in one piece and costs some ten times its size in memory.
_MAX_DIRECTORY_BYTES = 2**20
# What a compressed member may grow to, and beyond which size it is then taken for a bomb. Deflate
# itself cannot do better than 1032.
_MAX_GROWTH, _BOMB_BYTES, _DEFLATE_GROWTH = 100, 64 * 2**20, 1032
_LOCAL_HEADER_BYTES = 30
_PIECE = 2**20

_SAVE_AGAIN = "Save it again with np.savez or np.save."

# What reading a damaged picture, array or archive raises; Pillow's decoders raise the last ones.
_BROKEN = (
    *(OSError, EOFError, ValueError, KeyError, IndexError, SyntaxError, RuntimeError),
    *(OverflowError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(TypeError, AttributeError, AssertionError, ZeroDivisionError),
)


# ------------------------------------------------------------------------------ words for messages


def printable(text: str, most: int = 200) -> str:
    """A name from outside in one line: what is no visible character is written as its escape."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown + ("…" if len(text) > most else "")


def shown(path: Path) -> str:
    """A file's or folder's own name, for messages."""
    return printable(path.absolute().name or str(path))


def counted(count: int, noun: str) -> str:
    """E.g. "1 sample", "2 samples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: str, names: Sequence[str]) -> str:
    """The three names that are most like a name."""
    return listed(difflib.get_close_matches(name[:200], names, n=3, cutoff=0.0))


def is_static(dim: int | str | None) -> bool:
    """Whether a dimension is fixed. Some exporters write 0 or -1 where they mean "dynamic"."""
    return isinstance(dim, int) and dim > 0


def shape_text(shape: Sequence[int | str | None]) -> str:
    """A model's shape as Python writes it, "?" for a dimension without size and name."""
    dims = [str(d) if is_static(d) or (d and isinstance(d, str)) else "?" for d in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    """Whether an array's shape is one the model's shape allows."""
    return len(shape) == len(expected) and all(
        not is_static(want) or have == want for have, want in zip(shape, expected, strict=True)
    )


# ------------------------------------------------------------------------------------------ files


@contextmanager
def readable(shown: str, what: str, hint: str) -> Iterator[None]:
    """Turns what a damaged file raises into a `FeedError`."""
    try:
        yield
    except _BROKEN as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = printable(" ".join(reason.split())) or type(error).__name__
        raise FeedError(f"{shown} cannot be read as {what}: {reason}", hint=hint) from error


def stamp(path: Path) -> Stamp:
    """What changes when a file does; OSError where there is none."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _without_waiting(path: str, flags: int) -> int:
    # A FIFO would be waited for until somebody writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _checked(stream: IO[bytes] | io.FileIO, path: Path, known: Stamp | None) -> None:
    found = os.fstat(stream.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if known is not None and known != (found.st_mtime_ns, found.st_size):
        raise FeedError(
            f"{shown(path)} changed after the feeds were loaded",
            hint="Load the feeds again when nothing writes to them any more.",
        )


def open_file(path: Path, known: Stamp | None = None) -> IO[bytes]:
    """A regular file open for reading; FIFOs, devices and folders are refused.

    Raises:
        OSError, ValueError: it cannot be opened, or is no regular file.
        FeedError: its stamp is not the `known` one.
    """
    stream = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
    try:
        _checked(stream, path, known)
    except BaseException:
        stream.close()
        raise
    return stream


def read_file(path: Path, most: int, known: Stamp | None = None) -> bytes:
    """All of a file of at most `most` bytes; raises as `open_file`, ValueError for a larger one."""
    with open_file(path, known) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, expected at most {most:,}")
        return stream.read(size)  # which is reserved at once


def read_json(
    path: Path, what: str, kind: type, example: str, *, most: int = MAX_JSON_BYTES
) -> Any:
    """A JSON file's value, which is a `kind` (dict or list); no key is given twice."""
    with readable(shown(path), what, "Write it as JSON, e.g. with json.dump."):
        value = json.loads(
            read_file(path, most).decode("utf-8-sig"),
            parse_constant=_no_constant,
            object_pairs_hook=_unique,
        )
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
        found = names.get(type(value), f"the value {json_text(value)}")
        raise FeedError(f"{shown(path)} holds {found}, expected {names[kind]}", hint=example)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it gives {printable(key, 40)!r} twice")
        found[key] = value
    return found


def json_text(value: Any) -> str:
    """The beginning of a JSON value for a message; only its kind where it is nested."""
    if isinstance(value, dict):
        return "an object" if value else "{}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        return f"a list of {counted(len(value), 'value')}"
    return printable(json.dumps(value, default=str), 60)


# ---------------------------------------------------------------------------- one converted array


def integer_limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Least and greatest value of an integer type; 0 and 1 for bool."""
    if dtype.kind == "b":
        return 0, 1
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def convert(
    array: NDArray[Any], info: TensorInfo, where: str, *, rounding: bool = False
) -> NDArray[Any]:
    """The array in the input's element type, native byte order and C order; texts as `str` objects.

    float64 to float32 rounds, real numbers to bfloat16 and float8 do, and to float16 where
    `rounding` (pixels, which were never more exact); every other conversion must give back the
    same numbers.
    """
    if info.dtype == "string":
        return _texts(array, where)
    target = np.dtype(info.dtype)
    if array.dtype.kind == "V" and array.dtype != target:
        return array.view(target)  # np.save knows of such a type only how long it is
    with np.errstate(all="ignore"):
        converted = array.astype(target, order="C", copy=False)
        if array.dtype == target:
            return converted
        if info.dtype in CODED_DTYPES:
            back = converted.astype(np.float64)
            real = array.dtype.kind == "f"
            lost = (np.isfinite(array) & ~np.isfinite(back)) if real else back != array
        elif array.dtype.kind == target.kind == "f" and (target.itemsize > 2 or rounding):
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
            hint="Scale the values into its range, or export the model with a float32 input."
            if info.dtype in CODED_DTYPES
            else f"If the change is meant, save array.astype(np.{info.dtype}) instead.",
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


def _texts(array: NDArray[Any], where: str) -> NDArray[Any]:
    texts = np.empty(array.size, object)
    with readable(where, "text", "Save it as np.asarray(array, dtype=str), encoded in UTF-8."):
        flat = np.ascontiguousarray(array).reshape(-1)
        if array.dtype.kind == "U":
            points = flat.view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
            if points.max(initial=0) > sys.maxunicode:
                raise ValueError(f"it holds {int(points.max()):#x}, which is no character")
        for at, text in enumerate(flat.tolist()):
            texts[at] = text.decode("utf-8") if isinstance(text, bytes) else str(text)
            texts[at].encode("utf-8")  # half of a surrogate pair is no text
    return texts.reshape(array.shape)


# -------------------------------------------------------------------------------- arrays in files


@dataclass(kw_only=True, slots=True)
class StoredArray:
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
        values = np.empty(count, self.dtype)
        raw = values.view(np.uint8)
        self.stream.seek(self.start + offset * self.dtype.itemsize)
        for at in range(0, size, _PIECE):
            wanted = min(_PIECE, size - at)
            piece = self.stream.read(wanted)
            if len(piece) != wanted:
                raise EOFError(f"it ends after {at + len(piece):,} of {size:,} bytes")
            raw[at : at + wanted] = np.frombuffer(piece, np.uint8)
        return values


# Matched instead of evaluated: a header is text from outside.
_DESCR = r"""["']descr["']\s*:\s*["']([^"']*)["']"""
_ORDER = r"""["']fortran_order["']\s*:\s*(True|False)"""
_SHAPE = r"""["']shape["']\s*:\s*\(([\d\sL,]*)\)"""
_ITEM = f"(?:{_DESCR}|{_ORDER}|{_SHAPE})"
_HEADER = re.compile(rf"\s*\{{\s*{_ITEM}(?:\s*,\s*{_ITEM}){{2}}\s*,?\s*\}}\s*")
_PLAIN = re.compile(r"[<>|=]?[?biufcOSUVmM]\d{0,9}(\[\w{1,9}\])?")


def _npy(stream: IO[bytes], where: str, size: int) -> StoredArray:
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8:
        raise ValueError("it does not begin as .npy does")
    major, minor = magic[6:]
    if major not in (1, 2):
        raise ValueError(f"its .npy format {major}.{minor} is not for plain numbers")
    length = int.from_bytes(stream.read(2 if major == 1 else 4), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
    text = stream.read(length).decode("latin-1")
    whole = len(text) == length and _HEADER.fullmatch(text)
    descr, order, dims = (re.search(item, text) for item in (_DESCR, _ORDER, _SHAPE))
    if not (whole and descr and order and dims and _PLAIN.fullmatch(descr[1])):
        raise ValueError(f"its header {printable(text.strip(), 60)!r} describes no plain array")
    try:
        # np.save writes float8_e5m2 as f1, which np.dtype does not know.
        dtype = np.dtype("V1" if descr[1][-2:] == "f1" else descr[1])
    except TypeError as error:
        raise ValueError(f"its element type {descr[1]!r} is unknown") from error
    shape = tuple(int(d) for d in dims[1].replace("L", "").split(",") if d.strip())
    if len(shape) > _MAX_AXES:
        raise ValueError(f"it has {len(shape):,} axes, expected at most {_MAX_AXES}")
    start = len(magic) + (2 if major == 1 else 4) + length
    claimed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (claimed != size - start or not dtype.itemsize):
        raise ValueError(
            f"its header {shape} {dtype.name} needs {claimed:,} bytes, "
            f"the file has {size - start:,}"
        )
    return StoredArray(
        where=where,
        shape=shape,
        dtype=dtype,
        stream=stream,
        start=start,
        fortran=order[1] == "True",
    )


def _proto(path: Path, where: str, known: Stamp | None) -> StoredArray:
    tensor = onnx.TensorProto()
    hint = "Write it with onnx.numpy_helper.from_array(array).SerializeToString()."
    with readable(where, "an ONNX tensor", hint):
        content = read_file(path, _MAX_PB_BYTES, known)
        try:
            tensor.ParseFromString(content)
        except DecodeError as error:
            raise ValueError("it is no TensorProto") from error
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError("its values lie in another file")
        # Checked before to_array: an empty tensor may claim any number of elements.
        shape = tuple(tensor.dims)
        absurd = min(shape, default=0) < 0 or len(shape) > _MAX_AXES
        if absurd or math.prod(shape) > 8 * len(content):
            claim = printable(str(shape))
            raise ValueError(f"it claims the shape {claim} but is much smaller")
        if tensor.data_type == onnx.TensorProto.STRING:
            # to_array would pad all texts to the longest.
            values = np.empty(len(tensor.string_data), object)
            values[:] = list(tensor.string_data)
            values = values.reshape(shape)
        else:
            values = np.asarray(onnx.numpy_helper.to_array(tensor)).reshape(shape)
    return StoredArray(where=where, shape=values.shape, dtype=values.dtype, whole=values)


class _ArchiveFile(io.FileIO):
    """A file that is not read in pieces larger than `most`, whatever its own directory says."""

    most = _MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        size = self.most if size is None or size < 0 else size
        if size > self.most:
            raise ValueError(f"its directory has {size:,} bytes, expected at most {self.most:,}")
        return super().read(size) or b""


def _archive(
    path: Path, known: Stamp | None, stack: ExitStack
) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """An archive and its members by name, which are what they claim to be."""
    stream = stack.enter_context(_ArchiveFile(path, "rb", opener=_without_waiting))
    _checked(stream, path, known)
    archive = stack.enter_context(zipfile.ZipFile(stream))
    stream.most = 2 * zipfile.ZipExtFile.MAX_SEEK_READ  # pieces of a member are larger
    members: dict[str, zipfile.ZipInfo] = {}
    end = os.fstat(stream.fileno()).st_size
    # From the last to the first, each ends before the next begins: no byte is inflated twice.
    for member in sorted(archive.infolist(), key=lambda m: m.header_offset, reverse=True):
        name, packed, size = member.filename, member.compress_size, member.file_size
        if min(member.header_offset, packed) < 0 or (
            member.header_offset + _LOCAL_HEADER_BYTES + packed > end
        ):
            raise ValueError(f"its member {printable(name)!r} overlaps others or the end")
        end = member.header_offset
        if member.is_dir():
            continue
        if member.flag_bits & 1:
            raise ValueError(f"its member {printable(name)!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"its member {printable(name)!r} has compression method {member.compress_type}, "
                "expected none or deflate"
            )
        stored = member.compress_type == zipfile.ZIP_STORED
        growth = _MAX_GROWTH if size > _BOMB_BYTES else _DEFLATE_GROWTH
        if (size != packed) if stored else (size > growth * packed + _PIECE):
            raise ValueError(
                f"its member {printable(name)!r} claims {size:,} bytes in {packed:,}; "
                "this may be a decompression bomb"
            )
        if members.setdefault(name.removesuffix(".npy"), member) is not member:
            raise ValueError(f"it holds {printable(name)!r} twice")
    return archive, dict(sorted(members.items(), key=lambda item: item[1].header_offset))


@contextmanager
def opened(
    files: Sequence[Path], inputs: Sequence[TensorInfo], known: Sequence[Stamp] = ()
) -> Iterator[list[tuple[TensorInfo, StoredArray]]]:
    """Each of the model's inputs with its array in one ``.npz``, one ``.npy`` or some ``.pb``.

    Args:
        files: one file, or one ``.pb`` for each input.
        inputs: the model's.
        known: the files' stamps; a file that changed since is refused.

    Raises:
        FeedError: one is damaged, changed, or does not hold numbers (texts for a string input).
    """
    path, found = files[0], []
    first = known[0] if known else None
    with ExitStack() as stack:
        suffix = path.suffix.lower()
        if suffix == ".npz":
            with readable(shown(path), "an .npz archive", _SAVE_AGAIN):
                archive, members = _archive(path, first, stack)
            _check_keys(list(members), [i.name for i in inputs], shown(path))
        for index, info in enumerate(inputs):
            where = f"{shown(path)}: {info.name!r}"
            if suffix == ".pb":
                path = files[index]
                where = f"{shown(path.parent)}/{shown(path)}: {info.name!r}"
                array = _proto(path, where, known[index] if known else None)
            else:
                with readable(where, "an array", _SAVE_AGAIN):
                    if suffix == ".npz":
                        size = members[info.name].file_size
                        stream = stack.enter_context(archive.open(members[info.name]))
                    else:
                        stream = stack.enter_context(open_file(path, first))
                        size = os.fstat(stream.fileno()).st_size
                    array = _npy(stream, where, size)
            _check_kind(array, info)
            found.append((info, array))
        yield found


def _check_kind(array: StoredArray, info: TensorInfo) -> None:
    text = info.dtype == "string"
    # An object array that is in memory came from a .pb and holds bytes.
    holds_text = array.dtype.kind in "SU" or (array.dtype.hasobject and array.whole is not None)
    # Types of other packages are saved as so many bytes.
    coded = info.dtype in CODED_DTYPES and (
        array.dtype == np.dtype(info.dtype) or array.dtype == f"V{np.dtype(info.dtype).itemsize}"
    )
    if holds_text if text else (coded or array.dtype.kind in "fiub"):
        return
    what = "text or pickled objects" if array.dtype.hasobject else array.dtype.name
    kind, dtype = ("text", "str") if text else ("numbers", f"np.{info.dtype}")
    if info.dtype in CODED_DTYPES:
        dtype = "np.float32"
    raise FeedError(
        f"{array.where} holds {what}, expected {'text' if text else info.dtype}",
        hint=f"Save it as {kind}: np.asarray(array, dtype={dtype}); pickles are never opened.",
    )


def _check_keys(keys: list[str], names: list[str], shown: str) -> None:
    # The whole statement, so that following the hint is copying it.
    call = ", ".join(f"{name!r}: ..." for name in names[:4]) + (", ..." if len(names) > 4 else "")
    hint = f"Save it with np.savez({shown!r}, **{{{call}}})."
    unknown = [key for key in keys if key not in names]
    missing = [name for name in names if name not in keys]
    if unknown:
        found = f"has the key '{printable(unknown[0])}', which is no input of the model"
        raise FeedError(f"{shown} {found}; nearest: {nearest(unknown[0], names)}", hint=hint)
    if missing:
        found = f"lacks the input {missing[0]!r}, found {listed(keys) or 'nothing'}"
        raise FeedError(f"{shown} {found}, expected {listed(names, most=8)}", hint=hint)
