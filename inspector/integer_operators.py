"""Which float operator each operator on integers or packed weights stands for.

A table apart from `scheme`, whose own says where the parameters lie: here is what to write in the
place of a node, with which of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from inspector.scheme import QCONCAT, QOPERATORS

AS_IT_IS = -1
"""In the place of a scale: the input is handed over as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatOperator:
    """The float operator that an integer operator stands for.

    Attributes:
        op_type: its name.
        operands: its inputs: (tensor, scale, zero point) among the integer operator's inputs,
            `AS_IT_IS` as scale where the input is handed over as it is.
        output: (scale, zero point) of the output; None where that is float.
        bias: the constant that is added, a separate Add where `added`.
        added: the float operator has no place for the bias.
    """

    op_type: str
    operands: tuple[tuple[int, int, int], ...]
    output: tuple[int, int] | None = None
    bias: int | None = None
    added: bool = False


def _same_ports(integer: str) -> FloatOperator:
    """Of an operator whose inputs are all in `scheme`'s table."""
    known = QOPERATORS[integer]
    return FloatOperator(
        op_type=integer.removeprefix("QLinear").removeprefix("Q"),
        operands=tuple((tensor, scale, zero) for tensor, scale, zero, _ in known.tensors),
        output=known.output,
        bias=None if known.bias is None else known.bias[0],
    )


_WHERE = _same_ports("QLinearWhere")
FLOAT_OPERATORS: dict[str, FloatOperator] = {
    # QAttention stands for no single operator.
    **{name: _same_ports(name) for name in QOPERATORS if name != "QAttention"},
    "QLinearWhere": replace(_WHERE, operands=((0, AS_IT_IS, 0), *_WHERE.operands)),
    "MatMulIntegerToFloat": FloatOperator(
        op_type="MatMul", operands=((0, 2, 4), (1, 3, 5)), bias=6, added=True
    ),
    "DynamicQuantizeMatMul": FloatOperator(
        op_type="MatMul", operands=((0, AS_IT_IS, 0), (1, 2, 3)), bias=4, added=True
    ),
    "MatMulNBits": FloatOperator(
        op_type="MatMul", operands=((0, AS_IT_IS, 0), (1, 2, 3)), bias=5, added=True
    ),
    "GatherBlockQuantized": FloatOperator(
        op_type="Gather", operands=((0, 2, 3), (1, AS_IT_IS, 0))
    ),
    "DynamicQuantizeLSTM": FloatOperator(
        op_type="LSTM",
        operands=(
            (0, AS_IT_IS, 0), (1, 8, 9), (2, 10, 11),
            *((at, AS_IT_IS, 0) for at in (3, 4, 5, 6, 7)),
        ),
    ),
}  # fmt: skip
PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
"""Those whose scales are multiplied in by further nodes behind them."""
INTEGER_ATTRIBUTES = frozenset(
    {"channels_last", "opset", "K", "N", "bits", "block_size", "accuracy_level", "quantize_axis",
     "weight_prepacked"}
)  # fmt: skip
"""Attributes that the float operator does not have."""


def float_operator(op_type: str, inputs: int) -> FloatOperator | None:
    """What an operator with so many inputs stands for; None where no float operator does it."""
    if op_type == QCONCAT:
        return FloatOperator(
            op_type="Concat",
            operands=tuple((at, at + 1, at + 2) for at in range(2, inputs, 3)),
            output=(0, 1),
        )
    return FLOAT_OPERATORS.get(op_type)
