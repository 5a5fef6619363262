"""Which constants or activations hold the same numbers, where names and graph edges do not tell.

Pure numpy, and apart from `matching` because it knows no graph: arrays in, likeness out. Likeness
is Pearson's correlation, not the cosine: behind a ReLU, or for gains around 1, any two arrays have
a cosine near 1. A false pair costs more than a missing one (every number that follows would be
wrong and look exact), so a pair needs a correlation above `THRESHOLD`, enough numbers for that not
to happen by chance, and a runner-up that is clearly worse. Constant arrays never match by content.

Limits. A constant with fewer than `EVIDENCE` + 2 numbers must be equal to about 1 %, so a small
one in 4 bits stays unmatched, and so does a scalar that is not equal to six digits. Gains per
channel are seen through only where channels together hold `EVIDENCE` numbers more than the two
per channel that a gain and an offset can explain. Parts of a concatenation have equal length.
Activations are compared without gains: behind cross-layer equalization they stay unmatched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.95
# Numbers beyond those that a gain and an offset explain: with 24 of them a correlation above
# THRESHOLD between unrelated normal values has a probability below 1e-12, and enough is left of
# that for the heavy tails of real weights and for the many pairs tried.
EVIDENCE = 24
# Elements that a summary keeps of an activation.
ELEMENTS = 65_536
_SCREENED = 2048
_SCREEN_THRESHOLD = 0.9
_MAX_RANK = 5
_GATES = {4: "iofc", 3: "zrh"}


# -- likeness ------------------------------------------------------------------------------------


def _real(values: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(values, np.float64)


def _closeness(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Likeness of a few numbers by their distance, 0..1; above THRESHOLD where it is no chance.

    n values of one magnitude agree within a share d by chance with a probability of about d^n. So
    d may be 10^(-6/n), at most 1 %: a rounding to 8 bits moves values by 0.4 % of the largest.
    """
    largest = float(np.abs(x).max())
    distance = float(np.abs(x - y).max())
    if largest == 0:
        return 1.0 if distance == 0 else 0.0
    allowed: float = min(1e-2, 10.0 ** (-6 / x.size))
    likeness: float = 1.0 - (1.0 - THRESHOLD) * distance / largest / allowed
    return max(0.0, likeness)


def _varies(deviation: Any, power: Any) -> Any:
    """Whether sums of squares about the mean are more than the rounding of float32 values."""
    return deviation > 1e-12 * power


def _by_channel(values: NDArray[Any], channel_axis: int | None) -> NDArray[Any]:
    """One row per channel; one row of all without an axis."""
    if channel_axis is None or values.ndim < 2:
        return values.reshape(1, -1)
    return np.moveaxis(values, channel_axis, 0).reshape(values.shape[channel_axis], -1)


def _rows(
    x: NDArray[np.float64], y: NDArray[np.float64], finite: NDArray[np.bool_] | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
    """Correlation of each row, its finite count, whether it counts, and actual's deviation (std).

    A row that varies in actual but not in the reference has correlation 0 and counts; one that is
    constant in actual (dead, or too small for the scale) does not.
    """
    count = np.full(len(x), x.shape[1]) if finite is None else finite.sum(axis=1)
    if finite is not None:
        x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
    divisor = np.maximum(count, 1)[:, None]
    power_x, power_y = np.einsum("cn,cn->c", x, x), np.einsum("cn,cn->c", y, y)
    x = x - x.sum(axis=1, keepdims=True) / divisor
    y = y - y.sum(axis=1, keepdims=True) / divisor
    if finite is not None:
        x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
    xx, yy, xy = (np.einsum("cn,cn->c", a, b) for a, b in ((x, x), (y, y), (x, y)))
    both = _varies(xx, power_x) & _varies(yy, power_y)
    norm = np.sqrt(np.where(both, xx, 1.0)) * np.sqrt(np.where(both, yy, 1.0))
    result = np.where(both, np.clip(xy / norm, -1.0, 1.0), 0.0)
    counts = _varies(yy, power_y) & (count > 2)
    return result, count.astype(np.int64), counts, np.sqrt(yy / divisor[:, 0])


def _step(actual: NDArray[Any]) -> float:
    """The distance of neighbouring values where all lie on one grid of few levels, otherwise 0."""
    flat = np.asarray(actual).reshape(-1)
    levels = np.unique(_real(flat[:: max(1, flat.size // ELEMENTS)]))
    levels = levels[np.isfinite(levels)]
    if not 1 < levels.size <= 1024:
        return 0.0
    gaps = np.diff(levels)
    gaps = gaps[gaps > 1e-6 * np.abs(levels).max()]
    return float(gaps.min()) if gaps.size else 0.0


def correlation(reference: NDArray[Any], actual: NDArray[Any], channel_axis: int | None) -> float:
    """Likeness of two arrays of one shape, -1..1, higher is better; see the module for its limits.

    With a channel axis: Pearson's correlation of each channel, without its sign, because folding
    and equalization scale channels by gains of either sign. The value is the lower quartile, i.e.
    three quarters of the channels are at least as alike. Left out are channels that are constant
    in `actual`, and those whose deviation is below one step of a per-tensor grid: at 336:1 between
    channel ranges nothing is left of the small ones in 8 bits. Where too few numbers remain, and
    without a channel axis, one correlation (with its sign) of all numbers. Where there are fewer
    than EVIDENCE + 2 of them, or either is constant (or constant in each channel), by distance:
    1 for equal arrays, 0.95 where they differ by 1 % of the largest value (less for 1 or 2).

    Positions where either is NaN or infinite are ignored; nan where less than half is finite, and
    for empty arrays.

    Raises:
        ValueError: shapes differ, or the axis (>= 0) is outside the array.
    """
    if reference.shape != actual.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, actual {actual.shape}")
    if channel_axis is not None and not 0 <= channel_axis < reference.ndim:
        raise ValueError(f"axis {channel_axis} is outside an array of shape {reference.shape}")
    step = 0.0 if channel_axis is None else _step(actual)
    return _correlation(reference, actual, channel_axis, step)


def _correlation(
    reference: NDArray[Any], actual: NDArray[Any], channel_axis: int | None, step: float
) -> float:
    """`correlation` with actual's step already known."""
    if reference.size == 0:
        return math.nan
    x, y = _real(reference), _real(actual)
    finite = np.isfinite(x) & np.isfinite(y)
    kept = int(finite.sum())
    if 2 * kept < x.size:
        return math.nan
    mask = None if kept == x.size else finite
    if channel_axis is not None and x.ndim > 1:
        result, count, counts, deviation = _rows(
            _by_channel(x, channel_axis),
            _by_channel(y, channel_axis),
            None if mask is None else _by_channel(mask, channel_axis),
        )
        if not counts.any() and x.size > x.shape[channel_axis]:
            return _closeness(x[finite], y[finite])
        counts &= deviation >= step
        if int((count[counts] - 2).sum()) >= EVIDENCE:
            ordered = np.sort(np.abs(result[counts]))
            return float(ordered[(ordered.size - 1) // 4])
    if kept - 2 < EVIDENCE:
        return _closeness(x[finite], y[finite])
    result, _, counts, _ = _rows(
        x.reshape(1, -1), y.reshape(1, -1), None if mask is None else mask.reshape(1, -1)
    )
    return float(result[0]) if counts[0] else _closeness(x[finite], y[finite])


def _clearly_best(best: float, runner_up: float) -> bool:
    """Whether the runner-up lies at least three times as far from 1 (and not by rounding)."""
    return 1.0 - runner_up >= 3.0 * (1.0 - best) + 1e-5


@lru_cache(maxsize=4096)
def _kept(shape: tuple[int, ...], limit: int) -> tuple[slice, ...]:
    """Positions along each axis, so that at most `limit` elements remain (one, if less).

    An axis's stride depends on its size and a bound common to all axes, so thinning and permuting
    axes commute.
    """

    def strides(bound: int) -> list[int]:
        return [max(1, -(-size // bound)) for size in shape]

    def kept(bound: int) -> int:
        return math.prod(-(-size // s) for size, s in zip(shape, strides(bound), strict=True))

    if math.prod(shape) <= limit:
        return (slice(None),) * len(shape)
    low, high = 1, max(shape)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kept(middle) <= limit else (low, middle - 1)
    return tuple(slice(None, None, stride) for stride in strides(low))


def _thinned(values: NDArray[Any], limit: int) -> NDArray[Any]:
    """A view of at most `limit` elements, see `_kept`."""
    return values[_kept(values.shape, limit)]


# -- constants -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentMatch:
    """A constant that holds the same numbers as another model's, or several that do together.

    Attributes:
        name: of the constant; where there are parts, their names joined by " + ".
        parts: the match of each part where the other is a concatenation, in its order.
        correlation: see `correlation`; the lowest of the parts.
        transform: what `apply` does, in words to show; "" for nothing.
        apply: brings references into the actual's layout; takes one array per name of `names`.
    """

    name: str
    parts: tuple[ContentMatch, ...] = ()
    correlation: float
    transform: str
    apply: Callable[..., NDArray[Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The constants that `apply` takes."""
        return tuple(n for p in self.parts for n in p.names) if self.parts else (self.name,)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """One way to bring an array into a shape: text to show, and the function (a view if can be)."""

    text: str
    apply: Callable[[NDArray[Any]], NDArray[Any]]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _reshaping(shape: tuple[int, ...], text: str) -> _Layout:
    return _Layout(text=text, apply=lambda values: values.reshape(shape))


def _reshaped(source: tuple[int, ...], target: tuple[int, ...]) -> Iterator[_Layout]:
    """The array as it is, or with its elements in the same order in another shape."""
    yield _reshaping(target, "" if source == target else f"reshaped to {target}")


def _transposed(source: tuple[int, ...], target: tuple[int, ...]) -> Iterator[_Layout]:
    """Permutations of axes of more than one element, also of an array flattened to two axes."""
    wanted = _squeezed(target)
    flattened = (source[:1] or (1,)) + (math.prod(source[1:]),)
    for inner in dict.fromkeys((_squeezed(source), flattened)):
        if len(inner) != len(wanted) or not 1 < len(inner) <= _MAX_RANK:
            continue
        for axes in itertools.permutations(range(len(inner))):
            if axes == tuple(range(len(inner))) or tuple(inner[a] for a in axes) != wanted:
                continue

            def apply(
                values: NDArray[Any],
                inner: tuple[int, ...] = inner,
                axes: tuple[int, ...] = axes,
            ) -> NDArray[Any]:
                return values.reshape(inner).transpose(axes).reshape(target)

            text = f"transposed {axes}" if source == inner else f"as {inner} transposed {axes}"
            moved = text if target == wanted else f"{text}, reshaped to {target}"
            yield _Layout(text=moved, apply=apply)


def _first_axis(shape: tuple[int, ...]) -> int | None:
    """The first axis with more than one element."""
    return next((axis for axis, size in enumerate(shape) if size > 1), None)


_Ways = tuple[Callable[[tuple[int, ...], tuple[int, ...]], Iterator[_Layout]], ...]


class _Bank:
    """Samples of all ways in which constants of one size may lie in one shape, for screening."""

    def __init__(
        self,
        entries: list[tuple[str, _Layout]],
        arrays: list[NDArray[Any]],
        channel_axis: int | None,
    ) -> None:
        self.entries = entries
        self.channel_axis = channel_axis
        rows = [self._sampled(values) for values in arrays]
        self.odd = np.array([not np.isfinite(r).all() for r in rows], bool)
        self.few = bool(rows) and rows[0].size - 2 < EVIDENCE
        if self.few:
            self.values = np.stack([r.ravel() for r in rows])
        elif rows:
            self.whole = np.stack([_unit_rows(r.reshape(1, -1))[0] for r in rows])
            self.channels = np.stack([_unit_rows(r) for r in rows]) if len(rows[0]) > 1 else None

    def _sampled(self, values: NDArray[Any]) -> NDArray[np.float64]:
        return _by_channel(_real(_thinned(values, _SCREENED)), self.channel_axis)

    def likely(self, actual: NDArray[Any], step: float) -> list[tuple[str, _Layout]]:
        """The entries that a sample does not rule out."""
        if not self.entries:
            return []
        rows = self._sampled(actual)
        if not np.isfinite(rows).all():
            return self.entries
        if self.few:
            with np.errstate(invalid="ignore"):
                distance = np.abs(self.values - rows.ravel()).max(axis=1)
            kept = ~(distance > 0.02 * np.abs(self.values).max(axis=1))
        else:
            kept = np.abs(self.whole @ _unit_rows(rows.reshape(1, -1))[0]) > _SCREEN_THRESHOLD
            chosen = rows.std(axis=1) >= step
            if self.channels is not None and chosen.any():
                units = _unit_rows(rows)
                chosen &= units.any(axis=1)
                likes = np.abs(np.einsum("kcn,cn->kc", self.channels, units))[:, chosen]
                if likes.shape[1]:
                    likes.sort(axis=1)
                    kept |= likes[:, (likes.shape[1] - 1) // 4] > _SCREEN_THRESHOLD
        return [self.entries[at] for at in np.flatnonzero(kept | self.odd)]


def _unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows centred and of length 1; zeros for constant rows and those that are not finite."""
    with np.errstate(invalid="ignore"):
        centred = rows - rows.mean(axis=1, keepdims=True)
    power = np.einsum("cn,cn->c", rows, rows)
    squared = np.einsum("cn,cn->c", centred, centred)
    varies = np.isfinite(squared) & _varies(squared, power)
    length = np.sqrt(np.where(varies, squared, 1.0))[:, None]
    unit: NDArray[np.float64] = np.where(varies[:, None], centred / length, 0.0)
    return unit.astype(np.float32)


class Candidates:
    """Constants to look among, grouped by size and sampled once for many calls of `find_constant`.

    Values are read from the mapping again where a sample does not rule them out, so it may load
    them lazily. At most 16 KiB are kept for each constant and layout that was asked for.
    """

    def __init__(self, constants: Mapping[str, NDArray[Any]]) -> None:
        self._constants = constants
        self._by_size: dict[int, list[str]] = {}
        self._banks: dict[tuple[object, ...], _Bank] = {}
        for name, value in constants.items():
            if value.dtype.kind not in "OSUcMm":
                self._by_size.setdefault(int(value.size), []).append(name)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._constants[name]

    def bank(
        self, shape: tuple[int, ...], channel_axis: int | None, ways: _Ways, blocks: int = 1
    ) -> _Bank:
        """Samples of the constants of a shape's size, laid out in it; of each block, if several."""
        key = (shape, channel_axis, ways, blocks)
        if key not in self._banks:
            axis = _first_axis(shape) or 0
            entries, arrays = [], []
            for name in self._by_size.get(math.prod(shape), []):
                reference = self._constants[name]
                for layout in (lay for way in ways for lay in way(reference.shape, shape)):
                    laid_out = layout.apply(reference)
                    pieces = np.split(laid_out, blocks, axis=axis) if blocks > 1 else [laid_out]
                    entries += [(name, layout)] * blocks
                    arrays += pieces
            self._banks[key] = _Bank(entries, arrays, channel_axis)
        return self._banks[key]


class _Search:
    """The search for one array; each stage runs only where the simpler ones found nothing."""

    def __init__(
        self,
        actual: NDArray[Any],
        candidates: Candidates,
        channel_axis: int | None,
        gates: bool,
        step: float,
    ) -> None:
        self.actual = actual
        self.candidates = candidates
        self.channel_axis = channel_axis
        self.gates = gates
        self.step = step
        self.ambiguous = False

    def _match(self, name: str, text: str, apply: Callable[..., Any]) -> list[ContentMatch]:
        """The match with a constant laid out by `apply`; none where it cannot be compared."""
        like = self._like(apply(self.candidates[name]), self.actual)
        found = ContentMatch(name=name, correlation=like, transform=text, apply=apply)
        return [] if math.isnan(like) else [found]

    def _like(self, reference: NDArray[Any], actual: NDArray[Any]) -> float:
        return _correlation(reference, actual, self.channel_axis, self.step)

    def _best(self, found: list[ContentMatch]) -> ContentMatch | None:
        """The best where it is above THRESHOLD and no other constant comes near."""
        found = sorted(found, key=lambda match: -match.correlation)
        if not found or found[0].correlation <= THRESHOLD:
            return None
        others = [m.correlation for m in found if m.name != found[0].name]
        self.ambiguous = bool(others) and not _clearly_best(found[0].correlation, others[0])
        return None if self.ambiguous else found[0]

    def whole(self) -> ContentMatch | None:
        """A constant with the same numbers, possibly in another layout or order of blocks."""
        shape = self.actual.shape
        for way in (_reshaped, _transposed):
            bank = self.candidates.bank(shape, self.channel_axis, (way,))
            found: list[ContentMatch] = []
            for name, layout in bank.likely(self.actual, self.step):
                found += self._match(name, layout.text, layout.apply)
            match = self._best(found)
            if match is not None or self.ambiguous:
                return match
        axis = _first_axis(shape)
        if axis is None or len(_squeezed(shape)) > 2:  # no recurrent weight
            return None
        found = []
        for number in _GATES:
            if shape[axis] % number or shape[axis] == number:
                continue
            bank = self.candidates.bank(shape, self.channel_axis, (_reshaped, _transposed), number)
            blocks = np.split(self.actual, number, axis=axis)
            likely = {(n, lay.text): lay for n, lay in bank.likely(blocks[0], self.step)}
            for (name, _), layout in likely.items():
                found += self._reordered(name, layout, blocks, axis)
        return self._best(found)

    def _reordered(
        self, name: str, layout: _Layout, blocks: list[NDArray[Any]], axis: int
    ) -> list[ContentMatch]:
        """The match with a constant of whose blocks these are a permutation."""
        theirs = np.split(layout.apply(self.candidates[name]), len(blocks), axis=axis)
        order: list[int] = []
        for block in blocks:
            likes = np.nan_to_num([self._like(other, block) for other in theirs], nan=-1.0)
            at = int(np.argmax(likes))
            if likes[at] <= THRESHOLD or at in order:
                return []
            order.append(at)

        def apply(values: NDArray[Any]) -> NDArray[Any]:
            pieces = np.split(layout.apply(values), len(order), axis=axis)
            return np.concatenate([pieces[at] for at in order], axis=axis)

        text = ", ".join(t for t in (layout.text, self._order(order)) if t)
        return self._match(name, text, apply)

    def _order(self, order: list[int]) -> str:
        """Which block of the reference each block is; by its gate where it has one."""
        if not self.gates:
            return f"blocks {', '.join(map(str, order))}"
        letters = _GATES[len(order)]
        theirs = [letters[order.index(at)] for at in range(len(order))]
        return f"gate order {', '.join(letters)} here, {', '.join(theirs)} in the float tensor"

    def joined(self, depth: int) -> ContentMatch | None:
        """Constants that are this array's halves or thirds along an axis, in this order."""
        shape = self.actual.shape
        for axis, number in itertools.product(range(len(shape)), (2, 3)):
            size = self.actual.size // number
            # Short parts would be pieced together by chance.
            if shape[axis] % number or size - 2 < EVIDENCE:
                continue
            parts: list[ContentMatch] = []
            for piece in np.split(self.actual, number, axis=axis):
                part = self.over(piece).find(depth - 1)
                if part is None:
                    break
                parts.append(part)
            names = [name for part in parts for name in part.names]
            if len(parts) == number and len(set(names)) == len(names):
                return _joined(parts, axis)
        return None

    def over(self, piece: NDArray[Any]) -> _Search:
        return _Search(piece, self.candidates, self.channel_axis, self.gates, self.step)

    def find(self, depth: int) -> ContentMatch | None:
        """The match of the whole, or else of parts of parts down to `depth`."""
        if not _tells(self.actual):
            return None
        match = self.whole()
        if match is not None or self.ambiguous or depth < 0:
            return match
        return self.joined(depth)


def _joined(parts: list[ContentMatch], axis: int) -> ContentMatch:
    def apply(*references: NDArray[Any]) -> NDArray[Any]:
        left = iter(references)
        pieces = [part.apply(*(next(left) for _ in part.names)) for part in parts]
        return np.concatenate(pieces, axis=axis)

    described = [p.name + (f" ({p.transform})" if p.transform else "") for p in parts]
    return ContentMatch(
        name=" + ".join(part.name for part in parts),
        parts=tuple(parts),
        correlation=min(part.correlation for part in parts),
        transform=f"joined along axis {axis}: {' and '.join(described)}",
        apply=apply,
    )


def _tells(values: NDArray[Any]) -> bool:
    """Whether an array has content to go by: numbers, half of them finite, not all equal.

    A scalar does: it has to be equal.
    """
    if values.size == 0 or values.dtype.kind in "OSUcMm":
        return False
    if values.size == 1:
        return bool(np.isfinite(_real(values)).all())
    real = _real(values).ravel()
    real = real[np.isfinite(real)]
    if 2 * real.size < values.size:
        return False
    return bool(_varies(np.square(real - real.mean()).sum(), np.square(real).sum()))


def find_constant(
    actual: NDArray[Any],
    candidates: Mapping[str, NDArray[Any]] | Candidates,
    *,
    channel_axis: int | None = None,
    gates: bool = False,
) -> ContentMatch | None:
    """The constant that holds the same numbers as `actual`, None where none or more than one does.

    Tried in this order, and the first that finds one decides: the same order of elements (in any
    shape), a permutation of axes, 3 or 4 equal blocks along the first axis of more than one element
    in another order, and halves or thirds along an axis that are constants of their own (also
    halves of halves: both directions of an LSTM's bias).

    Args:
        actual: real values, e.g. dequantized; integers of a quantized weight do as well.
        candidates: constants by name; `Candidates` where many calls share them.
        channel_axis: actual's output-channel axis (>= 0), None where gains per channel are not to
            be seen through.
        gates: blocks are gates in ONNX's order (4: LSTM i, o, f, c; 3: GRU z, r, h), so that their
            order in the float tensor can be named.

    Raises:
        ValueError: the axis is outside the array.
    """
    if channel_axis is not None and not 0 <= channel_axis < actual.ndim:
        raise ValueError(f"axis {channel_axis} is outside an array of shape {actual.shape}")
    if not isinstance(candidates, Candidates):
        candidates = Candidates(candidates)
    step = 0.0 if channel_axis is None else _step(actual)
    return _Search(actual, candidates, channel_axis, gates, step).find(1)


# -- activations ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A bounded part of an activation's values over one or several samples.

    Attributes:
        parts: values of each sample, at most `ELEMENTS` together (samples beyond are not kept),
            float64 for float64 arrays, otherwise float32, in the activation's axes.
        shapes: the whole shape at each sample.
        count: elements of all samples, kept or not.
        finite: of those, neither NaN nor infinite.
        mean: of the finite ones, 0 without any.
        power: mean square of the finite ones, 0 without any.
    """

    parts: tuple[NDArray[np.floating[Any]], ...]
    shapes: tuple[tuple[int, ...], ...]
    count: int
    finite: int
    mean: float
    power: float

    @classmethod
    def of(cls, array: NDArray[Any], limit: int = ELEMENTS) -> Summary:
        """The summary of one sample; a smaller `limit` leaves room for further samples.

        Kept is the array, or every n-th element along each axis, n from the axis's size alone: the
        same positions in both models, also where the axes are permuted.

        Raises:
            ValueError: the limit is not within 1..ELEMENTS.
        """
        if not 1 <= limit <= ELEMENTS:
            raise ValueError(f"limit {limit} is not within 1..{ELEMENTS}")
        array = np.asarray(array)
        real = _real(array).ravel()
        finite = real[np.isfinite(real)]
        wide = array.dtype == np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            thinned = _thinned(array, limit)
            # A copy, or a summary would keep the whole array alive.
            kept: NDArray[Any] = thinned.astype(np.float64 if wide else np.float32)
        return cls(
            parts=(kept,),
            shapes=(array.shape,),
            count=int(array.size),
            finite=int(finite.size),
            mean=float(finite.mean()) if finite.size else 0.0,
            power=float(np.square(finite).mean()) if finite.size else 0.0,
        )

    def merge(self, other: Summary) -> Summary:
        """Both, `other` after this one; its samples' values only as far as there is room."""
        parts = list(self.parts)
        for part in other.parts:
            if sum(p.size for p in parts) + part.size <= ELEMENTS:
                parts.append(part)
        finite = self.finite + other.finite
        share = self.finite / finite if finite else 0.0
        return Summary(
            parts=tuple(parts),
            shapes=self.shapes + other.shapes,
            count=self.count + other.count,
            finite=finite,
            mean=share * self.mean + (1.0 - share) * other.mean if finite else 0.0,
            power=share * self.power + (1.0 - share) * other.power if finite else 0.0,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at the first sample."""
        return self.shapes[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationMatch:
    """The activation of the other model that holds the same numbers.

    Attributes:
        name: of the other (actual) activation.
        permutation: axes that bring the actual array into the reference's layout, as in
            `numpy.transpose`; None where the layout is the same.
        correlation: Pearson's correlation over the kept values; for few of them see `correlation`.
    """

    name: str
    permutation: tuple[int, ...] | None
    correlation: float


def _vector(summary: Summary, axes: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """All kept values in one row, each sample's axes permuted."""
    rows = [np.transpose(p, axes).ravel() if axes else p.ravel() for p in summary.parts]
    return np.concatenate(rows).astype(np.float64)


def _why_not_told(summary: Summary) -> str:
    """Why an activation cannot be told by its content, "" where it can."""
    values = _vector(summary)
    finite = np.isfinite(values)
    if values.size == 0:
        return "it is empty"
    if 2 * int(finite.sum()) < values.size:
        return "less than half of its values are finite"
    return "" if _tells(values) and values.size > 1 else "all its values are equal"


def _permutations(reference: Summary, actual: Summary) -> Iterator[tuple[int, ...]]:
    """Axes that bring actual into the reference's shapes, but for the order of elements as it is.

    Permutations that differ only in where an axis of one element goes are the same and given once.
    """
    rank = len(reference.shape)
    everything = [*reference.shapes, *actual.shapes]
    if rank > _MAX_RANK or any(len(shape) != rank for shape in everything):
        return
    seen: set[tuple[int, ...]] = set()
    for axes in itertools.permutations(range(rank)):
        if any(
            tuple(theirs[a] for a in axes) != ours
            for ours, theirs in zip(reference.shapes, actual.shapes, strict=True)
        ):
            continue
        moved = tuple(a for a in axes if any(shape[a] != 1 for shape in actual.shapes))
        if moved in seen or axes == tuple(range(rank)):
            continue
        seen.add(moved)
        yield axes


# What a difference in gain and offset costs: a factor of 2 (a wrong scale) 0.02, of 4 0.053. A
# tensor and its multiple correlate perfectly, so something else has to tell them apart.
_SIZE_WEIGHT = 0.1


class _Likeness:
    """Correlation of a set of rows of equal length, the references, with others."""

    def __init__(self, rows: list[NDArray[np.float64]]) -> None:
        self.rows = rows
        self.whole = len(rows[0]) - 2 >= EVIDENCE and all(np.isfinite(r).all() for r in rows)
        self.unit = np.concatenate([_unit_rows(row[None]) for row in rows])
        self.size = np.array([_mean_and_deviation(row) for row in rows]).T

    def to(self, other: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Correlation of each row with `other`, -1 where unknown; and what differing sizes cost."""
        if self.whole and bool(np.isfinite(other).all()):
            likes = np.asarray(self.unit @ _unit_rows(other[None])[0], np.float64)
        else:
            known = [_correlation(row, other, None, 0.0) for row in self.rows]
            likes = np.nan_to_num(np.array(known), nan=-1.0)
        mean, deviation = _mean_and_deviation(other)
        means, deviations = self.size
        # The factor by which Lin's concordance correlation is below Pearson's.
        both = deviations * deviation
        agreement = 2 * both / (deviations**2 + deviation**2 + (means - mean) ** 2)
        return likes, _SIZE_WEIGHT * (1.0 - agreement)


def _mean_and_deviation(row: NDArray[np.float64]) -> tuple[float, float]:
    finite = row[np.isfinite(row)]
    return float(finite.mean()), float(finite.std())


class _Board:
    """Likeness of references (rows) to actual activations (columns), and who belongs to whom."""

    def __init__(self, rows: list[str], columns: list[str]) -> None:
        self.rows, self.columns = rows, columns
        self.correlations = np.full((len(rows), len(columns)), -1.0)
        self.likes = np.full((len(rows), len(columns)), -1.0)
        self.axes: dict[tuple[int, int], tuple[int, ...] | None] = {}

    def _rival(self, likes: NDArray[np.float64], at: int) -> int | None:
        """The runner-up where it comes too near to the best, `at`."""
        others = np.delete(np.arange(likes.size), at)
        if not others.size:
            return None
        second = int(others[np.argmax(likes[others])])
        return None if _clearly_best(float(likes[at]), float(likes[second])) else second

    def put(
        self,
        rows: list[int],
        column: int,
        scores: tuple[NDArray[np.float64], NDArray[np.float64]],
    ) -> None:
        """Correlations of some rows with a column, and what differing sizes take off them."""
        self.correlations[rows, column] = scores[0]
        self.likes[rows, column] = np.maximum(scores[0] - scores[1], -1.0)

    def settled(self) -> tuple[set[str], set[str]]:
        """Rows and columns whose numbers have been found, if not always which of several it is."""
        rows, columns = np.nonzero(self.likes > THRESHOLD)
        return {self.rows[at] for at in rows}, {self.columns[at] for at in columns}

    def decide(self, row: int) -> ActivationMatch | str:
        """The match of a reference, or why it has none."""
        if not self.columns:
            return "no other activation has its shape"
        likes = self.likes[row]
        column = int(np.argmax(likes))
        name, best = self.columns[column], float(likes[column])
        if best <= -1.0:
            return "no other activation has its shape"
        if best <= THRESHOLD:
            at_best = float(self.correlations[row, column])
            return f"nothing is like it (at best {name}, correlation {at_best:.2f})"
        theirs = self.likes[:, column]
        owner = int(np.argmax(theirs))
        if owner != row and theirs[owner] > best + 1e-5:
            return f"{name} is more like {self.rows[owner]}"
        rival = self._rival(likes, column)
        if rival is not None:
            return f"cannot be told from its values: {_alike(name, self.columns[rival])}"
        rival = self._rival(theirs, row)
        if rival is not None:
            return f"cannot be told from its values: {_alike(self.rows[row], self.rows[rival])}"
        return ActivationMatch(
            name=name,
            permutation=self.axes.get((row, column)),
            correlation=float(self.correlations[row, column]),
        )


def _alike(one: str, other: str) -> str:
    return f"{one} and {other} hold (nearly) the same numbers"


def _compared(
    reference: Mapping[str, Summary], actual: Mapping[str, Summary], *, permuted: bool
) -> _Board:
    """Likeness of all pairs of one shape, or of all pairs of permuted axes."""
    board = _Board([*reference], [*actual])

    def key(summary: Summary) -> tuple[tuple[int, ...], ...]:
        shapes = summary.shapes
        return tuple(tuple(sorted(s)) for s in shapes) if permuted else shapes

    columns: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for at, summary in enumerate(actual.values()):
        columns.setdefault(key(summary), []).append(at)
    rows: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for at, summary in enumerate(reference.values()):
        rows.setdefault(summary.shapes, []).append(at)
    for same in rows.values():
        first = reference[board.rows[same[0]]]
        others = columns.get(key(first), [])
        if not others:
            continue
        likeness = _Likeness([_vector(reference[board.rows[at]]) for at in same])
        for column in others:
            summary = actual[board.columns[column]]
            if [p.size for p in summary.parts] != [p.size for p in first.parts]:
                continue
            if not permuted:
                board.put(same, column, likeness.to(_vector(summary)))
                continue
            ways = [*_permutations(first, summary)]
            if not ways:
                continue
            scores = [likeness.to(_vector(summary, axes)) for axes in ways]
            likes = np.stack([score[0] for score in scores])
            for at, row in enumerate(same):
                order = np.argsort(-likes[:, at])
                best = int(order[0])
                # Which axes were permuted has to be as clear as with what.
                if order.size > 1 and not _clearly_best(*likes[order[:2], at].tolist()):
                    continue
                board.put([row], column, (scores[best][0][[at]], scores[best][1][[at]]))
                board.axes[row, column] = ways[best]
    return board


def find_activations(
    reference: Mapping[str, Summary],
    actual: Mapping[str, Summary],
    *,
    reasons: dict[str, str] | None = None,
) -> dict[str, ActivationMatch]:
    """Which activation of the other model holds the same numbers, by reference name.

    One to one: each is the other's best with a correlation above THRESHOLD, and on either side the
    runner-up lies at least three times as far from 1. What differs in size is less alike: a factor
    of 2 counts as 0.02 of correlation, one of 4 as 0.053, so that a tensor is not taken for its
    multiple, yet one with a wrong scale is still found. First within one shape; then what is left,
    with permuted axes. Never matched: activations whose values are all equal, or less than half
    finite (positions where either is not finite are ignored), and those that hold the same numbers
    as another of their model.

    Give it all activations of both models, also those whose partner is known otherwise: a tensor
    and its neighbour (before and after a small bias) correlate by 0.99, and only the neighbour's
    own partner shows that it is not the one.

    Args:
        reference: summaries of the float model's activations.
        actual: of the quantized model's, over the same samples; one per tensor (its values before
            Q or behind DQ, not both).
        reasons: filled with a sentence for each reference without a match.
    """
    why: dict[str, str] = {}
    told = {}
    for name, summary in reference.items():
        reason = _why_not_told(summary)
        if reason:
            why[name] = reason
        else:
            told[name] = summary
    others = {name: summary for name, summary in actual.items() if not _why_not_told(summary)}
    found: dict[str, ActivationMatch] = {}
    for permuted in (False, True):
        board = _compared(told, others, permuted=permuted)
        settled = board.settled()
        for row, name in enumerate(board.rows):
            decided = board.decide(row)
            if isinstance(decided, ActivationMatch):
                found[name] = decided
                why.pop(name, None)
            elif not permuted or name in settled[0]:
                why[name] = decided
        told = {name: summary for name, summary in told.items() if name not in settled[0]}
        others = {name: summary for name, summary in others.items() if name not in settled[1]}
    if reasons is not None:
        reasons.update(why)
    return found
