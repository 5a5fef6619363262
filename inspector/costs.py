"""Multiply-accumulates of a model's nodes, with the shapes that a feed gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from inspector.model import Model, Node
from inspector.runtime import Feed, open_session

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def count_macs(model: Model, feed: Feed) -> dict[str, int]:
    """Multiply-accumulates by node for Conv, ConvTranspose, Gemm and MatMul of the main graph.

    A node whose shapes the runtime cannot give counts as 0.

    Args:
        model: a float model.
        feed: one sample; its shapes are those that count.

    Raises:
        RunError: the runtime refuses the model or the feed.
    """
    counted = [n for n in model.nodes if n.op_type in COUNTED and n.outputs]
    shapes: dict[str, tuple[int, ...]] = {name: tuple(v.shape) for name, v in feed.items()}
    unknown = set()
    for node in counted:
        for name in (*node.inputs[:2], node.outputs[0]):
            if name in shapes or not name:
                continue
            shape = model.info(name).shape
            sizes = tuple(d for d in shape or () if isinstance(d, int))
            if shape is not None and len(sizes) == len(shape):
                shapes[name] = sizes
            elif name in model.producers:
                unknown.add(name)
    if unknown:
        names = sorted(unknown)
        session = open_session(model, optimized=False, outputs=names)
        readable = [n for n in names if n in session.output_names]
        shapes |= {n: tuple(v.shape) for n, v in session.run(feed, readable).items()}
    return {node.name: _macs(node, shapes) for node in counted}


def _macs(node: Node, shapes: dict[str, tuple[int, ...]]) -> int:
    first, second = (shapes.get(n) for n in node.inputs[:2])
    result = shapes.get(node.outputs[0])
    if first is None or second is None or result is None:
        return 0
    if node.op_type == "Conv":
        # Each output element sums one kernel over the channels of its group.
        return _size(result) * _size(second[1:])
    if node.op_type == "ConvTranspose":
        # Each input element is spread over one kernel to the channels of its group.
        return _size(first) * _size(second[1:])
    if not first:
        return 0
    transposed = node.op_type == "Gemm" and node.attributes.get("transA", 0)
    depth = first[0] if transposed else first[-1]
    return _size(result) * depth


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape)
