"""A graph without what only changes how numbers are stored: computing nodes, and values between.

QuantizeLinear and DequantizeLinear, Identity, Dropout, casts between floats and the rescaling
behind integer products are transparent, constants and what is computed from them alone are no
edges, and an integer operator is the operator that it stands for. So a float model and its
quantized twin look the same as far as they are, whatever format the quantization has. A separate
module because it knows one graph; `alignment` puts two beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from inspector.folding import DQ, Q, constant_value
from inspector.model import FLOAT_DTYPES, Model, Node

Permutation = tuple[int, ...]
# An axis order behind a node (None: unchanged), or False where there is none.
CarriedOrder = Permutation | Literal[False] | None
RECTIFIERS = frozenset({"Relu", "Clip"})
HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul"})
# What ONNX Runtime's quantizers and converters append to a tensor's name.
SUFFIXES = ("_QuantizeLinear_Input", "_QuantizeInput", "_quantized", "_DequantizeLinear_Output")

_KINDS = {
    **dict.fromkeys(
        ("Gemm", "QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "FusedMatMul",
         "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4", "FusedGemm", "MatMulInteger16"),
        "MatMul",
    ),
    **dict.fromkeys(("QLinearConv", "ConvInteger", "FusedConv"), "Conv"),
    **dict.fromkeys(("Flatten", "Squeeze", "Unsqueeze"), "Reshape"),
    "GatherBlockQuantized": "Gather", "DynamicQuantizeLSTM": "LSTM", "Upsample": "Resize",
    "Sum": "Add", "QGelu": "Gelu",
}  # fmt: skip
# Where integer operators keep the operands of the operator that they stand for.
_OPERANDS: dict[str, tuple[int, ...]] = {
    "QLinearConv": (0, 3, 8), "QLinearConvTranspose": (0, 3, 8), "QLinearMatMul": (0, 3),
    "QGemm": (0, 3, 6), "QLinearAdd": (0, 3), "QLinearMul": (0, 3), "QLinearSigmoid": (0,),
    "QLinearLeakyRelu": (0,), "QLinearSoftmax": (0,), "QLinearAveragePool": (0,),
    "QLinearGlobalAveragePool": (0,), "QLinearReduceMean": (0,), "QLinearWhere": (0, 1, 4),
    "MatMulInteger": (0, 1), "ConvInteger": (0, 1), "DynamicQuantizeMatMul": (0, 1, 4),
    "MatMulIntegerToFloat": (0, 1, 6), "MatMulNBits": (0, 1, 5), "MatMulBnb4": (0, 1),
    "GatherBlockQuantized": (0, 1), "DynamicQuantizeLSTM": (0, 1, 2, 3, 4, 5, 6, 7),
}  # fmt: skip
# Operands that carry data; the others say how (shapes, axes, limits, statistics, states' lengths).
DATA_OPERANDS = {
    **dict.fromkeys(
        ("Reshape", "Slice", "Expand", "Tile", "Pad", "Resize", "Split", "TopK", "Clip", "OneHot",
         "CumSum", "Trilu", "BatchNormalization", "InstanceNormalization", "LayerNormalization",
         "GroupNormalization", "PRelu", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
         "ReduceProd", "ReduceL1", "ReduceL2", "If", "Shape"),
        (0,),
    ),
    **dict.fromkeys(("MatMul", "Conv", "ConvTranspose", "Gather"), (0, 1)),
    "ScatterND": (0, 2),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (0,)),  # states: computed in one, absent in another
}  # fmt: skip
COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal", "Mean"})
# Any axis order gives the same numbers.
ELEMENTWISE = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu",
     "Gelu", "Softplus", "Mish", "Add", "Sub", "Mul", "Div", "Max", "Min", "Exp", "Log", "Sqrt",
     "Pow", "Abs", "Neg", "Erf", "Reciprocal", "Sign", "Floor", "Ceil", "Round", "Cast", "Where"}
)  # fmt: skip
# Only move values; pre-processing may take them out or put them in.
MOVEMENT = frozenset(
    {"Reshape", "Slice", "Expand", "Tile", "Pad", "Concat", "Split", "Cast", "Transpose", "Resize"}
)
# Those of them that may leave everything as it was.
NEUTRAL = frozenset({"Reshape", "Slice", "Expand", "Tile", "Pad", "Resize"})
# Attributes that must agree, with their defaults; what is not here may be spelled in other ways.
_HARD = frozenset(
    {"strides", "dilations", "group", "kernel_shape", "perm", "hidden_size", "direction",
     "equation", "blocksize", "p", "largest", "reverse", "exclusive", "upper", "transA", "fmod"}
)  # fmt: skip
_SETTINGS: dict[str, dict[str, Any]] = {
    "LeakyRelu": {"alpha": 0.01},
    "Elu": {"alpha": 1.0},
    "ThresholdedRelu": {"alpha": 1.0},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Selu": {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
    "LRN": {"alpha": 1e-4, "beta": 0.75, "bias": 1.0, "size": 0},
    "AveragePool": {"count_include_pad": 0},
    "GatherElements": {"axis": 0},
    "DepthToSpace": {"mode": "DCR"},
    "Pad": {"mode": "constant"},
}
AXES_INPUT = frozenset(
    {"Squeeze", "Unsqueeze", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd",
     "ReduceL1", "ReduceL2"}
)  # fmt: skip
_FROM_CONSTANTS_NEVER = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def base_names(tensor: str) -> Iterator[str]:
    """A tensor's name, then the names it may have had before a quantizer renamed it."""
    yield tensor
    for suffix in SUFFIXES:
        if tensor.endswith(suffix):
            yield tensor.removesuffix(suffix)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Op:
    """A node that computes, as the operator it stands for.

    Attributes:
        node: the node.
        kind: its class, e.g. "Conv" also for QLinearConv.
        inputs: operands in the order of the float operator: roots of computed tensors, names of
            constants, "" where absent.
        outputs: its outputs, "" where absent.
        data: its data operands: roots, "=" for a constant, "" where absent; the end stripped.
        hard: attributes that must agree.
        activation: the activation fused into it, "" for none.
    """

    node: Node
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    data: tuple[str, ...]
    hard: tuple[Any, ...]
    activation: str

    @property
    def key(self) -> tuple[Any, ...]:
        return key_of(self, self.data)


def key_of(op: Op, data: Iterable[str]) -> tuple[Any, ...]:
    return (op.kind, op.hard, tuple(sorted(data) if op.kind in COMMUTATIVE else data))


class View:
    """A graph as its computing nodes and the values between them.

    A value is a tensor with everything that is the same but for its storage; its *root* is the
    first of these tensors.

    Attributes:
        model: the graph's file.
        constants: tensors computed from constants alone.
        root: the root of every computed tensor.
        members: by root, the tensors of a value in graph order, the root first.
        real: by root, the first member in the float model's unit, where that is not the root.
        ops: the computing nodes in file order.
        maker, readers: by root.
        outputs: roots of the graph outputs.
        extras: by root, what else the transparent nodes behind it write (Dropout's mask).
        by_name: the root behind every name, also behind those that a quantizer changed.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.constants: set[str] = set(model.constant_names)
        self.root: dict[str, str] = {}
        self.members: dict[str, list[str]] = {}
        self.real: dict[str, str] = {}
        self.ops: list[Op] = []
        self.maker: dict[str, Op] = {}
        self.readers: dict[str, list[Op]] = {}
        self.extras: dict[str, list[str]] = {}
        self._scales: set[str] = set()  # computed at run time: scales and zero points
        for info in model.inputs:
            self._new(info.name)
        for node in model.nodes:
            self._read(node)
        self.outputs = {self.root[o.name] for o in model.outputs if o.name in self.root}
        self.by_name: dict[str, str] = {}
        for tensor in self.root:
            for name in base_names(tensor):
                self.by_name.setdefault(name, self.root[tensor])
        self.by_name.update(self.root)

    def _new(self, tensor: str) -> None:
        self.root[tensor] = tensor
        self.members[tensor] = [tensor]

    def _alias(self, tensor: str, source: str) -> None:
        root = self.root.get(source, source)
        self.root[tensor] = root
        self.members.setdefault(root, [root]).append(tensor)

    def _read(self, node: Node) -> None:
        present = [i for i in node.inputs if i]
        if node.op_type == "Constant":
            return
        if (
            present
            and all(i in self.constants for i in present)
            and not node.captured
            and node.op_type not in _FROM_CONSTANTS_NEVER
            and not node.op_type.startswith("Random")
        ):
            self.constants.update(o for o in node.outputs if o)
            return
        if node.op_type == "DynamicQuantizeLinear":
            self._alias(node.outputs[0], node.inputs[0])
            self._scales.update(node.outputs[1:])
            return
        computed = [i for i in present if i not in self.constants]
        if computed and any(i in self._scales for i in computed):
            rest = [i for i in computed if i not in self._scales]
            if not rest:
                self._scales.update(node.outputs)
                return
            if node.op_type == "Mul" and len(rest) == 1:
                self._alias(node.outputs[0], rest[0])
                self.real.setdefault(self.root[rest[0]], node.outputs[0])
                return
        if present and self._transparent(node):
            self._alias(node.outputs[0], node.inputs[0])
            for extra in filter(None, node.outputs[1:]):
                self._new(extra)
                self.extras.setdefault(self.root[node.outputs[0]], []).append(extra)
            return
        self._compute(node)

    def _transparent(self, node: Node) -> bool:
        if node.op_type in (Q, DQ, "Identity", "Dropout"):
            return True
        if node.op_type != "Cast":
            return False
        if not _is_float_type(int(node.attributes.get("to", 0))):
            return False
        maker = self.maker.get(self.root.get(node.inputs[0], ""))
        if maker is not None and maker.node.op_type in ("MatMulInteger", "ConvInteger"):
            return True
        return self.model.info(node.inputs[0]).dtype in FLOAT_DTYPES

    def _compute(self, node: Node) -> None:
        op_type = node.op_type
        if op_type == "QLinearConcat":
            operands = node.inputs[2::3]
        else:
            at = _OPERANDS.get(op_type, range(len(node.inputs)))
            operands = tuple(node.inputs[i] if i < len(node.inputs) else "" for i in at)
        stripped = op_type.removeprefix("QLinear")
        kind = _KINDS.get(op_type) or _KINDS.get(stripped, stripped)
        if op_type == "Sum" and len(operands) != 2:
            kind = "Sum"
        inputs = tuple(i if i in self.constants else self.root.get(i, i) for i in operands)
        data = [
            "=" if name in self.constants else name
            for name in (
                inputs
                if kind not in DATA_OPERANDS
                else [inputs[i] for i in DATA_OPERANDS[kind] if i < len(inputs)]
            )
        ]
        if kind == "Gather" and data[0] != "=":
            data = data[:1]  # indices: one model may compute what the other holds
        while data and not data[-1]:
            data.pop()
        op = Op(
            node=node, kind=kind, inputs=inputs, outputs=node.outputs, data=tuple(data),
            hard=_hard(node, kind), activation=str(node.attributes.get("activation", "")),
        )  # fmt: skip
        self.ops.append(op)
        for output in node.outputs:
            if output:
                self._new(output)
                self.maker[output] = op
        captured = [self.root[c] for c in node.captured if c in self.root]
        for name in dict.fromkeys((*inputs, *captured)):
            if name and name not in self.constants:
                self.readers.setdefault(name, []).append(op)

    def tensor(self, root: str) -> str:
        """The tensor of a value that is in the float model's unit."""
        return self.real.get(root, root)

    def shape(self, tensor: str) -> tuple[int | str | None, ...] | None:
        """The shape of a tensor as far as it is known."""
        shape = self.model.info(self.real.get(tensor, tensor)).shape
        if shape is None and tensor in self.constants:
            value = constant_value(self.model, tensor)
            return None if value is None else value.shape
        return shape

    def sole_reader(self, root: str) -> Op | None:
        """The only node that reads a value that is no graph output."""
        readers = self.readers.get(root, ())
        return readers[0] if len(readers) == 1 and root not in self.outputs else None

    def integers(self, tensor: str) -> tuple[int, ...] | None:
        """The value of a constant integer operand; None where it is computed or not small."""
        if tensor not in self.constants:
            return None
        value = constant_value(self.model, tensor)
        if value is None or value.dtype.kind not in "iu" or value.size > 4096:
            return None
        return tuple(int(v) for v in value.ravel())


def _is_float_type(elem_type: int) -> bool:
    return elem_type in (1, 10, 11, 16)


def _hard(node: Node, kind: str) -> tuple[Any, ...]:
    found = []
    for name in sorted(_HARD.intersection(node.attributes)):
        value = node.attributes[name]
        if kind in ("Conv", "ConvTranspose") and name == "kernel_shape":
            continue  # the weight says it
        if name in ("strides", "dilations") and all(v == 1 for v in value):
            continue
        if (name, value) in (("group", 1), ("transA", 0), ("direction", "forward")):
            continue
        if name in ("reverse", "exclusive", "fmod") and value == 0:
            continue
        found.append((name, value))
    for name, default in _SETTINGS.get(kind, {}).items():
        value = node.attributes.get(name, default)
        found.append((name, round(value, 5) if isinstance(value, float) else value))
    if kind == "Cast":
        found.append(("to", node.attributes.get("to")))
    return tuple(found)


# -- are two nodes of one class the same -------------------------------------------------------


def dims_agree(
    a: tuple[int | str | None, ...] | None, b: tuple[int | str | None, ...] | None
) -> bool:
    if a is None or b is None:
        return True
    if len(a) != len(b):
        return False
    both = zip(a, b, strict=True)
    return all(x == y for x, y in both if isinstance(x, int) and isinstance(y, int))


def axes_of(op: Op, view: View, rank: int | None) -> tuple[int, ...] | None:
    """The axes that a node works along, >= 0; None where they are not known."""
    axes: Any = op.node.attributes.get("axes", op.node.attributes.get("axis"))
    if axes is None and op.node.op_type in AXES_INPUT and len(op.inputs) > 1 and op.inputs[1]:
        axes = view.integers(op.inputs[1])
    elif axes is None and op.kind in ("Gather", "Split"):
        axes = 0
    elif axes is None and op.kind in ("Softmax", "LogSoftmax"):
        axes = -1 if view.model.opset >= 13 else 1
    if axes is None:
        return None
    axes = (axes,) if isinstance(axes, int) else axes
    if rank is None:
        return None if any(a < 0 for a in axes) else tuple(sorted(int(a) for a in axes))
    return tuple(sorted(int(a) % rank if rank else int(a) for a in axes))


def slices_of(op: Op, view: View, shape: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    def part(name: str, at: int) -> tuple[int, ...] | None:
        if name in op.node.attributes:
            return tuple(op.node.attributes[name])
        return view.integers(op.inputs[at]) if at < len(op.inputs) and op.inputs[at] else None

    starts, ends = part("starts", 1), part("ends", 2)
    if starts is None or ends is None:
        return None
    axes = part("axes", 3) or tuple(range(len(starts)))
    steps = part("steps", 4) or (1,) * len(starts)
    found = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=False):
        if shape:
            axis %= len(shape)
            size = shape[axis]
            if isinstance(size, int):
                start, end, _ = slice(start, end, step).indices(size)
        if (start, step) != (0, 1) or end < 2**31 - 1:
            found.append((axis, start, min(end, 2**31 - 1), step))
    return tuple(sorted(found))


# The attributes that `settings_of` reads.
SETTINGS = ("axes", "axis", "keepdims", "split", "starts", "ends")


def settings_of(op: Op, view: View, shape: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """What else decides a node's result, each None where it is not known before it runs.

    Args:
        op: the node.
        view: its graph.
        shape: of its first operand, None where it is unknown.
    """
    kind = op.kind
    rank = None if shape is None else len(shape)
    if kind in ("Concat", "Softmax", "LogSoftmax", "LayerNormalization"):
        return (axes_of(op, view, rank),)
    if kind == "Gather":
        return (axes_of(op, view, rank), view.integers(op.inputs[1]))
    if kind == "Split":
        sizes = op.node.attributes.get("split")
        if sizes is None and len(op.inputs) > 1 and op.inputs[1]:
            sizes = view.integers(op.inputs[1])
        return (axes_of(op, view, rank), sizes)
    if kind.startswith("Reduce"):
        return (axes_of(op, view, rank), op.node.attributes.get("keepdims", 1))
    if kind == "Slice":
        return (slices_of(op, view, shape),)
    return ()


def weight_shapes_agree(f: Op, q: Op, a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    if a is None or b is None or q.node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return True
    if q.node.op_type in ("GatherBlockQuantized", "DynamicQuantizeLSTM"):
        return True
    squeezed = [tuple(d for d in shape if d != 1) for shape in (a, b)]
    if dims_agree(*squeezed):
        return True
    return f.kind == "MatMul" and dims_agree(squeezed[0][::-1], squeezed[1])


# -- axis orders and chains of moved values -----------------------------------------------------


def compose(first: Permutation | None, second: Permutation | None) -> Permutation | None:
    """The permutation that transposes by `first`, then by `second`; None for the identity."""
    if first is None or second is None:
        found = first or second
    else:
        found = tuple(first[axis] for axis in second)
    return None if found is None or found == tuple(range(len(found))) else found


def inverse(permutation: Permutation) -> Permutation:
    """The permutation that undoes another."""
    return tuple(permutation.index(axis) for axis in range(len(permutation)))


def relabelled(
    op_type: str, order: Permutation, mine: Permutation | None, its: Permutation | None
) -> CarriedOrder:
    """The axis order behind a Squeeze or Unsqueeze; False where both drop other axes."""
    if mine is None or its is None:
        return False
    there = list(range(len(order)))
    here = list(order)
    if op_type == "Unsqueeze":
        for number, (a, b) in enumerate(zip(mine, its, strict=True)):
            here.insert(a, -1 - number)
            there.insert(b, -1 - number)
    else:
        here = [label for at, label in enumerate(here) if at not in mine]
        there = [label for at, label in enumerate(there) if at not in its]
    if sorted(here) != sorted(there):
        return False
    return compose(tuple(there.index(label) for label in here), None)


def reshapes(root: str, view: View) -> list[str]:
    """A value and what it becomes by being reshaped again and again, read by nothing else."""
    found = [root]
    while (reader := view.sole_reader(found[-1])) is not None and reader.kind == "Reshape":
        found.append(reader.outputs[0])
    return found


def origin(root: str, view: View) -> str:
    """Where a value comes from, up through nodes that only move values."""
    while (op := view.maker.get(root)) is not None:
        computed = [d for d in op.data if d not in ("=", "")]
        if op.kind not in (*MOVEMENT, "Gather") or len(computed) != 1:
            break
        root = computed[0]
    return root


def permutation_of(transpose: Node, rank: int | None) -> Permutation | None:
    """The axis order of a Transpose; None where it is not known or orders no such axes.

    Args:
        transpose: the node.
        rank: of its operand, None where it is unknown.
    """
    perm = transpose.attributes.get("perm")
    if perm is None:
        return None if rank is None else tuple(reversed(range(rank)))
    if not isinstance(perm, tuple | list) or rank not in (None, len(perm)):
        return None
    return tuple(perm) if sorted(perm) == list(range(len(perm))) else None


def perm_of(transpose: Op, view: View) -> Permutation | None:
    shapes = [view.shape(t) for t in (*transpose.inputs[:1], *transpose.outputs[:1]) if t]
    rank = next((len(s) for s in shapes if s is not None), None)
    return permutation_of(transpose.node, rank)
