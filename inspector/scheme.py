"""What quantization a file carries: its formats, and each quantized tensor with its parameters.

Reads the graph and its constants; runs nothing. A *quantized tensor* is what one group of
consumers reads: a DequantizeLinear's output (QDQ), an integer tensor with its scale and zero point
(QOperator, dynamic), or the packed weight of an operator that unpacks it (weight-only). Bodies of
If, Loop and Scan are read like the main graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.folding import DQ as DQ  # re-exported: the two names belong to the format
from inspector.folding import Q as Q
from inspector.folding import (
    code_dtype,
    constant_value,
    folded_from,
    folded_names,
    quantization_qparams,
)
from inspector.model import FLOAT_DTYPES, Body, Graph, Model, Node, TensorInfo
from inspector.qparams import QParams, qparams_from_constants


class QuantFormat(StrEnum):
    """How a file says that it is quantized; a file can mix several."""

    FLOAT = "float"
    QDQ = "qdq"
    QOPERATOR = "qoperator"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight_only"


# Formats in which activations, too, become integers.
COMPUTES_IN_INTEGERS = frozenset({QuantFormat.QDQ, QuantFormat.QOPERATOR, QuantFormat.DYNAMIC})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Operator:
    """Where an integer operator keeps its parameters.

    Attributes:
        tensors: (tensor, scale, zero point, channel axis of a per-channel scale) of each input;
            None as axis where only one scale is allowed.
        output: (scale, zero point) of the first output; None where it is float.
        bias: (bias, data, weight) of an int32 bias, which has no scale of its own.
    """

    tensors: tuple[tuple[int, int, int, int | None], ...]
    output: tuple[int, int] | None = None
    bias: tuple[int, int, int] | None = None


_ONE = _Operator(tensors=((0, 1, 2, None),), output=(3, 4))
_TWO = _Operator(tensors=((0, 1, 2, None), (3, 4, 5, None)), output=(6, 7))
QOPERATORS: dict[str, _Operator] = {
    "QLinearConv": _Operator(
        tensors=((0, 1, 2, None), (3, 4, 5, 0)), output=(6, 7), bias=(8, 0, 3)
    ),
    "QLinearMatMul": _Operator(tensors=((0, 1, 2, -2), (3, 4, 5, -1)), output=(6, 7)),
    "QGemm": _Operator(tensors=((0, 1, 2, None), (3, 4, 5, 1)), output=(7, 8), bias=(6, 0, 3)),
    "QLinearAdd": _TWO,
    "QLinearMul": _TWO,
    "QLinearSigmoid": _ONE,
    "QLinearLeakyRelu": _ONE,
    "QLinearSoftmax": _ONE,
    "QLinearAveragePool": _ONE,
    "QLinearGlobalAveragePool": _ONE,
    "QLinearReduceMean": _ONE,
    "QLinearWhere": _Operator(tensors=((1, 2, 3, None), (4, 5, 6, None)), output=(7, 8)),
    "QAttention": _Operator(tensors=((0, 3, 6, None), (1, 4, 7, 1))),
}
# Its inputs come in any number, the output's parameters first.
QCONCAT = "QLinearConcat"
# Constants stored as integers inside a float operator.
_QEMBED = _Operator(
    tensors=((2, 8, 13, None), (3, 9, 14, None), (4, 10, 15, None), (5, 11, 16, None),
             (6, 12, 17, None))
)  # fmt: skip
_STORES = {"QEmbedLayerNormalization": _QEMBED}
# Inputs of dynamic operators: the weights; the scale None where it stands behind the operator.
_DYNAMIC: dict[str, tuple[tuple[int, int | None, int, int], ...]] = {
    "DynamicQuantizeLinear": (),
    "MatMulInteger": ((1, None, 3, -1),),
    "ConvInteger": ((1, None, 3, 0),),
    "MatMulIntegerToFloat": ((1, 3, 5, -1),),
    "DynamicQuantizeMatMul": ((1, 2, 3, -1),),
    "DynamicQuantizeLSTM": ((1, 8, 9, -1), (2, 10, 11, -1)),
}
# Those that quantize a float input themselves.
_QUANTIZES_INPUT = frozenset(
    {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)
# Weight-only operators: packed weight, scales, zero points.
_WEIGHT_ONLY: dict[str, tuple[int, int, int]] = {
    "MatMulNBits": (1, 2, 3),
    "GatherBlockQuantized": (0, 2, 3),
}
# Weight-only operators in whose packing a weight cannot be shown as scale * (q - zero_point).
_NOT_READ: dict[str, str] = {
    "MatMulBnb4": "4-bit floats of bitsandbytes (FP4 or NF4) have no scale and zero point",
    "QMoE": "the packed weights of a mixture of experts are not read",
    "MatMulNBitsQkv": "the weights of this fused operator are not read",
    "MatMulNBitsMlp": "the weights of this fused operator are not read",
    "MatMulBlockQuantizedFp8Weight": "the block-scaled float8 weights are not read",
    "MatMulBlockQuantizedFp4Weight": "the block-scaled float4 weights are not read",
}
# Integer tensors keep their parameters through these.
_PASS_THROUGH = frozenset(
    {"MaxPool", "NhwcMaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice",
     "Gather", "GatherElements", "GatherND", "Resize", "Pad", "Expand", "Split", "Identity",
     "DepthToSpace", "SpaceToDepth", "Tile"}
)  # fmt: skip
# May stand between a Q and its DQ: a Clip narrows the codes (fewer bits than the type has).
BETWEEN = frozenset({"Identity", "Clip"})
QUANTIZATION_OPS = frozenset(
    {Q, DQ, *QOPERATORS, QCONCAT, *_STORES, *_DYNAMIC, *_WEIGHT_ONLY, *_NOT_READ}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedTensor:
    """One quantized tensor of a quantized model.

    Attributes:
        kind: "weight" (constant), "bias" (int32 constant) or "activation" (computed).
        quantized: the integer tensor, packed in weight-only operators; what Q writes for a float
            weight that goes through Q at run time (``AddQDQPairToWeight``, QAT exports).
        before: the float tensor that Q reads; None where the file holds only integers.
        after: the float tensor that consumers read; None where they read the integers.
        qparams: scale and zero point, in the layout of `stored_values` for packed weights.
        consumers: names of the nodes that read it.
        scope: path of the body (`Model.bodies`) it lies in, "" for the main graph.
        note: what has to be known, e.g. that Q and DQ carry different scales; "" for nothing.
        q_qparams: those of Q, where they are not the DQ's; they say what is clipped.
    """

    kind: str
    quantized: str
    before: str | None
    after: str | None
    qparams: QParams
    consumers: tuple[str, ...]
    scope: str = ""
    note: str = ""
    q_qparams: QParams | None = None

    @property
    def name(self) -> str:
        """What consumers read: `after`, else the integer tensor."""
        return self.after or self.quantized


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """The quantization of one file.

    Attributes:
        formats: every format found, `QuantFormat.FLOAT` alone where there is none.
        tensors: every quantized tensor, in graph order, the main graph before its bodies.
        skipped: quantization nodes whose parameters could not be read, with the reason; a node in
            a body as "<path of the body>/<node>".
        activations_at_run_time: float tensors that are quantized with parameters computed while
            the model runs, so that the file holds none.
    """

    formats: tuple[QuantFormat, ...]
    tensors: tuple[QuantizedTensor, ...]
    skipped: Mapping[str, str]
    activations_at_run_time: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The formats joined by ``+``, as in JSON."""
        return "+".join(self.formats)


class _View:
    """The main graph or one body, with look-ups by tensor."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.path = graph.path if isinstance(graph, Body) else ""
        self.nodes = graph.nodes
        self.producers = graph.producers
        self.folded = folded_names(graph)

    def value(self, tensor: str) -> NDArray[Any] | None:
        return constant_value(self.graph, tensor) if tensor else None

    def info(self, tensor: str) -> TensorInfo:
        """Type and shape; in a body those of constants only."""
        if isinstance(self.graph, Model):
            return self.graph.info(tensor)
        value = self.value(tensor) if tensor in self.folded else None
        if value is not None:
            return TensorInfo(name=tensor, dtype=value.dtype.name, shape=value.shape)
        return TensorInfo(name=tensor, dtype="unknown", shape=None)

    def stored(self, tensor: str) -> str | None:
        """The constant that a tensor is, or that it is taken from by moving elements alone."""
        for _ in range(8):
            if tensor in self.folded:
                return tensor
            node = self.producers.get(tensor)
            if node is None or node.op_type not in _PASS_THROUGH:
                return None
            tensor = node.inputs[0]
        return None

    def read_by(self, tensor: str) -> tuple[Node, ...]:
        return self.graph.consumers.get(tensor, ())

    def runtime_scale(self, scale: str) -> bool:
        """Whether a DynamicQuantizeLinear computes it."""
        maker = self.producers.get(scale)
        return maker is not None and maker.op_type == "DynamicQuantizeLinear"


def _views(model: Model) -> Iterator[_View]:
    yield _View(model)
    for body in model.bodies:
        yield _View(body)


def _input(node: Node, position: int) -> str:
    return node.inputs[position] if position < len(node.inputs) else ""


def _names(nodes: tuple[Node, ...]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes)


def _kind(dtype: str, constant: bool) -> str:
    if not constant:
        return "activation"
    return "bias" if dtype == "int32" else "weight"


def quant_formats(model: Model) -> tuple[QuantFormat, ...]:
    """Every quantization format in a file; `QuantFormat.FLOAT` alone where there is none.

    Constants stored as integers and dequantized, with no QuantizeLinear, while every node computes
    in float, are `QuantFormat.WEIGHT_ONLY`. A file of half-precision floats is `FLOAT`.
    """
    return _formats(tuple(_views(model)))


def _formats(views: tuple[_View, ...]) -> tuple[QuantFormat, ...]:
    found = set()
    stores = packed = False
    for view in views:
        for node in view.nodes:
            kind = node.op_type
            if kind not in QUANTIZATION_OPS:
                continue
            if kind == Q:
                found.add(QuantFormat.QDQ)
            elif kind == DQ:
                if view.stored(_input(node, 0)) is None:
                    found.add(QuantFormat.QDQ)
                stores = True
            elif kind in _DYNAMIC or (kind == "QAttention" and view.runtime_scale(_input(node, 3))):
                found.add(QuantFormat.DYNAMIC)
            elif kind in QOPERATORS or kind == QCONCAT:
                found.add(QuantFormat.QOPERATOR)
            elif kind in _STORES:
                stores = True
            else:
                packed = True
    if packed or (stores and not found):
        found.add(QuantFormat.WEIGHT_ONLY)
    if QuantFormat.QOPERATOR in found:
        # Its Q and DQ at the borders belong to the format.
        found.discard(QuantFormat.QDQ)
    return tuple(f for f in QuantFormat if f in found) or (QuantFormat.FLOAT,)


class _Unreadable(Exception):
    """Why a node's parameters are not known."""


def _qparams(
    view: _View, tensor: str, scale_name: str, zero_name: str, axis: int | None
) -> QParams:
    """Parameters of an integer operator's input or output.

    Raises:
        _Unreadable: they are computed at run time, or do not fit.
    """
    scale, zero = view.value(scale_name), view.value(zero_name)
    if scale is None or (zero_name and zero is None):
        raise _Unreadable(f"scale or zero point of {tensor} cannot be read from the file")
    info = view.info(tensor) if zero is None or scale.size != 1 else None
    dtype = zero.dtype.name if zero is not None else info.dtype if info is not None else "unknown"
    shape = info.shape if info is not None else None
    if scale.size != 1:
        # [1, N] and the like: one scale per column.
        scale = scale.reshape(-1)
        zero = zero.reshape(-1) if zero is not None else None
        if axis is None:
            raise _Unreadable(f"{tensor} has {scale.size} scales, expected one")
    try:
        return qparams_from_constants(scale, zero, dtype=dtype, shape=shape, axis=axis or 0)
    except ValueError as error:
        raise _Unreadable(f"{tensor}: {error}") from error


def _node_qparams(view: _View, node: Node) -> QParams:
    """Parameters of a Q or DQ node.

    Raises:
        _Unreadable: they are computed at run time, or do not fit.
    """
    tensor, zero_name = _input(node, 0), _input(node, 2)
    scale, zero = view.value(_input(node, 1)), view.value(zero_name)
    if scale is None or (zero_name and zero is None):
        raise _Unreadable("its scale or zero point is computed at run time")
    dtype = ""
    if zero is None:
        maker = view.producers.get(tensor)
        if node.op_type == Q:
            dtype = code_dtype(node)
        elif maker is not None and maker.op_type == Q and not _input(maker, 2):
            dtype = code_dtype(maker)
        else:
            dtype = view.info(tensor).dtype
    shape = view.info(tensor).shape if scale.size != 1 else None
    try:
        return quantization_qparams(node, scale, zero, dtype=dtype, shape=shape)
    except ValueError as error:
        raise _Unreadable(f"its parameters do not fit {tensor}: {error}") from error


class _Reader:
    """Collects the quantized tensors of one graph after another."""

    def __init__(self) -> None:
        self.tensors: list[QuantizedTensor] = []
        self.skipped: dict[str, str] = {}
        self.at_run_time: set[str] = set()

    def skip(self, view: _View, node: Node, reason: str) -> None:
        self.skipped[f"{view.path}/{node.name}" if view.path else node.name] = reason

    def add(
        self,
        view: _View,
        kind: str,
        quantized: str,
        qparams: QParams,
        consumers: tuple[Node, ...],
        *,
        before: str | None = None,
        after: str | None = None,
        note: str = "",
        q_qparams: QParams | None = None,
    ) -> None:
        self.tensors.append(
            QuantizedTensor(
                kind=kind, quantized=quantized, before=before, after=after, qparams=qparams,
                consumers=_names(consumers), scope=view.path, note=note, q_qparams=q_qparams,
            )
        )  # fmt: skip

    def read(self, view: _View, *, integers: bool) -> None:
        """Everything in one graph; `integers` where it has operators on integer tensors."""
        tables: set[str] = set()
        known = _Propagated(view, self) if integers else None
        for node in view.nodes:
            kind = node.op_type
            if kind == DQ and known is None:
                self._dequantized(view, node, tables)
            elif kind == Q:
                if not self._runtime_q(view, node) and known is None:
                    self._integers_of(view, node)
            elif kind in _DYNAMIC:
                self._dynamic(view, node)
            elif kind in _WEIGHT_ONLY:
                self._packed(view, node)
            elif kind in _NOT_READ:
                self.skip(view, node, _NOT_READ[kind])
        if known is not None:
            known.emit()

    # -- QDQ -----------------------------------------------------------------------------------

    def _runtime_q(self, view: _View, node: Node) -> bool:
        """Notes an activation whose Q gets its scale at run time."""
        if all(name in view.folded for name in node.inputs[1:3] if name):
            return False
        self.at_run_time.add(node.inputs[0])
        return True

    def _dequantized(self, view: _View, node: Node, tables: set[str]) -> None:
        source = node.inputs[0]
        if view.runtime_scale(_input(node, 1)):
            return  # its activation is named where a DynamicQuantizeLinear reads it
        try:
            qparams = _node_qparams(view, node)
        except _Unreadable as error:
            self.skip(view, node, str(error))
            return
        before, note, q_qparams = _before(view, node, qparams)
        constant = source in view.folded
        table = view.stored(source) if not constant and qparams.per_tensor else None
        if table is not None and table not in tables:
            # quantize_dynamic stores an embedding as integers and dequantizes what Gather took.
            tables.add(table)
            self.add(view, _kind(qparams.dtype, True), table, qparams, view.read_by(table))
        self.add(
            view, _kind(qparams.dtype, constant), source, qparams, view.read_by(node.outputs[0]),
            before=before, after=node.outputs[0], note=note, q_qparams=q_qparams,
        )  # fmt: skip

    def _integers_of(self, view: _View, node: Node) -> None:
        """A Q whose integers nobody dequantizes: a graph output, or read by integer operators."""
        consumers = view.read_by(node.outputs[0])
        if any(c.op_type in (DQ, *_PASS_THROUGH, *BETWEEN) for c in consumers):
            return
        try:
            qparams = _node_qparams(view, node)
        except _Unreadable as error:
            self.skip(view, node, str(error))
            return
        self.add(
            view, _kind(qparams.dtype, node.inputs[0] in view.folded), node.outputs[0], qparams,
            consumers, before=node.inputs[0],
        )  # fmt: skip

    # -- dynamic -------------------------------------------------------------------------------

    def _dynamic(self, view: _View, node: Node) -> None:
        if node.op_type in _QUANTIZES_INPUT:
            self.at_run_time.add(node.inputs[0])
        for at, scale_at, zero_at, axis in _DYNAMIC[node.op_type]:
            weight = _input(node, at)
            if weight not in view.folded:
                if not self._quantized_at_run_time(view, weight):
                    self.skip(view, node, f"{weight} is computed at run time, expected a constant")
                continue
            table = ""
            scale = _input(node, scale_at) if scale_at is not None else ""
            if scale_at is None:
                table, scale = _scales_behind(view, node)
            try:
                if node.op_type == "DynamicQuantizeLSTM":
                    qparams = _lstm_qparams(view, weight, scale, _input(node, zero_at))
                else:
                    qparams = _qparams(view, weight, scale, _input(node, zero_at), axis)
            except _Unreadable as error:
                self.skip(view, node, str(error))
                continue
            self.add(view, "weight", weight, qparams, (node,))
            if table:
                self._table(view, node, table)

    def _table(self, view: _View, node: Node, scale: str) -> None:
        """A constant whose elements a Gather picks for an integer product: an embedding."""
        table = view.stored(_input(node, 0))
        if table is None or any(t.quantized == table for t in self.tensors):
            return
        try:
            qparams = _qparams(view, table, scale, _input(node, 2), None)
        except _Unreadable as error:
            self.skip(view, node, str(error))
            return
        self.add(view, "weight", table, qparams, view.read_by(table))

    def _quantized_at_run_time(self, view: _View, tensor: str) -> bool:
        maker = view.producers.get(tensor)
        for _ in range(4):
            if maker is None or maker.op_type not in _PASS_THROUGH:
                break
            maker = view.producers.get(maker.inputs[0])
        return maker is not None and maker.op_type == "DynamicQuantizeLinear"

    # -- weight-only ---------------------------------------------------------------------------

    def _packed(self, view: _View, node: Node) -> None:
        try:
            qparams = _PACKED[node.op_type](view, node)[1]
        except _Unreadable as error:
            self.skip(view, node, str(error))
            return
        weight = _input(node, _WEIGHT_ONLY[node.op_type][0])
        self.add(view, "weight", weight, qparams, (node,))


def _before(view: _View, node: Node, qparams: QParams) -> tuple[str | None, str, QParams | None]:
    """The float tensor that the Q behind a DQ reads, and what is odd about the pair.

    Last the parameters of Q, where they are others.
    """
    note = ""
    maker = view.producers.get(node.inputs[0])
    for _ in range(4):
        if maker is None or maker.op_type not in BETWEEN:
            break
        if maker.op_type == "Clip":
            note = f"{maker.name} clips the codes between Q and DQ"
        maker = view.producers.get(maker.inputs[0])
    if maker is None or maker.op_type != Q:
        return None, "", None
    other = None
    if (*maker.inputs[1:], "")[:2] != (*node.inputs[1:], "")[:2]:
        try:
            own = _node_qparams(view, maker)
        except _Unreadable:
            return maker.inputs[0], f"the scale of {maker.name} is computed at run time", None
        if own.scale.shape != qparams.scale.shape or np.any(own.scale != qparams.scale):
            note, other = f"Q and DQ carry different scales ({maker.name}, {node.name})", own
        elif np.any(own.zero_point != qparams.zero_point):
            note, other = f"Q and DQ carry different zero points ({maker.name}, {node.name})", own
    return maker.inputs[0], note, other


def _scales_behind(view: _View, node: Node) -> tuple[str, str]:
    """The constant scales of both operands of a MatMulInteger or ConvInteger, "" for none.

    Its result is multiplied by both, at once (``a_scale * b_scale``) or one after the other. Where
    both are constant the order tells them apart: that of the operands.
    """
    tensor = node.outputs[0]
    found: list[str] = []
    scales = 0
    for _ in range(6):
        following = view.read_by(tensor)
        if len(following) != 1 or following[0].op_type not in ("Cast", "Mul", "Reshape"):
            break
        step = following[0]
        if step.op_type == "Mul":
            other = next((name for name in step.inputs if name != tensor), "")
            maker = view.producers.get(other)
            both = maker.inputs if maker is not None and maker.op_type == "Mul" else (other,)
            found += [name for name in both if not view.runtime_scale(name)]
            if any(name not in view.folded for name in found):
                return "", ""
            scales += len(both)
            if scales > 1:
                break  # what else is multiplied belongs to the model
        tensor = step.outputs[0]
    source = view.stored(_input(node, 0))
    maker = view.producers.get(_input(node, 0))
    if source is None and (maker is None or maker.op_type != Q):
        return "", found[0] if len(found) == 1 else ""
    own = _input(maker, 1) if maker is not None and maker.op_type == Q else ""
    if len(found) != 2 or own not in ("", *found):
        return "", ""
    return (found[0], found[1]) if own != found[1] else (found[1], found[0])


def _lstm_qparams(view: _View, weight: str, scale_name: str, zero_name: str) -> QParams:
    """Parameters in the float LSTM's layout [directions, 4*hidden, input], stored transposed.

    Raises:
        _Unreadable: they are computed at run time, or do not fit.
    """
    scale, zero, codes = view.value(scale_name), view.value(zero_name), view.value(weight)
    if scale is None or codes is None or codes.ndim != 3 or (zero_name and zero is None):
        raise _Unreadable(f"scale, zero point or shape of {weight} cannot be read from the file")
    shape = (codes.shape[0], codes.shape[2], codes.shape[1])
    dtype = zero.dtype.name if zero is not None else codes.dtype.name
    per_channel = scale.ndim == 2
    if per_channel:
        # Two axes have scales: as blocks that are as long as the third.
        scale = scale[:, :, None]
        zero = zero[:, :, None] if zero is not None else None
    try:
        return qparams_from_constants(
            scale, zero, dtype=dtype, shape=shape, axis=2 if per_channel else 0,
            block_size=max(1, shape[2]) if per_channel else 0,
        )  # fmt: skip
    except (ValueError, IndexError) as error:
        raise _Unreadable(f"{weight}: {error}") from error


def unpack_bits(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The codes in bytes of a last axis, low bits first: shape (..., n) to (..., n * 8 / bits).

    Args:
        packed: uint8.
        bits: 2, 4 or 8.
    """
    if bits == 8:
        return packed.astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(codes.reshape(*packed.shape[:-1], -1), np.uint8)


def _matmul_nbits(view: _View, node: Node) -> tuple[Callable[[], NDArray[Any]], QParams]:
    """Codes in the float MatMul's layout [K, N], computed when asked, and their parameters.

    Raises:
        _Unreadable: they are computed at run time, reordered by group, or do not fit.
    """
    get = node.attributes.get
    rows, columns = int(get("K", 0)), int(get("N", 0))
    bits, block = int(get("bits", 4)), int(get("block_size", 0))
    weight = _input(node, 1)
    scale, zero_name = view.value(_input(node, 2)), _input(node, 3)
    zero = view.value(zero_name)
    if _input(node, 4):
        raise _Unreadable(f"{weight} is reordered by groups (g_idx), which is not read")
    if int(get("weight_prepacked", 0)):
        raise _Unreadable(f"{weight} is packed for one kind of GPU, which is not read")
    if bits not in (2, 4, 8) or block < 1 or rows < 1 or columns < 1:
        raise _Unreadable(
            f"{weight}: bits={bits}, block_size={block}, K={rows}, N={columns}, expected 2, 4 or 8 "
            "bits and positive sizes"
        )
    if weight not in view.folded or scale is None or (zero_name and zero is None):
        raise _Unreadable(f"the weight or its scales ({weight}) are computed at run time")
    blocks = -(-rows // block)
    if scale.size != columns * blocks:
        raise _Unreadable(
            f"{weight}: {scale.size} scales, expected N * blocks = {columns}x{blocks}"
        )
    zeros: NDArray[Any]
    if zero is None:
        zeros = np.full((columns, blocks), 2 ** (bits - 1), np.int64)
    elif zero.dtype == np.uint8:
        zeros = unpack_bits(zero.reshape(columns, -1), bits)[:, :blocks].astype(np.int64)
    else:
        zeros = zero.astype(np.float64).reshape(columns, -1)  # fractions of a step are allowed
    if zeros.shape != (columns, blocks):
        raise _Unreadable(f"{weight}: zero points of shape {zeros.shape}, expected N x blocks")

    def codes() -> NDArray[Any]:
        packed = view.value(weight)
        assert packed is not None
        return unpack_bits(packed.reshape(columns, -1), bits)[:, :rows].T

    qparams = QParams(
        scale=scale.astype(np.float64).reshape(columns, blocks).T,
        zero_point=zeros.T, dtype=f"uint{bits}", axis=0, block_size=block,
    )  # fmt: skip
    return codes, qparams


def _gather_block(view: _View, node: Node) -> tuple[Callable[[], NDArray[Any]], QParams]:
    """Codes in the float Gather's layout, computed when asked, and their parameters.

    Raises:
        _Unreadable: they are computed at run time, or do not fit.
    """
    get = node.attributes.get
    table, zero_name = _input(node, 0), _input(node, 3)
    scale, zero, packed = view.value(_input(node, 2)), view.value(zero_name), view.value(table)
    if scale is None or packed is None or (zero_name and zero is None):
        raise _Unreadable(f"the table or its scales ({table}) are computed at run time")
    bits, block, dtype = int(get("bits", 4)), int(get("block_size", 128)), packed.dtype.name
    if dtype == "uint8":
        if bits not in (2, 4, 8):
            raise _Unreadable(f"{table}: {bits} bits, expected 2, 4 or 8")
        dtype = f"uint{bits}"
        if zero is None:
            zero = np.array(2 ** (bits - 1), np.uint8)
        elif bits < 8:
            zero = unpack_bits(zero, bits)[..., : scale.shape[-1] if scale.ndim else 1]

    def codes() -> NDArray[Any]:
        stored = view.value(table)
        assert stored is not None
        return unpack_bits(stored, bits) if stored.dtype == np.uint8 else stored

    shape = (*packed.shape[:-1], packed.shape[-1] * (8 // bits if packed.dtype == np.uint8 else 1))
    axis = int(get("quantize_axis", 1))
    axis += len(shape) if axis < 0 else 0
    if 0 <= axis < len(shape) and scale.ndim == len(shape):
        block = block or shape[axis]
        # One scale for all rows is allowed for float8 and float4.
        wanted = (*shape[:axis], scale.shape[axis], *shape[axis + 1 :])
        if dtype.startswith("float") and scale.shape != wanted:
            scale = np.broadcast_to(scale, wanted) if 1 in scale.shape else scale
    try:
        qparams = qparams_from_constants(
            scale, zero, dtype=dtype, shape=shape, axis=axis, block_size=block
        )
    except ValueError as error:
        raise _Unreadable(f"{table}: {error}") from error
    return codes, qparams


_PACKED: dict[str, Callable[[_View, Node], tuple[Callable[[], NDArray[Any]], QParams]]] = {
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_block,
}


class _Propagated:
    """Parameters of integer tensors: as operators declare them, then along what moves elements."""

    def __init__(self, view: _View, reader: _Reader) -> None:
        self.view = view
        self.reader = reader
        self.known: dict[str, QParams] = {}
        for node in view.nodes:
            self._declared(node)
        for node in view.nodes:
            self._moved(node.inputs[:1], node.outputs, node)
        for node in reversed(view.nodes):
            self._moved(node.outputs[:1], node.inputs[:1], node)

    def _moved(self, sources: tuple[str, ...], targets: tuple[str, ...], node: Node) -> None:
        if node.op_type not in _PASS_THROUGH or not sources or sources[0] not in self.known:
            return
        qparams = self.known[sources[0]]
        if qparams.per_tensor:  # a channel axis may have moved
            for target in filter(None, targets):
                self.known.setdefault(target, qparams)

    def _see(self, node: Node, tensor: str, scale: str, zero: str, axis: int | None) -> None:
        if not tensor or tensor in self.known or self.view.runtime_scale(scale):
            return
        try:
            self.known[tensor] = _qparams(self.view, tensor, scale, zero, axis)
        except _Unreadable as error:
            self.reader.skip(self.view, node, str(error))

    def _declared(self, node: Node) -> None:
        kind = node.op_type
        if kind in (Q, DQ):
            tensor = node.outputs[0] if kind == Q else node.inputs[0]
            if tensor in self.known or self.view.runtime_scale(_input(node, 1)):
                return
            try:
                self.known[tensor] = _node_qparams(self.view, node)
            except _Unreadable as error:
                self.reader.skip(self.view, node, str(error))
        elif kind == QCONCAT:
            for at in range(2, len(node.inputs) - 2, 3):
                self._see(node, node.inputs[at], node.inputs[at + 1], node.inputs[at + 2], None)
            self._see(node, node.outputs[0], _input(node, 0), _input(node, 1), None)
        elif (operator := QOPERATORS.get(kind) or _STORES.get(kind)) is not None:
            for at, scale_at, zero_at, columns in operator.tensors:
                transposed = kind == "QGemm" and node.attributes.get("transB", 0)
                axis = 0 if transposed and columns is not None else columns
                tensor, scale, zero = (_input(node, i) for i in (at, scale_at, zero_at))
                self._see(node, tensor, scale, zero, axis)
            if operator.bias is not None:
                self._bias(node, *(_input(node, at) for at in operator.bias))
            if operator.output is not None and _input(node, operator.output[0]):
                scale, zero = (_input(node, at) for at in operator.output)
                self._see(node, node.outputs[0], scale, zero, None)

    def _bias(self, node: Node, bias: str, data: str, weight: str) -> None:
        if not bias or data not in self.known or weight not in self.known:
            return
        # An int32 bias has no scale of its own: that of the products it is added to.
        alpha = float(node.attributes.get("alpha", 1.0)) if node.op_type == "QGemm" else 1.0
        steps = alpha * self.known[data].scale * self.known[weight].scale
        rank = len(self.view.info(bias).shape or (1,))
        self.known.setdefault(
            bias,
            QParams(
                scale=steps, zero_point=np.zeros(steps.shape, np.int64), dtype="int32",
                axis=max(rank - 1, 0) if steps.ndim else None,
            ),
        )  # fmt: skip

    def emit(self) -> None:
        """One tensor per DQ where only DQs read the integers, else one for all readers."""
        view, add = self.view, self.reader.add

        def place(tensor: str) -> int:
            maker = view.producers.get(tensor)
            around = (maker, *view.read_by(tensor)[:1])
            return max((node.index for node in around if node is not None), default=-1)

        for tensor in sorted(self.known, key=place):
            qparams, consumers = self.known[tensor], view.read_by(tensor)
            kind = _kind(qparams.dtype, tensor in view.folded)
            maker = view.producers.get(tensor)
            before = maker.inputs[0] if maker is not None and maker.op_type == Q else None
            if not consumers or any(c.op_type != DQ for c in consumers):
                add(view, kind, tensor, qparams, consumers, before=before)
                continue
            for node in consumers:
                try:
                    own = _node_qparams(view, node)
                except _Unreadable as error:
                    self.reader.skip(view, node, str(error))
                    continue
                before, note, q_qparams = _before(view, node, own)
                after = node.outputs[0]
                add(
                    view, kind, tensor, own, view.read_by(after), before=before, after=after,
                    note=note, q_qparams=q_qparams,
                )  # fmt: skip


def read_scheme(model: Model) -> Scheme:
    """The quantization of a file: its formats and every quantized tensor, bodies included.

    Takes time and memory in proportion to the number of nodes.
    """
    views = tuple(_views(model))
    reader = _Reader()
    for view in views:
        integers = any(
            n.op_type in QOPERATORS or n.op_type in _STORES or n.op_type == QCONCAT
            for n in view.nodes
        )
        reader.read(view, integers=integers)
    return Scheme(
        formats=_formats(views),
        tensors=tuple(reader.tensors),
        skipped=reader.skipped,
        activations_at_run_time=frozenset(reader.at_run_time),
    )


def stored_values(model: Model, tensor: QuantizedTensor) -> NDArray[np.float64] | None:
    """The real values of a constant quantized tensor, float64; None for a computed one.

    In the layout of the float weight: [K, N] for MatMulNBits, [rows, columns] for
    GatherBlockQuantized, [directions, 4*hidden, input] for DynamicQuantizeLSTM. A float constant
    that goes through Q at run time is quantized here the same way.
    """
    view = next((v for v in _views(model) if v.path == tensor.scope), None)
    if view is None or tensor.quantized not in view.folded:
        return None
    reader = next((n for n in view.read_by(tensor.quantized) if n.name in tensor.consumers), None)
    if reader is not None and reader.op_type in _PACKED:
        return tensor.qparams.dequantize(_PACKED[reader.op_type](view, reader)[0]())
    codes = view.value(tensor.quantized)
    if codes is None:
        return None
    if reader is not None and reader.op_type == "DynamicQuantizeLSTM":
        codes = np.swapaxes(codes, 1, 2)
    return tensor.qparams.dequantize(codes)


def scale_names(model: Model) -> frozenset[str]:
    """Constants that are scales or zero points of quantization nodes, not weights."""
    found: set[str] = set()
    for view in _views(model):
        names: set[str] = set()
        for node in view.nodes:
            if node.op_type in QUANTIZATION_OPS:
                names.update(_parameter_names(view, node))
        for name in names & view.folded:
            found.update((name, *folded_from(view.graph, name)))
    return frozenset(found)


def _parameter_names(view: _View, node: Node) -> Iterator[str]:
    kind = node.op_type
    if kind in (Q, DQ):
        yield from node.inputs[1:3]
    elif kind == QCONCAT:
        yield from node.inputs[:2]
        yield from (name for at, name in enumerate(node.inputs[2:]) if at % 3)
    elif (operator := QOPERATORS.get(kind) or _STORES.get(kind)) is not None:
        for port in operator.tensors:
            yield from (_input(node, at) for at in port[1:3])
        yield from (_input(node, at) for at in operator.output or ())
    elif kind in _DYNAMIC:
        for _, scale_at, zero_at, _ in _DYNAMIC[kind]:
            if scale_at is None:
                yield from _scales_behind(view, node)
            else:
                yield _input(node, scale_at)
            yield _input(node, zero_at)
        if kind in ("MatMulInteger", "ConvInteger"):
            yield _input(node, 2)
        elif kind == "MatMulIntegerToFloat":
            yield from (_input(node, 2), _input(node, 4))
    elif kind in _WEIGHT_ONLY:
        yield from (_input(node, at) for at in _WEIGHT_ONLY[kind][1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeCounts:
    """How much of a file is quantized, bodies of If, Loop and Scan included.

    Attributes:
        nodes: compute nodes, i.e. without Q, DQ and Constant.
        quantized_nodes: of those, integer operators, and nodes that read and write quantized
            tensors and have no float weight.
        weights: constants read by Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU, RNN, Attention (and
            their integer twins), and embedding tables that are stored as integers.
        quantized_weights: of those, the ones stored as integers or going through Q.
        op_types: compute nodes by op type, most frequent first.
        quantized_op_types: of the quantized nodes.
        weight_dtypes: weights by the element type that stores them, e.g. ``"int8"``; a file of
            half-precision floats shows here, and nowhere else.
    """

    nodes: int
    quantized_nodes: int
    weights: int
    quantized_weights: int
    op_types: Mapping[str, int]
    quantized_op_types: Mapping[str, int]
    weight_dtypes: Mapping[str, int] = field(default_factory=dict)


_WEIGHTED = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1), "LSTM": (1, 2),
    "GRU": (1, 2), "RNN": (1, 2), "Attention": (1,), "FusedConv": (1,), "FusedGemm": (0, 1),
    "FusedMatMul": (0, 1),
}  # fmt: skip


_LAYOUT = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
# What an integer kernel does along with its node.
_RECTIFIERS = frozenset({"Relu", "Clip"})


def count_scheme(model: Model, scheme: Scheme) -> SchemeCounts:
    """How many nodes and weights of a file are quantized."""
    plain: list[Node] = []
    quantized: list[Node] = []
    dtypes: dict[tuple[str, str], str] = {}
    stored = {(t.scope, t.quantized): t for t in scheme.tensors if t.kind == "weight"}
    for view in _views(model):
        here = [t for t in scheme.tensors if t.scope == view.path]
        activations = [t for t in here if t.kind == "activation"]
        reads = {t.name for t in activations}
        writes = reads | {t.before for t in activations if t.before}
        # A layout that is moved between DQ and its reader, or a rectifier between a node and its
        # Q, changes nothing for the node: some exporters write both.
        for node in view.nodes:
            if node.op_type in _LAYOUT and reads.intersection(node.inputs[:1]):
                reads.update(node.outputs)
        for node in reversed(view.nodes):
            if node.op_type in _RECTIFIERS and writes.intersection(node.outputs):
                reads.update(node.inputs[:1])
                writes.update(node.inputs[:1])
        constants = {t.name for t in here if t.kind != "activation"}
        nodes = [n for n in view.nodes if n.op_type not in (Q, DQ, "Constant")]
        plain += nodes
        for node in nodes:
            floats = []
            for at in _WEIGHTED.get(node.op_type, ()):
                floats += _float_weights(view, _input(node, at), constants)
            for name in floats:
                dtypes[view.path, name] = view.info(name).dtype
            if node.op_type in QUANTIZATION_OPS or (
                not floats
                and any(i in reads for i in node.inputs)
                and any(o in writes for o in node.outputs)
            ):
                quantized.append(node)
    dtypes |= {key: tensor.qparams.dtype for key, tensor in stored.items()}
    return SchemeCounts(
        nodes=len(plain),
        quantized_nodes=len(quantized),
        weights=len(dtypes),
        quantized_weights=len(stored),
        op_types=dict(Counter(n.op_type for n in plain).most_common()),
        quantized_op_types=dict(Counter(n.op_type for n in quantized).most_common()),
        weight_dtypes=dict(Counter(dtypes.values()).most_common()),
    )


def _float_weights(view: _View, tensor: str, quantized: set[str]) -> list[str]:
    """The float constants a weight is computed from; none where it comes out of a DQ."""
    if tensor not in view.folded:
        return []
    waiting, seen, found = [tensor], set(quantized), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        node = view.producers.get(name)
        if node is not None and node.op_type != "Constant":
            waiting += [i for i in node.inputs if i]
        elif view.info(name).dtype in FLOAT_DTYPES:
            found.append(name)
    return found
