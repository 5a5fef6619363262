"""What can be drawn at random for a model's inputs: sizes for dynamic dimensions, integers that
stay inside the tables they index, and the draw itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inspector.arrays import MAX_ARRAY_BYTES, Arrays, Samples, integer_limits
from inspector.errors import FeedError
from inspector.model import Model, TensorInfo

# For string inputs.
_WORDS = (
    *("apple", "blue", "cat", "door", "eight", "fast", "green", "house", "in", "June", "key"),
    *("light", "moon", "no", "of", "paper", "quiet", "river", "seven", "the", "under", "yes"),
)

# Operators that hand values on unchanged, and the inputs they take them from.
_FIRST = (
    "Cast CastLike Identity Unsqueeze Squeeze Reshape Flatten Transpose Expand Slice Split Tile "
    "Pad Clip Dropout Gather GatherElements GatherND Trilu"
)
_PASSES = {
    **dict.fromkeys(_FIRST.split(), slice(0, 1)),
    "Concat": slice(None),
    "Where": slice(1, 3),
}
# Operators that look rows up: position of the indices, position of the table.
_ROWS = "Gather GatherElements GatherND Scatter ScatterElements ScatterND GatherBlockQuantized"
_LOOKUPS = {
    **dict.fromkeys(_ROWS.split(), ((1, 0),)),
    "EmbedLayerNormalization": ((0, 2), (1, 4)),
}


class _Graph:
    """Which table an integer input indexes, bodies of If, Loop and Scan included."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._consumers: dict[str, list[Any]] = {}
        self._local: dict[str, Any] = {}
        graphs = [model.proto.graph]
        for graph in graphs:  # which grows by the bodies that are found
            self._local.update({i.name: i for i in graph.initializer})
            for node in graph.node:
                for name in dict.fromkeys(node.input):
                    self._consumers.setdefault(name, []).append(node)
                for attribute in node.attribute:
                    if node.op_type == "Constant" and attribute.name == "value":
                        self._local[node.output[0]] = attribute.t
                    graphs += [g for g in (attribute.g, *attribute.graphs) if g.node]

    def _shape(self, name: str) -> tuple[int | str | None, ...] | None:
        if name in self._local:
            return tuple(self._local[name].dims)
        shape = self._model.info(name).shape
        producer = self._model.producers.get(name)
        if shape is None and producer and producer.op_type in ("DequantizeLinear", "Cast"):
            return self._shape(producer.inputs[0])
        return shape

    def _rows(self, node: Any, table: int) -> int:
        """How many rows the table has; 1 where unknown, since row 0 is always there."""
        shape = self._shape(node.input[table]) or ()
        if not node.op_type.endswith("ND"):
            axis = next((a.i for a in node.attribute if a.name in ("axis", "gather_axis")), 0)
            shape = shape[axis:][:1]
        return min((d if isinstance(d, int) and d > 0 else 1 for d in shape), default=1)

    def _operand(self, node: Any, name: str) -> tuple[int, int] | None:
        """Range of a two-input node's other operand where that is an integer constant."""
        others = [i for i in node.input if i != name]
        if node.op_type not in ("Add", "Sub", "Equal") or len(others) != 1:
            return None
        value = self._model.constant(others[0])
        if value is None or value.size == 0 or value.dtype.kind not in "iu":
            return None
        return int(value.min()), int(value.max())

    def limits(self, tensor: str) -> tuple[int, int, str] | None:
        """Smallest and largest integer that every look-up this input reaches allows, and why.

        Without a look-up, the range of the constants it is compared with; None for neither.
        """
        inside: list[tuple[int, int, str]] = []
        compared: list[tuple[int, int, str]] = []
        # A tensor on the way, and what was added to the input's values so far (least, most).
        front = [(tensor, 0, 0)]
        visited = {tensor}
        while front:
            name, least, most = front.pop()
            for node in self._consumers.get(name, ()):
                for indices, table in _LOOKUPS.get(node.op_type, ()):
                    if node.input[indices] == name:
                        rows = self._rows(node, table)
                        why = f"the {rows:,} rows that {node.op_type} {node.name!r} reads"
                        inside.append((-least, rows - 1 - most, why))
                operand = self._operand(node, name)
                if operand is not None:
                    low, high = operand
                    if node.op_type == "Equal":
                        why = f"the constants that Equal {node.name!r} compares it with"
                        compared.append((low - least, high - most, why))
                        continue
                    if node.op_type == "Sub":
                        if node.input[0] != name:
                            continue
                        low, high = -high, -low
                elif name in node.input[_PASSES.get(node.op_type, slice(0))]:
                    low = high = 0
                else:
                    continue
                for output in node.output:
                    if output and output not in visited:
                        visited.add(output)
                        front.append((output, least + low, most + high))
        found = inside or compared
        if not found:
            return None
        low = max(f[0] for f in found)
        _, high, why = min(found, key=lambda f: f[1])
        return low, max(low, high), why


def _dynamic_size(info: TensorInfo, axis: int) -> int:
    """A size for a dynamic dimension that most models accept."""
    shape = info.shape or ()
    dim, rank = shape[axis], len(shape)
    label = dim.lower() if isinstance(dim, str) else ""
    long = any(word in label for word in ("seq", "tok", "len", "time", "frame", "past"))
    if "batch" in label or label in ("n", "b", "bs") or (axis == 0 and not long):
        return 1
    if "float" not in info.dtype or "past" in label:
        return 16
    if rank >= 4:
        channels = axis == 1 and shape[-1] not in (1, 3, 4)
        return 3 if channels else 224 if rank == 4 else 32
    # Two axes are most often audio (samples), three are features over time.
    return 512 if rank <= 2 else 64


def index_limits(model: Model, tensor: str) -> tuple[int, int, str] | None:
    """Least and greatest integer an input may hold for what it looks up, and why; None: anything.

    Where it looks nothing up, the range of the constants it is compared with.
    """
    return _Graph(model).limits(tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSource:
    """Seeded noise or words: name, type, shape, least and greatest integer of each input."""

    inputs: tuple[tuple[str, str, tuple[int, ...], int, int], ...]
    seed: int

    def samples(self, indices: Sequence[int]) -> Samples:
        for index in indices:
            rng = np.random.default_rng([self.seed, index])
            feed: Arrays = {}
            for name, dtype, shape, low, high in self.inputs:
                if dtype == "string":
                    feed[name] = np.asarray(rng.choice(np.array(_WORDS, object), shape), object)
                    continue
                if "float" in dtype:
                    drawn: Any = rng.standard_normal(shape).astype(dtype)
                else:
                    drawn = rng.integers(low, high, shape, dtype=np.dtype(dtype), endpoint=True)
                feed[name] = np.asarray(drawn, dtype)
            yield feed


def random_source(
    model: Model, inputs: Sequence[TensorInfo], seed: int
) -> tuple[RandomSource, list[str]]:
    """Noise for the inputs, and what was assumed, one sentence each.

    Raises:
        FeedError: an input names no shape, or one too large.
    """
    graph = _Graph(model)
    sizes: dict[str, int] = {}
    for info in inputs:
        if info.shape is None:
            raise FeedError(
                f"{model.name}: input {info.name!r} names no shape, so no sample can be drawn",
                hint="Give real inputs, e.g. a folder with one .npz per sample.",
            )
        for axis, dim in enumerate(info.shape):
            if isinstance(dim, str):
                size = _dynamic_size(info, axis)
                sizes[dim] = min(size, sizes.get(dim, size))
    notes = [f"dynamic dimension {name!r} is {size} here" for name, size in sizes.items()]
    drawn = []
    for info in inputs:
        shape = []
        for axis, dim in enumerate(info.shape or ()):
            if isinstance(dim, str):
                shape.append(sizes[dim])
            elif isinstance(dim, int) and dim > 0:
                shape.append(dim)
            else:
                shape.append(_dynamic_size(info, axis))
                notes.append(f"dynamic axis {axis} of input {info.name!r} is {shape[-1]} here")
        if math.prod(shape) > MAX_ARRAY_BYTES // 8:
            raise FeedError(
                f"{model.name}: input {info.name!r} has the shape {tuple(shape)}, "
                f"expected at most {MAX_ARRAY_BYTES // 8:,} elements",
                hint="Export the model with the shape it is used with.",
            )
        low, high, because = 0, 1, ""
        if info.dtype == "string":
            notes.append(f"input {info.name!r} is random words")
            drawn.append((info.name, info.dtype, tuple(shape), low, high))
            continue
        dtype = np.dtype(info.dtype)
        if dtype.kind in "iu":
            least, most = integer_limits(dtype)
            limits = graph.limits(info.name)
            if limits is not None:
                low, high, because = limits[0], limits[1], f" (inside {limits[2]})"
            elif dtype.itemsize == 1:
                # Bytes that index nothing are pixels or quantized values.
                low, high = least, most
            low = max(low, least)
            high = max(low, min(high, most))
            notes.append(f"input {info.name!r} is random integers {low}..{high}{because}")
        drawn.append((info.name, info.dtype, tuple(shape), low, high))
    return RandomSource(inputs=tuple(drawn), seed=seed), notes
