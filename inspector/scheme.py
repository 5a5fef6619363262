"""What quantization a file carries: its formats, and each quantized tensor with its parameters.

Reads the graph only; runs nothing. A *quantized tensor* is what one group of consumers reads:
a DequantizeLinear's output (QDQ), or an integer tensor with its scale and zero point
(QOperator, dynamic).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.qparams import INTEGER_DTYPES, QParams


class QuantFormat(StrEnum):
    """How a file says that it is quantized; a file can mix several."""

    FLOAT = "float"
    QDQ = "qdq"
    QOPERATOR = "qoperator"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight_only"


# Formats in which activations, too, become integers.
COMPUTES_IN_INTEGERS = frozenset({QuantFormat.QDQ, QuantFormat.QOPERATOR, QuantFormat.DYNAMIC})
Q, DQ = "QuantizeLinear", "DequantizeLinear"

# Inputs of QOperator nodes as (tensor, scale, zero point) positions; then the output's own
# (scale, zero point); None where the table says nothing about outputs.
_QOPERATORS: dict[str, tuple[tuple[tuple[int, int, int], ...], tuple[int, int]]] = {
    "QLinearConv": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearMatMul": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QGemm": (((0, 1, 2), (3, 4, 5)), (7, 8)),
    "QLinearAdd": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearMul": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearSigmoid": (((0, 1, 2),), (3, 4)),
    "QLinearLeakyRelu": (((0, 1, 2),), (3, 4)),
    "QLinearSoftmax": (((0, 1, 2),), (3, 4)),
    "QLinearAveragePool": (((0, 1, 2),), (3, 4)),
    "QLinearGlobalAveragePool": (((0, 1, 2),), (3, 4)),
    "QLinearReduceMean": (((0, 1, 2),), (3, 4)),
    "QLinearWhere": (((1, 2, 3), (4, 5, 6)), (7, 8)),
}
_DYNAMIC = frozenset(
    {
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
    }
)
_WEIGHT_ONLY = frozenset({"MatMulNBits", "GatherBlockQuantized", "MatMulBnb4"})
# Integer tensors keep their parameters through these.
_PASS_THROUGH = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather",
     "Resize", "Pad", "Expand", "Split", "Identity", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
QUANTIZATION_OPS = frozenset({Q, DQ, *_QOPERATORS, "QLinearConcat", *_DYNAMIC, *_WEIGHT_ONLY})


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedTensor:
    """One quantized tensor of a quantized model.

    Attributes:
        kind: "weight" (constant), "bias" (int32 constant) or "activation" (computed).
        quantized: the integer tensor; the float constant for a weight that goes through Q at run
            time (``AddQDQPairToWeight``, QAT exports).
        before: the float tensor that Q reads; None where the file holds only integers.
        after: the float tensor that consumers read; None where they read the integers.
        qparams: scale and zero point.
        consumers: names of the nodes that read it.
    """

    kind: str
    quantized: str
    before: str | None
    after: str | None
    qparams: QParams
    consumers: tuple[str, ...]

    @property
    def name(self) -> str:
        """What consumers read: `after`, else the integer tensor."""
        return self.after or self.quantized


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """The quantization of one file.

    Attributes:
        formats: every format found, `QuantFormat.FLOAT` alone where there is none.
        tensors: every quantized tensor, in graph order.
        skipped: quantization nodes whose parameters could not be read, with the reason.
    """

    formats: tuple[QuantFormat, ...]
    tensors: tuple[QuantizedTensor, ...]
    skipped: Mapping[str, str]

    @property
    def label(self) -> str:
        """The formats joined by ``+``, as in JSON."""
        return "+".join(self.formats)


def quant_formats(model: Model) -> tuple[QuantFormat, ...]:
    """Every quantization format in the main graph; `QuantFormat.FLOAT` alone where there is none.

    DequantizeLinear on constants alone, with no QuantizeLinear, stores weights as integers while
    every node computes in float: `QuantFormat.WEIGHT_ONLY`.
    """
    found = set()
    for node in model.nodes:
        if node.op_type == Q:
            found.add(QuantFormat.QDQ)
        elif node.op_type == DQ:
            stored = node.inputs[0] in model.constant_names
            found.add(QuantFormat.WEIGHT_ONLY if stored else QuantFormat.QDQ)
        elif node.op_type in _QOPERATORS or node.op_type == "QLinearConcat":
            found.add(QuantFormat.QOPERATOR)
        elif node.op_type in _DYNAMIC:
            found.add(QuantFormat.DYNAMIC)
        elif node.op_type in _WEIGHT_ONLY:
            found.add(QuantFormat.WEIGHT_ONLY)
    if QuantFormat.QDQ in found and not any(n.op_type in _WEIGHT_ONLY for n in model.nodes):
        found.discard(QuantFormat.WEIGHT_ONLY)
    if QuantFormat.QOPERATOR in found:
        # Its Q and DQ at the borders belong to the format.
        found.discard(QuantFormat.QDQ)
    return tuple(f for f in QuantFormat if f in found) or (QuantFormat.FLOAT,)


def _parameters(model: Model, scale_name: str, zero_name: str) -> tuple[Any, Any] | None:
    scale = model.constant(scale_name)
    zero = model.constant(zero_name) if zero_name else None
    if scale is None or (zero_name and zero is None):
        return None
    return scale, zero


def qparams_of(
    model: Model, quantized: str, scale_name: str, zero_name: str, *, axis: int | None, block: int
) -> QParams | None:
    """Parameters from constants of the graph; None where they are computed at run time."""
    found = _parameters(model, scale_name, zero_name)
    if found is None:
        return None
    scale, zero = found
    dtype = str(zero.dtype.name) if zero is not None else model.info(quantized).dtype
    if dtype == "unknown":
        dtype = "uint8"  # ONNX: Q without a zero point writes uint8
    if dtype not in INTEGER_DTYPES:
        return None
    scale = scale.astype(np.float64)
    if scale.size == 1 and not block:
        scale = scale.reshape(())
    zeros = (
        np.zeros(scale.shape, np.int64)
        if zero is None
        else zero.astype(np.int64).reshape(scale.shape)
    )
    per_axis = axis if scale.ndim else None
    if per_axis is not None and per_axis < 0:
        shape = model.info(quantized).shape
        if shape is None:
            return None
        per_axis += len(shape)
    return QParams(
        scale=scale, zero_point=zeros, dtype=dtype, axis=per_axis, block_size=block or None
    )


def _input(node: Node, position: int) -> str:
    return node.inputs[position] if position < len(node.inputs) else ""


def _names(nodes: tuple[Node, ...]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes)


def _kind(dtype: str, constant: bool) -> str:
    if not constant:
        return "activation"
    return "bias" if dtype == "int32" else "weight"


def _read_qdq(model: Model, tensors: list[QuantizedTensor], skipped: dict[str, str]) -> None:
    for node in model.nodes:
        if node.op_type != DQ:
            continue
        source = node.inputs[0]
        qparams = qparams_of(
            model,
            source,
            _input(node, 1),
            _input(node, 2),
            axis=int(node.attributes.get("axis", 1)),
            block=int(node.attributes.get("block_size", 0)),
        )
        if qparams is None:
            skipped[node.name] = "scale, zero point or element type cannot be read from the file"
            continue
        maker = model.producers.get(source)
        before = maker.inputs[0] if maker is not None and maker.op_type == Q else None
        kind = _kind(
            qparams.dtype, source in model.constant_names or before in model.constant_names
        )
        tensors.append(
            QuantizedTensor(
                kind=kind,
                quantized=source,
                before=before,
                after=node.outputs[0],
                qparams=qparams,
                consumers=_names(model.consumers.get(node.outputs[0], ())),
            )
        )


def _read_qoperator(model: Model, tensors: list[QuantizedTensor], skipped: dict[str, str]) -> None:
    known: dict[str, QParams] = {}

    def see(node: Node, tensor: str, scale: str, zero: str, axis: int | None = None) -> None:
        if tensor in known:
            return
        qparams = qparams_of(model, tensor, scale, zero, axis=axis, block=0)
        if qparams is None:
            skipped[node.name] = f"scale or zero point of {tensor} cannot be read from the file"
        else:
            known[tensor] = qparams

    for node in model.nodes:
        if node.op_type == Q:
            axis = int(node.attributes.get("axis", 1))
            see(node, node.outputs[0], _input(node, 1), _input(node, 2), axis)
        elif node.op_type == "QLinearConcat":
            for at in range(2, len(node.inputs) - 2, 3):
                see(node, node.inputs[at], node.inputs[at + 1], node.inputs[at + 2])
            see(node, node.outputs[0], node.inputs[0], node.inputs[1])
        elif node.op_type in _QOPERATORS:
            triples, (scale_at, zero_at) = _QOPERATORS[node.op_type]
            for number, positions in enumerate(triples):
                # A per-channel weight is the second triple; its channels are the outputs.
                outputs = {"QLinearConv": 0, "QLinearMatMul": 1, "QGemm": 1}.get(node.op_type)
                if node.op_type == "QGemm" and node.attributes.get("transB", 0):
                    outputs = 0
                tensor, scale, zero = (_input(node, at) for at in positions)
                see(node, tensor, scale, zero, outputs if number else None)
            bias_at = {"QLinearConv": 8, "QGemm": 6}.get(node.op_type, len(node.inputs))
            bias = _input(node, bias_at)
            if bias and _input(node, 0) in known and _input(node, 3) in known:
                # An int32 bias has no scale of its own: that of the products it is added to.
                steps = known[node.inputs[0]].scale * known[node.inputs[3]].scale
                known.setdefault(
                    bias,
                    QParams(
                        scale=steps, zero_point=np.zeros(steps.shape, np.int64), dtype="int32",
                        axis=0 if steps.ndim else None,
                    ),
                )  # fmt: skip
            if _input(node, scale_at):
                see(node, node.outputs[0], _input(node, scale_at), _input(node, zero_at))
        elif node.op_type in _PASS_THROUGH and node.inputs[0] in known:
            for output in node.outputs:
                known.setdefault(output, known[node.inputs[0]])
    for tensor, qparams in known.items():
        if not tensor:
            continue
        maker = model.producers.get(tensor)
        consumers = model.consumers.get(tensor, ())
        after = next((c.outputs[0] for c in consumers if c.op_type == DQ), None)
        tensors.append(
            QuantizedTensor(
                kind=_kind(qparams.dtype, tensor in model.constant_names),
                quantized=tensor,
                before=maker.inputs[0] if maker is not None and maker.op_type == Q else None,
                after=after if all(c.op_type == DQ for c in consumers) else None,
                qparams=qparams,
                consumers=_names(consumers),
            )
        )


def scale_names(model: Model) -> frozenset[str]:
    """Constants that are scales or zero points of quantization nodes, not weights."""
    found: set[str] = set()
    for node in model.nodes:
        if node.op_type in (Q, DQ):
            found.update(node.inputs[1:3])
        elif node.op_type == "QLinearConcat":
            found.update(node.inputs[:2])
            found.update(name for at, name in enumerate(node.inputs[2:]) if at % 3)
        elif node.op_type in _QOPERATORS:
            triples, outputs = _QOPERATORS[node.op_type]
            positions = (*outputs, *(at for triple in triples for at in triple[1:]))
            found.update(_input(node, at) for at in positions)
        elif node.op_type in _DYNAMIC:
            scale = _dynamic_weight_scale(model, node) if node.outputs else ""
            found.update((scale, *node.inputs[2:]))
    return frozenset(found)


def _dynamic_weight_scale(model: Model, node: Node) -> str:
    """The constant scale that multiplies a MatMulInteger's or ConvInteger's result."""
    tensor = node.outputs[0]
    for _ in range(4):
        following = model.consumers.get(tensor, ())
        if len(following) != 1 or following[0].op_type not in ("Cast", "Mul", "Reshape"):
            return ""
        step = following[0]
        if step.op_type == "Mul":
            for other in step.inputs:
                maker = model.producers.get(other)
                if other == tensor or maker is None or maker.op_type != "Mul":
                    continue
                constants = [i for i in maker.inputs if i in model.constant_names]
                if len(constants) == 1:
                    return constants[0]
            return ""
        tensor = step.outputs[0]
    return ""


def _read_dynamic(model: Model, tensors: list[QuantizedTensor], skipped: dict[str, str]) -> None:
    for node in model.nodes:
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            weight, scale, zero = (
                _input(node, 1),
                _dynamic_weight_scale(model, node),
                _input(node, 3),
            )
            axis = 0 if node.op_type == "ConvInteger" else -1
        elif node.op_type == "DynamicQuantizeMatMul":
            weight, scale, zero, axis = _input(node, 1), _input(node, 2), _input(node, 3), -1
        elif node.op_type == "MatMulIntegerToFloat":
            weight, scale, zero, axis = _input(node, 1), _input(node, 3), _input(node, 5), -1
        else:
            continue
        qparams = qparams_of(model, weight, scale, zero, axis=axis, block=0) if scale else None
        if qparams is None:
            skipped[node.name] = f"scale or zero point of {weight} cannot be read from the file"
            continue
        tensors.append(
            QuantizedTensor(
                kind="weight",
                quantized=weight,
                before=None,
                after=None,
                qparams=qparams,
                consumers=(node.name,),
            )
        )


def read_scheme(model: Model) -> Scheme:
    """The quantization of a file: its formats and every quantized tensor of the main graph."""
    formats = quant_formats(model)
    tensors: list[QuantizedTensor] = []
    skipped: dict[str, str] = {}
    if QuantFormat.QOPERATOR in formats:
        _read_qoperator(model, tensors, skipped)
    else:
        _read_qdq(model, tensors, skipped)
    if QuantFormat.DYNAMIC in formats:
        _read_dynamic(model, tensors, skipped)
    for node in model.nodes:
        if node.op_type in _WEIGHT_ONLY:
            skipped[node.name] = f"weights of {node.op_type} are not read yet"
    return Scheme(formats=formats, tensors=tuple(tensors), skipped=skipped)


def stored_values(model: Model, tensor: QuantizedTensor) -> NDArray[Any] | None:
    """The real values of a constant quantized tensor, float64; None for a computed one.

    A float constant that goes through Q at run time is quantized here the same way.
    """
    values = model.constant(tensor.quantized)
    if values is None and tensor.before is not None:
        real = model.constant(tensor.before)
        values = None if real is None else tensor.qparams.quantize(real)
    return None if values is None else tensor.qparams.dequantize(values)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeCounts:
    """How much of a file is quantized.

    Attributes:
        nodes: compute nodes, i.e. without Q, DQ and Constant.
        quantized_nodes: of those, integer operators, and nodes that read and write quantized
            tensors and have no float weight.
        weights: constants read by Conv, ConvTranspose, Gemm and MatMul (and their integer twins).
        quantized_weights: of those, the ones stored as integers or going through Q.
        op_types: compute nodes by op type, most frequent first.
        quantized_op_types: of the quantized nodes.
    """

    nodes: int
    quantized_nodes: int
    weights: int
    quantized_weights: int
    op_types: Mapping[str, int]
    quantized_op_types: Mapping[str, int]


_WEIGHTED = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


def count_scheme(model: Model, scheme: Scheme) -> SchemeCounts:
    """How many nodes and weights of a file are quantized."""
    plain = [n for n in model.nodes if n.op_type not in (Q, DQ, "Constant")]
    activations = [t for t in scheme.tensors if t.kind == "activation"]
    reads = {t.name for t in activations}
    writes = reads | {t.before for t in activations if t.before}

    def computes_in_integers(node: Node) -> bool:
        if node.op_type in QUANTIZATION_OPS:
            return True
        weights = [_input(node, at) for at in _WEIGHTED.get(node.op_type, ())]
        if any(model.info(w).dtype in FLOAT_DTYPES for w in weights if w in model.constant_names):
            return False
        return any(i in reads for i in node.inputs) and any(o in writes for o in node.outputs)

    quantized = [n for n in plain if computes_in_integers(n)]
    float_weights = {
        n.inputs[at]
        for n in plain
        for at in _WEIGHTED.get(n.op_type, ())
        if at < len(n.inputs)
        and n.inputs[at] in model.constant_names
        and model.info(n.inputs[at]).dtype in FLOAT_DTYPES
    }
    quantized_weights = {t.quantized for t in scheme.tensors if t.kind == "weight"}
    return SchemeCounts(
        nodes=len(plain),
        quantized_nodes=len(quantized),
        weights=len(float_weights | quantized_weights),
        quantized_weights=len(quantized_weights),
        op_types=dict(Counter(n.op_type for n in plain).most_common()),
        quantized_op_types=dict(Counter(n.op_type for n in quantized).most_common()),
    )
