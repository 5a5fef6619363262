"""The quantized model's graph outputs as the float model gives them.

A converter may leave an output in integers, with its channels last, or behind a Transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.folding import DQ, Q
from inspector.matching import ActivationPair, Matching
from inspector.model import Model
from inspector.qparams import QParams
from inspector.structure import permutation_of

# Nodes between a graph output and the tensor that it stands for.
_CHAIN = 8

Order = tuple[int, ...] | None


class OutputLayouts:
    """How each graph output of the quantized model becomes the float model's.

    Args:
        quantized_model: the quantized model.
        matching: of the two models.
        outputs: the quantized model's output by the float model's.
        pairs: activation pairs by float tensor, those that are compared.
    """

    def __init__(
        self,
        quantized_model: Model,
        matching: Matching,
        outputs: Mapping[str, str],
        pairs: Mapping[str, ActivationPair],
    ) -> None:
        self._model = quantized_model
        self._matching = matching
        self._layouts = {n: self._layout(pairs.get(n), other) for n, other in outputs.items()}

    def fit(self, output: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
        """Where nothing else says how an output is laid out, its shape may: channels moved.

        Args:
            output: the float model's.
            ours: the float model's shape.
            theirs: the quantized model's.

        Returns:
            A sentence that says what was learned from the shapes; "" for nothing.
        """
        qparams, order = self._layouts[output]
        if order is not None or ours == theirs or len(ours) != len(theirs) or len(ours) < 3:
            return ""
        rank = len(ours)
        moves = ((0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1))
        fitting = [m for m in dict.fromkeys(moves) if tuple(theirs[a] for a in m) == ours]
        if len(fitting) != 1:
            return ""
        self._layouts[output] = (qparams, fitting[0])
        return (
            f"output {output} is {list(theirs)} in the quantized model and {list(ours)} in the "
            f"float model: its axes are taken in the order {fitting[0]}"
        )

    def as_float(self, output: str, values: NDArray[Any]) -> NDArray[Any]:
        """An output of the quantized model as real numbers in the float model's layout.

        Args:
            output: the float model's.
            values: what the quantized model gives.
        """
        qparams, order = self._layouts[output]
        if qparams is not None and values.dtype.kind in "iu":
            values = qparams.dequantize(values)
        if order is None or len(order) != values.ndim:
            return values
        return values.transpose(order)

    def _layout(self, pair: ActivationPair | None, other: str) -> tuple[QParams | None, Order]:
        """Its pair may be a tensor before it: a converter leaves a Transpose at the end."""
        tensors = self._matching.scheme.tensors
        qparams = next((t.qparams for t in tensors if t.quantized == other), None)
        if pair is None:
            return qparams, None
        order: Order = None
        tensor = other
        for _ in range(_CHAIN):
            if tensor == pair.after:
                return qparams, _then(order, pair.permutation)
            node = self._model.producers.get(tensor)
            if node is None or node.op_type not in ("Transpose", "Identity", "Cast", Q, DQ):
                break
            if node.op_type == "Transpose":
                moved = permutation_of(node, None)
                if moved is None:
                    break
                order = _then(order, tuple(int(a) for a in np.argsort(moved)))
            tensor = node.inputs[0]
        return qparams, pair.permutation


def _then(first: Order, second: Order) -> Order:
    """One order of axes for two that are applied one after the other."""
    if first is None or second is None:
        return first or second
    return tuple(first[axis] for axis in second)
