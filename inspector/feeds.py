"""Model inputs: found in files or drawn at random, checked, converted, iterated one at a time.

A `Feeds` holds file names and shapes, never arrays: each pass reads one sample, converts it and
lets go of it, so memory does not grow with the number of samples and a `Feeds` crosses to another
process as a few kilobytes. Headers of all files are checked when feeds are loaded, so that most
faults show before anything runs. Nothing is unpickled and no file is written.

Where samples come from, in the order in which a folder is searched: ``.npz`` (one sample each,
keyed by input name), ``.npy`` (one sample each, models with one input), ``test_data_set_*`` or
``input_*.pb`` (ONNX's own test data), images with a `Preprocess`, ``texts.txt`` (before images
where the model takes texts or token ids). A single ``.npz`` or ``.npy`` holds many samples along
its leading axis. The folder is the user's own: links are followed, but only to regular files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from inspector.arrays import (
    CODED_DTYPES,
    Arrays,
    Samples,
    Stamp,
    StoredArray,
    convert,
    counted,
    fits,
    is_static,
    json_text,
    listed,
    opened,
    printable,
    read_json,
    readable,
    shape_text,
    shown,
    stamp,
)
from inspector.errors import FeedError
from inspector.images import (
    IMAGE_SUFFIXES,
    PRESETS,
    Preprocess,
    image_losses,
    open_image,
    read_preprocess,
)
from inspector.model import Model, TensorInfo
from inspector.random_feeds import random_source
from inspector.texts import TOKENIZER, takes_text, text_source

# Most samples in one file, or files in one folder.
MAX_SAMPLES = 1_000_000
# Most calibration samples taken from the inputs when no calibration feeds are named, and the
# number of inputs below which all of them are taken.
MAX_DEFAULT_CALIBRATION = 100
MIN_SPLIT = 8

_PB, _IMAGES, _TEXTS = "ONNX test data", "images", "texts"
# What a file's suffix says about it.
_KINDS = {
    ".npz": ".npz",
    ".npy": ".npy",
    ".pb": _PB,
    **dict.fromkeys(IMAGE_SUFFIXES, _IMAGES),
    ".txt": _TEXTS,
}
_TEXTS_FILE = "texts.txt"
_EXPECTED = ".npz, .npy, ONNX test data (input_0.pb), image files or texts.txt"
_COMPANIONS = frozenset({"preprocess.json", "labels.json", "boxes.json"})
_LABELS_HINT = "Write one class number per sample in sorted file order, e.g. [3, 0, 7]."

# Element types that can be fed.
_DTYPES = frozenset(
    {"float16", "float32", "float64", "bool", "string", *CODED_DTYPES}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def _inputs(model: Model) -> tuple[TensorInfo, ...]:
    """The inputs a feed must give, all of an element type that can be fed."""
    if not model.inputs:
        raise FeedError(
            f"{model.name} has no inputs, expected at least one to feed",
            hint="Load a model whose graph has inputs.",
        )
    for info in model.inputs:
        if info.dtype not in _DTYPES:
            found = f"{model.name}: input {info.name!r} has element type {info.dtype}"
            if info.dtype == "unknown":
                found = f"{model.name}: input {info.name!r} is no tensor of a known element type"
            raise FeedError(
                f"{found}, which cannot be fed; expected floating point of 8 to 64 bits, "
                "integers of 8 to 64 bits, bool or string",
                hint="Export the model with one of these, e.g. float32 and a Cast behind it.",
            )
    return model.inputs


# ---------------------------------------------------------------------------- samples in an array


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


def _slot(array: StoredArray, info: TensorInfo, *, stacked: bool) -> _Slot:
    """How an array gives its input's samples.

    Stacked, it has a leading sample axis. One axis more than the input has: each row is a sample.
    As many axes: rows are taken as batches of the input's own batch size (1 where dynamic). A
    scalar and a single batch of several rows are shared by all samples.

    Raises:
        FeedError: the shapes do not fit.
    """
    shape = array.shape
    expected = (None,) * len(shape) if info.shape is None else info.shape
    if shape and shape[0] == 0 and (stacked or not fits(shape, expected)):
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
        stamps: of these files when they were checked.
        inputs: the model's.
        slots: how the samples lie in one file, by input; None where each unit is one sample.
    """

    units: tuple[tuple[Path, ...], ...]
    stamps: tuple[tuple[Stamp, ...], ...]
    inputs: tuple[TensorInfo, ...]
    slots: tuple[_Slot, ...] | None = None

    def samples(self, indices: Sequence[int]) -> Samples:
        with ExitStack() as stack:
            arrays: list[tuple[TensorInfo, StoredArray]] = []
            for index in indices:
                if self.slots is None or not arrays:
                    stack.close()
                    at = index if self.slots is None else 0
                    arrays = stack.enter_context(
                        opened(self.units[at], self.inputs, self.stamps[at])
                    )
                feed: Arrays = {}
                for position, (info, array) in enumerate(arrays):
                    where = array.where
                    if self.slots is None:
                        slot = _slot(array, info, stacked=False)
                    else:
                        slot = self.slots[position]
                        where += f" of sample {index}"
                    feed[info.name] = convert(
                        array.read(index * slot.step, slot.shape), info, where
                    )
                yield feed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pictures:
    """One sample per image; its files with their stamps."""

    files: tuple[tuple[Path, Stamp], ...]
    info: TensorInfo
    preprocess: Preprocess

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            path, known = self.files[index]
            array = self.preprocess.apply(open_image(path, known))
            if len(self.info.shape or ()) == 3:
                array = array[0]
            where = f"{shown(path)}: {self.info.name!r}"
            yield {self.info.name: convert(array, self.info, where, rounding=True)}


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
        rows: how many rows of a batch each sample holds; 1 where the model has no batch.
        labels: class of each row of each sample in order; None where there are none.
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
    rows: tuple[int, ...]
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
        # Negative ones count from the end.
        indices = [range(len(self))[i] for i in indices]
        labels = self.labels
        if labels is not None:
            ends = list(accumulate(self.rows))
            labels = tuple(
                label for i in indices for label in labels[ends[i] - self.rows[i] : ends[i]]
            )
        return replace(
            self,
            indices=tuple(self.indices[i] for i in indices),
            names=tuple(self.names[i] for i in indices),
            rows=tuple(self.rows[i] for i in indices),
            labels=labels,
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
        path, known = self.source.files[self.indices[index]]
        return self.source.preprocess.picture(open_image(path, known))


def _facts_of(feed: Arrays) -> _Facts:
    digest = hashlib.sha256()
    nonfinite = []
    for name in sorted(feed):
        array = feed[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        if array.dtype.hasobject:
            for text in array.reshape(-1).tolist():
                content = text.encode("utf-8")
                digest.update(len(content).to_bytes(8, "little") + content)
        else:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if array.dtype.name in CODED_DTYPES:
            array = array.astype(np.float32)
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
    kinds: Sequence[str] = (".npz", ".npy", _PB, _IMAGES, _TEXTS),
) -> Feeds:
    inputs = _inputs(model)
    try:
        if not path.exists():
            raise FeedError(
                f"{printable(str(path))} does not exist", hint="Check the path and its spelling."
            )
        folder = path if path.is_dir() else path.parent
        entries = _entries(folder)
        if takes_text(inputs):
            kinds = sorted(kinds, key=lambda kind: kind == _IMAGES)
        kind, units = _found(path, entries, inputs, kinds)
        values = _read_labels(folder / "labels.json")
    except OSError as error:
        raise FeedError(
            f"{printable(str(path))} cannot be looked into: {error.strerror}",
            hint="Check the path and its permissions.",
        ) from error
    total, taken = len(units), tuple(units[:limit])
    names = [shown(unit[0]) for unit in taken]
    noun, where, conversions = f"{kind} file", "", list[str]()
    source: _Source
    rows = [1] * total
    if kind == _IMAGES:
        noun = "image"
        source, notes = _pictures(taken, model, folder, preprocess)
    elif kind == _TEXTS:
        noun, where = "text", f" in {shown(units[0][0])}"
        source, names, notes = text_source(units[0][0], model)
        total, names, rows = len(names), names[:limit], [1] * len(names)
    elif path.is_dir() or kind == _PB:
        if kind == _PB:
            noun = "ONNX test data set"
            names = [shown(unit[0].parent) for unit in taken] if path.is_dir() else names
        # Labels of rows can be counted only where every sample is looked at.
        every = values is not None and len(values) != total
        checked = _check(units if every else taken, inputs, stacked=False)
        rows = [_rows(shapes, model) for shapes in checked.shapes]
        stamps = checked.stamps[: len(taken)]
        source, notes = _Files(units=taken, stamps=stamps, inputs=inputs), []
        conversions = checked.conversions
    else:
        noun, where = "sample", f" in {shown(path)}"
        source, rows, conversions, notes = _stack(path, model, inputs)
        total = len(rows)
        names = [f"sample {i}" for i in range(min(total, limit or total))]
    alone = path.is_dir() or all(e == path or e.suffix != path.suffix for e in entries)
    labels, more = _labels(values, total, rows, alone=alone)
    rows = rows[: len(names)]
    notes = conversions + notes + more
    if path.is_dir():
        notes += _strays(shown(path), entries, units, kind)
    if preprocess is not None and kind != _IMAGES:
        notes.append(f"preprocessing is for images and is not applied to {kind}")
    feeds = Feeds(
        source=source,
        indices=tuple(range(len(names))),
        names=tuple(names),
        available=total,
        what=counted(total, noun) + where,
        rows=tuple(rows),
        labels=labels and labels[: sum(rows)],
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
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    if len(entries) > MAX_SAMPLES:
        raise FeedError(
            f"{shown(folder)} holds {len(entries):,} files, expected at most {MAX_SAMPLES:,}",
            hint="Name a folder with the samples to look at.",
        )
    return entries


def _found(
    path: Path, entries: Sequence[Path], inputs: Sequence[TensorInfo], kinds: Sequence[str]
) -> tuple[str, list[tuple[Path, ...]]]:
    """The first of the kinds of feeds in a folder, and the files of each unit; or of one file."""
    many = path.is_dir()
    files = [e for e in (entries if many else [path]) if e.is_file()]
    for kind in kinds:
        units: list[tuple[Path, ...]] = [
            (f,) for f in files if _KINDS.get(f.suffix.lower()) == kind
        ]
        if kind == _TEXTS and many:
            units = [unit for unit in units if unit[0].name == _TEXTS_FILE]
        if kind == _PB and many:
            folders = [e for e in entries if e.is_dir() and e.name.startswith("test_data_set_")]
            if not folders and any(re.fullmatch(r"input_\d+\.pb", f.name) for f in files):
                folders = [path]
            units = [_test_data(e, inputs) for e in sorted(folders, key=_natural)]
        if units and kind in (".npy", _PB) and len(units[0]) < len(inputs):
            raise FeedError(
                f"{shown(units[0][0])} is one array without a name, but the model has "
                f"{len(inputs)} inputs: {listed([i.name for i in inputs], most=8)}",
                hint="Save one .npz per sample, keyed by input name.",
            )
        if units:
            return kind, units
    for inner in entries if many else ():
        held = inner.is_dir() and [
            e for e in _entries(inner) if e.suffix.lower() in _KINDS and e.suffix != ".txt"
        ]
        if held:
            raise FeedError(
                f"{shown(path)} holds no feeds itself; its subfolder {shown(inner)} has "
                f"{counted(len(held), 'file')} that may be feeds",
                hint=f"Name the subfolder: {printable(str(inner), 4096)}",
            )
    wanted = "images" if tuple(kinds) == (_IMAGES,) else _EXPECTED
    found = f"holds no feeds: found {_named(entries) or 'nothing'}"
    if not many:
        found = "is no feed" if files else "is no regular file"
    raise FeedError(
        f"{shown(path)} {found}, expected {wanted}",
        hint="Unpack archives and name the folder or file that holds the feeds.",
    )


def _named(entries: Sequence[Path]) -> str:
    """The first entries of a folder; those that are no regular files are marked."""
    names = []
    for entry in entries[:3]:
        mark = "/" if entry.is_dir() else "" if entry.is_file() else " (no regular file)"
        names.append(shown(entry) + mark)
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return ", ".join(names) + more


def _test_data(folder: Path, inputs: Sequence[TensorInfo]) -> tuple[Path, ...]:
    """A test data set's input files, one per input of the model."""
    wanted = [folder / f"input_{i}.pb" for i in range(len(inputs))]
    found = sorted(folder.glob("input_*.pb"), key=_natural)
    if found != wanted:
        raise FeedError(
            f"{shown(folder)} has {listed(map(shown, found), 8) or 'no input_*.pb'}, "
            f"expected {listed([f.name for f in wanted], 8)}: one per input of the model",
            hint=f"Write them in input order: {listed([i.name for i in inputs], most=8)}.",
        )
    return tuple(wanted)


def _natural(path: Path) -> tuple[Any, ...]:
    # test_data_set_10 comes after test_data_set_2.
    return tuple(int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.name))


def _strays(
    shown: str, entries: Sequence[Path], units: Sequence[Sequence[Path]], kind: str
) -> list[str]:
    taken = {part for unit in units for file in unit for part in (file, file.parent)}
    companions = {*_COMPANIONS, *([TOKENIZER] if kind == _TEXTS else [])}
    stray = [
        e
        for e in entries
        if e not in taken
        and e.name not in companions
        and not (kind == _PB and re.fullmatch(r"output_\d+\.pb", e.name))
    ]
    verb = "is" if len(stray) == 1 else "are"
    return [f"{shown}: {_named(stray)} {verb} not {kind} and {verb} ignored"] if stray else []


# --------------------------------------------------------------------------------- rows and labels


def _rows(shapes: Mapping[str, tuple[int, ...]], model: Model) -> int:
    """How many rows of a batch a sample of these shapes holds; 1 where the model has no batch.

    The batch is the leading axis that all inputs share (where some leave theirs open, those) and
    that an output has too: a picture of shape (3, H, W) is no batch of three.
    """
    ranked = [(i.shape[0] if i.shape else None, shapes[i.name][0]) for i in model.inputs
              if shapes[i.name]]  # fmt: skip
    batched = [pair for pair in ranked if not is_static(pair[0])] or ranked
    sizes = {size for _, size in batched}
    if len(sizes) != 1:
        return 1
    (size,) = sizes
    own = {dim for dim, _ in batched if isinstance(dim, str)}
    for output in model.outputs:
        if output.shape == ():
            continue
        dim = output.shape[0] if output.shape else None
        named = own and isinstance(dim, str)
        if dim in own if named else (dim == size or not is_static(dim)):
            return max(size, 1)
    return 1


def _read_labels(path: Path) -> list[Any] | None:
    return read_json(path, "labels", list, _LABELS_HINT) if path.is_file() else None


def _labels(
    values: Sequence[Any] | None, samples: int, rows: Sequence[int], *, alone: bool
) -> tuple[tuple[int, ...] | None, list[str]]:
    """The label of every row, None where there are none, and notes.

    Args:
        values: the labels beside the feeds, one per sample or one per row.
        samples: how many there are.
        rows: of each sample, or of the first where there is a label per sample.
        alone: False for one file among others; labels of another number are then theirs.
    """
    if values is None:
        return None, []
    per_sample, total = len(values) == samples, sum(rows)
    if not per_sample and len(values) != total:
        found = f"labels.json has {counted(len(values), 'label')}"
        if not alone:
            return None, [f"{found} for {counted(samples, 'sample')} and is not used"]
        wanted = f"{samples:,}: one per sample"
        if total != samples:
            wanted = f"{samples:,} (one per sample) or {total:,} (one per row)"
        raise FeedError(f"{found}, expected {wanted}", hint=_LABELS_HINT)
    for index, label in enumerate(values):
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
            most = (
                " and below 2,147,483,648"
                if label is not True and isinstance(label, int) and label > 0
                else ""
            )
            raise FeedError(
                f"labels.json has {json_text(label)} at position {index}, "
                f"expected an integer of 0 or more{most}",
                hint=_LABELS_HINT,
            )
    if per_sample and any(count != 1 for count in rows):
        # Fewer rows than labels where only the first samples are taken.
        pairs = zip(values, rows, strict=False)
        return tuple(label for label, count in pairs for _ in range(count)), [
            "labels.json has one label per sample, which counts for each of its rows"
        ]
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
            f"{shown(folder)} holds images but no preprocess.json, "
            "which says how pixels become the model's input",
            hint='Write preprocess.json beside them, e.g. {"preset": "yolo"} '
            f"(presets: {', '.join(PRESETS)}).",
        )
    if not isinstance(preprocess, Preprocess):
        preprocess = read_preprocess(preprocess or beside)
    recipe = preprocess.fitted(model)
    with readable(shown(folder), "a folder of images", "Load it again."):
        files = tuple((file, stamp(file)) for (file,) in units)
    losses = Counter(what for file, _ in files for what in image_losses(file))
    notes = [f"{count:,} of {len(files):,} images {what}" for what, count in losses.items()]
    return _Pictures(files=files, info=model.inputs[0], preprocess=recipe), notes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """What the headers of all files say.

    Attributes:
        stamps: of each unit's files.
        shapes: by input, of each unit.
        slots: how the last unit gives the inputs' samples.
        conversions: what is converted, one sentence each.
    """

    stamps: tuple[tuple[Stamp, ...], ...]
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    slots: tuple[_Slot, ...]
    conversions: list[str]


def _check(
    units: Sequence[Sequence[Path]], inputs: Sequence[TensorInfo], *, stacked: bool
) -> _Checked:
    """Every file's header, held against the model's inputs."""
    slots: list[_Slot] = []
    stamps, shapes = [], []
    converted: Counter[tuple[TensorInfo, str]] = Counter()
    for unit in units:
        with readable(shown(unit[0]), "a feed", "Load the feeds again."):
            stamps.append(tuple(stamp(file) for file in unit))
        with opened(unit, inputs) as arrays:
            slots = [_slot(array, info, stacked=stacked) for info, array in arrays]
            found = {info.name: array.shape for info, array in arrays}
            if all(0 in shape for shape in found.values()):
                raise FeedError(
                    f"{shown(unit[0])} holds no values, only the empty {listed(map(repr, found))}",
                    hint="Save it with at least one sample.",
                )
            shapes.append(found)
            converted.update(
                (i, a.dtype.name)
                for i, a in arrays
                if a.dtype.name != i.dtype and i.dtype != "string" and a.dtype.kind != "V"
            )
    notes = []
    for (info, dtype), count in converted.items():
        some = "" if count == len(units) else f" in {count:,} of {len(units):,} files"
        how = "rounded" if info.dtype in CODED_DTYPES and dtype.startswith("float") else "converted"
        notes.append(f"input {info.name!r} is {dtype}{some} and was {how} to {info.dtype}")
    return _Checked(
        stamps=tuple(stamps), shapes=tuple(shapes), slots=tuple(slots), conversions=notes
    )


def _stack(
    path: Path, model: Model, inputs: tuple[TensorInfo, ...]
) -> tuple[_Files, list[int], list[str], list[str]]:
    """Samples along the leading axis; the rows of each; what is converted; notes."""
    checked = _check([[path]], inputs, stacked=True)
    slots = {info.name: slot for info, slot in zip(inputs, checked.slots, strict=True)}
    counts = {name: slot.samples for name, slot in slots.items() if slot.samples is not None}
    first, total = next(iter(counts.items()), ("", 1))
    for name, count in counts.items():
        if count != total:
            raise FeedError(
                f"{shown(path)}: {name!r} has {counted(count, 'sample')} and {first!r} {total:,}, "
                "expected as many of each",
                hint="Save all arrays with the same leading sample axis.",
            )
    if total > MAX_SAMPLES:
        raise FeedError(
            f"{shown(path)} claims {total:,} samples, expected at most {MAX_SAMPLES:,}",
            hint="Split it into smaller files.",
        )
    notes = [
        f"{shown(path)}: {name!r} is taken as {total:,} samples of {slot.shape}, not as one batch"
        for name, slot in slots.items()
        if slot.chosen and total > 1
    ]
    shared = [repr(name) for name, slot in slots.items() if slot.samples is None]
    if shared and total > 1:
        notes.append(f"{shown(path)}: all samples share {listed(shared, most=8)}")
    (whole,) = checked.shapes
    shapes = {n: whole[n] if slot.shape is None else slot.shape for n, slot in slots.items()}
    source = _Files(units=((path,),), stamps=checked.stamps, inputs=inputs, slots=checked.slots)
    return source, [_rows(shapes, model)] * total, checked.conversions, notes


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
        what=f"{counted(samples, 'random feed')} (seed {seed})",
        rows=(_rows({name: shape for name, _, shape, _, _ in source.inputs}, model),) * samples,
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
