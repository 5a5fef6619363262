"""The recipe: the options of a quantization, and how they are read back from a finished file."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from inspector.calibration import METHODS, SUPPORTED_OP_TYPES
from inspector.equalize import is_equalized
from inspector.errors import (
    QuantizationError,
)
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.qparams import INTEGER_DTYPES, qparams_from_range
from inspector.scheme import (
    QUANTIZATION_OPS,
    Scheme,
    quant_formats,
    read_scheme,
)
from inspector.scheme import QuantFormat as Format

FORMATS = ("qdq", "qoperator", "dynamic")
ACTIVATION_TYPES = ("int8", "uint8", "int16", "uint16")
# For a tensor that 256 levels are too few for, by the recipe's activation type.
WIDER_TYPES = {"int8": "int16", "uint8": "uint16"}
WEIGHT_TYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
COMPUTE_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})


def nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` names most like `name`, the likest first; case does not matter."""
    by_lower: dict[str, list[str]] = {}
    for candidate in names:
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    close = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.0)
    return [original for lower in close for original in by_lower[lower]][:count]


_OVERRIDE_FORM = "TENSOR=LOW:HIGH, TENSOR=TYPE or TENSOR=SCALE@ZERO_POINT,TYPE"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorOverride:
    """What one tensor gets instead of what was observed, per tensor.

    Either a range (one end may be left to what was observed) or scale and zero point themselves.

    Attributes:
        tensor: its name in the prepared model: that in the float file, where pre-processing kept
            the tensor.
        quant_type: one of `ACTIVATION_TYPES` or `WEIGHT_TYPES`; "" for the recipe's.
        low: lower end of the range; widened to 0 where it lies above.
        high: upper end; widened to 0 where it lies below.
        scale: the step, above 0.
        zero_point: the code of 0.0; goes with `scale`, both with `quant_type`.
        symmetric: zero point in the middle; None for the recipe's. Goes with a range.

    Raises:
        ValueError: a value that is none of those, values that do not go together, or none at all.
    """

    tensor: str
    quant_type: str = ""
    low: float | None = None
    high: float | None = None
    scale: float | None = None
    zero_point: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, str) or not self.tensor:
            raise ValueError(f"the tensor of an override is {self.tensor!r}, expected a name")
        what = f"the override of {self.tensor!r}"
        known = dict.fromkeys((*ACTIVATION_TYPES, *WEIGHT_TYPES))
        if self.quant_type not in ("", *known):
            raise ValueError(f"{what} has type {self.quant_type!r}, expected {', '.join(known)}")
        for key in ("low", "high", "scale"):
            value = getattr(self, key)
            if value is not None and not (_is_number(value) and _fits_float32(value)):
                raise ValueError(f"{what} has {key} {value!r}, expected a finite float32 number")
        if self.symmetric not in (None, True, False):
            raise ValueError(f"{what} has symmetric {self.symmetric!r}, expected true or false")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{what} has low {self.low:g} above high {self.high:g}")
        ranged = self.low is not None or self.high is not None
        if (self.scale is None) != (self.zero_point is None):
            raise ValueError(f"{what} has one of scale and zero_point, expected both or none")
        if self.scale is not None and self.zero_point is not None:
            if ranged or self.symmetric is not None:
                raise ValueError(f"{what} has a scale, so low, high and symmetric say nothing more")
            if not np.float32(self.scale) > 0:
                raise ValueError(f"{what} has scale {self.scale!r}, expected a number above 0")
            if not self.quant_type:
                raise ValueError(f"{what} has a scale, but no quant_type for its zero point")
            first, last = INTEGER_DTYPES[self.quant_type]
            whole = isinstance(self.zero_point, int) and not isinstance(self.zero_point, bool)
            if not whole or not first <= self.zero_point <= last:
                raise ValueError(
                    f"{what} has zero_point {self.zero_point!r}, expected {first} to {last}"
                )
        elif not (ranged or self.quant_type or self.symmetric is not None):
            raise ValueError(f"{what} changes nothing")

    def to_json(self) -> dict[str, Any]:
        """The override as strict JSON values; what is not set is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: value for key, value in values.items() if value not in (None, "")}

    @classmethod
    def from_json(cls, values: Any) -> TensorOverride:
        """The override that `to_json` wrote.

        Raises:
            ValueError: no object, an unknown key, or a value out of its range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"an override is {type(values).__name__}, expected a JSON object")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown or "tensor" not in values:
            wrong = f"the option {unknown[0]!r}" if unknown else "no tensor"
            raise ValueError(f"an override has {wrong}, expected {', '.join(known)}")
        return cls(**values)

    def to_text(self) -> str:
        """The override as the command line's `--override` takes it (see `parse_override`)."""
        if self.scale is not None:
            parts = [f"{float(self.scale)!r}@{self.zero_point}", self.quant_type]
        else:
            ends = ["" if v is None else repr(float(v)) for v in (self.low, self.high)]
            parts = [":".join(ends) if any(ends) or not self.quant_type else "", self.quant_type]
        if self.symmetric is not None:
            parts.append("symmetric" if self.symmetric else "asymmetric")
        return f"{self.tensor}={','.join(part for part in parts if part)}"


def parse_override(text: str) -> TensorOverride:
    """The override written as one of the forms below.

    ``TENSOR=LOW:HIGH`` gives a range (an end that is left out is the observed one), ``TENSOR=TYPE``
    the observed range on another type's grid, ``TENSOR=SCALE@ZERO_POINT,TYPE`` the grid itself. A
    type and, but for a grid, "symmetric" or "asymmetric" may follow, with commas. The last "="
    counts: names of tensors may hold others.

    Raises:
        QuantizationError: another form, or a value out of its range.
    """
    tensor, equals, rest = text.rpartition("=")
    head, *words = (part.strip() for part in rest.split(","))
    values: dict[str, Any] = {"tensor": tensor}
    try:
        typed = head in ACTIVATION_TYPES or head in WEIGHT_TYPES
        if not equals or not (":" in head or "@" in head or typed):
            raise ValueError("has another form")
        if typed:
            values["quant_type"] = head
        elif "@" in head:
            scale, _, zero_point = head.partition("@")
            values |= {"scale": float(scale), "zero_point": int(zero_point)}
        else:
            for key, number in zip(("low", "high"), head.split(":", 1), strict=True):
                values |= {key: float(number)} if number.strip() else {}
        for word in words:
            if word in ("symmetric", "asymmetric"):
                values["symmetric"] = word == "symmetric"
            else:
                values["quant_type"] = word
        return TensorOverride(**values)
    except ValueError as error:
        raise QuantizationError(
            f"the override {text!r} cannot be used: {error}", hint=f"Write {_OVERRIDE_FORM}."
        ) from error


def with_type(
    override: TensorOverride | None, tensor: str, quant_type: str
) -> TensorOverride | None:
    """What gives a tensor an integer type and keeps the range that was set for it.

    A grid's scale is a step of its own type, so the range that it represents takes its place.

    Args:
        override: what the tensor has; None for nothing.
        tensor: its name.
        quant_type: one of `ACTIVATION_TYPES`; "" for the recipe's.

    Returns:
        None where the recipe's type and the observed range need no override.

    Raises:
        ValueError: no such type.
    """
    values = {} if override is None else override.to_json()
    if override is not None and override.scale is not None and override.zero_point is not None:
        if quant_type == override.quant_type:
            return override
        first, last = INTEGER_DTYPES[override.quant_type]
        values = {
            "low": (first - override.zero_point) * override.scale,
            "high": (last - override.zero_point) * override.scale,
        }
    values |= {"tensor": tensor, "quant_type": quant_type}
    return None if not quant_type and len(values) == 2 else TensorOverride(**values)


def _fits_float32(value: float) -> bool:
    with np.errstate(over="ignore"):
        return math.isfinite(value) and bool(np.isfinite(np.float32(value)))


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """A recipe: everything about a quantization but the exclusions.

    Attributes:
        format: one of `FORMATS`.
        activation_type: one of `ACTIVATION_TYPES`; dynamic quantization always takes uint8.
        weight_type: one of `WEIGHT_TYPES`.
        method: how ranges follow from what was observed, one of `calibration.METHODS`.
        percentile: share of values kept, in percent, for the method "percentile"; None takes
            ONNX Runtime's 99.999.
        per_channel: a scale per output channel of a weight.
        reduce_range: 7-bit weights, for CPUs whose 8-bit kernels saturate.
        activation_symmetric: zero point in the middle; None takes ONNX Runtime's default (no).
        weight_symmetric: the same; None takes ONNX Runtime's default (yes for signed types).
        op_types: quantize only nodes of these types; empty for all the quantizer knows.
        nodes: quantize only these nodes of the float file; empty for all.
        preprocess: run ONNX Runtime's pre-processing first.
        equalize: even out channels between layers before anything else (see `equalize`).
        calibration_samples: calibrate on at most as many feeds; None for all.
        overrides: tensors whose range, scale or type is given, each once.

    Raises:
        ValueError: a value that is none of those.
    """

    format: str = "qdq"
    activation_type: str = "int8"
    weight_type: str = "int8"
    method: str = "minmax"
    percentile: float | None = None
    per_channel: bool = False
    reduce_range: bool = False
    activation_symmetric: bool | None = None
    weight_symmetric: bool | None = None
    op_types: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    preprocess: bool = True
    equalize: bool = False
    calibration_samples: int | None = None
    overrides: tuple[TensorOverride, ...] = ()

    def __post_init__(self) -> None:
        for key, known in (
            ("format", FORMATS),
            ("activation_type", ACTIVATION_TYPES),
            ("weight_type", WEIGHT_TYPES),
            ("method", tuple(METHODS)),
        ):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}"
                )
        for key in ("per_channel", "reduce_range", "preprocess", "equalize"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected true or false")
        for key in ("activation_symmetric", "weight_symmetric"):
            if getattr(self, key) not in (None, True, False):
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected true, false or null")
        for key in ("op_types", "nodes"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
                raise ValueError(f"{key} is {value!r}, expected names")
        if self.percentile is not None and not (
            _is_number(self.percentile) and 50 < self.percentile <= 100
        ):
            raise ValueError(
                f"percentile is {self.percentile!r}, expected a number above 50, at most 100"
            )
        samples = self.calibration_samples
        if samples is not None and (
            not isinstance(samples, int) or isinstance(samples, bool) or samples < 1
        ):
            raise ValueError(f"calibration_samples is {samples!r}, expected a whole number above 0")
        if not isinstance(self.overrides, tuple) or not all(
            isinstance(each, TensorOverride) for each in self.overrides
        ):
            raise ValueError(f"overrides is {self.overrides!r}, expected overrides of tensors")
        for name, times in Counter(each.tensor for each in self.overrides).items():
            if times > 1:
                raise ValueError(f"overrides name {name!r} {times} times, expected each once")

    @property
    def static(self) -> bool:
        """It needs calibration feeds."""
        return self.format != "dynamic"

    def to_json(self) -> dict[str, Any]:
        """The recipe as strict JSON values; keys are our options with underscores.

        "equalize" and "overrides" are there only where they are set.
        """
        values = {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in fields(self)
        }
        values["overrides"] = [each.to_json() for each in self.overrides]
        later = ("equalize", "overrides")
        return {key: value for key, value in values.items() if value or key not in later}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The recipe that `to_json` wrote; absent keys take their defaults.

        Raises:
            QuantizationError: no object, an unknown key, or a value out of its range.
        """
        if not isinstance(values, Mapping):
            raise QuantizationError(
                f"a recipe is {type(values).__name__}, expected a JSON object",
                hint='Write an object like {"format": "qdq", "per_channel": true}.',
            )
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                near = nearest_names(str(key), known, 1)[0]
                raise QuantizationError(
                    f"a recipe has no option {key!r}; the nearest is {near!r}",
                    hint=f"Use one of: {', '.join(f.name for f in fields(cls))}.",
                )
        plain: dict[str, Any] = {
            key: tuple(value) if key in ("op_types", "nodes") and isinstance(value, list) else value
            for key, value in values.items()
        }
        try:
            if isinstance(plain.get("overrides"), list):
                plain["overrides"] = tuple(map(TensorOverride.from_json, plain["overrides"]))
            return cls(**plain)
        except (ValueError, TypeError) as error:
            raise QuantizationError(
                f"the recipe cannot be used: {error}", hint="Correct this option of the recipe."
            ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def config_options(config: QuantConfig) -> list[str]:
    """The recipe as words of our command line; options at their defaults are left out."""
    words: list[str] = []
    defaults = QuantConfig()
    for item in fields(config):
        value = getattr(config, item.name)
        if value == getattr(defaults, item.name):
            continue
        option = f"--{item.name.replace('_', '-')}"
        if item.name == "preprocess":
            words.append("--no-preprocess")
        elif item.name == "overrides":
            for each in config.overrides:
                words += ["--override", each.to_text()]
        elif isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, tuple):
            for entry in value:
                words += [option, entry]
        else:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def check_overrides(prepared: Model, config: QuantConfig) -> None:
    """Refuses overrides that ONNX Runtime would reject with a bare message, or silently ignore.

    ONNX Runtime looks at the first override only.

    Raises:
        QuantizationError: a tensor that the prepared model has not, or that is not float32; ranges
            of computed tensors for dynamic quantization; a type that tensor or format cannot have.
    """
    if not config.overrides:
        return
    tensors = {i.name for i in prepared.inputs} | set(prepared.constant_names)
    tensors |= {output for node in prepared.nodes for output in node.outputs if output}
    for each in config.overrides:
        name = each.tensor
        if name not in tensors:
            near = ", ".join(map(repr, nearest_names(name, sorted(tensors))))
            raise QuantizationError(
                f"there is no tensor {name!r} to override in the model that is quantized; the "
                f"nearest names are {near}",
                hint="Use one of these names (pre-processing fuses some tensors of the file away).",
            )
        dtype, constant = prepared.info(name).dtype, name in prepared.constant_names
        if dtype not in ("unknown", "float32"):
            raise QuantizationError(
                f"tensor {name!r} to override is {dtype}, expected float32",
                hint="Override a float32 tensor, or drop this override.",
            )
        if config.format != "qdq" and each.quant_type not in ("", "int8", "uint8"):
            raise QuantizationError(
                f"tensor {name!r} to override is {each.quant_type}, and format {config.format} "
                "takes 8-bit types only",
                hint="Use --format qdq for 16- and 4-bit types.",
            )
        if not constant and not config.static:
            raise QuantizationError(
                f"tensor {name!r} to override is computed, and format dynamic finds the ranges of "
                "those while it runs",
                hint="Use --format qdq, or override weights only.",
            )
        if not constant and each.quant_type not in ("", *ACTIVATION_TYPES):
            raise QuantizationError(
                f"tensor {name!r} to override is computed, which {each.quant_type} is not for",
                hint=f"Use one of the types {', '.join(ACTIVATION_TYPES)}.",
            )


def override_notes(prepared: Model, result: Model, config: QuantConfig) -> list[str]:
    """Overrides that the finished file does not follow, in sentences.

    A tensor that stays in float, whose Relu or Clip is folded into its quantization, or that has
    the scale of another (what Reshape, MaxPool and the like hand on), has no parameters of its own.
    """
    notes, without = [], []
    for each in config.overrides:
        scale = result.constant(f"{each.tensor}_scale")
        if scale is None:
            without.append(_without_effect(each.tensor, prepared, result))
            continue
        zero_point = result.constant(f"{each.tensor}_zero_point")
        wanted = [each.scale] if each.scale is not None else []
        if each.low is not None and each.high is not None and zero_point is not None:
            # The recipe's own symmetry depends on what the tensor is for: either will do.
            ways = (True, False) if each.symmetric is None else (each.symmetric,)
            reduced = (False, True) if config.reduce_range else (False,)
            wanted = [
                float(
                    qparams_from_range(
                        each.low, each.high, dtype=str(zero_point.dtype), symmetric=way,
                        reduce_range=less,
                    ).scale
                )
                for way in ways
                for less in reduced
            ]  # fmt: skip
        if wanted and not any(np.allclose(scale, want, rtol=1e-5, atol=0) for want in wanted):
            notes.append(
                f"the override of {each.tensor!r} asks for scale {wanted[0]:.6g}, but the "
                f"quantizer wrote {float(scale.flat[0]):.6g}"
            )
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        notes.append(
            f"without effect: the override of {', '.join(without[:3])}{more}, because the tensor "
            "stays in float or has no scale of its own"
        )
    return notes


def _without_effect(tensor: str, prepared: Model, result: Model) -> str:
    """The tensor's name, with that of the Relu's or Clip's output which has the scale instead."""
    for node in prepared.consumers.get(tensor, ()):
        if node.op_type in ("Relu", "Clip"):
            for output in node.outputs:
                if result.constant(f"{output}_scale") is not None:
                    return f"{tensor!r} (its {node.op_type} is folded: override {output!r})"
    return repr(tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a finished file says about how it was made.

    Attributes:
        config: the recipe, as far as the file tells; options it does not tell have their defaults.
        op_types: op types of the float model that are quantized in it, most frequent first.
        notes: what is assumed or cannot be repeated, one sentence each.
    """

    config: QuantConfig
    op_types: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


# Op types that ONNX Runtime quantizes wherever they compute with float tensors; the others only
# follow a quantized neighbour, so their absence says nothing.
_ALWAYS_QUANTIZED: dict[str, frozenset[str]] = {
    "qdq": frozenset(
        {"Add", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool",
         "InstanceNormalization", "LayerNormalization", "LeakyRelu", "MatMul", "Mul", "Sigmoid",
         "Softmax"}
    ),
    "qoperator": frozenset({"Add", "Conv", "Gemm", "MatMul", "Mul", "Sigmoid", "Softmax"}),
    "dynamic": frozenset({"Conv", "MatMul"}),
}  # fmt: skip
_INTEGER_TWINS = {
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "ConvInteger": "Conv",
    "DynamicQuantizeLSTM": "LSTM",
    "QAttention": "Attention",
    "QGemm": "Gemm",
}


def quantizer_format(model: Model) -> str:
    """Which of `FORMATS` a finished file was made with; "" where activations are float.

    Dynamic files hold DequantizeLinear too (behind an embedding), but no QuantizeLinear.
    """
    formats = quant_formats(model)
    static = any(node.op_type == "QuantizeLinear" for node in model.nodes)
    if Format.DYNAMIC in formats and not static:
        return "dynamic"
    if Format.QOPERATOR in formats:
        return "qoperator"
    return "qdq" if Format.QDQ in formats else ""


def read_recipe(quantized: Model, float_model: Model | None = None) -> Recipe:
    """The recipe of a finished file.

    Symmetry is read from the zero points, `reduce_range` from the codes that weights use,
    `per_channel` from the scales. The calibration method is not in a file: minmax is assumed, and
    this is said.

    Args:
        quantized: the finished file.
        float_model: what it was made from; tells which activations were folded.

    Raises:
        QuantizationError: nothing in it is quantized.
    """
    scheme = read_scheme(quantized)
    notes: list[str] = []
    kind = quantizer_format(quantized)
    if not kind and Format.WEIGHT_ONLY in scheme.formats:
        kind = "qdq"
        notes.append(
            "the file stores weights as integers and computes in float, which static quantization "
            "cannot repeat; the recipe quantizes activations as well"
        )
    if not kind:
        raise QuantizationError(
            f"{quantized.name} is not quantized: it has no QuantizeLinear, DequantizeLinear or "
            "integer operator",
            hint="Load the quantized model here and the float model on the other side.",
        )
    made_here = quantized.proto.producer_name == "onnx.quantize"
    if not made_here:
        made_by = f"by {quantized.producer}" if quantized.producer else "by another tool"
        notes.append(
            f"the file was written {made_by}, not by ONNX Runtime's quantizer: re-quantizing with "
            "this recipe gives another model"
        )
    if kind != "dynamic":
        notes.append("a file does not say how it was calibrated; the method minmax is assumed")

    weights = _weight_facts(quantized, scheme)
    activations = [t.qparams for t in scheme.tensors if t.kind == "activation"]
    activation_type = _most_common([q.dtype for q in activations], ACTIVATION_TYPES)
    activation_symmetric: bool | None = None
    alike = [q for q in activations if q.dtype == activation_type]
    if kind == "dynamic":
        activation_type = "uint8"
    elif alike:
        middle = 0 if activation_type.startswith("int") else 2 ** (_bits(activation_type) - 1)
        # Tensors without a range get scale 1 and zero point 0 in any scheme.
        ranged = [q for q in alike if not (np.all(q.scale == 1.0) and np.all(q.zero_point == 0))]
        if ranged and all(np.all(q.zero_point == middle) for q in ranged):
            activation_symmetric = True
    overrides: tuple[TensorOverride, ...] = ()
    if len({q.dtype for q in activations}) > 1:
        kinds = Counter(q.dtype for q in activations)
        if made_here and kind == "qdq":
            overrides = _own_types(quantized, scheme, activation_type, float_model)
        rest = f", with {len(overrides)} tensors of a type of their own" if overrides else ""
        notes.append(
            f"activations are of mixed types ({listed(kinds)}); the commonest is taken{rest}"
        )

    op_types = _quantized_op_types(
        quantized, scheme, folds=made_here and activation_symmetric is None
    )
    if made_here:
        op_types = {t: n for t, n in op_types.items() if t in SUPPORTED_OP_TYPES[kind]}
    pre_processed = any(p.key == "onnx.quant.pre_process" for p in quantized.proto.metadata_props)
    left_out = _left_out(quantized, op_types, kind)
    wanted = tuple(sorted(op_types)) if left_out else ()
    if left_out:
        notes.append(f"no {', '.join(sorted(left_out))} node is quantized in the file")
    if float_model is not None:
        folded = [
            sum(n.op_type in ("Relu", "Clip") for n in m.nodes) for m in (float_model, quantized)
        ]
        if folded[0] > folded[1]:
            notes.append(
                f"{folded[0] - folded[1]} of {folded[0]} Relu and Clip nodes are folded into the "
                "quantization of the node before them"
            )
    return Recipe(
        config=QuantConfig(
            format=kind,
            activation_type=activation_type,
            weight_type=weights.dtype,
            per_channel=weights.per_channel,
            reduce_range=weights.reduce_range,
            activation_symmetric=activation_symmetric,
            weight_symmetric=weights.symmetric,
            op_types=wanted,
            preprocess=pre_processed or not made_here,
            equalize=is_equalized(quantized),
            overrides=overrides,
        ),
        op_types=tuple(op_types),
        notes=tuple(notes),
    )


def _own_types(
    quantized: Model, scheme: Scheme, usual: str, float_model: Model | None
) -> tuple[TensorOverride, ...]:
    """The overrides that give activations another type than the usual one.

    ONNX Runtime names a zero point after the tensor whose range it is of, also where others share
    it. A tensor that the float model does not have is left out.
    """
    known = None
    if float_model is not None:
        known = {i.name for i in float_model.inputs}
        known |= {output for node in float_model.nodes for output in node.outputs}
    found: dict[str, str] = {}
    for each in scheme.tensors:
        maker = quantized.producers.get(each.quantized)
        if each.kind != "activation" or each.qparams.dtype == usual or maker is None:
            continue
        zero_point = maker.inputs[2] if len(maker.inputs) > 2 else ""
        tensor = zero_point.removesuffix("_zero_point")
        if tensor != zero_point and each.qparams.dtype in ACTIVATION_TYPES:
            found[tensor] = each.qparams.dtype
    return tuple(
        TensorOverride(tensor=tensor, quant_type=dtype)
        for tensor, dtype in found.items()
        if known is None or tensor in known
    )


def _bits(dtype: str) -> int:
    return int(dtype.removeprefix("u").removeprefix("int"))


def _most_common(dtypes: Sequence[str], known: Sequence[str]) -> str:
    counts = Counter(d for d in dtypes if d in known)
    return counts.most_common(1)[0][0] if counts else "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class _WeightFacts:
    dtype: str
    symmetric: bool | None
    per_channel: bool
    reduce_range: bool


def _weight_facts(quantized: Model, scheme: Scheme) -> _WeightFacts:
    """What the weights of computing nodes have in common.

    Constants of Add, Mul and the like are left aside: ONNX Runtime quantizes those as activations.
    """
    by_name = quantized.node_by_name
    weighted = {*COMPUTE_OPS, *_INTEGER_TWINS, "QLinearConv", "QLinearMatMul"}
    found = [
        t
        for t in scheme.tensors
        if t.kind == "weight"
        and t.qparams.dtype in WEIGHT_TYPES
        and any(by_name[c].op_type in weighted for c in t.consumers if c in by_name)
    ]
    found = found or [t for t in scheme.tensors if t.kind == "weight"]
    dtype = _most_common([t.qparams.dtype for t in found], WEIGHT_TYPES)
    alike = [t for t in found if t.qparams.dtype == dtype]
    if not alike:
        return _WeightFacts(dtype=dtype, symmetric=None, per_channel=False, reduce_range=False)
    signed = dtype.startswith("int")
    middle = 0 if signed else 2 ** (_bits(dtype) - 1)
    centred = all(np.all(t.qparams.zero_point == middle) for t in alike)
    # None where it is what ONNX Runtime does unasked: symmetric for signed types only.
    symmetric = None if centred == signed else centred
    low, high = (-64, 64) if signed else (0, 127)
    codes = [c for c in (_codes(quantized, t.quantized) for t in alike) if c is not None and c.size]
    reduce_range = (
        dtype in ("int8", "uint8")
        and bool(codes)
        and all(int(c.min()) >= low and int(c.max()) <= high for c in codes)
    )
    return _WeightFacts(
        dtype=dtype,
        symmetric=symmetric,
        per_channel=any(t.qparams.scale.size > 1 for t in alike),
        reduce_range=reduce_range,
    )


def _codes(model: Model, name: str) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    values = model.constant(name)
    return None if values is None or values.dtype.kind == "f" else values.astype(np.int64)


def _quantized_op_types(quantized: Model, scheme: Scheme, *, folds: bool) -> dict[str, int]:
    """How many quantized nodes there are by the float model's op type, most frequent first.

    Args:
        quantized: the finished file.
        scheme: its quantization.
        folds: whoever wrote it folds a quantized Relu or Clip into the node before it, so that
            one which is still there and could have been folded is in float.
    """
    reads = {t.name for t in scheme.tensors}
    weights = {t.name for t in scheme.tensors if t.kind != "activation"}
    writes = {t.before for t in scheme.tensors if t.before}
    counts: Counter[str] = Counter()
    for node in quantized.nodes:
        if node.op_type in _INTEGER_TWINS:
            counts[_INTEGER_TWINS[node.op_type]] += 1
        elif node.op_type.startswith("QLinear"):
            counts[node.op_type.removeprefix("QLinear")] += 1
        elif node.op_type in QUANTIZATION_OPS or node.op_type == "Constant":
            continue
        elif any(i in weights for i in node.inputs):
            counts[node.op_type] += 1
        elif any(i in reads for i in node.inputs) and any(o in writes for o in node.outputs):
            # A node in float between quantized neighbours reads and feeds Q/DQ as well; what tells
            # it apart is a float weight.
            unfolded = (
                folds
                and node.op_type in ("Relu", "Clip")
                and len(quantized.consumers[node.inputs[0]]) == 1
            )
            if not unfolded and not _float_constants(quantized, node):
                counts[node.op_type] += 1
    return dict(counts.most_common())


def _left_out(quantized: Model, op_types: Mapping[str, int], kind: str) -> set[str]:
    """Op types that compute in the file with float tensors, though they are always quantized."""
    return {
        node.op_type
        for node in quantized.nodes
        if node.op_type in _ALWAYS_QUANTIZED[kind]
        and node.op_type not in op_types
        and node.outputs
        and quantized.info(node.outputs[0]).dtype in FLOAT_DTYPES
        # What dynamic and integer formats add are scalar or unnamed helpers.
        and (
            kind == "qdq" or any(quantized.info(i).shape for i in _float_constants(quantized, node))
        )
    }


def _float_constants(model: Model, node: Node) -> list[str]:
    return [
        i for i in node.inputs if i in model.constant_names and model.info(i).dtype in FLOAT_DTYPES
    ]


def listed(counts: Mapping[str, int], limit: int = 4) -> str:
    common = Counter(counts).most_common()
    shown = ", ".join(f"{count} {op}" for op, count in common[:limit])
    return shown if len(common) <= limit else f"{shown}, …"
