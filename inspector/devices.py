"""Tensors dumped from a device beside what this machine computes for them.

A compiler for an NPU or a microcontroller requantizes, fuses and rounds in its own way. Where its
tensors can be dumped, each of them tells three steps apart: what quantization costs, what the
kernels here add, what the device adds. Dumps come from foreign tools: nothing is unpickled, sizes
are judged before memory is reserved, and names are matched, never trusted. One sample is in memory
at a time; a `Dump` itself holds file names only, so it crosses to another process.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.arrays import (
    StoredArray,
    counted,
    listed,
    nearest,
    open_file,
    opened,
    printable,
    readable,
    shown,
)
from inspector.comparison import DeviceError, Skipped
from inspector.errors import FeedError
from inspector.metrics import decibels, powers
from inspector.model import TensorInfo
from inspector.qparams import INTEGER_DTYPES, QParams

# Most tensors in one dump: a directory of names is read whole.
MAX_TENSORS = 100_000
# For so many unknown names the nearest ones are looked for, which takes a while for each.
_MOST_NEAREST = 20

_EXPECTED = "NN.npz (one per sample, keyed by tensor name), one .npz with a leading sample axis, "
_EXPECTED += "or .npy files named by tensor"
_SAVE_AGAIN = "Save it again with np.savez or np.save, as plain numbers."

# ------------------------------------------------------------------------------------------ files


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """Files that hold arrays by name: one .npz, or the .npy files of a folder.

    Attributes:
        path: the .npz or the folder.
        names: of the arrays.
    """

    path: Path
    names: tuple[str, ...]

    def arrays(self, names: Iterable[str]) -> Iterator[tuple[str, StoredArray]]:
        """The arrays of these names, their headers checked; each is open until the next is asked.

        Raises:
            FeedError: a damaged file, or one that holds no numbers.
        """
        wanted = set(names)
        # What type the model wants is no matter here: any numbers are accepted.
        infos = [TensorInfo(name=name, dtype="float32", shape=None) for name in self.names]
        if self.path.is_dir():
            for info in infos:
                if info.name in wanted:
                    with opened([self.path / f"{info.name}.npy"], [info]) as found:
                        yield info.name, found[0][1]
            return
        with opened([self.path], infos) as found:
            yield from ((info.name, array) for info, array in found if info.name in wanted)


def _npz(path: Path) -> _Unit:
    with (
        readable(shown(path), "an .npz archive", _SAVE_AGAIN),
        open_file(path) as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        members = [m.filename for m in archive.infolist() if not m.is_dir()]
    return _checked(_Unit(path=path, names=tuple(m.removesuffix(".npy") for m in members)))


def _npy_folder(folder: Path) -> _Unit:
    files = [e for e in _entries(folder) if e.suffix == ".npy" and e.is_file()]
    return _checked(_Unit(path=folder, names=tuple(f.stem for f in files)))


def _checked(unit: _Unit) -> _Unit:
    if not 0 < len(unit.names) <= MAX_TENSORS:
        raise FeedError(
            f"{shown(unit.path)} holds {len(unit.names):,} tensors, "
            f"expected 1 to {MAX_TENSORS:,} keyed by tensor name",
            hint="Dump the tensors with np.savez(file, **{name: array, ...}).",
        )
    return unit


def _entries(folder: Path) -> list[Path]:
    with readable(shown(folder), "a folder", "Check the folder's permissions."):
        return sorted(folder.iterdir(), key=_natural)


def _natural(path: Path) -> tuple[Any, ...]:
    # 10.npz comes after 2.npz. Digits and text alternate, so parts compare with their own kind.
    parts = re.split(r"([0-9]+)", path.name)
    return tuple(int(p) if at % 2 else p for at, p in enumerate(parts))


def _quoted(name: str) -> str:
    return f"'{printable(name, 120)}'"


# ------------------------------------------------------------------------------------------- dump


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """Tensors of a device by name, for some of the samples; read one sample at a time.

    Attributes:
        names: every tensor's key in the dump, in the order in which they were found.
        samples: for each of the feeds' samples whether the dump holds anything for it.
        notes: sentences that say how samples were found, and what is not used.
        units: the files of each sample; None where there are none.
        stacked: all samples lie along the leading axis of one unit's arrays.
    """

    names: tuple[str, ...]
    samples: tuple[bool, ...]
    notes: tuple[str, ...]
    units: tuple[_Unit | None, ...]
    stacked: bool

    def tensors(self, index: int, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """The arrays dumped for the sample with this index, as they are in the file, by key.

        Args:
            index: of the sample among the feeds.
            names: keys wanted, all by default; those not dumped for this sample are left out.

        Raises:
            FeedError: a damaged array, or one that holds no numbers or too many.
        """
        unit = self.units[index]
        if unit is None:
            return {}
        return {
            name: array.read(index, array.shape[1:]) if self.stacked else array.read()
            for name, array in unit.arrays(unit.names if names is None else names)
        }


def load_dump(path: Path, sample_names: Sequence[str]) -> Dump:
    """The tensors a device computed for the feeds' samples.

    One ``.npz`` per sample in a folder, keyed by tensor name; or one subfolder per sample with a
    ``.npy`` per tensor; or all samples along the leading axis of the arrays of one ``.npz`` or of a
    folder of ``.npy``. Files belong to the samples whose names they bear (without suffix), else to
    samples in their order, which a note says. Samples without a dump are allowed.

    Args:
        path: a file or folder.
        sample_names: of the feeds, in order; at least one.

    Raises:
        FeedError: nothing that is such a dump.
        ValueError: no sample names.
    """
    if not sample_names:
        raise ValueError("no sample names")
    if not path.exists():
        raise FeedError(
            f"{shown(path)} does not exist, expected a dump: {_EXPECTED}",
            hint="Name the file or folder that holds the device's tensors.",
        )
    entries = _entries(path) if path.is_dir() else [path]
    archives = [e for e in entries if e.is_file() and e.suffix.lower() == ".npz"]
    if archives:
        units = [_npz(e) for e in archives]
    elif path.is_dir() and any(e.suffix == ".npy" and e.is_file() for e in entries):
        units = [_npy_folder(path)]
    else:
        units = [
            _npy_folder(e)
            for e in entries
            if e.is_dir() and any(f.suffix == ".npy" for f in _entries(e))
        ]
    if not units:
        found = listed([printable(e.name) for e in entries]) or "nothing"
        raise FeedError(
            f"{shown(path)} holds no dump: found {found}, expected {_EXPECTED}",
            hint="Dump the tensors with np.savez('00.npz', **{name: array, ...}), one per sample.",
        )
    used = {unit.path for unit in units}
    arrays = units[0].path == path and path.is_dir()
    strays = [e for e in entries if e not in used and not (arrays and e.suffix == ".npy")]
    notes = []
    if strays:
        names = listed([printable(e.name) for e in strays])
        notes.append(f"{shown(path)}: {names} {_are(strays)} not part of the dump")
    stems = {_key(Path(name).stem) for name in sample_names}
    if len(units) == 1 and len(sample_names) > 1 and _key(units[0].path.stem) not in stems:
        dump = _stacked(units[0], sample_names)
    else:
        dump = _each(units, sample_names)
    return replace(dump, notes=(*dump.notes, *notes))


def _are(things: Sequence[object]) -> str:
    return "is" if len(things) == 1 else "are"


def _stacked(unit: _Unit, sample_names: Sequence[str]) -> Dump:
    counts = {}
    for name, array in unit.arrays(unit.names):
        if not array.shape:
            raise FeedError(
                f"{array.where} is a scalar, expected a leading sample axis "
                f"for {counted(len(sample_names), 'sample')}",
                hint="Stack the samples' arrays with np.stack, or save one .npz per sample.",
            )
        counts[name] = array.shape[0]
    first = next(iter(counts))
    total = counts[first]
    for name, count in counts.items():
        if count != total or not count:
            raise FeedError(
                f"{shown(unit.path)}: {_quoted(name)} has {counted(count, 'sample')} "
                f"and {_quoted(first)} {total:,}, expected as many of each along the leading axis",
                hint="Stack the samples' arrays with np.stack, or save one .npz per sample.",
            )
    held = min(total, len(sample_names))
    where, samples = shown(unit.path), counted(total, "sample")
    notes = [f"{where}: the leading axis is taken as {samples}, in feed order"]
    if total != len(sample_names):
        notes.append(_different(where, total, len(sample_names)))
    return Dump(
        names=unit.names,
        samples=tuple(at < held for at in range(len(sample_names))),
        notes=tuple(notes),
        units=tuple(unit if at < held else None for at in range(len(sample_names))),
        stacked=True,
    )


def _different(what: str, dumped: int, samples: int) -> str:
    rest = "the others have none" if dumped < samples else "the rest of it is not used"
    return f"{what} holds {dumped:,} of {counted(samples, 'sample')}: {rest}"


def _each(units: Sequence[_Unit], sample_names: Sequence[str]) -> Dump:
    """One unit per sample: by its name, or in order where no name fits."""
    stems = [_key(Path(name).stem) for name in sample_names]
    twice = {stem for stem, count in Counter(stems).items() if count > 1}
    by_stem = {stem: at for at, stem in enumerate(stems) if stem not in twice}
    of: list[_Unit | None] = [None] * len(sample_names)
    strays, notes = [], []
    for unit in units:
        at = by_stem.get(_key(unit.path.stem))
        if at is None or of[at] is not None:
            strays.append(unit)
        else:
            of[at] = unit
    folder = shown(units[0].path.absolute().parent)
    if len(strays) == len(units):
        # zip: what one has too many of is in the note.
        of = [*units[: len(of)], *([None] * (len(of) - len(units)))]
        notes.append(
            f"{folder}: no file of the dump has a sample's name ({listed(sample_names)}), "
            f"so {listed([shown(u.path) for u in units])} are taken in feed order"
        )
        if len(units) != len(of):
            notes.append(_different(folder, len(units), len(of)))
    else:
        if strays:
            names = listed([shown(u.path) for u in strays])
            notes.append(f"{folder}: {names} belong to no sample by name and are not used")
        missing = [name for name, unit in zip(sample_names, of, strict=True) if unit is None]
        if missing:
            notes.append(
                f"{folder} holds nothing for {counted(len(missing), 'sample')}: {listed(missing)}"
            )
    used = [unit for unit in of if unit is not None]
    return Dump(
        names=tuple(dict.fromkeys(name for unit in used for name in unit.names)),
        samples=tuple(unit is not None for unit in of),
        notes=tuple(notes),
        units=tuple(of),
        stacked=False,
    )


# -------------------------------------------------------------------------------- names and shapes


def _key(name: str) -> str:
    """A name as tools write it into file names: case and punctuation say nothing."""
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_") or name


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpNames:
    """Which tensor of a model each key of a dump is.

    Attributes:
        found: key in the dump by the tensor's name.
        unknown: one record per key that is no tensor, or could be several.
        notes: sentences that say what was matched loosely.
    """

    found: Mapping[str, str]
    unknown: tuple[Skipped, ...]
    notes: tuple[str, ...]


def match_names(dump: Dump, tensors: Sequence[str]) -> DumpNames:
    """Which of `tensors` (names in the models) the keys of a dump are.

    Exact names first; then without case and with every run of other characters as one underscore,
    as tools write file names. A key that fits several tensors that way is not guessed at.
    """
    exact = set(tensors)
    found = {name: name for name in dump.names if name in exact}
    loosely: dict[str, list[str]] = {}
    for tensor in dict.fromkeys(tensors):
        loosely.setdefault(_key(tensor), []).append(tensor)
    unknown: list[Skipped] = []
    loose: list[str] = []
    for name in dump.names:
        if name in exact:
            continue
        fitting = [t for t in loosely.get(_key(name), ()) if t not in found]
        if len(fitting) == 1:
            found[fitting[0]] = name
            loose.append(f"{_quoted(name)} for {fitting[0]!r}")
            continue
        reason = "dumped from the device, but no tensor's name"
        if len(unknown) < _MOST_NEAREST:
            reason += f"; nearest: {nearest(name, tensors)}"
        if len(fitting) > 1:
            reason = f"dumped from the device, but it may be any of {listed(fitting)}"
        elif _key(name) in loosely:
            reason = f"dumped twice: {loosely[_key(name)][0]} is there already"
        unknown.append(Skipped(name=printable(name), kind="tensor", model="", reason=reason))
    notes = [f"names in the dump are not exactly the model's: {listed(loose)}"] if loose else []
    return DumpNames(found=found, unknown=tuple(unknown), notes=tuple(notes))


def fitted(array: NDArray[Any], shape: tuple[int, ...]) -> tuple[NDArray[Any], str] | None:
    """A dumped array in a tensor's shape, and what was done to it ("" for nothing).

    Leading axes of 1 are added or taken away, and the channel axis is moved between last (NHWC) and
    second (NCHW) where exactly one of the two gives the shape. None where nothing does. Shapes
    that fit are left alone, although a square image with as many channels hides a transposition.
    """
    if array.shape == shape:
        return array, ""
    padded = array
    while padded.ndim > len(shape) and padded.shape[0] == 1:
        padded = padded[0]
    if padded.ndim < len(shape):
        padded = padded.reshape((1,) * (len(shape) - padded.ndim) + padded.shape)
    if padded.shape == shape:
        return padded, f"{array.shape} taken as {shape}"
    rank = padded.ndim
    if rank != len(shape) or rank < 3:
        return None
    first = (0, rank - 1, *range(1, rank - 1))
    last = (0, *range(2, rank), 1)
    ways = [p for p in dict.fromkeys((first, last)) if padded.transpose(p).shape == shape]
    if len(ways) != 1:
        return None
    layouts = "channels last to channels first" if ways[0] == first else "channels first to last"
    if rank == 3:
        # Moving the last axis to the front and the second to the back are the same here.
        layouts = "the last two axes swapped"
    return padded.transpose(ways[0]), f"{array.shape} transposed to {shape}: {layouts}"


def real_values(array: NDArray[Any], qparams: QParams | None) -> NDArray[Any]:
    """What a dumped array stands for: integers are codes of `qparams`, floats are real already.

    Float arrays are returned as they are. Integers without `qparams` are taken as numbers, float64.

    Args:
        array: in the tensor's own shape (see `fitted`), for scales per channel.
        qparams: of the tensor, None where it has none.

    Raises:
        FeedError: integers that are no codes of the tensor's type.
    """
    if array.dtype.kind == "f":
        return array
    if qparams is None or array.dtype.kind == "b" or qparams.dtype not in INTEGER_DTYPES:
        return array.astype(np.float64)
    low, high = INTEGER_DTYPES[qparams.dtype]
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        raise FeedError(
            f"the dumped {array.dtype.name} values reach from {array.min()} to {array.max()}, "
            f"expected codes of {qparams.dtype}: {low} to {high}",
            hint=f"Dump the tensor as {qparams.dtype}, or dequantized as float32.",
        )
    return qparams.dequantize(array)


# ------------------------------------------------------------------------------------------ totals


def _added(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Noise power of one step; infinite where only one side is not finite, or they are not alike.

    Values that are the same NaN or infinity on both sides were not added here.
    """
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        alike = (x == y) | (np.isnan(x) & np.isnan(y))
        error = np.where(alike, 0.0, x - y).ravel()
        power = float(np.einsum("i,i->", error, error))
    return math.inf if math.isnan(power) else power


class DeviceWatch:
    """Running sums of one dumped tensor: float, simulated, deployed here, device.

    Attributes:
        samples: how many samples were added.
        broken: why the tensor cannot be compared, "" where it can.
        notes: what was done to the device's arrays to make them comparable, each once.
    """

    def __init__(self, name: str, quantized_name: str, device_name: str) -> None:
        self.name = name
        self.quantized_name = quantized_name
        self.device_name = device_name
        self.samples = 0
        self.broken = ""
        self.notes: dict[str, None] = {}
        self._has_deployed = True
        # Signal and noise of each step, and what each step adds where the rest is not finite.
        self._powers = {s: np.zeros(2) for s in ("quantization", "kernel", "device", "total")}
        self._from_simulated = np.zeros(2)
        self._steps = dict.fromkeys(("quantization", "kernel", "device"), 0.0)
        self._step_from_simulated = 0.0

    def add(
        self,
        reference: NDArray[Any],
        simulated: NDArray[Any],
        deployed: NDArray[Any] | None,
        device: NDArray[Any],
        qparams: QParams | None = None,
    ) -> None:
        """One sample's tensor, in real values; `device` as dumped.

        Args:
            reference: the float model's.
            simulated: the quantized model's with optimisations off, of the same shape.
            deployed: the same with all optimisations on; None for a tensor that is no output.
            device: the dumped array; brought into shape, and into real values where it holds codes.
            qparams: of the quantized model's tensor, in the layout of `simulated`.

        Raises:
            FeedError: integers that are no codes of the tensor's type.
        """
        if self.broken:
            return
        shapes = {np.shape(a) for a in (reference, simulated, deployed) if a is not None}
        if len(shapes) > 1:
            self.broken = f"shapes differ here: {listed([str(s) for s in sorted(shapes)])}"
            return
        fit = fitted(device, np.shape(simulated))
        if fit is None:
            self.broken = f"shapes differ: here {np.shape(simulated)}, device {device.shape}"
            return
        array, note = fit
        if note:
            self.notes[f"{self.device_name}: {note}"] = None
        try:
            array = real_values(array, qparams)
        except FeedError as error:
            raise FeedError(
                f"{_quoted(self.device_name)}: {error.message}", hint=error.hint
            ) from error
        if device.dtype.kind != "f" and simulated.dtype.kind == "f":
            # Rounded as DequantizeLinear rounds: equal codes are equal values.
            array = array.astype(simulated.dtype)
        self.samples += 1
        self._has_deployed &= deployed is not None
        self._powers["quantization"] += powers(reference, simulated)
        self._powers["total"] += powers(reference, array)
        self._from_simulated += powers(simulated, array)
        self._steps["quantization"] += _added(reference, simulated)
        self._step_from_simulated += _added(simulated, array)
        if deployed is not None:
            self._powers["kernel"] += powers(simulated, deployed)
            self._powers["device"] += powers(deployed, array)
            self._steps["kernel"] += _added(simulated, deployed)
            self._steps["device"] += _added(deployed, array)

    def error(self) -> DeviceError | Skipped:
        """The tensor's record, or why there is none.

        The verdict is the step that adds the most noise power; of equal ones the earlier. Where a
        step turns finite values into others, it is that one.
        """
        if self.broken or not self.samples:
            reason = self.broken or "the dump holds it for no sample"
            return Skipped(name=self.device_name, kind="tensor", model="", reason=reason)
        steps, device = dict(self._steps), self._powers["device"]
        if not self._has_deployed:
            steps["kernel"], steps["device"] = 0.0, self._step_from_simulated
            device = self._from_simulated
        verdict = max(steps, key=lambda step: steps[step]) if any(steps.values()) else "exact"

        def sqnr(sums: NDArray[np.float64]) -> float:
            return decibels(float(sums[0]), float(sums[1]))

        return DeviceError(
            name=self.name,
            quantized_name=self.quantized_name,
            device_name=self.device_name,
            samples=self.samples,
            quantization_sqnr_db=sqnr(self._powers["quantization"]),
            kernel_sqnr_db=sqnr(self._powers["kernel"]) if self._has_deployed else None,
            device_sqnr_db=sqnr(device),
            total_sqnr_db=sqnr(self._powers["total"]),
            verdict=verdict,
        )
