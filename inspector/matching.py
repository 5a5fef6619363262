"""Which tensor is which in two models: by names and graph edges, then by structure.

Runs nothing. ONNX Runtime's quantizer keeps most names, but not all of them mean the same: a
Relu or Clip that was folded into a QuantizeLinear leaves its name on the tensor *before* it
was rectified, graph outputs are renamed, and pre-processing folds BatchNormalization into the Conv
before it. Each pair says which rule found it, and every float tensor without a partner says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.comparison import Unmatched
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.qparams import QParams
from inspector.scheme import (
    DQ,
    Q,
    QuantFormat,
    QuantizedTensor,
    Scheme,
    qparams_of,
    read_scheme,
    scale_names,
)

RECTIFIERS = frozenset({"Relu", "Clip"})
_SUFFIXES = ("_QuantizeLinear_Input", "_QuantizeInput", "_quantized", "_DequantizeLinear_Output")
_CHANNELS_FIRST = frozenset(
    {"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
     "LRN"}
)  # fmt: skip
# A channel axis survives these from their first input (the first with a rank for binary ones).
_KEEPS_AXIS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu",
     "Selu", "Gelu", "Softplus", "Mish", "Add", "Sub", "Mul", "Div", "Max", "Min", "MaxPool",
     "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "Resize", "Upsample", "Pad",
     "Dropout", "Identity", "Cast", "Softmax", "LogSoftmax", "Exp", "Sqrt", "Pow", "Abs", "Neg",
     Q, DQ}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationPair:
    """A computed float tensor and the tensor of the quantized model that stands for it.

    Attributes:
        name: the float model's tensor.
        node: the float model's node that computes it, None for a graph input.
        before: the quantized model's tensor that Q reads; None without a Q/DQ pair.
        after: the quantized model's tensor that consumers read (integers where `integers`).
        integers: `after` holds integers, to be dequantized with `qparams`.
        qparams: None where it was left in float.
        rectifier: the float model's Relu or Clip that was folded into Q; `before` lacks it.
        matched_by: "name" or "structure".
        note: what has to be known, "" for nothing.
    """

    name: str
    node: Node | None
    before: str | None
    after: str
    integers: bool
    qparams: QParams | None
    rectifier: Node | None
    matched_by: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPair:
    """A constant of the float model and what the quantized model reads in its place.

    Attributes:
        name: the float model's tensor.
        node: the float model's first node that reads it.
        kind: "weight" or "bias".
        quantized: the quantized tensor; None where it was left in float under `quantized_name`.
        quantized_name: the quantized model's constant.
        reference: gives the float values, after the same fold where there was one.
        channel_axis: output-channel axis, None where the node has none.
        matched_by: "name" or "structure".
        note: what has to be known, "" for nothing.
    """

    name: str
    node: Node
    kind: str
    quantized: QuantizedTensor | None
    quantized_name: str
    reference: Callable[[], NDArray[Any]]
    channel_axis: int | None
    matched_by: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """All pairs of two models, and what has none.

    Attributes:
        scheme: of the quantized model.
        activations: in topological order of the float model, graph inputs first.
        weights: in order of their float nodes.
        outputs: float output name -> quantized output name.
        inputs: float input name -> quantized input name.
        unmatched: everything else, with its reason.
        notes: sentences to show beside the result.
    """

    scheme: Scheme
    activations: tuple[ActivationPair, ...]
    weights: tuple[WeightPair, ...]
    outputs: dict[str, str]
    inputs: dict[str, str]
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...]


def rectify(values: NDArray[Any], rectifier: Node | None, model: Model) -> NDArray[Any]:
    """`values` after the float model's Relu or Clip; unchanged without one."""
    if rectifier is None:
        return values
    if rectifier.op_type == "Relu":
        return np.asarray(np.maximum(values, 0))
    low, high = clip_limits(rectifier, model)
    return np.asarray(np.clip(values, low, high))


def clip_limits(clip: Node, model: Model) -> tuple[float, float]:
    """A Clip's limits from its attributes (opset < 11) or constant inputs; infinite if absent."""
    limits = []
    for position, key, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        limit: Any = clip.attributes.get(key, default)
        if position < len(clip.inputs) and clip.inputs[position]:
            constant = model.constant(clip.inputs[position])
            limit = default if constant is None else constant
        limits.append(float(np.asarray(limit).reshape(-1)[0]))
    return limits[0], limits[1]


def constant_value(model: Model, tensor: str, _depth: int = 0) -> NDArray[Any] | None:
    """The value of a constant, through DequantizeLinear, Identity, Cast and Transpose of constants.

    None for a computed tensor.
    """
    value = model.constant(tensor)
    if value is not None or _depth > 8:
        return value
    node = model.producers.get(tensor)
    if node is None or not node.inputs:
        return None
    source = constant_value(model, node.inputs[0], _depth + 1)
    if source is None:
        return None
    if node.op_type in ("Identity", "Cast"):
        return source
    if node.op_type == "Transpose":
        return np.transpose(source, node.attributes.get("perm"))
    if node.op_type == DQ:
        qparams = qparams_of(
            model,
            node.inputs[0],
            node.inputs[1],
            node.inputs[2] if len(node.inputs) > 2 else "",
            axis=int(node.attributes.get("axis", 1)),
            block=int(node.attributes.get("block_size", 0)),
        )
        return None if qparams is None else qparams.dequantize(source).astype(np.float32)
    return None


def weight_channel_axis(node: Node, position: int, rank: int) -> int | None:
    """The output-channel axis of a constant at an input of a node; None where it has none."""
    if rank == 0:
        return None
    if position == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        return rank - 1
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm" and position == 1:
        return 0 if node.attributes.get("transB", 0) else 1
    if node.op_type == "MatMul":
        return rank - 1 if position == 1 else (rank - 2 if rank > 1 else None)
    return None


def _keeps_first_axes(model: Model, node: Node) -> bool:
    """A Concat along a later axis, or a Reshape that leaves batch and channels as they are."""
    if node.op_type == "Concat":
        return int(node.attributes.get("axis", 1)) not in (0, 1)
    if node.op_type != "Reshape":
        return False
    before, after = (model.info(t).shape for t in (node.inputs[0], node.outputs[0]))
    return before is not None and after is not None and before[:2] == after[:2] != ()


def activation_channel_axis(model: Model, tensor: str, rank: int) -> int | None:
    """The channel axis of an activation: a Concat's own, 1 behind Conv-like producers, else last.

    None for a scalar.
    """
    if rank == 0:
        return None
    node = model.producers.get(tensor)
    if node is not None and node.op_type == "Concat":
        axis = int(node.attributes.get("axis", 1))
        return axis % rank if -rank <= axis < rank else rank - 1
    for _ in range(64):
        if node is None:
            break
        if node.op_type in _CHANNELS_FIRST:
            return 1 if rank > 1 else 0
        if node.op_type not in _KEEPS_AXIS and not _keeps_first_axes(model, node):
            break
        following = [model.producers.get(i) for i in node.inputs if i not in model.constant_names]
        node = next((n for n in following if n is not None), None)
    return rank - 1


class _Matcher:
    def __init__(self, float_model: Model, quantized_model: Model) -> None:
        self.f = float_model
        self.q = quantized_model
        self.scheme = read_scheme(quantized_model)
        self.notes: list[str] = []
        self.loners: list[Unmatched] = []
        self.q_tensors = (
            set(self.q.producers) | set(self.q.constant_names) | {i.name for i in self.q.inputs}
        )
        # Float name -> the quantized tensor whose Q reads it (or whose integers carry its name).
        self.by_base: dict[str, QuantizedTensor] = {}
        q_outputs = {o.name for o in self.q.outputs}
        for tensor in self.scheme.tensors:
            if tensor.kind != "activation":
                continue
            names = [n for n in (tensor.before, tensor.after, tensor.quantized) if n]
            for name in names:
                self.by_base.setdefault(name, tensor)
                for suffix in _SUFFIXES:
                    if name.endswith(suffix):
                        self.by_base.setdefault(name.removesuffix(suffix), tensor)
            if tensor.after in q_outputs:
                self.by_base[tensor.after] = tensor

    # -- activations ---------------------------------------------------------------------------

    def activations(self, outputs: Mapping[str, str]) -> list[ActivationPair]:
        """Pairs by name, and graph outputs of another name by their position."""
        f = self.f
        names = [i.name for i in f.inputs]
        names += [o for n in f.nodes if n.op_type != "Constant" for o in n.outputs if o]
        pairs: dict[str, ActivationPair] = {}
        for name in names:
            known = name in self.by_base or name in self.q_tensors
            if known and constant_value(f, name) is None:
                behind = self._folded_behind(name)
                if behind is None:
                    pairs[name] = self._pair(name)
                else:
                    pairs[behind.outputs[0]] = replace(
                        self._pair(name), name=behind.outputs[0], node=behind, rectifier=behind,
                        matched_by="structure", note=f"{behind.op_type} is folded into Q",
                    )  # fmt: skip
            elif name in outputs:
                pairs[name] = replace(
                    self._pair(outputs[name]), name=name, node=f.producers.get(name),
                    matched_by="structure",
                )  # fmt: skip
        for name in names:
            floating = f.info(name).dtype in (*FLOAT_DTYPES, "unknown")
            if name not in pairs and floating and constant_value(f, name) is None:
                reason = self._why_missing(name, pairs)
                self.loners.append(
                    Unmatched(name=name, kind="activation", model="float", reason=reason)
                )
        order = {name: at for at, name in enumerate(names)}
        return sorted(pairs.values(), key=lambda pair: order[pair.name])

    def _folded_behind(self, name: str) -> Node | None:
        """The float Relu or Clip that reads `name` alone and is gone from the quantized model.

        Other writers (QOperator, older quantizers) keep the name before the rectifier.
        """
        consumers = self.f.consumers.get(name, ())
        if name not in self.by_base or len(consumers) != 1:
            return None
        node = consumers[0]
        gone = node.outputs[0] not in self.q_tensors and node.outputs[0] not in self.by_base
        kept = self.q.node_by_name.get(node.name)
        if node.op_type not in RECTIFIERS or not gone or kept is not None:
            return None
        return node

    def _folded_rectifier(self, name: str, before: str | None) -> Node | None:
        """The float Relu or Clip that computes `name`, where the quantized model left it to Q.

        ONNX Runtime's quantizer gives the rectifier's output name to the tensor before it.
        """
        node = self.f.producers.get(name)
        if node is None or node.op_type not in RECTIFIERS or before is None:
            return None
        maker = self.q.producers.get(before)
        return None if maker is not None and maker.op_type in RECTIFIERS else node

    def _pair(self, name: str) -> ActivationPair:
        tensor = self.by_base.get(name)
        node = self.f.producers.get(name)
        if tensor is None:
            return ActivationPair(
                name=name, node=node, before=None, after=name, integers=False, qparams=None,
                rectifier=None, matched_by="name", note="",
            )  # fmt: skip
        rectifier = self._folded_rectifier(name, tensor.before)
        return ActivationPair(
            name=name,
            node=node,
            before=tensor.before,
            after=tensor.name,
            integers=tensor.after is None,
            qparams=tensor.qparams,
            rectifier=rectifier,
            matched_by="name",
            note=f"{rectifier.op_type} is folded into Q" if rectifier else "",
        )

    def _why_missing(self, name: str, pairs: dict[str, ActivationPair]) -> str:
        at = name
        for _ in range(16):
            consumers = self.f.consumers.get(at, ())
            if not consumers:
                return "nothing reads it"
            if len(consumers) != 1:
                break
            at = consumers[0].outputs[0]
            if at in pairs:
                return f"fused into {at}"
        node = self.f.producers.get(name)
        twin = self.q.node_by_name.get(node.name) if node is not None else None
        if twin is not None and twin.op_type == node.op_type:  # type: ignore[union-attr]
            return f"its node writes {twin.outputs[0]} instead (layout or fusion changed)"
        return "not in the quantized model (removed by pre-processing)"

    # -- weights -------------------------------------------------------------------------------

    def weights(self) -> list[WeightPair]:
        pairs: dict[str, WeightPair] = {}
        parameters = scale_names(self.q)
        quantized = {t.name: t for t in self.scheme.tensors if t.kind in ("weight", "bias")}
        for node in self.q.nodes:
            if node.op_type in (Q, DQ, "Constant"):
                continue
            for position, name in enumerate(node.inputs):
                tensor = quantized.get(name)
                constant = name in self.q.constant_names
                if tensor is None and not constant:
                    continue
                if tensor is None and (
                    name in parameters or self.q.info(name).dtype not in FLOAT_DTYPES
                ):
                    continue
                pair = self._weight(node, position, name, tensor)
                if pair is not None:
                    pairs.setdefault(pair.name, pair)
                elif tensor is not None:
                    self.loners.append(
                        Unmatched(
                            name=tensor.quantized, kind=tensor.kind, model="quantized",
                            reason=f"no float constant found for input {position} of {node.name}",
                        )
                    )  # fmt: skip
        self.loners += self._lone_weights(set(pairs))
        return list(pairs.values())

    def _weight(
        self, node: Node, position: int, name: str, tensor: QuantizedTensor | None
    ) -> WeightPair | None:
        stored = tensor.quantized if tensor is not None else name
        base = (tensor.before if tensor is not None else None) or stored
        for suffix in ("", *_SUFFIXES):
            candidate = base.removesuffix(suffix) if suffix else base
            if candidate != base or not suffix:
                value = constant_value(self.f, candidate)
                if value is not None and value.dtype.kind in "fV":
                    return self._weight_pair(candidate, node, position, tensor, stored, "name", "")
        return self._weight_by_structure(node, position, tensor, stored)

    def _weight_pair(
        self,
        name: str,
        q_node: Node,
        position: int,
        tensor: QuantizedTensor | None,
        stored: str,
        matched_by: str,
        note: str,
        reference: Callable[[], NDArray[Any]] | None = None,
        float_node: Node | None = None,
    ) -> WeightPair | None:
        consumers = self.f.consumers.get(name, ())
        twin = self.f.node_by_name.get(q_node.name)
        node = float_node or next((c for c in consumers if c is twin), None)
        if node is None:
            node = next(iter(consumers), None)
        if node is None:
            return None
        shape = self.f.info(name).shape
        if shape is None or self.f.constant(name) is None:
            value = constant_value(self.f, name)
            shape = value.shape if value is not None else ()
        at = node.inputs.index(name) if name in node.inputs else position
        kind = tensor.kind if tensor is not None else "weight"
        if kind == "weight" and at == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            kind = "bias"

        def value_of() -> NDArray[Any]:
            value = constant_value(self.f, name)
            assert value is not None
            return value

        return WeightPair(
            name=name,
            node=node,
            kind=kind,
            quantized=tensor,
            quantized_name=stored,
            reference=reference or value_of,
            channel_axis=weight_channel_axis(node, at, len(shape)),
            matched_by=matched_by,
            note=note,
        )

    def _weight_by_structure(
        self, node: Node, position: int, tensor: QuantizedTensor | None, stored: str
    ) -> WeightPair | None:
        """The float constant at the same input of the node that computes the same tensor."""
        twin = self.f.node_by_name.get(node.name)
        if twin is None or twin.op_type != node.op_type:
            twin = self._twin_by_output(node)
        if twin is None:
            return None
        at = {"QLinearConv": {3: 1, 8: 2}, "QGemm": {3: 1, 6: 2}, "QLinearMatMul": {3: 1}}.get(
            node.op_type, {}
        ).get(position, position)
        fold = self._batch_normalization_behind(twin)
        if fold is not None and at in (1, 2):
            return self._folded(twin, fold, at, node, tensor, stored)
        if at >= len(twin.inputs) or constant_value(self.f, twin.inputs[at]) is None:
            return None
        return self._weight_pair(
            twin.inputs[at], node, at, tensor, stored, "structure", "", float_node=twin
        )

    def _twin_by_output(self, node: Node) -> Node | None:
        """The float node whose result (through a folded BatchNormalization) `node` computes."""
        for output in node.outputs:
            base = output
            for suffix in _SUFFIXES:
                base = base.removesuffix(suffix)
            maker = self.f.producers.get(base)
            if maker is None:
                continue
            if (
                maker.op_type in ("BatchNormalization", "Add", "Mul")
                and maker.op_type != node.op_type
            ):
                sources = [self.f.producers.get(i) for i in maker.inputs]
                maker = next((s for s in sources if s and s.op_type == node.op_type), maker)
            return maker
        return None

    def _batch_normalization_behind(self, conv: Node) -> Node | None:
        if conv.op_type not in ("Conv", "ConvTranspose"):
            return None
        consumers = self.f.consumers.get(conv.outputs[0], ())
        if len(consumers) != 1 or consumers[0].op_type != "BatchNormalization":
            return None
        return consumers[0] if conv.outputs[0] not in self.q_tensors else None

    def _folded(
        self,
        conv: Node,
        normalization: Node,
        at: int,
        q_node: Node,
        tensor: QuantizedTensor | None,
        stored: str,
    ) -> WeightPair | None:
        values = [constant_value(self.f, i) for i in normalization.inputs[1:5]]
        weight = constant_value(self.f, conv.inputs[1])
        if any(v is None for v in values) or weight is None:
            return None
        gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
        gain = gamma / np.sqrt(variance + float(normalization.attributes.get("epsilon", 1e-5)))
        has_bias = len(conv.inputs) > 2 and conv.inputs[2]

        def folded_weight() -> NDArray[Any]:
            shape = [1] * weight.ndim
            if conv.op_type == "Conv":
                shape[0] = -1
                return np.asarray(weight * gain.reshape(shape))
            groups = int(conv.attributes.get("group", 1))
            shape[1] = -1
            per_group = gain.reshape(groups, -1)
            rows = np.repeat(per_group, weight.shape[0] // groups, axis=0)
            return np.asarray(weight * rows.reshape(rows.shape + (1,) * (weight.ndim - 2)))

        def folded_bias() -> NDArray[Any]:
            bias = constant_value(self.f, conv.inputs[2]) if has_bias else 0.0
            return np.asarray((np.asarray(bias, np.float64) - mean) * gain + beta)

        name = (
            conv.inputs[1] if at == 1 else (conv.inputs[2] if has_bias else normalization.inputs[2])
        )
        node = conv if at == 1 or has_bias else normalization
        return self._weight_pair(
            name, q_node, at, tensor, stored, "structure",
            f"compared after folding BatchNormalization {normalization.name}",
            reference=folded_weight if at == 1 else folded_bias, float_node=node,
        )  # fmt: skip

    def _lone_weights(self, matched: set[str]) -> list[Unmatched]:
        found = []
        for node in self.f.nodes:
            for position, name in enumerate(node.inputs):
                if name in matched or name not in self.f.constant_names:
                    continue
                matched.add(name)
                info = self.f.info(name)
                value = self.f.constant(name)
                dtype = info.dtype if value is None else value.dtype.name
                if dtype not in FLOAT_DTYPES:
                    continue
                kind = "bias" if position == 2 and node.op_type in ("Conv", "Gemm") else "weight"
                reason = "not in the quantized model"
                if node.op_type == "BatchNormalization" and node.outputs[0] not in (
                    n.outputs[0] for n in self.q.nodes if n.op_type == "BatchNormalization"
                ):
                    reason = f"folded with BatchNormalization {node.name}"
                elif node.op_type in RECTIFIERS:
                    reason = f"limit of {node.op_type} {node.name}, which is folded into Q"
                elif node.name not in self.q.node_by_name:
                    reason = f"its node {node.name} was fused or removed by pre-processing"
                found.append(Unmatched(name=name, kind=kind, model="float", reason=reason))
        return found


def _by_position(
    float_side: list[Any], quantized_side: list[Any], what: str, notes: list[str]
) -> dict[str, str]:
    names = {v.name for v in quantized_side}
    mapping = {v.name: v.name for v in float_side if v.name in names}
    if len(mapping) == len(float_side):
        return mapping
    rest_f = [v for v in float_side if v.name not in mapping]
    rest_q = [v for v in quantized_side if v.name not in mapping.values()]
    if len(rest_f) == len(rest_q):
        for a, b in zip(rest_f, rest_q, strict=True):
            mapping[a.name] = b.name
            notes.append(f"{what} {a.name} is called {b.name} in the quantized model (by position)")
    return mapping


def match_tensors(float_model: Model, quantized_model: Model) -> Matching:
    """All tensor pairs of two models.

    Content is not looked at: a tensor that neither its name nor its place in the graph identifies
    is listed in `Matching.unmatched`.
    """
    matcher = _Matcher(float_model, quantized_model)
    notes: list[str] = []
    inputs = _by_position(list(float_model.inputs), list(quantized_model.inputs), "input", notes)
    outputs = _by_position(
        list(float_model.outputs), list(quantized_model.outputs), "output", notes
    )
    weights = matcher.weights()
    activations = matcher.activations(outputs)
    if matcher.scheme.formats == (QuantFormat.FLOAT,):
        notes.append("the second model carries no quantization; two float models are compared")
    for node, reason in matcher.scheme.skipped.items():
        matcher.loners.append(
            Unmatched(name=node, kind="activation", model="quantized", reason=reason)
        )
    return Matching(
        scheme=matcher.scheme,
        activations=tuple(activations),
        weights=tuple(weights),
        outputs=outputs,
        inputs=inputs,
        unmatched=tuple(matcher.loners),
        notes=tuple(notes),
    )
