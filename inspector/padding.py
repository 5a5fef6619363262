"""Which positions of every tensor are padding, by the input that says so.

An input of shape (batch, positions), e.g. ``attention_mask``, whose zeros mark padding. What a
padded position holds is nobody's result, so figures leave it out. Which axes of a tensor run over
the positions is never guessed: a symbolic dimension says so, or the axis is as long as the mask on
samples of unequal length. Where neither settles it the tensor is compared whole and is listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.arrays import nearest
from inspector.errors import FeedError
from inspector.model import Model
from inspector.runtime import Feed

# Weights of these say how wide a model is; a mask as long as one of their axes proves nothing.
_WIDE = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Gather"})


class Padding:
    """The padded positions of one sample after the other.

    First `learn` from a few samples of unequal length; then `use` each sample before `parts`.

    Args:
        model: the float model.
        name: its input that marks padding with zeros.

    Attributes:
        name: that input.
        not_applied: float tensors whose positions are not known, with the reason.

    Raises:
        FeedError: the model has no such input.
    """

    def __init__(self, model: Model, name: str) -> None:
        inputs = [i.name for i in model.inputs]
        if name not in inputs:
            raise FeedError(
                f"{model.name} has no input {name!r} that could mark padding, the nearest are "
                f"{nearest(name, inputs)}",
                hint="Name the input whose zeros mark padding, e.g. attention_mask.",
            )
        self.name = name
        self.not_applied: dict[str, str] = {}
        self._model = model
        self._seen: list[tuple[int, int, Mapping[str, tuple[int, ...]]]] = []
        self._axes: dict[str, tuple[int, ...]] = {}
        self._mask = np.ones((1, 0), np.bool_)
        shape = model.info(name).shape or ()
        # A fixed length would say "not a position" of every axis that is one.
        self._symbol = shape[-1] if shape and isinstance(shape[-1], str) else None
        self._fixed = bool(shape) and isinstance(shape[-1], int) and shape[-1] > 0

    def mask_of(self, feed: Feed, sample: str) -> NDArray[np.bool_]:
        """True where a position counts; shape (batch, positions).

        Raises:
            FeedError: the mask has another shape.
        """
        values = np.asarray(feed[self.name])
        batch = values.shape[0] if values.ndim > 1 else 1
        if not values.ndim or values.size != batch * values.shape[-1]:
            raise FeedError(
                f"sample {sample}: the mask {self.name} has shape {list(values.shape)}, "
                "expected (batch, positions)",
                hint="Name an input with one value per position, 0 for padding.",
            )
        return np.asarray(values.reshape(batch, -1) != 0)

    @staticmethod
    def telling(masks: Iterable[NDArray[np.bool_]]) -> tuple[int, ...]:
        """Samples that show which axes follow the mask: the shortest and the longest."""
        lengths = [mask.shape[1] for mask in masks]
        if not lengths:
            return ()
        return tuple(dict.fromkeys((int(np.argmin(lengths)), int(np.argmax(lengths)))))

    def learn(self, mask: NDArray[np.bool_], values: Mapping[str, NDArray[Any]]) -> None:
        """Notes the shapes that the float model's tensors have on one sample."""
        batch, positions = mask.shape
        self._seen.append((batch, positions, {n: v.shape for n, v in values.items()}))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Of the sample that is used."""
        return self._mask

    def use(self, mask: NDArray[np.bool_]) -> None:
        """The sample that the following arrays belong to."""
        self._mask = mask

    def parts(self, tensor: str, values: NDArray[Any]) -> list[NDArray[Any]]:
        """What is left of a tensor without padding: one array, or one per row of the batch.

        Rows stay together where all have the same positions. The whole array, where the tensor has
        no positions or where it is not known which axes they are (see `not_applied`).

        Args:
            tensor: the float model's name.
            values: in the float model's layout, of either model.
        """
        mask = self._mask
        if mask.all():
            return [values]
        axes = self._axes_of(tensor)
        if not axes or axes[-1] >= values.ndim:
            return [values]
        batch, positions = mask.shape
        alike = bool((mask == mask[0]).all())
        if alike and all(values.shape[a] == positions for a in axes):
            return [_kept(values, axes, mask[0])]
        if axes == (0,) and values.shape[0] == mask.size:
            return [_kept(values, axes, mask.ravel())]
        if 0 not in axes and values.shape[0] == batch:
            return [_kept(values[at : at + 1], axes, mask[at]) for at in range(batch)]
        self.not_applied[tensor] = f"its first axis is not the batch of {batch} rows"
        return [values]

    # -- which axes ----------------------------------------------------------------------------

    def _axes_of(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self._axes:
            found, reason = self._find(tensor)
            self._axes[tensor] = found
            if reason:
                self.not_applied[tensor] = reason
        return self._axes[tensor]

    def _find(self, tensor: str) -> tuple[tuple[int, ...], str]:
        seen = [(b, p, shapes[tensor]) for b, p, shapes in self._seen if tensor in shapes]
        if not seen:
            return (), ""  # not compared
        ranks = {len(shape) for _, _, shape in seen}
        if len(ranks) > 1:
            return (), "its rank differs between samples"
        known = self._model.info(tensor).shape
        known = known if known is not None and len(known) == len(seen[0][2]) else None
        found = []
        for axis in range(len(seen[0][2])):
            verdict = self._judge(axis, seen, None if known is None else known[axis])
            if isinstance(verdict, str):
                return (), verdict
            if verdict:
                found.append(axis)
        return tuple(found), ""

    def _judge(
        self, axis: int, seen: list[tuple[int, int, tuple[int, ...]]], dim: int | str | None
    ) -> bool | str:
        """Whether an axis runs over the positions, or why that cannot be told."""
        lengths = [shape[axis] for _, _, shape in seen]
        positions = [p for _, p, _ in seen]
        if self._symbol is not None and dim == self._symbol:
            return True
        if isinstance(dim, int) and not self._fixed and all(n == dim for n in lengths):
            return False
        if axis == 0 and lengths == [b for b, _, _ in seen] and lengths != positions:
            return False
        flat = axis == 0 and lengths == [b * p for b, p, _ in seen]
        if lengths == positions or flat:
            if len(set(lengths)) > 1 or not self._is_a_width(lengths[0]):
                return True
            return (
                f"axis {axis} is {lengths[0]} long like the mask, but so are weights of the model, "
                "and all samples are equally long"
            )
        if len(set(lengths)) > 1 and axis > 0:
            return (
                f"axis {axis} is {lengths[0]} and {lengths[1]} long where the mask is "
                f"{positions[0]} and {positions[1]}"
            )
        return False

    def _is_a_width(self, length: int) -> bool:
        """Whether a weight, or (with a mask of open length) any fixed axis, is as long."""
        model = self._model
        for node in model.nodes:
            if node.op_type in _WIDE:
                for name in node.inputs:
                    shape = model.info(name).shape if name in model.constant_names else None
                    if shape is not None and length in shape:
                        return True
            elif node.op_type == "Reshape" and len(node.inputs) > 1:
                target = model.constant(node.inputs[1])
                if target is not None and target.tolist().count(length) > self._fixed:
                    return True
        return False


def _kept(values: NDArray[Any], axes: tuple[int, ...], mask: NDArray[np.bool_]) -> NDArray[Any]:
    kept = np.flatnonzero(mask)
    for axis in axes:
        values = np.take(values, kept, axis=axis)
    return values


def padded(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """`values` with zeros behind, up to `shape`."""
    assert math.prod(shape) >= values.size
    return np.pad(values, [(0, to - have) for have, to in zip(values.shape, shape, strict=True)])
