"""What a quantized file itself says is wrong: its weights, scales, zero points, options.

One function per rule, each from a case to its findings. Apart from the rules that judge how large
an error is, because these compare what the file holds with what the float model, the observed
ranges and the file's own other numbers say it should hold. A weight is looked at in steps of its
scale: rounding moves a value by half a step at most, so whatever lies further off has another
cause, and that cause is named only where it explains all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from inspector.arrays import counted, listed
from inspector.comparison import LOOK_DB, ActivationError, WeightError, judged_db
from inspector.equalize import equalize
from inspector.errors import ModelError, QuantizationError
from inspector.findings import LOOK, NOTE, PROBLEM, Case, Finding, Remedy
from inspector.folding import constant_value
from inspector.matching import RECTIFIERS, clip_limits
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.qparams import (
    FLOAT_CODES,
    INTEGER_DTYPES,
    QParams,
    code_range,
    qparams_from_range,
)
from inspector.recipe import QuantConfig, TensorOverride, read_recipe
from inspector.scheme import (
    QCONCAT,
    QOPERATORS,
    QuantFormat,
    QuantizedTensor,
    count_scheme,
    stored_values,
)
from inspector.structure import base_names
from inspector.weights import WeightPair

# Rounding moves a value by half a step; the rest is room for float32.
_ROUNDED_STEPS = 0.55
# What an explanation may leave: rounding, and the rounding of the fit.
_EXPLAINED_STEPS = 0.75
# Float32 scales and folded constants are exact to about this part of a value.
_RELATIVE_ROOM = 1e-5
# Shares of a group's values: more than the first unexplained by rounding is looked into, less than
# the second unexplained by a fit is an explanation, more than the third at the ends is clipping.
_OFF_FRACTION, _LEFT_FRACTION, _CLIPPED_FRACTION = 0.01, 0.02, 0.2
# Fewer values per channel than this are judged together.
_ENOUGH = 8
# Fewer values than this say too little about whose content they are.
_TELLING = 26
# Of more values than this only a part is fitted.
_MOST = 2**22
# Correlation from which two constants have the same content.
_SAME = 0.95
# A factor below the first is worth a look, from the second on nothing but a fault is so far off.
_GAIN_LOOK, _GAIN_PROBLEM = 0.01, 0.05
# Nodes behind a weight's own that are looked at for the next compared tensor.
_CHAIN = 8
# Scale in the file by the scale of the observed range.
_TOO_WIDE, _TOO_NARROW = 1.9, 0.55
# At most so many tensors with the same sign are named one by one.
_MANY = 3
# A scale so near to that of the observed range is the one calibrated on these very samples, and a
# file of which so many are has no reason for another one.
_EXACT, _NEARLY_ALL = 0.01, 0.9

_CHANNELLED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})


# -- what the rules share ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """A weight's codes as a line over its float values, in steps of the scale, per group.

    With x the float value and u the code without its zero point: ``u = gain * x / scale + offset``.
    A group is the tensor, or a channel with a scale of its own and enough values.

    Attributes:
        gain: 1 for a healthy weight, k where the scale is k times too large.
        gain_error: standard error of `gain` that rounding alone makes.
        offset: in steps; 0 for a healthy weight.
        off_fraction: share of values that rounding does not explain.
        left_fraction: share of values that the line does not explain.
        clipped_fraction: share of codes at the ends of their type.
        correlation: of the float values with the stored ones; nan where one is constant.
        distance: root mean square of u - x / scale, all groups together, in steps.
        channels: the groups are the channels.
    """

    gain: NDArray[np.float64]
    gain_error: NDArray[np.float64]
    offset: NDArray[np.float64]
    off_fraction: NDArray[np.float64]
    left_fraction: NDArray[np.float64]
    clipped_fraction: NDArray[np.float64]
    correlation: NDArray[np.float64]
    distance: float
    channels: bool

    @property
    def explained(self) -> NDArray[np.bool_]:
        """Groups that rounding does not explain and the line does."""
        return np.asarray(
            (self.off_fraction > _OFF_FRACTION)
            & (self.left_fraction < _LEFT_FRACTION)
            & (self.clipped_fraction < _CLIPPED_FRACTION)
        )

    @property
    def gained(self) -> NDArray[np.bool_]:
        """Groups whose gain is not 1."""
        room = np.maximum(_GAIN_LOOK, 6 * self.gain_error)
        return np.asarray(self.explained & (self.gain != 0) & (np.abs(self.gain - 1) > room))

    @property
    def shifted(self) -> NDArray[np.bool_]:
        """Groups whose values share an offset of whole steps."""
        whole = np.abs(self.offset - np.rint(self.offset)) < 0.25
        return np.asarray(self.explained & (np.abs(self.offset) > 0.9) & whole)

    def evidence(self, where: NDArray[np.intp]) -> dict[str, Any]:
        """How many groups are meant, and what rounding and what the line leaves of them."""
        return {
            "groups_off": int(where.size),
            "groups": int(self.gain.size),
            "off_fraction": float(self.off_fraction[where].mean()),
            "left_fraction": float(self.left_fraction[where].max()),
        }

    def part(self, name: str, where: NDArray[np.intp]) -> str:
        """A weight's name with the channels that are meant."""
        return f"{name} (channels {listed((str(c) for c in where), 4)} of {self.gain.size})"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    """A constant of the float model beside one of the quantized model, without their values.

    Attributes:
        name, node, op_type, kind, quantized_name, scope: as in `WeightPair`.
        size: number of elements.
        qparams: None where it was left in float.
        low, high: range of the float values per scale, shape () or (channels,); nan in blocks.
        fit: None where rounding explains every value, there is none, or a scale is no number.
        correlation: of the float values with stored ones, where it was left in float; else 1.
        same: stored values are the float ones but for their rounding.
    """

    name: str
    node: str
    op_type: str
    kind: str
    quantized_name: str
    scope: str
    size: int
    qparams: QParams | None
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    fit: _Fit | None
    correlation: float
    same: bool

    @property
    def foreign(self) -> bool:
        """The quantized file holds other content in its place."""
        if self.size < _TELLING or self.same:
            return False
        if self.qparams is None:
            return self.correlation < 0.9
        if self.fit is None:
            return False
        known = self.fit.correlation[np.isfinite(self.fit.correlation)]
        return self.fit.distance > 1.5 and bool(known.size) and abs(float(np.median(known))) < 0.9


def _pairs(case: Case) -> Iterator[WeightPair]:
    for pair in case.matching.weights:
        yield pair
        yield from pair.copies


def _values(case: Case, pair: WeightPair) -> NDArray[np.float64] | None:
    """What the quantized model holds in a weight's place; None where it cannot be read."""
    if pair.quantized is not None:
        return stored_values(case.quantized_model, pair.quantized)
    graphs = (b for b in case.quantized_model.bodies if b.path == pair.scope)
    graph = next(graphs, None) if pair.scope else case.quantized_model
    value = None if graph is None else constant_value(graph, pair.quantized_name)
    return None if value is None else np.asarray(value, np.float64)


def _in_steps(qparams: QParams, values: NDArray[np.float64], channels: bool) -> NDArray[np.float64]:
    """Values divided by their scale, [groups, values per group]."""
    view, scale, _ = qparams.aligned(values)
    steps = (view / scale).reshape(values.shape)
    return _grouped(qparams, steps, channels)


def _grouped(qparams: QParams, values: NDArray[Any], channels: bool) -> NDArray[Any]:
    if not channels or qparams.axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, qparams.axis, 0).reshape(values.shape[qparams.axis], -1)


def _rounded(qparams: QParams, reference: NDArray[np.float64], actual: NDArray[np.float64]) -> bool:
    """Rounding explains nearly all values of every scale; cheap in time and memory.

    Raises:
        ValueError: the parameters do not fit the shape.
    """
    far = np.abs(reference - actual)
    view, scale, _ = qparams.aligned(far)
    view /= np.abs(scale)
    off = far > _ROUNDED_STEPS
    channels = not qparams.per_tensor and qparams.block_size is None
    return bool((_grouped(qparams, off, channels).mean(axis=1) <= _OFF_FRACTION).all())


def _fit(qparams: QParams, reference: NDArray[np.float64], actual: NDArray[np.float64]) -> _Fit:
    by_channel = not qparams.per_tensor and qparams.block_size is None
    channels = bool(by_channel and reference.size >= _ENOUGH * qparams.scale.size)
    x = _in_steps(qparams, reference, channels)
    u = _in_steps(qparams, actual, channels)
    _, _, zero_point = qparams.aligned(reference)
    zero = np.broadcast_to(zero_point, qparams.aligned(reference)[0].shape).reshape(reference.shape)
    codes = u + _grouped(qparams, zero, channels)
    # Of very large tensors every n-th value tells enough.
    every = max(1, x.size // _MOST)
    x, u, codes = x[:, ::every], u[:, ::every], codes[:, ::every]
    low, high = code_range(qparams.dtype)
    # Symmetric types leave out their lowest code.
    ends = (codes <= low + (qparams.dtype.startswith("int"))) | (codes >= high)
    count = x.shape[1]
    mean_x, mean_u = x.mean(axis=1), u.mean(axis=1)
    dx, du = x - mean_x[:, None], u - mean_u[:, None]
    var_x, var_u = (dx * dx).mean(axis=1), (du * du).mean(axis=1)
    cov = (dx * du).mean(axis=1)
    safe = np.where(var_x > 0, var_x, 1.0)
    gain = cov / safe
    offset = mean_u - gain * mean_x
    error = np.sqrt(1 / 12 / (count * safe))
    # Values that hardly differ tell a factor from an offset only by what a zero point may be. With
    # a deviation of 0.7 steps what rounding adds is independent of them (Widrow's theorem).
    alike = var_x * gain * gain < 0.5
    if alike.any():
        signed = qparams.dtype.startswith("int")
        near = np.where(np.abs(mean_x) > 1, mean_x, 1.0)
        gain = np.where(alike, mean_u / near if signed else 1.0, gain)
        gain = np.where(alike & (np.abs(mean_x) <= 1), 1.0, gain)
        offset = np.where(alike, 0.0 if signed else mean_u - mean_x, offset)
        error = np.where(alike, 0.5 / np.abs(near), error)
    room = _RELATIVE_ROOM * np.abs(x)
    far = np.abs(u - x)
    off = (far > _ROUNDED_STEPS + room) & ~(ends & (np.abs(x) > np.abs(u)))
    left = np.abs(u - gain[:, None] * x - offset[:, None]) > _EXPLAINED_STEPS + room
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = cov / np.sqrt(var_x * var_u)
    return _Fit(
        gain=gain,
        gain_error=error,
        offset=offset,
        off_fraction=off.mean(axis=1),
        left_fraction=(left & ~ends).mean(axis=1),
        clipped_fraction=ends.mean(axis=1),
        correlation=correlation,
        distance=float(np.sqrt(np.square(far).mean())),
        channels=channels,
    )


def _ends(
    qparams: QParams | None, reference: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lowest and the highest float value per scale."""
    if qparams is None or qparams.block_size is not None or not reference.size:
        return np.array(np.nan), np.array(np.nan)
    if qparams.per_tensor or qparams.axis is None:
        found = reference.min(), reference.max()
    else:
        others = tuple(a for a in range(reference.ndim) if a != qparams.axis)
        found = reference.min(axis=others), reference.max(axis=others)
    return np.asarray(found[0], np.float64), np.asarray(found[1], np.float64)


def _looked_at(case: Case, pair: WeightPair, record: WeightError | None) -> _Weight | None:
    """One weight; None where its values cannot be read or have another shape."""
    reference = pair.reference()
    qparams = pair.quantized.qparams if pair.quantized is not None else None
    low, high = _ends(qparams, reference)
    fit, same, correlation = None, False, 1.0
    sound = qparams is None or (
        bool(np.all(np.isfinite(qparams.scale)) and np.all(qparams.scale != 0))
        and qparams.dtype not in FLOAT_CODES
    )
    rounded = (
        record is not None
        and qparams is not None
        and qparams.per_tensor
        and record.max_abs_error <= _ROUNDED_STEPS * abs(float(qparams.scale.reshape(-1)[0]))
    )
    if rounded or not sound or not reference.size:
        same = rounded
    else:
        actual = _values(case, pair)
        if actual is None or actual.shape != reference.shape:
            return None
        reference = np.asarray(reference, np.float64)
        if not (np.isfinite(reference).all() and np.isfinite(actual).all()):
            same = True  # nothing to say about its content
        elif qparams is None:
            noise = float(np.square(reference - actual).sum())
            same = noise <= 1e-4 * float(np.square(reference).sum())
            correlation = _correlation(reference, actual)
        else:
            try:
                same = _rounded(qparams, reference, actual)
                fit = None if same else _fit(qparams, reference, actual)
            except ValueError:  # parameters that do not fit the float layout
                return None
            same = fit is None or bool((fit.off_fraction <= _OFF_FRACTION).all())
    return _Weight(
        name=pair.name, node=pair.node.name, op_type=pair.node.op_type, kind=pair.kind,
        quantized_name=pair.quantized_name, scope=pair.scope, size=int(reference.size),
        qparams=qparams, low=low, high=high, fit=None if same else fit,
        correlation=correlation, same=same,
    )  # fmt: skip


_Known = tuple[ReferenceType[Model], tuple[Any, ...], tuple[_Weight | None, ...]]
# Several rules ask for the same figures. Holds no model, so that a model's lifetime decides.
_KNOWN: WeakKeyDictionary[Model, _Known] = WeakKeyDictionary()


def _weights(case: Case) -> tuple[_Weight | None, ...]:
    """What `_pairs` gives, looked at; in the same order."""
    pairs = tuple(_pairs(case))
    key = tuple((p.name, p.quantized_name, p.scope, p.node.name, p.note) for p in pairs)
    known = _KNOWN.get(case.quantized_model)
    if known is not None and known[0]() is case.float_model and known[1] == key:
        return known[2]
    records = {(w.name, w.scope, w.quantized_name, w.node): w for w in case.comparison.weights}
    found = tuple(
        _looked_at(case, p, records.get((p.name, p.scope, p.quantized_name, p.node.name)))
        for p in pairs
    )
    _KNOWN[case.quantized_model] = (ref(case.float_model), key, found)
    return found


def _known_weights(case: Case) -> Iterator[_Weight]:
    return (w for w in _weights(case) if w is not None)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _excluding(*nodes: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for n in nodes if n))


def _config(case: Case) -> QuantConfig | None:
    """The recipe asked for, else the one that the file tells; None where it tells none."""
    try:
        if case.recipe is not None:
            return QuantConfig.from_json(case.recipe)
        return read_recipe(case.quantized_model, case.float_model).config
    except QuantizationError:
        return None


def _float_names(case: Case) -> dict[str, tuple[str, str]]:
    """Float tensor and its node by each name that the quantized model has for it."""
    found: dict[str, tuple[str, str]] = {}
    for pair in case.matching.activations:
        names = (pair.name, pair.node.name if pair.node is not None else "")
        for name in (pair.after, pair.before):
            if name:
                found[name] = names
    for own in _pairs(case):
        if own.quantized is not None and not own.scope:
            for name in (own.quantized.quantized, own.quantized.after, own.quantized.before):
                if name:
                    found.setdefault(name, (own.name, own.node.name))
    return found


def _names_of(tensor: QuantizedTensor, names: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Float tensor and node of a quantized tensor; its own name where it has no float twin."""
    for name in (tensor.after, tensor.before, tensor.quantized):
        if name and name in names:
            return names[name]
    return tensor.before or tensor.name, ""


def _midway(dtype: str) -> int:
    return 0 if dtype.startswith("int") else (INTEGER_DTYPES[dtype][1] + 1) // 2


def _scalar(value: float | int | tuple[float, ...] | tuple[int, ...] | None) -> float | None:
    """A record's scale or zero point where it is one for the tensor."""
    return None if value is None or isinstance(value, tuple) else float(value)


def _override(tensor: str, low: float, high: float) -> tuple[Mapping[str, Any], ...]:
    low, high = min(low, 0.0), max(high, 0.0)
    try:
        return (TensorOverride(tensor=tensor, low=low, high=high).to_json(),)
    except ValueError:  # beyond float32
        return ()


# -- Q and DQ ------------------------------------------------------------------------------------


def qdq_pair_differs(case: Case) -> Iterator[Finding]:
    """What is quantized with one scale or zero point and read with another.

    A problem in any case: no float model is needed to tell. One finding per tensor.
    """
    names = _float_names(case)
    seen: set[str] = set()
    for tensor in case.matching.scheme.tensors:
        own = tensor.q_qparams
        if own is None:
            continue
        name, node = _names_of(tensor, names)
        if name in seen:
            continue
        seen.add(name)
        yield _differing(name, node, own, tensor.qparams, "QuantizeLinear", "DequantizeLinear")
    for tensor_name, made, read, maker, reader in _operator_differences(case.quantized_model):
        name, node = names.get(tensor_name, (tensor_name, ""))
        if name not in seen:
            seen.add(name)
            yield _differing(name, node, made, read, maker, reader)


def _differing(
    name: str, node: str, made: QParams, read: QParams, maker: str, reader: str
) -> Finding:
    whole = made.per_tensor and read.per_tensor
    parts: list[str] = []
    evidence: dict[str, Any] = {}
    if made.scale.shape != read.scale.shape:
        parts.append(f"{made.scale.size} scales against {read.scale.size}")
        evidence |= {"q_scales": made.scale.size, "dq_scales": read.scale.size}
    else:
        for what, first, second in (
            ("scale", made.scale, read.scale),
            ("zero point", made.zero_point, read.zero_point),
        ):
            # Both nan is no difference.
            differs = ~((first == second) | ((first != first) & (second != second)))
            if not differs.any():
                continue
            at = int(np.argmax(differs.reshape(-1)))
            a, b = (float(v.reshape(-1)[at]) for v in (first, second))
            where = "" if whole else f" in channel {at}"
            times = f" ({_number(b / a)} times)" if what == "scale" and a else ""
            parts.append(f"{what} {_number(a)} against {_number(b)}{times}{where}")
            key = what.replace(" ", "_")
            evidence |= {f"q_{key}": a, f"dq_{key}": b}
            if not whole:
                evidence["channel"] = at
    what = " and ".join(parts) or "other parameters"
    return Finding(
        code="qdq-pair-differs",
        severity=PROBLEM,
        node=node,
        tensor=name,
        sentence=f"{name} is quantized with one set of parameters and read with another: {what} "
        f"({maker} against {reader}); expected the same.",
        evidence=evidence,
        remedy=Remedy(
            say=f"Re-quantize the float model, or write the scale and zero point of {maker} into "
            f"{reader}, too.",
            exclude=_excluding(node),
        ),
    )


def _operator_differences(
    model: Model,
) -> Iterator[tuple[str, QParams, QParams, str, str]]:
    """Tensors between integer operators that are written and read with other parameters."""
    written: dict[str, tuple[QParams, str]] = {}

    def parameters(scale_name: str, zero_name: str) -> QParams | None:
        scale = constant_value(model, scale_name) if scale_name else None
        zero = constant_value(model, zero_name) if zero_name else np.array(0, np.uint8)
        if scale is None or zero is None or scale.size != 1 or zero.size != 1:
            return None
        return QParams(
            scale=np.asarray(scale, np.float64).reshape(()),
            zero_point=np.asarray(zero, np.int64).reshape(()),
            dtype=zero.dtype.name,
        )

    def given(node: Node, position: int) -> str:
        return node.inputs[position] if position < len(node.inputs) else ""

    for node in model.nodes:
        reads: list[tuple[str, str, str]] = []
        output: tuple[str, str] | None = None
        if node.op_type == QCONCAT:
            output = (given(node, 0), given(node, 1))
            reads = [
                (given(node, at), given(node, at + 1), given(node, at + 2))
                for at in range(2, len(node.inputs) - 2, 3)
            ]
        elif (operator := QOPERATORS.get(node.op_type)) is not None:
            reads = [(given(node, a), given(node, b), given(node, c))
                     for a, b, c, _ in operator.tensors]  # fmt: skip
            if operator.output is not None:
                output = (given(node, operator.output[0]), given(node, operator.output[1]))
        elif node.op_type == "QuantizeLinear":
            output = (given(node, 1), given(node, 2))
        elif node.op_type == "DequantizeLinear" and node.inputs[0] in written:
            if written[node.inputs[0]][1] == "QuantizeLinear":
                continue  # read from the pair already
            reads = [(given(node, 0), given(node, 1), given(node, 2))]
        for tensor, scale, zero in reads:
            known = written.get(tensor)
            own = parameters(scale, zero) if known is not None else None
            if known is None or own is None:
                continue
            if own.scale != known[0].scale or own.zero_point != known[0].zero_point:
                yield tensor, known[0], own, known[1], node.op_type
        if output is not None and output[0] and node.outputs:
            made = parameters(*output)
            if made is not None:
                written[node.outputs[0]] = (made, node.op_type)


# -- weights against the float model -------------------------------------------------------------


def _next_compared(case: Case, weight: _Weight) -> ActivationError | None:
    """The first compared tensor at or behind a weight's node."""
    records = {a.name: a for a in case.comparison.activations}
    node = case.float_model.node_by_name.get(weight.node)
    front = [o for o in node.outputs if o] if node is not None else []
    seen: set[str] = set()
    for _ in range(_CHAIN):
        known = next((records[name] for name in front if name in records), None)
        if known is not None:
            return known
        seen.update(front)
        behind = (c for n in front for c in case.float_model.consumers.get(n, ()))
        front = [o for c in behind for o in c.outputs if o and o not in seen]
        front = list(dict.fromkeys(front))
    return None


def _made_up_for(case: Case, weight: _Weight, gain: float, channel: int | None) -> bool:
    """What is computed with a weight is better than its factor allows: the factor belongs there.

    Args:
        case: gives the figures.
        weight: the weight. A bias has no factor of its own that something could make up for.
        gain: its factor.
        channel: the output channel that has it; None for all.
    """
    record = _next_compared(case, weight)
    if record is None or case.comparison.random_feeds or weight.kind == "bias":
        return False
    channels = record.channel_sqnr_db
    groups = weight.fit.gain.size if weight.fit is not None else 0
    measured = [record.accumulated_sqnr_db]
    if channel is not None and len(channels) == groups:
        measured = [channels[channel]]
    elif channels:
        measured.append(record.median_channel_sqnr_db)
    return min(measured) > -20 * math.log10(abs(gain - 1)) + 10


def weight_gain(case: Case) -> Iterator[Finding]:
    """Weights and biases that are the float ones times a factor, and rounding.

    Only where rounding does not explain the stored values and the factor explains them all. A
    problem where the factor is the tensor's, or that of up to a quarter of its channels, at least
    5 % off, and not made up for by what follows (folded, equalized).
    """
    gained: dict[tuple[str, str], float] = {}
    for weight in sorted(_known_weights(case), key=lambda w: w.kind != "weight"):
        fit = weight.fit
        if fit is None or weight.qparams is None or not fit.gained.any() or weight.foreign:
            continue
        where = np.flatnonzero(fit.gained)
        gains = fit.gain[where]
        typical = float(np.median(gains))
        alike = bool(np.all(np.abs(gains / typical - 1) < 0.02))
        whole = not fit.channels or (alike and where.size > fit.gain.size / 2)
        worst = int(where[np.argmax(np.abs(gains - 1))])
        gain = typical if whole else float(fit.gain[worst])
        if weight.kind == "bias" and abs(gained.get((weight.node, weight.scope), 0) - gain) < (
            0.02 * abs(gain)
        ):
            continue  # in integer operators a bias has the weight's scale
        if weight.kind == "weight":
            gained[weight.node, weight.scope] = gain
        folded = _made_up_for(case, weight, gain, None if whole else worst)
        sure = abs(gain - 1) > _GAIN_PROBLEM and not folded
        sure = sure and (whole or where.size <= fit.gain.size / 4)
        scale = float(weight.qparams.scale.reshape(-1)[0 if not fit.channels else worst])
        part = weight.name if whole else fit.part(weight.name, where)
        why = (
            "what is computed with it is right, so a factor was folded into it"
            if folded
            else "expected 1: its scale is wrong"
        )
        yield Finding(
            code="weight-gain",
            severity=PROBLEM if sure else NOTE if folded else LOOK,
            node=weight.node,
            tensor=weight.name,
            sentence=f"{part} holds {_number(gain)} times the float values, and nothing but "
            f"rounding beside that ({weight.node} reads it with scale {_number(scale)}); {why}.",
            evidence={
                "gain": gain,
                "scale_in_file": scale,
                "scale_expected": scale / gain,
                **fit.evidence(where),
            },
            remedy=Remedy(
                say=f"Divide the scale of {weight.quantized_name} by {_number(gain)}, or "
                f"re-quantize {weight.node} from the float model.",
                exclude=_excluding(weight.node),
            )
            if not folded
            else Remedy(say="Compare with the float model after the same folding."),
        )


def weight_offset(case: Case) -> Iterator[Finding]:
    """Weights and biases that lie whole steps beside the float ones: a wrong zero point.

    A problem: only where rounding does not explain the stored values and the offset explains them
    all. One finding per tensor; it names the worst channel.
    """
    for weight in _known_weights(case):
        fit = weight.fit
        if fit is None or weight.qparams is None or weight.foreign:
            continue
        shifted = fit.shifted
        if weight.qparams.dtype == "int32":
            # Codes are large, and so is what float32 leaves of them.
            scale = float(weight.qparams.scale.reshape(-1)[0])
            shifted = shifted & (np.abs(fit.offset) * scale > 1e-4 * _absmax(weight))
        if not shifted.any():
            continue
        where = np.flatnonzero(shifted)
        worst = int(where[np.argmax(np.abs(fit.offset[where]))])
        steps = round(float(fit.offset[worst]))
        zero = weight.qparams.zero_point.reshape(-1)
        found = int(zero[worst if fit.channels and zero.size > 1 else 0])
        part = fit.part(weight.name, where) if fit.channels else weight.name
        yield Finding(
            code="weight-offset",
            severity=PROBLEM,
            node=weight.node,
            tensor=weight.name,
            sentence=f"{part} lies {steps:+d} steps beside the float values, and nothing but "
            f"rounding beside that: {weight.node} reads it with zero point {found}, expected "
            f"{found + steps}.",
            evidence={
                "offset_steps": steps,
                "zero_point_in_file": found,
                "zero_point_expected": found + steps,
                **fit.evidence(where),
            },
            remedy=Remedy(
                say=f"Set the zero point of {weight.quantized_name} to {found + steps}, or "
                f"re-quantize {weight.node} from the float model.",
                exclude=_excluding(weight.node),
            ),
        )


def _absmax(weight: _Weight) -> float:
    return float(np.maximum(np.abs(weight.low), np.abs(weight.high)).max(initial=0.0))


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a.reshape(-1) - a.mean(), b.reshape(-1) - b.mean()
    power = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / math.sqrt(power)) if power > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exchanged:
    """A weight that holds the content of another one.

    Attributes:
        pair: the weight.
        other: the pair of the float weight whose content it holds.
        own, found: correlation with its own and with the other's float values.
        read_by_other: the node that reads it has the other's name, so that not the weights were
            swapped but their nodes were taken for each other.
        named_as_other: it is stored under the other's name.
    """

    pair: WeightPair
    other: WeightPair
    own: float
    found: float
    read_by_other: bool
    named_as_other: bool


def _exchanged(case: Case) -> Iterator[_Exchanged]:
    pairs = tuple(_pairs(case))
    for pair, weight in zip(pairs, _weights(case), strict=True):
        if weight is None or not weight.foreign:
            continue
        actual = _values(case, pair)
        if actual is None:
            continue
        best, twin = 0.0, None
        for other in pairs:
            if other.name == pair.name or _elements(case.float_model, other.name) != actual.size:
                continue
            values = other.reference()
            if values.shape != actual.shape:
                continue
            found = _correlation(values.astype(np.float64), actual)
            if found > best:
                best, twin = found, other
        if twin is None or best < _SAME:
            continue
        stored = pair.quantized
        readers = stored.consumers if stored is not None else ()
        yield _Exchanged(
            pair=pair,
            other=twin,
            own=_correlation(pair.reference().astype(np.float64), actual),
            found=best,
            read_by_other=twin.node.name in readers and pair.node.name not in readers,
            named_as_other=twin.name in base_names(pair.quantized_name),
        )


def weights_swapped(case: Case) -> Iterator[Finding]:
    """Weights whose content is that of another weight of the float model.

    The content correlates above 0.95 with another float weight of the same shape and below 0.9
    with its own. A problem, a look where every output has 20 dB and more all the same, a note
    where names say that only the pairs are wrong. One finding per weight.
    """
    harmless = bool(case.comparison.outputs) and all(
        judged_db(o) >= LOOK_DB for o in case.comparison.outputs
    )
    for found in _exchanged(case):
        pair, other = found.pair, found.other
        mispaired = found.read_by_other or (harmless and found.named_as_other)
        holds = (
            f"{pair.quantized_name}, which holds the values of {other.name} (correlation "
            f"{found.found:.3f}) and not those of {pair.name} ({found.own:.3f})"
        )
        yield Finding(
            code="weights-swapped",
            severity=NOTE if mispaired else LOOK if harmless else PROBLEM,
            node=pair.node.name,
            tensor=pair.name,
            sentence=f"{pair.name} is compared with {holds}: two nodes were taken for each other, "
            "the file is not wrong."
            if mispaired
            else f"{pair.node.name} reads {holds}: two weights were swapped.",
            evidence={
                "correlation_with_own": found.own,
                "correlation_with_other": found.found,
                "other_tensor": other.name,
                "other_node": other.node.name,
            },
            remedy=Remedy(say=f"Pin {other.name} to {pair.quantized_name} and compare again.")
            if mispaired
            else Remedy(
                say=f"Swap the stored weights of {pair.node.name} and {other.node.name} back, or "
                "re-quantize the float model.",
                exclude=_excluding(pair.node.name, other.node.name),
            ),
        )


def not_the_same_model(case: Case) -> Iterator[Finding]:
    """That the quantized file was not made from this float model.

    A problem where over half of the weights hold other content, or over half of them have no
    partner; a look where over half lie steps beside the float ones, as after further training.
    Distances are in steps of each weight's scale, so that coarse types are not taken for others.
    """
    weights = [w for w in _known_weights(case) if w.kind == "weight" and w.size >= _TELLING]
    foreign = [w for w in weights if w.foreign]
    if foreign:
        explained = {e.pair.name for e in _exchanged(case)}
        explained.update(f.tensor for f in block_axis(case))
        foreign = [w for w in foreign if w.name not in explained]
    records = {w.name: w for w in case.comparison.weights}
    lone = [
        u.name
        for u in case.comparison.unmatched
        if u.model == "float"
        and u.kind == "weight"
        and not u.fused_into
        and _elements(case.float_model, u.name) >= _TELLING
    ]
    total = len(weights) + len(lone)
    if not total:
        return
    matched_share = len(weights) / total
    sqnr = [records[w.name].sqnr_db for w in weights if w.name in records]
    median = float(np.median([v for v in sqnr if not math.isnan(v)] or [math.nan]))
    trained = [
        w
        for w in weights
        if w.fit is not None
        and not w.foreign
        and w.fit.distance > 1.5
        and bool(np.all(w.fit.off_fraction > 0.2))
        and not w.fit.explained.any()
        and bool(np.all(w.fit.clipped_fraction < _CLIPPED_FRACTION))
    ]
    worst = min(
        foreign or trained or weights,
        key=lambda w: records[w.name].sqnr_db if w.name in records else math.inf,
        default=None,
    )
    evidence = {
        "weights": total,
        "weights_with_other_content": len(foreign),
        "weights_without_partner": len(lone),
        "median_weight_sqnr_db": median,
    }
    if len(foreign) * 2 > len(weights) or matched_share < 0.5:
        what = (
            f"{len(foreign)} of {len(weights)} matched weights hold other values than the float "
            f"model's (median SQNR {median:.1f} dB)"
            if len(foreign) * 2 > len(weights)
            else f"only {len(weights)} of {total} weights have a partner"
        )
        yield Finding(
            code="not-the-same-model",
            severity=PROBLEM,
            node="",
            tensor=worst.name if worst is not None else lone[0],
            sentence=f"{case.quantized_model.name} was not made from {case.float_model.name}: "
            f"{what}.",
            evidence=evidence,
            remedy=Remedy(say="Load the float model that this quantized model was made from."),
        )
    elif len(trained) * 2 > len(weights) and worst is not None and worst.fit is not None:
        yield Finding(
            code="not-the-same-model",
            severity=LOOK,
            node="",
            tensor=worst.name,
            sentence=f"{len(trained)} of {len(weights)} weights lie more than rounding beside the "
            f"float model's ({worst.name}: {_number(worst.fit.distance)} steps, expected 0.3): "
            "trained further after this float model was saved, or rounded by another method.",
            evidence=evidence | {"distance_steps": worst.fit.distance},
            remedy=Remedy(
                say="Compare with the float model of the training step that was quantized."
            ),
        )


def _elements(model: Model, tensor: str) -> int:
    shape = model.info(tensor).shape
    return math.prod(d for d in shape if isinstance(d, int)) if shape is not None else 0


def block_axis(case: Case) -> Iterator[Finding]:
    """Scales that fit the weight along another axis, per channel or in blocks.

    A problem: read along the other axis the weight is at least 10 dB better, and rounding explains
    nearly all of it.
    """
    pairs = tuple(_pairs(case))
    for pair, weight in zip(pairs, _weights(case), strict=True):
        if weight is None or weight.fit is None or weight.qparams is None:
            continue
        qparams = weight.qparams
        if qparams.per_tensor or qparams.axis is None:
            continue
        reference = pair.reference().astype(np.float64)
        actual = _values(case, pair)
        if actual is None or actual.shape != reference.shape:
            continue
        view, scale, zero = qparams.aligned(actual)
        codes = np.rint(view / scale + zero).reshape(actual.shape)
        own = _sqnr_db(reference, actual)
        best, found = own, None
        for other in _turned(qparams, actual.shape):
            try:
                turned = _sqnr_db(reference, other.dequantize(codes))
            except ValueError:
                continue
            if turned > best:
                best, found = turned, other
        if found is None or best < own + 10:
            continue
        fit = _fit(found, reference, found.dequantize(codes))
        if not bool(np.all(fit.off_fraction < 0.05)):
            continue
        what = "blocks of scales" if qparams.block_size else "scales"
        yield Finding(
            code="block-axis",
            severity=PROBLEM,
            node=weight.node,
            tensor=weight.name,
            sentence=f"The {what} of {weight.name} lie along axis {qparams.axis} in the file and "
            f"fit axis {found.axis}: {own:.1f} dB as {weight.node} reads it, {best:.1f} dB along "
            "the other axis.",
            evidence={
                "axis_in_file": qparams.axis,
                "axis_expected": found.axis,
                "sqnr_db": own,
                "sqnr_on_expected_axis_db": best,
            },
            remedy=Remedy(
                say=f"Set the axis of {weight.quantized_name} to {found.axis}, or re-quantize "
                f"{weight.node} from the float model.",
                exclude=_excluding(weight.node),
            ),
        )


def _turned(qparams: QParams, shape: tuple[int, ...]) -> Iterator[QParams]:
    """The same scales along other axes, wherever their number allows it."""
    if qparams.block_size is None:
        for axis, size in enumerate(shape):
            if axis != qparams.axis and size == qparams.scale.size:
                yield QParams(
                    scale=qparams.scale, zero_point=qparams.zero_point, dtype=qparams.dtype,
                    axis=axis, saturate=qparams.saturate,
                )  # fmt: skip
        return
    if len(shape) != 2 or qparams.axis is None:
        return
    axis, block = 1 - qparams.axis, qparams.block_size
    wanted = list(shape)
    wanted[axis] = -(-shape[axis] // block)
    if math.prod(wanted) != qparams.scale.size:
        return
    for turn in (False, True):
        scale, zero = (v.T if turn else v for v in (qparams.scale, qparams.zero_point))
        yield QParams(
            scale=scale.reshape(wanted), zero_point=zero.reshape(wanted), dtype=qparams.dtype,
            axis=axis, block_size=block, saturate=qparams.saturate,
        )  # fmt: skip


def _sqnr_db(reference: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    signal = float(np.square(reference).sum())
    noise = float(np.square(reference - actual).sum())
    if not signal or not noise:
        return math.inf if not noise else -math.inf
    return 10 * math.log10(signal / noise)


def _asked_scales(weight: _Weight, reduced: bool) -> NDArray[np.float64] | None:
    """The scales that ONNX Runtime computes for a weight's values, [scales]; its own where all 0.

    Of the same type, symmetry and granularity; the next power of two where all its scales are
    such. None for a bias, for blocks and where the float values say nothing.
    """
    qparams = weight.qparams
    if weight.kind != "weight" or qparams is None or qparams.block_size is not None:
        return None
    if qparams.dtype not in INTEGER_DTYPES or qparams.dtype == "int32":
        return None
    scale = qparams.scale.reshape(-1)
    low, high = weight.low.reshape(-1), weight.high.reshape(-1)
    if low.size != scale.size or not (np.isfinite(low).all() and np.isfinite(high).all()):
        return None
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return None
    middle = bool(np.all(qparams.zero_point == _midway(qparams.dtype)))
    asked = np.array(
        [
            float(
                qparams_from_range(
                    min(a, 0.0), max(b, 0.0), dtype=qparams.dtype, symmetric=middle,
                    reduce_range=reduced,
                ).scale
            )
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
    )  # fmt: skip
    powers = np.log2(scale)
    if np.all(powers == np.rint(powers)):
        asked = 2 ** np.ceil(np.log2(asked))
    return np.where(np.maximum(np.abs(low), np.abs(high)) > 1e-30, asked, scale)


# -- scales of activations -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _BiasLink:
    """A node whose bias was quantized with the product of two scales.

    Attributes:
        activation: float tensor that the node reads.
        reader: the float node, or the quantized model's where it has no twin.
        weight, bias: names of the quantized model's tensors.
        ratio: scale of the input times that of the weight, by that of the bias; 1 where they agree.
    """

    activation: str
    reader: str
    weight: str
    bias: str
    ratio: float

    @property
    def agrees(self) -> bool:
        return abs(self.ratio - 1) < 1e-3


def _bias_links(case: Case) -> list[_BiasLink]:
    """Every node of a QDQ file with an int32 bias: its scale is a record of the two others.

    ONNX Runtime's fused kernels read the bias with that product, whatever its own scale says.
    """
    model = case.quantized_model
    tensors = {t.after: t for t in case.matching.scheme.tensors if t.after and not t.scope}
    names = _float_names(case)
    back = {its: mine for mine, its in case.matching.node_pairs.items()}
    found = []
    for node in model.nodes:
        if node.op_type not in _BIASED or len(node.inputs) < 3:
            continue
        x, w, b = (tensors.get(name) for name in node.inputs[:3])
        if x is None or w is None or b is None or b.qparams.dtype != "int32":
            continue
        if x.kind != "activation" or not x.qparams.per_tensor:
            continue
        step = b.qparams.scale.reshape(-1)
        product = (x.qparams.scale * w.qparams.scale).reshape(-1)
        if product.size != step.size and 1 not in (product.size, step.size):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = product / step
        if not ratios.size or not np.isfinite(ratios).all() or (ratios <= 0).any():
            continue
        found.append(
            _BiasLink(
                activation=_names_of(x, names)[0],
                reader=back.get(node.name, node.name),
                weight=w.quantized,
                bias=b.quantized,
                ratio=float(np.median(ratios)),
            )
        )
    return found


def _nearer(ratio: float, factor: float) -> bool:
    """A ratio of scales speaks for one that is off by `factor`, not for a right one."""
    return abs(math.log(ratio / factor)) < abs(math.log(ratio))


def _against_biases(case: Case) -> dict[str, tuple[float, str]]:
    """By float tensor the factor of its scale that biases tell, and a node with such a bias.

    Only where biases agree elsewhere in the file, and neither the weight nor the bias is off by
    that factor itself.
    """
    links = _bias_links(case)
    if sum(link.agrees for link in links) * 2 < len(links):
        return {}  # whoever wrote it has another rule for biases
    config = _config(case)
    reduced = config.reduce_range if config is not None else False
    gains: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for weight in _known_weights(case):
        if weight.fit is not None and weight.fit.gained.any():
            gains[weight.quantized_name] = float(np.median(weight.fit.gain[weight.fit.gained]))
        asked = _asked_scales(weight, reduced)
        if asked is not None and weight.qparams is not None and asked.size:
            own = weight.qparams.scale.reshape(-1) / asked
            gain = gains.get(weight.quantized_name, 1.0)
            ratios[weight.quantized_name] = float(np.median(own)) / gain
    found: dict[str, tuple[float, str]] = {}
    sound = {link.activation for link in links if link.agrees}
    for link in links:
        rest = link.ratio / gains.get(link.weight, 1.0) * gains.get(link.bias, 1.0)
        if link.agrees or abs(rest - 1) < 0.02 or link.activation in sound:
            continue
        if _nearer(ratios.get(link.weight, 1.0), rest):
            continue  # the weight was quantized again, its bias was not
        found.setdefault(link.activation, (rest, link.reader))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """A quantized activation against what was observed.

    Attributes:
        record: its figures.
        members: all tensors that share the scale, this one first.
        scale, zero_point: in the file.
        low, high: observed, of all tensors that share the scale, 0 included.
        expected: parameters for that range, symmetric where the file's are.
        plain: parameters for that range, not symmetric.
    """

    record: ActivationError
    members: tuple[str, ...]
    scale: float
    zero_point: int
    low: float
    high: float
    expected: QParams
    plain: QParams

    @property
    def ratio(self) -> float:
        return self.scale / float(self.expected.scale)

    @property
    def shift_steps(self) -> int:
        """How far the zero point lies from the one that goes with this scale, where it does."""
        return self.zero_point - int(self.plain.zero_point)

    def misplaced(self, *, asymmetric: bool, exact: bool) -> bool:
        """The scale is that of the observed range, the zero point is not, and values are lost.

        Args:
            asymmetric: most other zero points of the file are not in the middle. Where they are, a
                range that grew to twice the calibrated one has this scale, too.
            exact: nearly all scales of the file are those of the observed ranges.
        """
        low, high = code_range(self.record.dtype)
        shift = abs(self.shift_steps) / (high - low)
        off = abs(self.scale / float(self.plain.scale) - 1)
        lost = self.record.saturated_fraction
        if lost == 0:
            return False
        if off < 0.1 and shift > 1 / 4 and (asymmetric or lost is None or lost > 0.01):
            return True
        # Ranges of other samples are rarely as wide and moved, least of all just onto 0.
        return asymmetric and off < 0.02 and shift > 1 / 16 and (exact or self.zero_point == 0)


def _sources(
    model: Model, tensor: str, records: Mapping[str, ActivationError]
) -> Iterator[ActivationError]:
    """The nearest compared tensors that one is computed from."""
    front, seen = [tensor], {tensor}
    for _ in range(_CHAIN):
        makers = (model.producers.get(name) for name in front)
        inputs = dict.fromkeys(i for m in makers if m is not None for i in m.inputs if i)
        yield from (records[i] for i in inputs if i in records and i not in seen)
        front = [i for i in inputs if i not in records and i not in seen]
        seen.update(inputs)


def _ranges(case: Case) -> list[_Range]:
    """Quantized activations with one scale and a finite observed range, ends of groups shared.

    Tensors that a node only moves or joins share one scale: they are judged together, by the
    first of them.
    """
    # What a node takes out of a table of weights has their scale, not one of an observed range.
    tables = {(w.node, w.scale) for w in case.comparison.weights if w.kind == "weight"}
    records = {
        a.name: a
        for a in case.comparison.activations
        if a.dtype in INTEGER_DTYPES
        and (a.node, a.scale) not in tables
        and a.dtype != "int32"
        and (_scalar(a.scale) or 0) > 0
        and math.isfinite(_scalar(a.scale) or math.nan)
        and math.isfinite(a.observed_low)
        and math.isfinite(a.observed_high)
    }
    lead: dict[str, str] = {name: name for name in records}

    def first(name: str) -> str:
        while lead[name] != name:
            name = lead[name]
        return name

    for record in records.values():
        for other in _sources(case.float_model, record.name, records):
            same = (other.scale, other.zero_point, other.dtype) == (
                record.scale, record.zero_point, record.dtype
            )  # fmt: skip
            if same:
                lead[first(record.name)] = first(other.name)
    groups: dict[str, list[ActivationError]] = {}
    for name, record in records.items():
        groups.setdefault(first(name), []).append(record)
    found = []
    for name, members in groups.items():
        seen = [_read_range(case.float_model, m) for m in members]
        low, high = min(0.0, *(s[0] for s in seen)), max(0.0, *(s[1] for s in seen))
        record = records[name]
        scale, zero = _scalar(record.scale), _scalar(record.zero_point)
        if scale is None or zero is None or high - low < np.finfo(np.float32).tiny:
            continue
        middle = int(zero) == _midway(record.dtype)
        try:
            plain = qparams_from_range(low, high, dtype=record.dtype)
            expected = qparams_from_range(low, high, dtype=record.dtype, symmetric=middle)
        except ValueError:
            continue
        found.append(
            _Range(
                record=record,
                members=(name, *(m.name for m in members if m.name != name)),
                scale=scale,
                zero_point=int(zero),
                low=low,
                high=high,
                expected=expected,
                plain=plain,
            )
        )
    return found


def _read_range(model: Model, record: ActivationError) -> tuple[float, float]:
    """The observed range of a tensor as far as it is read.

    The quantizer gives what only a Relu or Clip reads the range behind that.
    """
    low, high = record.observed_low, record.observed_high
    readers = model.consumers.get(record.name, ())
    if len(readers) == 1 and readers[0].op_type in RECTIFIERS and not record.is_output:
        limits = (0.0, math.inf)
        if readers[0].op_type == "Clip":
            limits = clip_limits(readers[0], model)
        low, high = (min(max(end, limits[0]), limits[1]) for end in (low, high))
    return low, high


def _pinned(given: _Range) -> bool:
    """The quantizer sets this range whatever was observed."""
    ends = given.record.representable_low, given.record.representable_high
    if given.record.op_type not in ("Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Tanh"):
        return False
    return ends[1] is not None and abs(ends[1] - 1) < 0.02


def activation_scale(case: Case) -> Iterator[Finding]:
    """Scales and zero points of activations that do not go with the observed range.

    A look by the range alone: another set of samples may have other ranges. A problem where the
    file contradicts itself (a bias keeps the product of scales it was quantized with, or nearly all
    other scales are those of these very samples), or where the scale is that of the observed range
    and the zero point of another. Nothing by the range where feeds are random.
    """
    differing = {f.tensor for f in qdq_pair_differs(case)}
    ranges = [] if case.comparison.random_feeds else _ranges(case)
    known = {r.record.name: r for r in ranges}
    lead = {name: r.record.name for r in ranges for name in r.members}
    told: dict[str, tuple[float, str]] = {}
    for name, (factor, reader) in _against_biases(case).items():
        if name not in differing and lead.get(name, name) not in differing:
            told.setdefault(lead.get(name, name), (factor, reader))
    makers = {p.name: p.node.name if p.node is not None else "" for p in case.matching.activations}
    for name, (factor, reader) in told.items():
        own = known.get(name)
        evidence: dict[str, Any] = {"factor": factor, "reader": reader}
        seen = ""
        if own is not None:
            evidence |= _range_evidence(own)
            seen = f", whose observed range is {_number(own.low)} to {_number(own.high)}"
        yield Finding(
            code="activation-scale",
            severity=PROBLEM,
            node=makers.get(name, ""),
            tensor=name,
            sentence=f"The scale of {name} is {_number(factor)} times the one that the bias of "
            f"{reader} was quantized with{seen}: the scale was changed after quantization.",
            evidence=evidence,
            remedy=Remedy(
                say=f"Divide the scale of {name} by {_number(factor)}, or re-quantize the float "
                "model.",
                overrides=_override(name, own.low, own.high) if own is not None else (),
            ),
        )
    left = [r for r in ranges if r.record.name not in told and r.record.name not in differing]
    left = [r for r in left if not _pinned(r)]
    exact = sum(abs(r.ratio - 1) < _EXACT for r in left) >= _NEARLY_ALL * len(left)
    # One that was put in the middle does not make the file symmetric.
    centred = sum(r.zero_point == _midway(r.record.dtype) for r in ranges)
    asymmetric = centred * 2 < len(ranges)
    moved = [r for r in left if r.misplaced(asymmetric=asymmetric, exact=exact)]
    for own in moved:
        record = own.record
        yield Finding(
            code="activation-scale",
            severity=LOOK if record.op_type == "Input" and not exact else PROBLEM,
            node=record.node,
            tensor=record.name,
            sentence=f"{record.name} has zero point {own.zero_point}, expected "
            f"{int(own.plain.zero_point)}: its scale {_number(own.scale)} is that of the observed "
            f"range {_number(own.low)} to {_number(own.high)}, but it can hold only "
            f"{_number(record.representable_low or 0)} to {_number(record.representable_high or 0)}"
            + (
                f" and clips {record.saturated_fraction:.1%} of the values."
                if record.saturated_fraction is not None
                else "."
            ),
            evidence=_range_evidence(own)
            | {
                "zero_point_in_file": own.zero_point,
                "zero_point_expected": int(own.plain.zero_point),
                "saturated_fraction": record.saturated_fraction,
            },
            remedy=Remedy(
                say=f"Set the zero point of {record.name} to {int(own.plain.zero_point)}, or "
                "re-quantize the float model.",
                overrides=_override(record.name, own.low, own.high),
            ),
        )
    off = [r for r in left if r not in moved and not _TOO_NARROW < r.ratio < _TOO_WIDE]
    off = [r for r in off if (r.scale, r.zero_point) != (1.0, 0)]  # see `degenerate_range`
    off.sort(key=lambda r: -abs(math.log(r.ratio)))
    asked = _overridden(case)
    for own in [r for r in off if exact and asked.isdisjoint(r.members)]:
        off.remove(own)
        yield _off_range(own, 0, len(ranges), exact=True)
    for wide in (True, False):
        side = [r for r in off if (r.ratio > 1) is wide]
        # Where many are a little off, it is how the file was calibrated: said once.
        many = len(side) > _MANY
        alone = [r for r in side if abs(math.log(r.ratio)) > math.log(3)][:_MANY] if many else side
        for own in alone:
            yield _off_range(own, 0, len(ranges))
        rest = side[len(alone) :]
        if rest:
            yield _off_range(rest[0], len(rest), len(ranges))


def _overridden(case: Case) -> set[str]:
    """Tensors whose range the recipe asked for gives by hand."""
    entries = (case.recipe or {}).get("overrides") or ()
    return {str(entry.get("tensor")) for entry in entries}


def _range_evidence(own: _Range) -> dict[str, Any]:
    return {
        "scale_in_file": own.scale,
        "scale_of_observed_range": float(own.expected.scale),
        "scale_ratio": own.ratio,
        "observed_low": own.low,
        "observed_high": own.high,
    }


def _off_range(own: _Range, many: int, of: int, *, exact: bool = False) -> Finding:
    """A scale that does not go with the observed range.

    Args:
        own: the one that is named.
        many: how many are meant with it, 0 for this one alone.
        of: all that were judged.
        exact: nearly all others do go with theirs.
    """
    record = own.record
    effect = (
        "most codes are never used"
        if own.ratio > 1
        else "values are clipped"
        if (record.saturated_fraction or 0) > 0
        else "hardly any value is clipped"
    )
    sentence = (
        f"The scale of {record.name} is {_number(own.scale)}, {_number(own.ratio)} times what its "
        f"observed range {_number(own.low)} to {_number(own.high)} asks for "
        f"({_number(float(own.expected.scale))}): {effect}."
    )
    if exact:
        sentence = (
            f"{sentence[:-1]}. Nearly all of the {of} scales of the file are those of these "
            "samples, so this one was changed after calibration or set by hand."
        )
    if many:
        sentence = (
            f"{many} of {of} scales do not go with the observed ranges, as after calibration on "
            f"other feeds. {sentence}"
        )
    return Finding(
        code="activation-scale",
        severity=PROBLEM if exact else LOOK,
        node="" if many else record.node,
        tensor=record.name,
        sentence=sentence,
        evidence=_range_evidence(own) | ({"tensors": many} if many else {}),
        remedy=Remedy(
            say="Calibrate again with feeds like these."
            if many
            else f"Give {record.name} the observed range, or calibrate again with feeds like "
            "these.",
            overrides=() if many else _override(record.name, own.low, own.high),
        ),
    )


def degenerate_range(case: Case) -> Iterator[Finding]:
    """Scales that are 0, NaN or infinite; and scale 1 where nothing was calibrated.

    The first are problems, and so is a negative scale of an activation; packed weights use those.
    A scale of exactly 1 with the zero point that the quantizer writes for an all-zero tensor is a
    look where the tensor is not all zero on these feeds, else a note.
    """
    names = _float_names(case)
    seen: set[str] = set()
    for tensor in case.matching.scheme.tensors:
        scale = tensor.qparams.scale.reshape(-1)
        bad = ~(np.isfinite(scale) & (scale != 0))
        if tensor.kind == "activation":
            bad |= scale < 0
        if not bad.any():
            continue
        name, node = _names_of(tensor, names)
        if name in seen:
            continue
        seen.add(name)
        at = int(np.argmax(bad))
        first = next(
            (
                r.first_sample
                for r in case.comparison.nonfinite
                if r.model == "float" and r.tensor == name
            ),
            "",
        )
        where = "" if scale.size == 1 else f" in {int(bad.sum())} of {scale.size} channels"
        why = (
            f": the float model gives NaN or infinity there, first on sample {first!r}"
            if first
            else ""
        )
        yield Finding(
            code="degenerate-range",
            severity=PROBLEM,
            node=node,
            tensor=name,
            sentence=f"The scale of {name} is {scale[at]:g}{where}, expected a finite number above "
            f"0{why}.",
            evidence={
                "scale_in_file": float(scale[at]),
                "channels_off": int(bad.sum()),
                "channels": int(scale.size),
            }
            | ({"first_sample": first} if first else {}),
            remedy=Remedy(
                say="Calibrate again without samples on which this tensor is not finite."
                if tensor.kind == "activation"
                else "Re-quantize the float model: this weight has no usable range.",
                exclude=_excluding(node),
            ),
        )
    if case.comparison.random_feeds:
        return
    for own in case.comparison.activations:
        if _scalar(own.scale) != 1.0 or _scalar(own.zero_point) != 0:
            continue
        if own.dtype not in INTEGER_DTYPES or not math.isfinite(own.observed_high):
            continue
        low, high = min(0.0, own.observed_low), max(0.0, own.observed_high)
        dead = high == low == 0
        if not dead:
            ratio = 1.0 / float(qparams_from_range(low, high, dtype=own.dtype).scale)
            if _TOO_NARROW < ratio < _TOO_WIDE:
                continue
        yield Finding(
            code="degenerate-range",
            severity=NOTE if dead else LOOK,
            node=own.node,
            tensor=own.name,
            sentence=f"{own.name} has scale 1 and zero point 0, as the quantizer writes for a "
            "tensor that was all zero in calibration; "
            + (
                "on these feeds it is all zero, too: a dead branch, or one that only other "
                "samples use (padding), whose values beyond the codes would be clipped."
                if dead
                else f"on these feeds it ranges from {_number(low)} to {_number(high)}."
            ),
            evidence={"scale_in_file": 1.0, "observed_low": low, "observed_high": high},
            remedy=Remedy(
                say=f"Calibrate with feeds on which {own.name} is not zero, or leave its node in "
                "float.",
                exclude=_excluding(own.node),
                overrides=() if dead else _override(own.name, low, high),
            ),
        )


# -- what the choice of scales costs -------------------------------------------------------------


# A scale of its own would win the median channel so much, dB: one bit.
_ONE_BIT_DB = 6.0


def channel_range(case: Case) -> Iterator[Finding]:
    """Weights with one scale for channels of very different range. A look, one for the file.

    At least a tenth of the channels below 15 dB, or the largest channel 64 times the one that
    nine tenths of them exceed. Channels that are all zero do not count. Where hardly a weight is so
    bad and an output is below 20 dB all the same, many that lose a bit each are told instead: half
    of at least four weights, whose median channel would win 6 dB and more.
    """
    bad: list[tuple[WeightError, dict[str, Any]]] = []
    losses: list[float] = []
    worst_loss: tuple[float, WeightError] | None = None
    for weight in case.comparison.weights:
        if (
            weight.kind != "weight"
            or weight.op_type not in _CHANNELLED
            or weight.axis is not None
            or _scalar(weight.scale) is None
            or weight.dtype not in INTEGER_DTYPES
        ):
            continue
        absmax = np.asarray(weight.channel_absmax)
        live = absmax > 0
        if live.sum() < 2 or not np.isfinite(absmax).all():
            continue
        ranges, sqnr = absmax[live], np.asarray(weight.channel_sqnr_db)[live]
        loss = float(np.median(20 * np.log10(ranges.max() / ranges)))
        losses.append(loss)
        if worst_loss is None or loss > worst_loss[0]:
            worst_loss = loss, weight
        low = sqnr < 15
        spread = float(ranges.max() / np.percentile(ranges, 10))
        # A weight that is wrong altogether has no channel that is right.
        if low.all() and spread < 64:
            continue
        if low.mean() < 0.1 and spread <= 64:
            continue
        evidence = {
            "channels": int(live.sum()),
            "channels_below_15_db": int(low.sum()),
            "largest_by_smallest": float(ranges.max() / ranges.min()),
            "largest_by_10th_percentile": spread,
            "worst_channel_sqnr_db": float(sqnr.min()),
            "median_channel_sqnr_db": float(np.median(sqnr)),
            "sqnr_db": weight.sqnr_db,
        }
        bad.append((weight, evidence))
    typical = float(np.median(losses)) if len(losses) > _MANY else 0.0
    poor = any(judged_db(o) < LOOK_DB for o in case.comparison.outputs)
    if len(bad) > 1 or (bad and not (poor and typical > _ONE_BIT_DB)):
        yield _channel_finding(bad)
    elif poor and typical > _ONE_BIT_DB and worst_loss is not None:
        loss, weight = worst_loss
        yield Finding(
            code="channel-range",
            severity=LOOK,
            node="",
            tensor=weight.name,
            sentence=f"{len(losses)} weights have one scale for all their channels: with scales of "
            f"their own, the median channel would win {typical:.1f} dB in half of them and "
            f"{loss:.1f} dB in {weight.name}. The losses of many nodes add up.",
            evidence={
                "tensors": len(losses),
                "typical_gain_db": typical,
                "largest_gain_db": loss,
            },
            remedy=Remedy(say="Quantize weights per channel.", recipe={"per_channel": True}),
        )
    yield from _uneven_layers(case, [weight for weight, _ in bad])


# The largest channel of an activation by its median one, and what the latter then loses.
_UNEVEN_RATIO, _UNEVEN_DB = 16.0, 20.0


def _uneven_layers(case: Case, bad: Collection[WeightError]) -> Iterator[Finding]:
    """What cross-layer equalization may cure: channels that differ between two layers. A look.

    Weights with one scale that it would even out; else, where all such weights have a scale per
    channel, activations between two layers whose largest channel has more than 16 times the range
    of the median one, which is below 20 dB.

    Args:
        case: what to look at.
        bad: weights with one scale for channels of very different range.
    """
    records = {a.name: a for a in case.comparison.activations}
    uneven = {n: ratio for n, a in records.items() if (ratio := _channel_ratio(a)) is not None}
    if not bad and not uneven:
        return
    try:
        pairs = equalize(case.float_model).pairs
    except ModelError:
        return
    nodes = case.float_model.node_by_name
    touched = [w for w in bad if any(w.node in (p.first, p.second) for p in pairs)]
    if touched:
        worst = min(touched, key=lambda w: w.median_channel_sqnr_db)
        pair = next(p for p in pairs if worst.node in (p.first, p.second))
        node, tensor = worst.node, worst.name
        which = f"{worst.name} of {node}" + (
            f" and {len(touched) - 1} more weights with one scale lie" if touched[1:] else " lies"
        )
        evidence: dict[str, Any] = {"median_channel_sqnr_db": worst.median_channel_sqnr_db}
    else:
        between = {
            tensor: p
            for p in pairs
            for n in (p.first, *p.through)
            for tensor in nodes[n].outputs
            if tensor in uneven
        }
        if not between:
            return
        tensor = max(between, key=lambda name: uneven[name])
        pair, node = between[tensor], records[tensor].node
        which = (
            f"The channels of {tensor} differ {_number(uneven[tensor])} times (the largest by the "
            f"median one, which has {records[tensor].median_channel_sqnr_db:.1f} dB); it lies"
        )
        evidence = {
            "largest_by_median": uneven[tensor],
            "median_channel_sqnr_db": records[tensor].median_channel_sqnr_db,
        }
    yield Finding(
        code="channel-range",
        severity=LOOK,
        node=node,
        tensor=tensor,
        sentence=f"{which} between layers whose channels can be evened out without changing the "
        f"float model: those of {pair.first} and {pair.second} differ "
        f"{_number(pair.first_ratio_before)} and {_number(pair.second_ratio_before)} times.",
        evidence={**evidence, "pairs": len(pairs)},
        remedy=Remedy(
            say=f"Equalize {len(pairs)} pairs of layers before quantizing."
            if pairs[1:]
            else f"Equalize {pair.first} and {pair.second} before quantizing.",
            recipe={"equalize": True},
        ),
    )


def _channel_ratio(activation: ActivationError) -> float | None:
    """The largest channel's range by the median one's, where that is bad; None where it is not."""
    if activation.scale is None or len(activation.channel_low) < 2:
        return None
    ranges = np.maximum(np.abs(activation.channel_low), np.abs(activation.channel_high))
    median = float(np.median(ranges))
    if not np.isfinite(ranges).all() or median <= 0:
        return None
    ratio = float(ranges.max()) / median
    bad = ratio > _UNEVEN_RATIO and activation.median_channel_sqnr_db < _UNEVEN_DB
    return ratio if bad else None


def _channel_finding(bad: list[tuple[WeightError, dict[str, Any]]]) -> Finding:
    """Of one weight, or of all such weights of the file: one option cures them together."""
    weight, evidence = min(bad, key=lambda b: b[1]["median_channel_sqnr_db"])
    many = f" {len(bad)} weights are so, this one most." if len(bad) > 1 else ""
    return Finding(
        code="channel-range",
        severity=LOOK,
        node=weight.node if len(bad) == 1 else "",
        tensor=weight.name,
        sentence=f"{weight.name} of {weight.node} has one scale for {evidence['channels']} "
        "channels, whose largest values differ "
        f"{_number(evidence['largest_by_smallest'])} times: {evidence['channels_below_15_db']} of "
        f"them are below 15 dB, while the whole has {weight.sqnr_db:.1f} dB.{many}",
        evidence=evidence | ({"tensors": [other.name for other, _ in bad]} if len(bad) > 1 else {}),
        remedy=Remedy(
            say="Quantize weights per channel.",
            recipe={"per_channel": True},
            exclude=_excluding(*(other.node for other, _ in bad)),
        ),
    )


def bias_clipped(case: Case) -> Iterator[Finding]:
    """Biases that their integer type cannot hold: |b| / scale beyond the largest code. A look."""
    for weight in _known_weights(case):
        qparams = weight.qparams
        if weight.kind != "bias" or qparams is None or qparams.block_size is not None:
            continue
        if qparams.dtype not in INTEGER_DTYPES:
            continue
        low, high = INTEGER_DTYPES[qparams.dtype]
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = [
                np.asarray(end / qparams.scale + qparams.zero_point).reshape(-1)
                for end in (weight.low, weight.high)
            ]
        room = 1 + _RELATIVE_ROOM
        over = (codes[1] > high * room + 1) | (codes[0] < low * room - 1)
        if not over.any():
            continue
        with np.errstate(invalid="ignore"):
            factor = np.maximum(codes[1] / high, codes[0] / low if low else 0)
        worst = int(np.nanargmax(np.where(over, factor, -np.inf)))
        where = "" if over.size == 1 else f" in {int(over.sum())} of {over.size} channels"
        yield Finding(
            code="bias-clipped",
            severity=LOOK,
            node=weight.node,
            tensor=weight.name,
            sentence=f"The bias {weight.name} of {weight.node} takes "
            f"{_number(float(factor[worst]))} times the largest {qparams.dtype} code{where}: it is "
            "clipped, because its scale is the product of the input's and the weight's.",
            evidence={
                "bias_by_largest_code": float(factor[worst]),
                "scale_in_file": float(np.resize(qparams.scale, over.shape)[worst]),
                "channels_clipped": int(over.sum()),
                "channels": int(over.size),
            },
            remedy=Remedy(say=f"Leave {weight.node} in float.", exclude=_excluding(weight.node)),
        )


def weight_inflated(case: Case) -> Iterator[Finding]:
    """Scales of weights above 1.5 times what ONNX Runtime computes for the same weight. A look.

    The same granularity, type, symmetry and reduced range are assumed, and for powers of two the
    next one. Where the stored values are multiples of the float ones, `weight_gain` speaks.
    """
    config = _config(case)
    reduced = config.reduce_range if config is not None else False
    for weight in _known_weights(case):
        # Where rounding does not explain the stored values, other rules speak.
        asked = _asked_scales(weight, reduced) if weight.fit is None else None
        if asked is None or weight.qparams is None:
            continue
        scale = weight.qparams.scale.reshape(-1)
        ratio = scale / asked
        over = ratio > 1.5
        if not over.any():
            continue
        worst = int(np.argmax(ratio))
        where = "" if scale.size == 1 else f" in {int(over.sum())} of {scale.size} channels"
        yield Finding(
            code="weight-inflated",
            severity=LOOK,
            node=weight.node,
            tensor=weight.name,
            sentence=f"The scale of {weight.name} is {_number(float(scale[worst]))}, "
            f"{_number(float(ratio[worst]))} times what its values ask for "
            f"({_number(float(asked[worst]))}){where}: codes stay unused, most likely widened "
            f"so that the bias of {weight.node} fits into int32.",
            evidence={
                "scale_in_file": float(scale[worst]),
                "scale_expected": float(asked[worst]),
                "scale_ratio": float(ratio[worst]),
                "channels_over": int(over.sum()),
                "channels": int(scale.size),
            },
            remedy=Remedy(say=f"Leave {weight.node} in float.", exclude=_excluding(weight.node)),
        )


def half_range(case: Case) -> Iterator[Finding]:
    """Symmetric activations of one sign, which use half of their codes. One look for the file."""
    if case.comparison.random_feeds:
        return
    found = []
    for own in _ranges(case):
        if own.low > own.record.observed_low or own.high < own.record.observed_high:
            continue  # of both signs, and cut by what reads it
        short, long = sorted((abs(own.low), own.high))
        if own.zero_point == _midway(own.record.dtype) and long and short / long < 0.1:
            found.append((own, short / long))
    if not found:
        return
    own, share = min(found, key=lambda f: _local_db(f[0].record))
    record = own.record
    yield Finding(
        code="half-range",
        severity=LOOK,
        node=record.node if len(found) == 1 else "",
        tensor=record.name,
        sentence=f"{counted(len(found), 'activation')} of one sign quantized symmetrically, so "
        f"that half of the {record.dtype} codes stay unused (6 dB): "
        f"{'' if len(found) == 1 else 'the worst is '}{record.name}, observed "
        f"{_number(own.low)} to {_number(own.high)}.",
        evidence={
            "tensors": len(found),
            "observed_low": own.low,
            "observed_high": own.high,
            "short_end_by_long_end": share,
            "local_sqnr_db": record.local_sqnr_db,
        },
        remedy=Remedy(
            say="Quantize activations asymmetrically.",
            recipe={"activation_symmetric": False},
        ),
    )


def _local_db(record: ActivationError) -> float:
    value = record.accumulated_sqnr_db if record.local_sqnr_db is None else record.local_sqnr_db
    return math.inf if math.isnan(value) else value


def fixed_range(case: Case) -> Iterator[Finding]:
    """Outputs of Softmax and Sigmoid whose scale is not that of 0 to 1. A look.

    A Softmax in any case, a Sigmoid only where it is clipped.
    """
    for record in case.comparison.activations:
        scale, high = _scalar(record.scale), record.representable_high
        if record.op_type not in ("Softmax", "Sigmoid") or scale is None or high is None:
            continue
        if record.dtype not in INTEGER_DTYPES or not math.isfinite(high):
            continue
        clipped = (record.saturated_high_fraction or 0) > 0
        if abs(high - 1) < 0.02 or (record.op_type == "Sigmoid" and not clipped):
            continue
        low_code, high_code = INTEGER_DTYPES[record.dtype]
        yield Finding(
            code="fixed-range",
            severity=LOOK,
            node=record.node,
            tensor=record.name,
            sentence=f"{record.name} is the output of a {record.op_type}, between 0 and 1, and its "
            f"scale {_number(scale)} reaches up to {_number(high)}; expected "
            f"{_number(1 / (high_code - low_code))}, which reaches 1.",
            evidence={
                "scale_in_file": scale,
                "scale_expected": 1 / (high_code - low_code),
                "representable_high": high,
                "saturated_high_fraction": record.saturated_high_fraction,
            },
            remedy=Remedy(
                say=f"Set the range of {record.name} to 0 to 1.",
                overrides=_override(record.name, 0.0, 1.0),
            ),
        )


def negatives_leak(case: Case) -> Iterator[Finding]:
    """Relu or Clip that were left to the quantization, which lets values beyond them through.

    A look: the float model has the node, the quantized one has not, and the smallest code stands
    for less than the limit by more than half a step (or the largest for more). A problem where a
    body of If, Loop or Scan reads what is behind the node: it gets the values before it, and the
    file computes something else, whatever its scales are.
    """
    yield from _unrectified_in_bodies(case)
    records = {a.name: a for a in case.comparison.activations}
    for pair in case.matching.activations:
        record, qparams = records.get(pair.name), pair.qparams
        if record is None or qparams is None or not pair.rectifiers or not qparams.per_tensor:
            continue
        low, high = -math.inf, math.inf
        for node in pair.rectifiers:
            limits = (0.0, math.inf)
            if node.op_type == "Clip":
                limits = clip_limits(node, case.float_model)
            low, high = max(low, limits[0]), min(high, limits[1])
        ends = qparams.representable_range()
        step = float(qparams.scale.reshape(-1)[0])
        below, above = low - ends[0], ends[1] - high
        if not max(below, above) > step / 2:
            continue
        kinds = " and ".join(dict.fromkeys(n.op_type for n in pair.rectifiers))
        over = below >= above
        yield Finding(
            code="negatives-leak",
            severity=LOOK,
            node=pair.rectifiers[-1].name,
            tensor=pair.name,
            sentence=f"{kinds} {pair.rectifiers[-1].name} is gone from the quantized model and its "
            f"scale does not stand in for it: {pair.name} may be as "
            f"{'low' if over else 'high'} as {_number(ends[0] if over else ends[1])}, expected at "
            f"{'least' if over else 'most'} {_number(low if over else high)}.",
            evidence={
                "representable_low": ends[0],
                "representable_high": ends[1],
                "limit_low": low,
                "limit_high": high,
                "scale_in_file": step,
            },
            remedy=Remedy(
                say="Quantize activations asymmetrically, or keep the rectifier "
                "(QDQKeepRemovableActivations).",
                recipe={"activation_symmetric": False},
                overrides=_override(
                    pair.name, low, high if math.isfinite(high) else record.observed_high
                )
                if math.isfinite(low) and math.isfinite(record.observed_high)
                else (),
            ),
        )


def _unrectified_in_bodies(case: Case) -> Iterator[Finding]:
    """Folded Relus and Clips whose input a body reads where the float model's reads the output."""
    pairs = {p.name: p for p in case.matching.activations if p.rectifiers and p.before}
    theirs = case.quantized_model.node_by_name
    for node in case.float_model.nodes:
        twin = theirs.get(case.matching.node_pairs.get(node.name, ""))
        for name in node.captured if twin is not None else ():
            pair = pairs.get(name)
            if twin is None or pair is None or pair.before not in twin.captured:
                continue
            lost = pair.rectifiers[-1]
            yield Finding(
                code="negatives-leak",
                severity=PROBLEM,
                node=lost.name,
                tensor=name,
                sentence=f"{lost.op_type} {lost.name} was folded into the quantization of its "
                f"input, and a body of {node.op_type} {node.name} reads that input now: it gets "
                f"values that {lost.op_type} would have cut.",
                evidence={"reader": node.name, "reads": pair.before, "expected": pair.after},
                remedy=Remedy(
                    say=f"Leave {lost.name} in float, then it is kept.",
                    exclude=_excluding(lost.name),
                ),
            )


# -- the file as a whole -------------------------------------------------------------------------


_SAID = {
    "activation_type": "activations of type {}",
    "weight_type": "weights of type {}",
    "per_channel": "weights per channel",
    "reduce_range": "weights in a reduced range (7 bits)",
    "activation_symmetric": "symmetric activations",
    "weight_symmetric": "symmetric weights",
}


def flag_ignored(case: Case) -> Iterator[Finding]:
    """Options of the recipe that the file does not follow. A look each.

    Nothing where no recipe is known. What a file cannot tell (the method, the samples) is not
    judged, nor are options that were left to the quantizer.
    """
    if case.recipe is None:
        return
    try:
        asked = QuantConfig.from_json(case.recipe)
        found = read_recipe(case.quantized_model, case.float_model).config
    except QuantizationError:
        return  # see `nothing_quantized`
    scheme = case.matching.scheme
    weights = [w for w in case.comparison.weights if w.kind == "weight" and w.scale is not None]
    acts = [a for a in case.comparison.activations if a.scale is not None]
    differing: list[tuple[str, Any, Any]] = []
    if asked.static and acts and asked.activation_type != found.activation_type:
        differing.append(("activation_type", asked.activation_type, found.activation_type))
    if weights and asked.weight_type != found.weight_type:
        differing.append(("weight_type", asked.weight_type, found.weight_type))
    if weights:
        for key in ("per_channel", "reduce_range"):
            if getattr(asked, key) and not getattr(found, key):
                differing.append((key, True, False))
        if asked.weight_symmetric and _any_shifted(scheme.tensors, "weight"):
            differing.append(("weight_symmetric", True, False))
    centred = asked.static and bool(acts) and asked.activation_symmetric
    if centred and _any_shifted(scheme.tensors, "activation"):
        differing.append(("activation_symmetric", True, False))
    for key, wanted, given in differing:
        pool: tuple[Any, ...] = tuple(acts if key.startswith("activation") else weights)
        worst = min(pool, key=_db_of)
        say = _SAID[key].format(wanted)
        instead = f"{given}" if isinstance(given, str) else "not"
        opset = case.quantized_model.opset
        why = (
            f": opset {opset} has no scales per channel, opset 13 has"
            if key == "per_channel" and opset < 13
            else ""
        )
        yield Finding(
            code="flag-ignored",
            severity=LOOK,
            node="",
            tensor=worst.name,
            sentence=f"The recipe asks for {say}; the file has "
            f"{instead if instead != 'not' else 'them otherwise'}{why}.",
            evidence={"option": key, "asked": wanted, "in_file": given, "opset": opset},
            remedy=Remedy(say="Re-quantize with this option.", recipe={key: wanted}),
        )


def _db_of(record: ActivationError | WeightError) -> float:
    value = record.sqnr_db if isinstance(record, WeightError) else record.accumulated_sqnr_db
    return math.inf if math.isnan(value) else value


def _any_shifted(tensors: Iterable[QuantizedTensor], kind: str) -> bool:
    """Whether a tensor of a kind has its zero point elsewhere than in the middle."""
    for tensor in tensors:
        given = tensor.qparams
        if tensor.kind != kind or given.dtype not in INTEGER_DTYPES:
            continue
        # Tensors without a range get scale 1 and zero point 0 in any scheme.
        empty = np.all(given.scale == 1.0) and np.all(given.zero_point == 0)
        if not empty and np.any(given.zero_point != _midway(given.dtype)):
            return True
    return False


def nothing_quantized(case: Case) -> Iterator[Finding]:
    """That the quantized file computes in float.

    A problem where a recipe asked for more; a note where none is known and the weights are float32
    (a file of half-precision floats is none). A look where the weights lie in bodies of If, Loop
    or Scan and none of them is quantized there.
    """
    model, scheme = case.quantized_model, case.matching.scheme
    counts = count_scheme(model, scheme)
    worst = min(case.comparison.weights, key=_db_of, default=None)
    tensor = worst.name if worst is not None else ""
    inside = _float_elements_in_bodies(model)
    evidence = {
        "weights": counts.weights,
        "quantized_weights": counts.quantized_weights,
        "quantized_nodes": counts.quantized_nodes,
        "float_weight_elements_in_bodies": inside,
        "opset": model.opset,
    }
    nothing = scheme.formats == (QuantFormat.FLOAT,)
    if nothing:
        if case.recipe is None and not {"float32", "float64"} & set(counts.weight_dtypes):
            return
        causes = []
        if inside:
            causes.append("weights lie in bodies of If, Loop or Scan, which the quantizer skips")
        if model.opset < 10:
            causes.append(f"opset {model.opset} has no QuantizeLinear")
        fused = sorted({n.op_type for n in model.nodes if n.domain.startswith("com.microsoft")})
        if fused:
            causes.append(f"the graph was optimised before ({listed(fused)})")
        if not counts.weights:
            causes.append("it has no weights of Conv, Gemm, MatMul or recurrent nodes")
        why = f": {'; '.join(causes)}" if causes else ""
        yield Finding(
            code="nothing-quantized",
            severity=PROBLEM if case.recipe is not None else NOTE,
            node="",
            tensor=tensor,
            sentence=f"Nothing in {model.name} is quantized: no QuantizeLinear, DequantizeLinear "
            f"or integer operator among {counts.nodes} nodes{why}.",
            evidence=evidence,
            remedy=Remedy(
                say="Quantize the float model as it was exported, with opset 13 or newer."
                if causes
                else "Quantize the float model and load what comes out as the quantized model."
            ),
        )
        return
    quantized_inside = any(t.scope for t in scheme.tensors)
    if inside and not quantized_inside:
        main = sum(
            math.prod(w.shape)
            for w in case.comparison.weights
            if w.kind == "weight" and not w.scope
        )
        if inside > main:
            yield Finding(
                code="nothing-quantized",
                severity=LOOK,
                node="",
                tensor=tensor,
                sentence=f"{inside:,} weight values lie in bodies of If, Loop or Scan and stay in "
                f"float, {main:,} outside: the quantizer does not enter bodies.",
                evidence=evidence,
                remedy=Remedy(say="Export the model without If and Loop around its layers."),
            )


def _float_elements_in_bodies(model: Model) -> int:
    """Float values of matrices and larger constants that bodies hold themselves."""
    total = 0
    for body in model.bodies:
        for name in body.constant_names:
            if name in body.outer.constant_names:
                continue
            value = body.constant(name)
            if value is not None and value.dtype.name in FLOAT_DTYPES and value.ndim > 1:
                total += int(value.size)
    return total


def preprocess_first(case: Case) -> Iterator[Finding]:
    """That tensors have no partner because the quantized model was pre-processed. A note."""
    lost = [
        u
        for u in case.comparison.unmatched
        if u.model == "float" and not u.fused_into and "pre-processing" in u.reason
    ]
    if not lost:
        return
    kinds = [Counter(n.op_type for n in m.nodes) for m in (case.float_model, case.quantized_model)]
    gone = {k: c - kinds[1][k] for k, c in kinds[0].items() if c > kinds[1][k]}
    gone.pop("Constant", None)
    common = sorted(gone, key=lambda k: -gone[k])
    yield Finding(
        code="preprocess-first",
        severity=NOTE,
        node="",
        tensor=lost[0].name,
        sentence=f"{len(lost)} tensors of {case.float_model.name} have no partner, because the "
        "quantized file was made from a pre-processed model"
        + (f" (fewer {listed(common)} nodes)." if common else "."),
        evidence={"tensors_without_partner": len(lost), "nodes_gone": dict(gone)},
        remedy=Remedy(
            say="Pre-process the float model (quant_pre_process) and compare with that file."
        ),
    )


def saturation_elsewhere(case: Case) -> Iterator[Finding]:
    """Weights on which older x86 CPUs give other results than this machine. One note for the file.

    Their kernels add two products of a uint8 activation (x86 makes one of int8, too) and an int8
    weight in 16 bits, which saturates where the two codes sum up to more than 128. Order along the
    inner axis is that of the file; kernels may pair other neighbours.
    """
    model = case.quantized_model
    eights = {t.name for t in case.matching.scheme.tensors if t.kind == "activation"
              and t.qparams.dtype in ("int8", "uint8")}  # fmt: skip
    if not eights and not case.matching.scheme.activations_at_run_time:
        return
    worst: tuple[float, WeightPair] | None = None
    over = total = 0
    for pair in _pairs(case):
        tensor = pair.quantized
        if tensor is None or pair.kind != "weight" or tensor.qparams.dtype != "int8" or pair.scope:
            continue
        if pair.node.op_type not in _CHANNELLED or pair.channel_axis is None:
            continue
        codes = model.constant(tensor.quantized)
        if codes is None or codes.dtype != np.int8 or pair.channel_axis >= codes.ndim:
            continue
        rows = np.moveaxis(codes, pair.channel_axis, 0).reshape(codes.shape[pair.channel_axis], -1)
        pairs = rows[:, : rows.shape[1] // 2 * 2].astype(np.int16)
        if not pairs.size:
            continue
        sums = np.abs(pairs[:, 0::2] + pairs[:, 1::2]) > 128
        over += int(sums.sum())
        total += sums.size
        share = float(sums.mean())
        if share and (worst is None or share > worst[0]):
            worst = share, pair
    if worst is None:
        return
    yield Finding(
        code="saturation-elsewhere",
        severity=NOTE,
        node="",
        tensor=worst[1].name,
        sentence=f"On x86 CPUs without VNNI {over:,} of {total:,} pairs of int8 weights can "
        f"saturate their 16-bit sums; most in {worst[1].name} of {worst[1].node.name} "
        f"({worst[0]:.1%}). This machine may not show it.",
        evidence={
            "pairs_over_128": over,
            "pairs": total,
            "worst_tensor_fraction": worst[0],
        },
        remedy=Remedy(
            say="Quantize with a reduced range for such hosts.", recipe={"reduce_range": True}
        ),
    )


def off_grid(case: Case) -> Iterator[Finding]:
    """Float weights behind Q and DQ that are not on their grid, where the file's others are.

    Training with quantization leaves weights on the grid of their scale; one beside it has a stale
    scale, or had a BatchNormalization folded into it afterwards. A look. A file that rounds all its
    weights at run time is healthy.
    """
    on, off = 0, []
    for pair in _pairs(case):
        tensor = pair.quantized
        if tensor is None or tensor.before is None or tensor.kind != "weight" or pair.scope:
            continue
        if tensor.qparams.dtype not in INTEGER_DTYPES:
            continue
        value = constant_value(case.quantized_model, tensor.before)
        if value is None or value.size < _TELLING or value.dtype.name not in FLOAT_DTYPES:
            continue
        try:
            view, scale, _ = tensor.qparams.aligned(np.asarray(value, np.float64))
        except ValueError:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = view / scale
            share = float((np.abs(steps - np.rint(steps)) > 1e-3).mean())
        if share > 0.01:
            off.append((share, pair))
        else:
            on += 1
    if not on or len(off) >= on:
        return
    for share, pair in off:
        yield Finding(
            code="off-grid",
            severity=LOOK,
            node=pair.node.name,
            tensor=pair.name,
            sentence=f"{share:.0%} of the values of {pair.name} lie beside the grid of its scale, "
            f"while {on} other weights of the file lie on theirs: its scale is stale, or something "
            "was folded into it after training.",
            evidence={"off_grid_fraction": share, "weights_on_grid": on},
            remedy=Remedy(
                say="Export the trained model again with the scales of its last step.",
                exclude=_excluding(pair.node.name),
            ),
        )


WEIGHT_RULES: Mapping[str, Callable[[Case], Iterator[Finding]]] = MappingProxyType(
    {
        "qdq-pair-differs": qdq_pair_differs,
        "weight-gain": weight_gain,
        "weight-offset": weight_offset,
        "activation-scale": activation_scale,
        "degenerate-range": degenerate_range,
        "channel-range": channel_range,
        "not-the-same-model": not_the_same_model,
        "nothing-quantized": nothing_quantized,
        "weights-swapped": weights_swapped,
        "bias-clipped": bias_clipped,
        "half-range": half_range,
        "fixed-range": fixed_range,
        "block-axis": block_axis,
        "weight-inflated": weight_inflated,
        "negatives-leak": negatives_leak,
        "flag-ignored": flag_ignored,
        "off-grid": off_grid,
        "preprocess-first": preprocess_first,
        "saturation-elsewhere": saturation_elsewhere,
    }
)
