"""Which input and output of two models is which, and what a feed of the one needs for the other.

By name where the shapes agree, else by position among those that fit. Apart from `matching`
because feeds need it, whatever lies between inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inspector.model import FLOAT_DTYPES, TensorInfo
from inspector.qparams import QParams
from inspector.scheme import QuantizedTensor
from inspector.structure import Permutation


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConversion:
    """What a feed of the float model needs to fit an input of the quantized model.

    Attributes:
        name: the float model's input.
        quantized_name: the quantized model's.
        dtype: element type that the quantized model takes, e.g. "float16" or "uint8".
        permutation: axes to apply to the feed's array first; None where the layout is the same.
        qparams: to quantize the values with; None where the quantized model takes floats.
        note: the same in words.
    """

    name: str
    quantized_name: str
    dtype: str
    permutation: Permutation | None
    qparams: QParams | None
    note: str


def _orders(a: TensorInfo, b: TensorInfo) -> list[Permutation | None]:
    """Axis orders that bring an array of `a`'s shape into `b`'s: as it is, or channels moved."""
    if a.shape is None or b.shape is None:
        return [None]
    if len(a.shape) != len(b.shape):
        return []

    mine, its = a.shape, b.shape
    rank = len(mine)
    orders = [tuple(range(rank))]
    if rank > 2:
        orders += [(0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))]
    found: dict[Permutation, int] = {}
    for order in orders:
        both = [(mine[axis], size) for axis, size in zip(order, its, strict=True)]
        known = [x == y for x, y in both if isinstance(x, int) and isinstance(y, int)]
        if all(known):
            found.setdefault(order, len(known))
    # Where sizes are open, the order in which more of the known ones meet; else the first.
    best = sorted(found, key=lambda order: -found[order])
    return [None if order == orders[0] else order for order in best]


def _similar(a: str, b: str) -> bool:
    """A float input may have become an integer one, but an index stays an index."""
    if "unknown" in (a, b) or a == b:
        return True
    return a in FLOAT_DTYPES and (b in FLOAT_DTYPES or b in ("int8", "uint8", "int16", "uint16"))


def by_position(
    mine: Sequence[TensorInfo], its: Sequence[TensorInfo], what: str, notes: list[str]
) -> dict[str, str]:
    """Inputs or outputs of two models: by name, the others by position among those that fit."""
    names = {v.name: v for v in its}
    mapping = {v.name: v.name for v in mine if v.name in names and _orders(v, names[v.name])}
    rest = [v for v in its if v.name not in mapping.values()]
    for value in mine:
        if value.name in mapping or not rest:
            continue
        alike = [v for v in rest if _orders(value, v) and _similar(value.dtype, v.dtype)]
        chosen = next(iter(alike), rest[0])
        rest.remove(chosen)
        mapping[value.name] = chosen.name
        if value.name != chosen.name:
            notes.append(
                f"{what} {value.name} is called {chosen.name} in the quantized model (by position)"
            )
    return {v.name: mapping[v.name] for v in mine if v.name in mapping}


def conversion(
    mine: TensorInfo, its: TensorInfo, tensor: QuantizedTensor | None
) -> InputConversion | None:
    """What a feed needs for an input of the quantized model; None where it fits as it is.

    Args:
        mine: the float model's input.
        its: the quantized model's.
        tensor: the quantization of the quantized model's input, None where there is none.
    """
    order = next(iter(_orders(mine, its)), None)
    integers = mine.dtype in FLOAT_DTYPES and its.dtype not in (*FLOAT_DTYPES, "unknown")
    qparams = tensor.qparams if integers and tensor is not None else None
    steps = []
    if order is not None:
        steps.append(f"axes in the order {order}")
    if integers and qparams is None:
        steps.append(f"as {its.dtype}, whose scale is unknown")
    elif integers:
        steps.append(f"quantized to {its.dtype}")
    elif mine.dtype != its.dtype and "unknown" not in (mine.dtype, its.dtype):
        steps.append(f"as {its.dtype}")
    if not steps:
        return None
    note = f"input {mine.name} is fed to the quantized model's {its.name} {', '.join(steps)}"
    return InputConversion(
        name=mine.name,
        quantized_name=its.name,
        dtype=its.dtype,
        permutation=order,
        qparams=qparams,
        note=note,
    )
