"""What every node of a quantized model does wrong by itself.

Two more runs per sample. In one, the quantized model reads the float model's tensors wherever a
compared tensor is read, so that no error is handed on: the *isolated* error. In the other, the
float model reads the quantized model's tensors, so that the difference from what the quantized
model made of the same is what its node *added*. Tensors without partner in between are computed
from those: the error is then that of all nodes since the last compared tensors. Apart from `twin`,
which reduces whatever tensors it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from inspector.matching import ActivationPair, clip_limits
from inspector.metrics import decibels
from inspector.model import Model
from inspector.padding import Padding
from inspector.pairs import PairRunner
from inspector.runtime import Feed, Session, Tensors, open_session
from inspector.twin import Reducer
from inspector.watches import TensorWatch, real_values

# Types that can be fed, as ONNX Runtime and as ONNX name them.
_TYPES = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(double)": TensorProto.DOUBLE,
    "tensor(int8)": TensorProto.INT8,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(int16)": TensorProto.INT16,
    "tensor(uint16)": TensorProto.UINT16,
    "tensor(int32)": TensorProto.INT32,
}
_INPUT_TYPES = {
    helper.tensor_dtype_to_np_dtype(number).name: kind for kind, number in _TYPES.items()
}
_QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True, slots=True)
class _Fed:
    """A tensor whose readers get an input instead.

    Attributes:
        tensor: its name.
        input_name: the new input's.
        kind: ONNX Runtime's type of both.
        quantizers_only: only those readers that quantize it.
    """

    tensor: str
    input_name: str
    kind: str
    quantizers_only: bool = False


def rewired(model: Model, fed: Iterable[_Fed], more: Sequence[onnx.NodeProto]) -> Model:
    """A copy of a model in which the readers of some tensors read new inputs.

    Bodies of If, Loop and Scan too. The nodes that computed the tensors still do.

    Args:
        model: the model.
        fed: the tensors.
        more: nodes to add at the end, which read what they name.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    everywhere: dict[str, str] = {}
    at_quantizers: dict[str, str] = {}
    for each in fed:
        (at_quantizers if each.quantizers_only else everywhere)[each.tensor] = each.input_name
        proto.graph.input.append(
            helper.make_tensor_value_info(each.input_name, _TYPES[each.kind], None)
        )
    _rewire(proto.graph.node, everywhere, at_quantizers)
    proto.graph.node.extend(more)
    # What it was named after is another graph now.
    del proto.graph.value_info[:]
    return Model(proto, path=model.path, external=model.external)


def _rewire(
    nodes: Iterable[onnx.NodeProto], everywhere: Mapping[str, str], at_quantizers: Mapping[str, str]
) -> None:
    for node in nodes:
        for at, name in enumerate(node.input):
            new = everywhere.get(name)
            if node.op_type in _QUANTIZERS and at == 0:
                new = at_quantizers.get(name, new)
            if new is not None:
                node.input[at] = new
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                own = {o for n in body.node for o in n.output}
                own.update(v.name for v in (*body.input, *body.initializer))
                inner = [
                    {k: v for k, v in names.items() if k not in own}
                    for names in (everywhere, at_quantizers)
                ]
                _rewire(body.node, *inner)


def _tainted(model: Model, lost: Iterable[str]) -> set[str]:
    """Everything that is computed from some tensors."""
    found = set(lost)
    for node in model.nodes:
        if found.intersection((*node.inputs, *node.captured)):
            found.update(node.outputs)
    return found


class Isolation:
    """The isolated error of every compared tensor and the error its node adds, sample by sample.

    Args:
        float_model: the float model.
        quantized_model: its quantized twin.
        runner: runs both, and says which pairs are compared.
        padding: which positions to leave out.
        in_runtime: sums are made in the runtime (`twin`), else in numpy.
    """

    def __init__(
        self,
        float_model: Model,
        quantized_model: Model,
        runner: PairRunner,
        *,
        padding: Padding | None = None,
        in_runtime: bool = True,
    ) -> None:
        self._models = float_model, quantized_model
        self._runner = runner
        self._in_runtime = in_runtime
        self._reducers = Reducer(), Reducer()
        self._pairs = {p.name: p for p in runner.pairs}
        self._kinds = tuple(
            {i.name: _INPUT_TYPES.get(i.dtype, "") for i in model.inputs} | dict(kinds)
            for model, kinds in zip(self._models, runner.dtypes, strict=True)
        )
        self._into_quantized: list[tuple[_Fed, ActivationPair]] = []
        self._into_float: list[tuple[_Fed, ActivationPair]] = []
        self._isolated: dict[str, TensorWatch] = {}
        self._added: dict[str, TensorWatch] = {}
        self._padding = padding
        self._quantized = self._open_quantized()
        self._float = self._open_float()

    def close(self) -> None:
        """Ends the threads that reduce."""
        for reducer in self._reducers:
            reducer.close()

    # -- the two graphs --------------------------------------------------------------------

    def _open_quantized(self) -> Session | None:
        """The quantized model on the float model's tensors."""
        model, kinds = self._models[1], self._kinds[1]
        names = _Names(model)
        lost, more = set(), []
        wanted: dict[str, tuple[ActivationPair, str]] = {}
        for pair in self._runner.pairs:
            target = pair.before or pair.after
            if pair.node is None or target not in model.producers:
                continue
            kind = kinds.get(target, "")
            if kind not in _TYPES:
                lost.add(target)
                continue
            only = bool(pair.before and pair.rectifiers)
            fed = _Fed(target, names.new(f"{target}_float"), kind, only)
            self._into_quantized.append((fed, pair))
            output = target
            if only:
                for node in pair.rectifiers:
                    rectified = names.new(f"{output}_rectified")
                    limits = (0.0, math.inf)
                    if node.op_type != "Relu":
                        limits = clip_limits(node, self._models[0])
                    more += _clamp(output, rectified, limits, kind)
                    output = rectified
            wanted[pair.name] = pair, output
        if not wanted:
            return None
        changed = rewired(model, [f for f, _ in self._into_quantized], more)
        tainted = _tainted(changed, lost)
        for name, (pair, output) in wanted.items():
            if output not in tainted:
                self._isolated[name] = self._watch(pair, output)
        outputs = [w.pair.after for w in self._isolated.values()]
        return open_session(changed, optimized=False, outputs=outputs) if outputs else None

    def _open_float(self) -> Session | None:
        """The float model on the quantized model's tensors."""
        model, kinds = self._models[0], self._kinds[0]
        names = _Names(model)
        lost = set()
        for pair in self._runner.pairs:
            kind = kinds.get(pair.name, "")
            if kind in _TYPES:
                fed = _Fed(pair.name, names.new(f"{pair.name}_quantized"), kind)
                self._into_float.append((fed, pair))
            else:
                lost.add(pair.name)
        lost |= {n for n in self._runner.left_out if n not in self._runner.not_floating}
        changed = rewired(model, [f for f, _ in self._into_float], [])
        tainted = _tainted(changed, lost)
        for pair in self._runner.pairs:
            if pair.node is not None and pair.name not in tainted:
                self._added[pair.name] = self._watch(pair, pair.after)
        outputs = list(self._added)
        return open_session(changed, optimized=False, outputs=outputs) if outputs else None

    def _watch(self, pair: ActivationPair, after: str) -> TensorWatch:
        plain = replace(
            pair, before=None, after=after, rectifiers=(), stages=(),
            qparams=pair.qparams if pair.integers else None,
        )  # fmt: skip
        return TensorWatch(plain, self._models[0], self._padding)

    # -- one sample ------------------------------------------------------------------------

    def add(
        self, feed: Feed, quantized_feed: Feed, reference: Tensors, actual: Tensors, sample: str
    ) -> None:
        """One sample.

        Args:
            feed: the float model's.
            quantized_feed: the quantized model's.
            reference: the float model's tensors for it.
            actual: the quantized model's.
            sample: its name.
        """
        if self._quantized is not None:
            given: dict[str, Any] = dict(quantized_feed)
            given |= {f.input_name: _as_quantized(f, p, reference) for f, p in self._into_quantized}
            outputs = [w.pair.after for w in self._isolated.values()]
            made = Tensors(self._quantized.run_values(given, outputs, sample=sample))
            self._reduce(0, self._isolated, reference, made)
        if self._float is not None:
            given = dict(feed)
            given |= {f.input_name: _as_float(f, p, actual) for f, p in self._into_float}
            made = Tensors(self._float.run_values(given, list(self._added), sample=sample))
            self._reduce(1, self._added, made, actual)

    def _reduce(
        self, at: int, watches: Mapping[str, TensorWatch], reference: Tensors, actual: Tensors
    ) -> None:
        chosen = watches.values() if self._in_runtime else ()
        sums = self._reducers[at].sums(chosen, reference, actual)
        for name, watch in watches.items():
            if name in sums:
                watch.take(sums[name])
            else:
                watch.add(reference[name], None, actual[watch.pair.after], reference)

    # -- figures ---------------------------------------------------------------------------

    def isolated_sqnr_db(self, name: str) -> float | None:
        """Of a float tensor; None where it is not known."""
        watch = self._isolated.get(name)
        if watch is None or watch.broken or watch.accumulated is None:
            return None
        return watch.accumulated.sqnr_db

    def added_sqnr_db(self, name: str, signal: float) -> float | None:
        """What the node of a float tensor adds; None where it is not known.

        Args:
            name: the tensor.
            signal: the sum of its squares over all samples.
        """
        watch = self._added.get(name)
        if watch is None or watch.broken or watch.accumulated is None:
            return None
        return decibels(signal, float(watch.accumulated.noise.sum()))


class _Names:
    """Names that no tensor of a model has."""

    def __init__(self, model: Model) -> None:
        graphs = (model, *model.bodies)
        self._taken = {t for g in graphs for n in g.nodes for t in (*n.inputs, *n.outputs)}
        self._taken |= {i.name for i in (*model.inputs, *model.outputs)}
        self._taken |= {i for b in model.bodies for i in (*b.inputs, *b.outputs)}
        self._taken |= model.constant_names

    def new(self, name: str) -> str:
        """The name, with marks behind it where it is taken."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _clamp(
    tensor: str, output: str, limits: tuple[float, float], kind: str
) -> list[onnx.NodeProto]:
    """Nodes that clamp a tensor, in every opset: Constant, Max and Min are in all of them."""
    nodes, number = [], _TYPES[kind]
    ends = [(op, limit) for op, limit in zip(("Max", "Min"), limits, strict=True)
            if math.isfinite(limit)]  # fmt: skip
    for at, (op_type, limit) in enumerate(ends):
        result = output if at == len(ends) - 1 else f"{output}_{op_type}"
        value = helper.make_tensor(f"{output}_{op_type}_limit", number, [1], [limit])
        nodes.append(helper.make_node("Constant", [], [value.name], value.name, value=value))
        nodes.append(helper.make_node(op_type, [tensor, value.name], [result], result))
        tensor = result
    return nodes or [helper.make_node("Identity", [tensor], [output], output)]


def _as_quantized(fed: _Fed, pair: ActivationPair, reference: Tensors) -> Any:
    """The float model's tensor as the quantized model holds it."""
    if pair.permutation is None and reference.kind_of(pair.name) == fed.kind:
        return reference.held(pair.name)
    values = reference[pair.name]
    if pair.permutation is not None:
        values = values.transpose(np.argsort(pair.permutation))
    number = helper.tensor_dtype_to_np_dtype(_TYPES[fed.kind])
    if pair.integers and pair.qparams is not None:
        values = pair.qparams.quantize(values)
    return np.ascontiguousarray(values.astype(number)).reshape(values.shape)


def _as_float(fed: _Fed, pair: ActivationPair, actual: Tensors) -> Any:
    """The quantized model's tensor as the float model holds it."""
    if pair.permutation is None and actual.kind_of(pair.after) == fed.kind:
        return actual.held(pair.after)
    values = real_values(pair, actual[pair.after])
    number = helper.tensor_dtype_to_np_dtype(_TYPES[fed.kind])
    return np.ascontiguousarray(values.astype(number)).reshape(values.shape)
