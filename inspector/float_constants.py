"""The float model's values in the place of constants that a quantized file stores as integers.

They come in the layout of the quantized file, and from the float model's own file where that holds
them already. A weight that a factor was moved into (equalization) is refused: the factor's other
half is somewhere else in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import TensorProto

from inspector.folding import constant_value
from inspector.matching import Matching
from inspector.metrics import sqnr_db
from inspector.model import FLOAT_DTYPES, ExternalTensor, Model, Node
from inspector.scheme import DQ, QUANTIZATION_OPS, Q, stored_values
from inspector.weights import WeightPair

# A weight this near to the float one (dB) holds no factor; one that gets so much nearer when
# a factor is taken out (dB), and is at least so near then (dB), does.
_FACTOR_FROM_DB = 35.0
_FACTOR_GAIN_DB = 10.0
_FACTOR_AFTER_DB = 20.0


class RefusedError(Exception):
    """Why a node cannot be freed."""


class NewNames:
    """Names for what is added to a file: none of them is there already."""

    def __init__(self, model: Model) -> None:
        self.taken = {*model.producers, *model.constant_names, *model.node_by_name}
        self.taken.update(i.name for i in model.proto.graph.input)
        self.taken.update(n for b in model.bodies for n in (*b.producers, *b.constant_names))

    def fresh(self, stem: str) -> str:
        """The stem, with a number where it is taken."""
        name, count = stem, 1
        while name in self.taken:
            count += 1
            name = f"{stem}_{count}"
        self.taken.add(name)
        return name


class FloatConstants:
    """Constants that nodes of a quantized file read once they are in float.

    Args:
        float_model: gives the values.
        quantized: the file.
        matching: of the two.
        twins: by node of the file, those of the float model that it computes.
        names: gives the constants their names.
    """

    def __init__(
        self,
        float_model: Model,
        quantized: Model,
        matching: Matching,
        twins: Mapping[str, list[str]],
        names: NewNames,
    ) -> None:
        self.f, self.q, self.twins, self.names = float_model, quantized, twins, names
        self.protos, self.producers = quantized.proto.graph.node, quantized.producers
        self.weights: dict[str, list[WeightPair]] = {}
        for pair in matching.weights:
            for own in (pair, *pair.copies):
                if not own.scope:
                    self.weights.setdefault(own.quantized_name, []).append(own)
        self._made: dict[str, tuple[WeightPair | None, Callable[[], NDArray[Any]]]] = {}
        self._matched_names: dict[tuple[str, str], str] = {}
        self._placed: dict[str, list[WeightPair]] = {}  # by node of the file

    def constant(self, stem: str, value: NDArray[Any]) -> str:
        """The name of a new constant."""
        name = self.names.fresh(stem)
        self._made[name] = (None, lambda: value)
        return name

    def placed(self, operand: str, node: Node, dtype: str) -> tuple[str, list[onnx.NodeProto]]:
        """A constant operand with the float model's values.

        Returns:
            Its name, and the nodes that bring the stored layout into the operand's.

        Raises:
            RefusedError: it is quantized and the float model's values cannot be put there.
        """
        at = operand
        path: list[Node] = []
        quantized = False
        own_dtype = self.q.info(operand).dtype
        dtype = own_dtype if own_dtype in FLOAT_DTYPES else dtype
        while at not in self.weights:
            maker = self.producers.get(at)
            if maker is None or at in self.q.constant_names:
                break
            if maker.op_type in (Q, DQ):
                quantized = True
            elif not quantized:
                path.append(maker)
            at = next((i for i in maker.inputs if i), "")
        if at not in self.weights:
            if quantized or node.op_type in QUANTIZATION_OPS:
                raise RefusedError(
                    f"the float model's values for its constant {operand} are not known: no "
                    "constant was matched with it"
                )
            return operand, []
        pair = self._pair_of(at, node)
        if pair.quantized is None:
            # The file has it in float already; the float model's value where they differ.
            own, reference = constant_value(self.q, at), pair.reference()
            if own is None or own.shape != reference.shape:
                return operand, []
            if np.array_equal(own, reference.astype(own.dtype)):
                return operand, []
        self._placed.setdefault(node.name, []).append(pair)
        nodes = []
        value = self._matched(pair, dtype)
        for maker in reversed(path):
            nodes.append(self._moved(maker, value))
            value = nodes[-1].output[0]
        return value, nodes

    def _moved(self, maker: Node, value: str) -> onnx.NodeProto:
        """The Transpose, Reshape or Cast between a constant and its reader, once more."""
        node = onnx.NodeProto()
        node.CopyFrom(self.protos[maker.index])
        node.name = self.names.fresh(f"{maker.name}_float")
        source = next(at for at, name in enumerate(node.input) if name)
        node.input[source] = value
        for at, output in enumerate(maker.outputs):
            node.output[at] = self.names.fresh(f"{output}_float") if output else ""
        return node

    def _pair_of(self, stored: str, node: Node) -> WeightPair:
        own = self.twins.get(node.name, ())
        pairs = self.weights[stored]
        return next((p for p in pairs if p.node.name in own), pairs[0])

    def _matched(self, pair: WeightPair, dtype: str) -> str:
        key = (pair.quantized_name, dtype)
        if key not in self._matched_names:
            name = self.names.fresh(
                pair.name if pair.name not in self.names.taken else f"{pair.name}_float"
            )
            self._made[name] = (
                pair,
                lambda: np.ascontiguousarray(pair.reference().astype(np.dtype(dtype))),
            )
            self._matched_names[key] = name
        return self._matched_names[key]

    def refusal(self, node: str) -> str:
        """Why the values placed for a node of the file cannot be there; "" where they can."""
        for pair in self._placed.get(node, ()):
            try:
                _check_factor(pair, self.q)
            except RefusedError as reason:
                return str(reason)
        return ""

    def initializers(
        self, read: Collection[str]
    ) -> Iterator[tuple[TensorProto, ExternalTensor | None]]:
        """The constants among these names, with where their values lie if not in the proto."""
        for name, (pair, value) in self._made.items():
            if name in read:
                array = value()
                place = self._on_disk(name, pair, array)
                if place is None:
                    yield onnx.numpy_helper.from_array(array, name), None
                else:
                    yield _placeholder(place), place

    def _on_disk(
        self, name: str, pair: WeightPair | None, array: NDArray[Any]
    ) -> ExternalTensor | None:
        """Where the float model keeps exactly these values outside its own proto."""
        place = self.f.external.get(pair.name) if pair is not None else None
        if place is None:
            return None
        own = self.f.constant(place.name)
        if own is None or own.dtype != array.dtype or not np.array_equal(own, array):
            return None
        return replace(place, name=name)


def _check_factor(pair: WeightPair, quantized: Model) -> None:
    """Refuses a weight that is a multiple of the float one: the factor's other half is
    somewhere else in the file and would be left alone there.

    Raises:
        RefusedError: shapes differ, or a factor was moved in.
    """
    reference = pair.reference()
    actual = None if pair.quantized is None else stored_values(quantized, pair.quantized)
    if actual is None:
        return
    if actual.shape != reference.shape:
        raise RefusedError(
            f"the float weight {pair.name} has the shape {list(reference.shape)}, "
            f"{pair.quantized_name} has {list(actual.shape)}"
        )
    if pair.kind != "weight" or reference.size < 2:
        return
    found = _moved_factor(reference.astype(np.float64), actual)
    if found:
        raise RefusedError(
            f"{pair.quantized_name} holds the float weight {pair.name} {found}: a factor was "
            "moved into it, and its other half would stay behind"
        )


def _moved_factor(reference: NDArray[np.float64], actual: NDArray[np.float64]) -> str:
    """How a weight is the float one times factors that are not 1; "" where it is not."""
    if not (np.all(np.isfinite(reference)) and np.all(np.isfinite(actual))):
        return ""
    plain = sqnr_db(reference, actual)
    if plain >= _FACTOR_FROM_DB:
        return ""
    sides: list[int | None] = [None]
    sides += [a for a in range(reference.ndim) if 1 < reference.shape[a] < reference.size]
    for side in sides:
        others = tuple(a for a in range(reference.ndim) if a != side)
        power = (reference * reference).sum(axis=others, keepdims=True)
        gain = (reference * actual).sum(axis=others, keepdims=True) / np.where(power, power, 1.0)
        count = reference.size if side is None else reference.size // reference.shape[side]
        if count < 4:
            continue  # any two short vectors are nearly multiples
        after = sqnr_db(reference * gain, actual)
        if after >= _FACTOR_AFTER_DB and after - plain >= _FACTOR_GAIN_DB and np.all(gain >= 0):
            if side is None:
                return f"times {gain.item():.4g}"
            return f"times {gain.min():.4g} to {gain.max():.4g} along axis {side}"
    return ""


def _placeholder(place: ExternalTensor) -> TensorProto:
    tensor = TensorProto(
        name=place.name,
        dims=place.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(place.dtype)),
        data_location=TensorProto.EXTERNAL,
    )
    entries = (("location", place.file.name), ("offset", place.offset), ("length", place.length))
    for key, value in entries:
        tensor.external_data.add(key=key, value=str(value))
    return tensor
