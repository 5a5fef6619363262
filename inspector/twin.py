"""The error sums of tensor pairs, reduced in the runtime where the tensors already are.

The two debugging sessions hand their tensors on as they lie in memory to a third session that only
reduces: no activation becomes an array, and no weight is copied. The third session is one small
graph for all pairs of a kind. It runs over tiles that fit a core's cache, one tile per thread,
because every tensor is read several times. Sums are float32 over at most 512 elements and float64
from there on. What float32 cannot hold (overflow, squares that underflow) is found
afterwards and left to `TensorWatch.add`, which does the same in numpy for everything. Apart from
`watches`, which runs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from inspector.errors import RunError
from inspector.matching import clip_limits
from inspector.metrics import ErrorTotals
from inspector.qparams import FLOAT_CODES, QParams, code_range
from inspector.runtime import ORT_ERRORS, Codes, Tensors
from inspector.watches import SampleSums, TensorWatch

# Elements of one tile: three tensors and two differences of float32 are to stay in a core's cache.
TILE = 24576
# Elements that float32 sums before float64 takes over. The runtime adds a row on 8 lanes and a
# column on one: equal addends, the worst case, then give 1e-6 at most.
_ROW = 512
_COLUMN = 32
# Rows shorter than this are better summed as columns.
_SHORT = 16
# Tensors smaller than this are not worth a run of a session: numpy takes as long, in float64.
FEW = 8192
# The same for a tensor whose shape is not the last sample's: everything is bound anew.
RAGGED = 65536
# Places of a tensor that bindings are kept for.
_KNOWN = 4
# A sum of squares is trusted where the mean square is above this: float32's smallest normal number
# is 1.2e-38, and what is lost below it stays under 1e-6.
_TINY = 1e-31
# sum(x*y) is what the three sums of squares leave; its rounding grows with the ratio of the powers.
_RATIO = 30.0

_CASTABLE = ("tensor(float16)",)


# A session and what its inputs and its output are bound to.
_Run = tuple[Any, Any]
_Tile = tuple[tuple[int, int, int], int, NDArray[np.float32]]

# -- how a tensor is cut -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is seen to be reduced per channel.

    Attributes:
        kind: "rows" reduces the last two axes of a view, the middle one in float64, "columns" the
            middle one, "wide" the last one in float64.
        views: (groups, rows, width) of each part of the tensor, one after the other; cut along the
            first axis into tiles.
        outer, channels, inner: how the results of all parts lie; `channels` are kept.
    """

    kind: str
    views: tuple[tuple[int, int, int], ...]
    outer: int
    channels: int
    inner: int

    @property
    def results(self) -> int:
        return self.outer * self.channels * self.inner


def cut_of(shape: Sequence[int], axis: int | None) -> Cut:
    """How a tensor is reduced per channel of `axis`.

    Args:
        shape: of the tensor, no axis empty.
        axis: its channel axis, None for no channels.
    """
    size = math.prod(shape)
    channels = 1 if axis is None else shape[axis]
    outer = 1 if axis is None else math.prod(shape[:axis])
    inner = size // (outer * channels)
    if outer > 1 and (inner == 1 or (inner < _SHORT and outer >= _SHORT)):
        width = channels * inner
        rows = max(1, min(_COLUMN, TILE // width, outer))
        whole, rest = divmod(outer, rows)
        views = [(whole, rows, width)] + ([(1, rest, width)] if rest else [])
        return Cut("columns", tuple(views), whole + (rest > 0), channels, inner)
    row = inner
    for pieces in range(-(-inner // _ROW), inner // _SHORT + 1):
        if inner % pieces == 0:
            row = inner // pieces
            break
    pieces = inner // row
    rows = next(n for n in range(min(pieces, max(1, TILE // row)), 0, -1) if pieces % n == 0)
    kind = "rows" if row <= _ROW else "wide"
    return Cut(kind, ((size // (rows * row), rows, row),), outer, channels, pieces // rows)


# -- the graphs --------------------------------------------------------------------------------


def _session(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    constants: Sequence[onnx.TensorProto] = (),
) -> Any:
    graph = helper.make_graph(
        list(nodes),
        "reduce",
        [helper.make_tensor_value_info(n, kind, None) for n, kind in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A tile is one thread's work.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


# What is wanted of a tile: sums first, then largest, then smallest values.
_PAIR = ("x2", "y2", "e2", "x_high", "ee_high", "x_low")
_QUANTIZED = ("x2", "y2", "e2", "p2", "d2", "x_high", "ee_high", "p_high", "x_low", "p_low")
_CLAMPED = ("x2", "y2", "e2", "p2", "d2", "q_sum", *_QUANTIZED[5:])
# Behind a Relu whose zero Q can hold, only large values are clipped.
_RECTIFIED = tuple(n for n in _CLAMPED if n != "p_low")


def _reducer(kind: str, names: Sequence[str], codes: int = 0) -> Any:
    """A session that reduces one tile to the figures of these names, one after the other.

    With `codes`, ONNX's number of their type, it reads y as codes, "c", with scale and zero point.
    Sums of squares end in "2". x is the float tensor, y the quantized model's as its consumers
    read it, q the one before its Q, p the same clamped where a Relu or Clip was folded into Q,
    e is x - y, d is p - y, ee is e*e.
    """
    nodes: list[onnx.NodeProto] = []
    reduced = [1] if kind == "columns" else [1, 2]

    def node(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    inputs = ["x", "y"]
    node("Sub", ["x", "y"], "e")
    if "p2" in names:
        inputs.append("q" if "q_sum" in names else "p")
        if names == _RECTIFIED:
            node("Relu", ["q"], "p")
        elif "q_sum" in names:
            inputs += ["least", "most"]
            node("Clip", ["q", "least", "most"], "p")
        node("Sub", ["p", "y"], "d")
    sums = [n for n in names if n.endswith(("2", "_sum"))]
    parts = []
    for name in sums:
        # ReduceSumSquare would be three times slower. A comparison may hide NaN; a sum does not.
        what = "q" if name == "q_sum" else node("Mul", [name[0]] * 2, name[0] * 2)
        if kind == "wide":
            what = node("Cast", [what], f"{name}_double", to=TensorProto.DOUBLE)
        parts.append(
            node("ReduceSum", [what, "middle" if kind == "columns" else "last"], f"{name}_part",
                 keepdims=1)
        )  # fmt: skip
    node("Concat", parts, "parts", axis=1 if kind == "columns" else 2)
    if kind != "columns":
        wide = "parts"
        if kind == "rows":
            wide = node("Cast", ["parts"], "wide_parts", to=TensorProto.DOUBLE)
        node("ReduceSum", [wide, "middle"], "totals", keepdims=1)
        node("Cast", ["totals"], "sums", to=TensorProto.FLOAT)
    found = ["parts" if kind == "columns" else "sums"]
    for name in names[len(sums) :]:
        what, end = name.split("_")
        op_type = "ReduceMax" if end == "high" else "ReduceMin"
        found.append(node(op_type, [what], name, axes=reduced, keepdims=1))
    node("Concat", found, "figures", axis=1 if kind == "columns" else 2)
    axes = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in (("middle", 1), ("last", 2))
    ]
    return _on_codes(nodes, inputs, codes, axes)


def _on_codes(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    codes: int,
    constants: Sequence[onnx.TensorProto] = (),
) -> Any:
    """A session whose y is made of codes, where they have a type."""
    kinds = dict.fromkeys(inputs, int(TensorProto.FLOAT))
    if codes:
        del kinds["y"]
        kinds |= {"c": codes, "scale": TensorProto.FLOAT, "zero_point": codes}
        dequantize = helper.make_node("DequantizeLinear", ["c", "scale", "zero_point"], ["y"])
        nodes = [dequantize, *nodes]
    return _session(nodes, kinds, {"figures": TensorProto.FLOAT}, constants)


def _clip_counter() -> Any:
    """Counts the elements of one tile below and above two limits."""
    nodes = []
    for op_type, limit, output in (("Less", "low", "below"), ("Greater", "high", "above")):
        nodes += [
            helper.make_node(op_type, ["q", limit], [f"is_{output}"]),
            helper.make_node("Cast", [f"is_{output}"], [f"one_{output}"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", [f"one_{output}"], [output], keepdims=1),
        ]
    nodes.append(helper.make_node("Concat", ["below", "above"], ["figures"], axis=0))
    kinds = dict.fromkeys(("q", "low", "high"), int(TensorProto.FLOAT))
    return _session(nodes, kinds, {"figures": TensorProto.FLOAT})


def _distance(codes: int) -> Any:
    """The largest |x - y| of one tile."""
    nodes = [
        helper.make_node("Sub", ["x", "y"], ["d"]),
        helper.make_node("Abs", ["d"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["figures"], keepdims=1),
    ]
    return _on_codes(nodes, ("x", "y"), codes)


def _clamped_distance(codes: int) -> Any:
    """The largest |clamped q - y| of one tile."""
    nodes = [
        helper.make_node("Clip", ["q", "low", "high"], ["p"]),
        helper.make_node("Sub", ["p", "y"], ["d"]),
        helper.make_node("Abs", ["d"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["figures"], keepdims=1),
    ]
    return _on_codes(nodes, ("q", "y", "low", "high"), codes)


def _summer() -> Any:
    node = helper.make_node("ReduceSum", ["q"], ["figures"], keepdims=1)
    return _session([node], {"q": TensorProto.FLOAT}, {"figures": TensorProto.FLOAT})


# -- memory ------------------------------------------------------------------------------------


def _place(value: ort.OrtValue | NDArray[Any]) -> tuple[int, str] | None:
    """Where a tensor of float32 or float16 lies, and its type; None for any other."""
    if isinstance(value, ort.OrtValue):
        if not value.is_tensor():
            return None
        kind = str(value.data_type())
        return (int(value.data_ptr()), kind) if kind in ("tensor(float)", *_CASTABLE) else None
    if not value.dtype.isnative or not value.flags.c_contiguous:
        return None
    kinds = {"float32": "tensor(float)", "float16": "tensor(float16)"}
    kind = kinds.get(value.dtype.name, "")
    return (int(value.ctypes.data), kind) if kind else None


def _address(value: ort.OrtValue | NDArray[Any] | None) -> int:
    if value is None:
        return 0
    return int(value.data_ptr() if isinstance(value, ort.OrtValue) else value.ctypes.data)


def _array(value: ort.OrtValue | NDArray[Any]) -> NDArray[Any]:
    return np.asarray(value.numpy() if isinstance(value, ort.OrtValue) else value)


_CPU = ort.OrtDevice.make("cpu", 0)._get_c_device()


def _shape(value: ort.OrtValue | NDArray[Any]) -> tuple[int, ...]:
    return tuple(value.shape() if isinstance(value, ort.OrtValue) else value.shape)


def _bound(
    session: Any,
    inputs: Iterable[tuple[str, int, Sequence[int]]],
    result: tuple[int, Any],
    codes: Any = np.int8,
) -> _Run:
    """A run of a session, with its inputs and its one output as (address, shape).

    They are float32, except "c" and "zero_point", which are of the type of the codes.
    """
    binding = session.io_binding()
    raw = binding._iobinding
    for name, address, shape in inputs:
        kind = codes if name in ("c", "zero_point") else np.float32
        raw.bind_input(name, _CPU, kind, shape, address)
    raw.bind_output("figures", _CPU, np.float32, result[1], result[0])
    return session._sess, raw


def _run_all(runs: Iterable[_Run], _held: Any = None) -> None:
    for session, binding in runs:
        session.run_with_iobinding(binding, None)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (*ORT_ERRORS, RuntimeError, MemoryError) as error:
        raise RunError(
            f"the tensors of a sample could not be reduced: {error}",
            hint="Close other programs, or use a machine with more memory.",
        ) from error


def clip_ends(qparams: QParams) -> tuple[float, float]:
    """Below and above which real values a Q clips, as in `stats.saturated_masks`, per tensor."""
    first, last = code_range(qparams.dtype)
    half = FLOAT_CODES[qparams.dtype][1] / 2 if qparams.dtype in FLOAT_CODES else 0.5
    zero, scale = float(qparams.zero_point.reshape(())), float(qparams.scale.reshape(()))
    a, b = (first - zero - half) * scale, (last - zero + half) * scale
    return min(a, b), max(a, b)


def _float32_below(limit: float) -> np.float32:
    """The largest float32 <= limit: a float32 above the one is above the other."""
    with np.errstate(over="ignore"):
        near = np.float32(limit)
    return np.nextafter(near, np.float32(-np.inf)) if float(near) > limit else near


def _float32_above(limit: float) -> np.float32:
    return -_float32_below(-limit)


# -- one pair ----------------------------------------------------------------------------------


def _clamp_of(watch: TensorWatch) -> tuple[float, float]:
    """The one range that the pair's rectifiers clamp to; infinite without."""
    low, high = -math.inf, math.inf
    for rectifier in watch.pair.rectifiers:
        limits = (0.0, math.inf)
        if rectifier.op_type != "Relu":
            limits = clip_limits(rectifier, watch.model)
        low, high = (float(np.clip(v, *limits)) for v in (low, high))
    return low, high


@dataclass(slots=True)
class _Limits:
    """What is known of a pair whatever the sample.

    Attributes:
        clamp: the range its rectifiers clamp to; infinite without.
        clamped: whether it has rectifiers.
        low, high: the real values below and above which Q clips.
        names: the figures that are wanted where there is a tensor before Q.
        memory: float32: both ends of the clamp, then the largest values below `low` and the
            smallest above `high` that an element before the rectifiers is compared with.
    """

    clamp: tuple[float, float]
    clamped: bool
    low: float
    high: float
    names: tuple[str, ...]
    memory: NDArray[np.float32]

    @classmethod
    def of(cls, watch: TensorWatch) -> _Limits:
        clamp, (low, high) = _clamp_of(watch), (-math.inf, math.inf)
        if watch.stages:
            low, high = clip_ends(watch.stages[0][0])
        memory = np.array([*clamp, -np.inf, np.inf], np.float32)
        # Where the rectifier ends inside the range, nothing is clipped however far it was outside.
        if clamp[0] < low:
            memory[2] = _float32_above(low)
        if clamp[1] > high:
            memory[3] = _float32_below(high)
        clamped = bool(watch.pair.rectifiers)
        names: tuple[str, ...] = _CLAMPED if clamped else _QUANTIZED
        if clamped and clamp == (0.0, math.inf) and low <= 0:
            names = _RECTIFIED
        return cls(clamp, clamped, low, high, names, memory)


@dataclass(slots=True)
class _Item:
    """One pair of one sample, and where its tensors lie.

    Attributes:
        cut: how they are cut.
        tensors: x, y and q; q None without local error. They are held until they are reduced.
        addresses: of the three, 0 for none.
        codes: what y is held as; None where it is held as it is.
        names: the figures that are wanted.
    """

    watch: TensorWatch
    limits: _Limits
    shape: tuple[int, ...]
    size: int
    axis: int | None
    cut: Cut
    tensors: tuple[Any, Any, Any]
    addresses: tuple[int, int, int]
    names: tuple[str, ...]
    codes: Codes | None

    @property
    def code_type(self) -> int:
        """ONNX's number of the codes' type; 0 without."""
        if self.codes is None:
            return 0
        return int(helper.np_dtype_to_tensor_dtype(self.codes.zero_point.dtype))

    @property
    def code_dtype(self) -> Any:
        return np.int8 if self.codes is None else self.codes.zero_point.dtype.type

    def y_inputs(self, address: int, view: Sequence[int]) -> list[tuple[str, int, Sequence[int]]]:
        """y of one tile, as the sessions take it."""
        if self.codes is None:
            return [("y", address, view)]
        scale, zero_point = self.codes.scale, self.codes.zero_point
        return [
            ("c", address, view),
            ("scale", int(scale.ctypes.data), ()),
            ("zero_point", int(zero_point.ctypes.data), ()),
        ]

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.watch.pair.name, self.shape, self.axis


@dataclass(slots=True)
class _Slot:
    """Where the results of one pair come to lie, from sample to sample.

    Attributes:
        cut: how its tensor is cut.
        rows: float32, (results, figures); None for columns.
        columns: float32, (groups, figures, width) of each part; () for rows.
        runs: one for each tile.
        tiles: addresses of x, y and q, elements, and the tile's results.
        known: the two by the addresses of the tensors they are bound to, which come back.
    """

    cut: Cut
    rows: NDArray[np.float32] | None
    columns: tuple[NDArray[np.float32], ...]
    runs: list[_Run] = field(default_factory=list)
    tiles: list[_Tile] = field(default_factory=list)
    known: dict[tuple[int, ...], tuple[list[_Run], list[_Tile]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Layout:
    """All pairs of a sample that want the same figures, and their results.

    Attributes:
        names: the figures.
        key: the layouts of the pairs, for which this one is good.
        slots: one per pair, those of one block of rows per channel first.
        starts: in `rows`, where the channels of the first pairs begin.
        simple: how many pairs those are.
        rows: float32, (results, figures), of all pairs that are cut into rows.
        first: where the channels of each pair begin among all of them.
        order: places of the pairs in the list that was given.
        sizes: elements per pair.
        limits: below and above which each pair is clipped, float64, shape (2, pairs).
    """

    names: tuple[str, ...]
    key: tuple[Any, ...]
    slots: list[_Slot]
    order: list[int]
    simple: int
    rows: NDArray[np.float32]
    starts: NDArray[np.int64]
    first: NDArray[np.int64]
    channels: NDArray[np.int64]
    sizes: NDArray[np.float64]
    limits: NDArray[np.float64]

    @classmethod
    def of(cls, items: Sequence[_Item], key: tuple[Any, ...]) -> _Layout:
        """Memory for the results of these pairs."""
        names = items[0].names
        cuts = [item.cut for item in items]
        simple = [at for at, c in enumerate(cuts) if c.kind != "columns" and c.outer == 1]
        order = simple + [at for at in range(len(items)) if at not in set(simple)]
        total = sum(c.results for c in cuts if c.kind != "columns")
        rows = np.zeros((total, len(names)), np.float32)
        slots, starts, begin = [], [], 0
        for place, at in enumerate(order):
            cut = cuts[at]
            if cut.kind == "columns":
                own = tuple(np.zeros((g, len(names), w), np.float32) for g, _, w in cut.views)
                slots.append(_Slot(cut, None, own))
                continue
            if place < len(simple):
                starts.append(begin + cut.inner * np.arange(cut.channels))
            slots.append(_Slot(cut, rows[begin : begin + cut.results], ()))
            begin += cut.results
        channels = np.array([cuts[at].channels for at in order])
        return cls(
            names=names,
            key=key,
            slots=slots,
            order=order,
            simple=len(simple),
            rows=rows,
            starts=np.concatenate(starts) if starts else np.zeros(0, np.int64),
            first=np.concatenate([[0], np.cumsum(channels)[:-1]]),
            channels=channels,
            sizes=np.array([items[at].size for at in order], np.float64),
            limits=np.array([(items[at].limits.low, items[at].limits.high) for at in order]).T,
        )

    def figures(self) -> NDArray[np.float64]:
        """The results of all channels of all pairs, float64, shape (channels, figures)."""
        sums = sum(n.endswith(("2", "sum")) for n in self.names)
        highs = sum(n.endswith("high") for n in self.names)
        ways = (
            (slice(0, sums), np.add, np.float64),
            (slice(sums, sums + highs), np.maximum, np.float32),
            (slice(sums + highs, None), np.minimum, np.float32),
        )
        blocks = []
        if self.simple:
            end = sum(slot.cut.results for slot in self.slots[: self.simple])
            rows = self.rows[:end]
            blocks.append(
                np.concatenate(
                    [f.reduceat(rows[:, s], self.starts, axis=0, dtype=t) for s, f, t in ways],
                    axis=1,
                )
            )
        for slot in self.slots[self.simple :]:
            cut = slot.cut
            if slot.rows is not None:
                values = slot.rows.reshape(cut.outer, cut.channels, cut.inner, -1)
            elif cut.outer == 1 and cut.inner == 1:
                blocks.append(slot.columns[0][0].T)
                continue
            else:
                values = np.concatenate(slot.columns) if len(slot.columns) > 1 else slot.columns[0]
                values = values.reshape(cut.outer, len(self.names), cut.channels, cut.inner)
                values = values.transpose(0, 2, 3, 1)
            parts = [f.reduce(values[..., s], axis=(0, 2), dtype=t) for s, f, t in ways]
            blocks.append(np.concatenate(parts, axis=1))
        return np.concatenate(blocks).astype(np.float64, copy=False)


class Reducer:
    """Reduces the tensors of pairs in the runtime, sample by sample; keeps none of them.

    Args:
        threads: how many tiles are reduced at a time; by default as many as there are cores.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        self._sessions: dict[Any, Any] = {}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._limits: dict[str, _Limits] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    # -- sessions --------------------------------------------------------------------------

    def _opened(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._sessions:
            self._sessions[key] = make()
        return self._sessions[key]

    def _prepared(self, value: Any, permutation: tuple[int, ...] | None) -> Any:
        """A tensor as float32 in the float model's layout: itself, or a copy in the runtime."""
        place = _place(value)
        if place is None:
            return None
        cast = place[1] in _CASTABLE
        moves = permutation is not None and permutation != tuple(range(len(permutation)))
        if not cast and not moves:
            return value
        if moves and permutation is not None and len(permutation) != len(_shape(value)):
            return None

        def make() -> Any:
            nodes, tensor = [], "q"
            if cast:
                nodes.append(helper.make_node("Cast", ["q"], ["r"], to=TensorProto.FLOAT))
                tensor = "r"
            if moves:
                nodes.append(helper.make_node("Transpose", [tensor], ["s"], perm=permutation))
                tensor = "s"
            kind = TensorProto.FLOAT16 if cast else TensorProto.FLOAT
            return _session(nodes, {"q": kind}, {tensor: TensorProto.FLOAT})

        session = self._opened(("prepare", cast, permutation if moves else None), make)
        if not isinstance(value, ort.OrtValue):
            value = ort.OrtValue.ortvalue_from_numpy(value)
        return session.run_with_ort_values(None, {"q": value})[0]

    # -- one sample ------------------------------------------------------------------------

    def sums(
        self, watches: Iterable[TensorWatch], reference: Tensors, actual: Tensors
    ) -> dict[str, SampleSums]:
        """What one sample adds to each pair, by its name, for those that can be reduced here.

        Left out, for `TensorWatch.add`: small tensors (ragged ones sooner), pairs under a mask, of
        integers, of other types than float32 and float16, with scales per channel or several Q/DQ
        pairs in a row, of different shapes, with NaN or infinity, and those whose squares float32
        cannot hold.

        Args:
            watches: of the pairs.
            reference: the float model's tensors.
            actual: the quantized model's.

        Raises:
            RunError: the runtime failed.
        """
        groups: dict[tuple[str, ...], list[_Item]] = {}
        found: dict[str, SampleSums] = {}
        with _told():
            for watch in watches:
                item = self._item(watch, reference, actual)
                if item is not None:
                    groups.setdefault(item.names, []).append(item)
            layouts = [(self._layout(items), items) for items in groups.values()]
            runs = [run for layout, _ in layouts for slot in layout.slots for run in slot.runs]
            self._run(runs, layouts)
            for layout, items in layouts:
                found |= self._read(layout, items)
        return found

    def _item(self, watch: TensorWatch, reference: Tensors, actual: Tensors) -> _Item | None:
        pair = watch.pair
        if pair.name not in reference or pair.after not in actual or not watch.reducible:
            return None
        shape = reference.shape_of(pair.name)
        size = math.prod(shape)
        last = self._shapes.setdefault(pair.name, shape)
        self._shapes[pair.name] = shape
        if size < (FEW if last == shape else RAGGED):
            return None
        x = self._prepared(reference.held(pair.name), None)
        codes = None if pair.permutation is not None else actual.codes_of(pair.after)
        if x is None:
            return None
        if codes is not None:
            y: Any = actual.held(codes.tensor)
        else:
            y = self._prepared(actual.held(pair.after), pair.permutation)
        if y is None:
            return None
        if _shape(y) != shape:
            return None
        q = None
        if watch.qparams is not None and pair.before and pair.before in actual:
            q = self._prepared(actual.held(pair.before), pair.permutation)
            if q is None:
                return None
            if _shape(q) != shape:
                q = None
        limits = self._limits.get(pair.name)
        if limits is None:
            limits = self._limits[pair.name] = _Limits.of(watch)
        if not limits.clamp[0] <= limits.clamp[1]:
            return None
        watch.meet(shape)
        axis = watch.kept_axis(shape, reference)
        names = _PAIR if q is None else limits.names
        cut = cut_of(shape, axis)
        # As many results as elements are no gain: numpy has them at hand.
        if 2 * cut.results * len(names) > size:
            return None
        return _Item(
            watch=watch,
            limits=limits,
            shape=shape,
            size=size,
            axis=axis,
            cut=cut,
            tensors=(x, y, q),
            addresses=(_address(x), _address(y), _address(q)),
            names=names,
            codes=codes,
        )

    def _layout(self, items: list[_Item]) -> _Layout:
        """Results and bindings for these pairs: those of the sample before where they still fit."""
        key = tuple(item.layout for item in items)
        layout = self._layouts.get(items[0].names)
        if layout is None or layout.key != key:
            layout = _Layout.of(items, key)
            self._layouts[layout.names] = layout
        for slot, at in zip(layout.slots, layout.order, strict=True):
            self._bind(slot, items[at])
        return layout

    def _bind(self, slot: _Slot, item: _Item) -> None:
        scale = 0 if item.codes is None else int(item.codes.scale.ctypes.data)
        place_of_all = (*item.addresses, scale)
        known = slot.known.get(place_of_all)
        if known is not None:
            slot.runs, slot.tiles = known
            return
        if len(slot.known) >= _KNOWN:
            slot.known.clear()
        slot.runs, slot.tiles = slot.known[place_of_all] = [], []
        cut, names = slot.cut, item.names
        kind, number = cut.kind, item.code_type
        session = self._opened((kind, names, number), lambda: _reducer(kind, names, number))
        width_of_y = 1 if number else 4
        limits = int(item.limits.memory.ctypes.data)
        x, y, q = item.addresses
        begin = 0
        for at, (groups, rows, width) in enumerate(cut.views):
            each = rows * width
            results = slot.columns[at] if slot.rows is None else slot.rows
            step = max(1, TILE // each)
            for first in range(0, groups, step):
                own = results[first : first + step]
                some, place = len(own), begin + first * each
                offset = 4 * place
                view = (some, rows, width)
                tile = (x + offset, y + width_of_y * place, q + offset if q else 0)
                inputs: list[tuple[str, int, Sequence[int]]] = [("x", tile[0], view)]
                inputs += item.y_inputs(tile[1], view)
                slot.tiles.append((tile, some * each, own))
                if q:
                    inputs.append(("q" if item.limits.clamped else "p", q + offset, view))
                if "q_sum" in names and names != _RECTIFIED:
                    inputs += [("least", limits, ()), ("most", limits + 4, ())]
                shape = (some, 1, len(names)) if slot.rows is not None else own.shape
                run = _bound(session, inputs, (int(own.ctypes.data), shape), item.code_dtype)
                slot.runs.append(run)
            begin += groups * each

    def _run(self, runs: Sequence[_Run], held: Any) -> None:
        """Runs, shared among the threads; `held` lives until all have ended."""
        if self._threads < 2 or len(runs) < 2:
            _run_all(runs, held)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
        shares = [runs[at :: self._threads] for at in range(self._threads)]
        for future in [self._pool.submit(_run_all, share, held) for share in shares]:
            future.result()

    # -- results ---------------------------------------------------------------------------

    @np.errstate(invalid="ignore", over="ignore")
    def _read(self, layout: _Layout, items: list[_Item]) -> dict[str, SampleSums]:
        """The sums of all pairs of a layout, without those that float32 may not have held."""
        all_figures = layout.figures()
        column = {name: all_figures[:, at] for at, name in enumerate(layout.names)}
        sizes, first = layout.sizes, layout.first
        tiny = np.repeat(_TINY * sizes / layout.channels, layout.channels)
        error = np.sqrt(column["ee_high"])
        largest = np.maximum(column["x_high"], -column["x_low"])
        bad = ~np.isfinite(all_figures).all(axis=1)
        bad |= (column["x2"] < tiny) & (largest > 0)
        bad |= (column["e2"] < tiny) & (column["e2"] > 0)
        doubtful = np.logical_or.reduceat(bad, first)
        # No noise at all, or squares below what float32 holds.
        equal = np.logical_or.reduceat(column["e2"] == 0, first)
        power = {
            name: np.add.reduceat(column[name], first)
            for name in ("x2", "y2", "e2", "p2", "d2")
            if name in column
        }
        x2, y2 = power["x2"], power["y2"]
        some = (x2 > 0) | (power["e2"] > 0)
        doubtful |= some & (y2 < _TINY * sizes)
        doubtful |= some & ((x2 > _RATIO * y2) | (y2 > _RATIO * x2))
        exact = clips = np.zeros(len(items), np.bool_)
        if "p2" in power:
            doubtful |= (power["p2"] < _TINY * sizes) & some
            exact = power["d2"] < _TINY * sizes
            clips = np.maximum.reduceat(column["p_high"], first) > layout.limits[1]
            if "p_low" in column:
                clips |= np.minimum.reduceat(column["p_low"], first) < layout.limits[0]
        clipped = self._clipped(
            {
                at: (items[layout.order[at]], layout.slots[at])
                for at in np.flatnonzero(clips & ~doubtful).tolist()
            }
        )
        dot = (column["x2"] + column["y2"] - column["e2"]) / 2
        most = np.maximum.reduceat(error, first)
        found = {}
        for at, slot in enumerate(layout.slots):
            item = items[layout.order[at]]
            begin = int(first[at])
            own = slice(begin, begin + int(layout.channels[at]))
            if doubtful[at] or (equal[at] and self._underflows(item, slot, own, column)):
                continue
            totals = ErrorTotals(
                signal=column["x2"][own],
                noise=column["e2"][own],
                actual_power=column["y2"][own],
                dot=dot[own],
                max_abs_error=float(most[at]),
                count=item.size,
            )
            low, high = column["x_low"][own], column["x_high"][own]
            if "p2" not in power:
                found[item.watch.pair.name] = SampleSums(totals=totals, low=low, high=high)
                continue
            if exact[at] and self._apart(item, slot):
                continue
            found[item.watch.pair.name] = SampleSums(
                totals=totals,
                low=low,
                high=high,
                local=np.array([power["p2"][at], power["d2"][at]]),
                clipped=clipped.get(at, (0, 0)),
                quantized=item.size,
            )
        return found

    def _looked_at(
        self,
        kind: str,
        make: Callable[[int], Any],
        limits: int,
        tiles: Sequence[tuple[_Item, _Tile]],
        figures: int,
    ) -> NDArray[np.float32]:
        """What another session makes of x, y, q and two limits of tiles, (tiles, figures)."""
        found, runs = np.zeros((len(tiles), figures), np.float32), []
        for row, (item, ((x, y, q), size, _)) in zip(found, tiles, strict=True):
            session = self._opened((kind, item.code_type), partial(make, item.code_type))
            low = int(item.limits.memory.ctypes.data) + 4 * limits
            known: list[tuple[str, int, Sequence[int]]] = [
                ("x", x, (size,)), *item.y_inputs(y, (size,)), ("q", q, (size,)),
                ("low", low, ()), ("high", low + 4, ()),
            ]  # fmt: skip
            names = {i.name for i in session.get_inputs()}
            inputs = [i for i in known if i[0] in names]
            result = int(row.ctypes.data), (figures,)
            runs.append(_bound(session, inputs, result, item.code_dtype))
        self._run(runs, found)
        return found

    def _underflows(
        self, item: _Item, slot: _Slot, own: slice, column: Mapping[str, NDArray[np.float64]]
    ) -> bool:
        """Whether a channel without noise has errors all the same, whose squares are too small."""
        dead = (column["x_high"][own] == 0) & (column["x_low"][own] == 0)
        if not ((column["e2"][own] == 0) & ~(dead & (column["y2"][own] == 0))).any():
            return False
        if (column["e2"][own] == 0).all():
            tiles = [(item, tile) for tile in slot.tiles]
            return bool(self._looked_at("far", _distance, 0, tiles, 1).any())
        # Which tile holds which channel is not worth to be known for so rare a case.
        x, y = (_array(t) for t in item.tensors[:2])
        if item.codes is not None:
            y = item.codes.values(y)
        same = (x == y).all(axis=tuple(a for a in range(x.ndim) if a != item.axis))
        return bool(((column["e2"][own] == 0) & ~same).any())

    def _apart(self, item: _Item, slot: _Slot) -> bool:
        """Whether the tensor before Q differs from the one after it at all."""
        tiles = [(item, tile) for tile in slot.tiles]
        return bool(self._looked_at("clamped", _clamped_distance, 0, tiles, 1).any())

    def _clipped(self, pairs: Mapping[int, tuple[_Item, _Slot]]) -> dict[int, tuple[int, int]]:
        """How many elements of each pair Q clips at each end, counted in tiles where it does."""
        tiles: list[tuple[_Item, _Tile]] = []
        owners = []
        for owner, (item, slot) in pairs.items():
            high = item.names.index("p_high")
            low = item.names.index("p_low") if "p_low" in item.names else None
            for (x, y, q), size, own in slot.tiles:
                # In float64: a limit rounded to float32 may hide what lies just beyond it.
                clipped = own[:, high] > np.float64(item.limits.high)
                if low is not None:
                    clipped |= own[:, low] < np.float64(item.limits.low)
                groups = np.flatnonzero(clipped.reshape(len(own), -1).any(axis=1))
                if groups.size:
                    # The groups from the first to the last one with such an element.
                    each, first = size // len(own), int(groups[0])
                    place = (x, y, q + 4 * each * first)
                    count = each * (int(groups[-1]) + 1 - first)
                    tiles.append((item, (place, count, own)))
                    owners.append(owner)
        found = dict.fromkeys(pairs, (0, 0))
        counts = self._looked_at("clip", lambda _: _clip_counter(), 2, tiles, 2)
        for owner, (below, above) in zip(owners, counts.astype(np.int64).tolist(), strict=True):
            known = found[owner]
            found[owner] = known[0] + below, known[1] + above
        return found

    def suspects(self, tensors: Tensors, names: Iterable[str]) -> set[str]:
        """Of some tensors, those that may hold NaN or infinity."""
        found = set()
        out = np.zeros(1, np.float32)
        for name in names:
            value = tensors.held(name)
            place = _place(value)
            size = math.prod(_shape(value))
            if place is None or place[1] in _CASTABLE:
                found.add(name)
            elif size:
                session = self._opened("sum", _summer)
                run = _bound(session, [("q", place[0], (size,))], (int(out.ctypes.data), (1,)))
                _run_all([run])
                if not np.isfinite(out[0]):
                    found.add(name)
        return found
