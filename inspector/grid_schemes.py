"""How frameworks turn a range into a grid of codes: the formulas they publish, also the wrong ones.

Apart from `qparams`, which does what a file says, and from `scheme`, which reads what a file holds:
here are also grids that no ONNX file can hold (mid-rise, truncating, fractional zero points).
Values in, values out; no model is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.qparams import INTEGER_DTYPES

_Array = NDArray[np.float64]

LOWEST_BITS, HIGHEST_BITS = 2, 16
ROUNDINGS = ("mid-tread", "mid-rise", "truncating")

# The scale under which ONNX Runtime takes a range for empty, and the least one of PyTorch.
_TINY = float(np.finfo(np.float32).tiny)
_PYTORCH_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridScheme:
    """How one framework turns a range into a scale and a zero point, and reals into codes.

    Attributes:
        name: its key in `SCHEMES`.
        family: who does it so, e.g. "ONNX Runtime".
        variant: what is meant among the family's own, e.g. "symmetric".
        bits: width of a code, 2 to 16.
        signed: codes are two's complement, else they start at 0.
        rule: how scale and zero point follow from the range, one of `RULES`.
        rounding: "mid-tread" (nearest level; 0 is a level), "mid-rise" (levels halfway between
            multiples of the step; 0 is none) or "truncating" (towards 0).
        ties: "even" or "away" (from 0) for values halfway between two levels of a mid-tread grid.
        restricted: the formula leaves out the lowest code, so that +a and -a both fit.
        reduced: the formula uses one bit less (ONNX Runtime's `reduce_range`).
        narrow: codes that the formula leaves out are never made. ONNX Runtime's kernels make
            them: a value beyond the range clips at the end of the *type*.
        smallest_scale: scales below it are raised to it.
        corrected: of a published formula with an error, the name of the scheme that does what was
            meant; "" elsewhere.
        error: what is wrong with it, one sentence; "" for nothing.

    Raises:
        ValueError: a value that is none of those.
    """

    name: str
    family: str
    variant: str
    bits: int = 8
    signed: bool = True
    rule: str = "affine"
    rounding: str = "mid-tread"
    ties: str = "even"
    restricted: bool = False
    reduced: bool = False
    narrow: bool = False
    smallest_scale: float = 0.0
    corrected: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if not LOWEST_BITS <= self.bits <= HIGHEST_BITS:
            raise ValueError(
                f"a scheme of {self.bits} bits, expected {LOWEST_BITS} to {HIGHEST_BITS}"
            )
        for key, known in (
            ("rule", tuple(RULES)), ("rounding", ROUNDINGS), ("ties", ("even", "away")),
        ):  # fmt: skip
            if getattr(self, key) not in known:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}"
                )

    @property
    def type_name(self) -> str:
        """The type of the codes, e.g. "uint8"; also of widths that ONNX does not have."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def title(self) -> str:
        """What to call it on a page, e.g. "ONNX Runtime int8 symmetric"."""
        return f"{self.family} {self.type_name} {self.variant}".rstrip()

    @property
    def type_codes(self) -> tuple[int, int]:
        """The lowest and the highest code of the type."""
        if self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def span(self) -> tuple[int, int]:
        """The codes that the formula spreads the range over."""
        first, last = self.type_codes
        if self.reduced and self.signed:
            half = 2 ** (self.bits - 2)
            return -half, half - (self.bits < 8)  # ONNX Runtime's table: int8 -64..64, int4 -4..3
        if self.reduced:
            return 0, last // 2
        return first + (self.restricted and self.signed), last

    @property
    def codes(self) -> tuple[int, int]:
        """The codes at which values saturate."""
        return self.span if self.narrow else self.type_codes

    @property
    def quant_type(self) -> str:
        """The ONNX type that holds this grid exactly by scale and zero point; "" for none.

        Codes that the formula leaves out then exist all the same (see `narrow`).
        """
        fits = self.rounding == "mid-tread" and RULES[self.rule].whole
        return self.type_name if fits and self.type_name in INTEGER_DTYPES else ""

    @property
    def formula(self) -> str:
        """Scale s and zero point z from low, high and a = max(|low|, |high|), as one line."""
        return RULES[self.rule].text.format(
            first=self.span[0], last=self.span[1], codes=self.span[1] - self.span[0],
            middle=_middle(self.span), bits=self.bits, all=2**self.bits,
        )  # fmt: skip

    def with_bits(self, bits: int) -> GridScheme:
        """The same formula at another width.

        Raises:
            ValueError: a width outside 2 to 16.
        """
        return replace(self, bits=bits)

    def parameters(self, low: float, high: float) -> tuple[float, float]:
        """Scale and zero point for a range.

        The zero point is whole but where a scheme has an offset instead (MXNet's uint8). An empty
        range gives scale 1.

        Raises:
            ValueError: low > high, or a limit that is not finite.
        """
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"not a range: low={low}, high={high}")
        scale, zero_point = scheme_parameters(self, np.array([low]), np.array([high]))
        return float(scale[0]), float(zero_point[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """How a formula reads, whether it only looks at a = max|x|, and whether z is whole."""

    text: str
    symmetric: bool = False
    whole: bool = True


RULES: dict[str, _Rule] = {
    "affine": _Rule(text="s = (high - low) / {codes}, z = round({first} - low / s)"),
    "symmetric": _Rule(text="s = 2a / {codes}, z = {middle}", symmetric=True),
    "full-scale": _Rule(text="s = 2a / {all}, z = {middle}", symmetric=True),
    "offset": _Rule(text="s = (high - low) / {codes}, x = q * s + low", whole=False),
    "non-negative": _Rule(text="s = high / {codes}, z = {first}"),
    "power-of-two": _Rule(text="s = 2^ceil(log2(a / {last})), z = {middle}", symmetric=True),
    "fixed-parameters": _Rule(
        text="il = ceil(log2(a) + 1), s = 2^-({bits} - il), z = {middle}", symmetric=True
    ),
    "fixed-activations": _Rule(
        text="il = ceil(log2(a)), s = 2^-({bits} - il), z = {middle}", symmetric=True
    ),
    "affine-half": _Rule(text="s = (high - low) / {last}, z = round({first} - low / s)"),
    "absmax-whole": _Rule(text="s = a / {codes}, z = {middle}", symmetric=True),
}
"""Every rule by name. The last two are published mistakes: see `GridScheme.error`."""


def _middle(span: tuple[int, int]) -> int:
    return round((span[0] + span[1]) / 2)  # half to even, as ONNX Runtime's quantizer


def _exponent(a: _Array) -> _Array:
    """ceil(log2(a)) of positive numbers, exact at powers of two."""
    mantissa, exponent = np.frexp(a)
    return np.asarray(exponent - (mantissa == 0.5), np.float64)


def scheme_parameters(scheme: GridScheme, low: _Array, high: _Array) -> tuple[_Array, _Array]:
    """Scales and zero points for many ranges at once; all of one shape."""
    first, last = scheme.span
    codes = last - first
    rule = scheme.rule
    if rule != "offset":
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    a = np.maximum(-low, high)
    with np.errstate(divide="ignore"):
        if rule in ("affine", "offset"):
            scale = high / codes - low / codes  # the difference itself may overflow
        elif rule == "affine-half":
            scale = high / last - low / last
        elif rule == "symmetric":
            scale = a / (codes / 2)
        elif rule == "full-scale":
            scale = a / 2 ** (scheme.bits - 1)
        elif rule == "absmax-whole":
            scale = a / codes
        elif rule == "non-negative":
            scale = high / codes
        elif rule == "power-of-two":
            scale = np.exp2(_exponent(a / last))
        else:
            scale = np.exp2(_exponent(a) + (rule == "fixed-parameters") - scheme.bits)
    reach = high if rule == "non-negative" else high - low if rule == "offset" else a
    empty = (reach <= 0) | (scale < _TINY)
    scale = np.where(empty, 1.0, np.maximum(scale, scheme.smallest_scale))
    if rule == "offset":
        return scale, first - low / scale
    if rule in ("affine", "affine-half"):
        zero = np.clip(np.rint(first - low / scale), *scheme.codes)
    else:
        zero = np.full_like(scale, first if rule == "non-negative" else _middle(scheme.span))
    return scale, np.where(empty, 0.0, zero)  # as ONNX Runtime's quantizer where there is no range


def _scheme_list() -> tuple[GridScheme, ...]:
    ort, torch, tflite = "ONNX Runtime", "PyTorch", "TFLite"
    eps = _PYTORCH_EPS
    return (
        GridScheme(name="affine-int8", family="generic", variant="affine"),
        GridScheme(name="affine-uint8", family="generic", variant="affine", signed=False),
        GridScheme(
            name="mid-tread", family="generic", variant="mid-tread", rule="symmetric", narrow=True
        ),
        GridScheme(
            name="mid-rise", family="generic", variant="mid-rise", rule="full-scale",
            rounding="mid-rise",
        ),
        GridScheme(
            name="truncating", family="generic", variant="truncating", rule="full-scale",
            rounding="truncating",
        ),
        GridScheme(
            name="power-of-two", family="generic", variant="power-of-two step",
            rule="power-of-two", restricted=True,
        ),
        GridScheme(
            name="ort-int8-symmetric", family=ort, variant="symmetric", rule="symmetric",
            restricted=True,
        ),
        GridScheme(name="ort-int8", family=ort, variant="asymmetric"),
        GridScheme(name="ort-uint8", family=ort, variant="asymmetric", signed=False),
        GridScheme(
            name="ort-uint8-symmetric", family=ort, variant="symmetric", signed=False,
            rule="symmetric",
        ),
        GridScheme(
            name="ort-int8-reduced", family=ort, variant="symmetric, reduced range",
            rule="symmetric", reduced=True,
        ),
        GridScheme(
            name="ort-uint8-reduced", family=ort, variant="asymmetric, reduced range",
            signed=False, reduced=True,
        ),
        GridScheme(
            name="ort-int16-symmetric", family=ort, variant="symmetric", bits=16,
            rule="symmetric", restricted=True,
        ),
        GridScheme(name="ort-uint16", family=ort, variant="asymmetric", bits=16, signed=False),
        GridScheme(
            name="ort-int4-symmetric", family=ort, variant="symmetric", bits=4, rule="symmetric"
        ),
        GridScheme(name="ort-uint4", family=ort, variant="asymmetric", bits=4, signed=False),
        GridScheme(
            name="pytorch-int8-symmetric", family=torch, variant="symmetric", rule="symmetric",
            smallest_scale=eps,
        ),
        GridScheme(
            name="pytorch-uint8", family=torch, variant="affine", signed=False, smallest_scale=eps
        ),
        GridScheme(
            name="tflite-weights", family=tflite, variant="weights", rule="symmetric",
            restricted=True, narrow=True, ties="away",
        ),
        GridScheme(name="tflite-activations", family=tflite, variant="activations", ties="away"),
        GridScheme(
            name="mxnet-int8", family="MXNet", variant="zero-centred", rule="symmetric",
            restricted=True, narrow=True, ties="away",
        ),
        GridScheme(
            name="mxnet-uint8", family="MXNet", variant="offset", signed=False, rule="offset",
            ties="away",
        ),
        GridScheme(
            name="tensorflow-int8", family="TensorFlow, IPEX", variant="symmetric",
            rule="symmetric", restricted=True,
        ),
        GridScheme(
            name="tensorflow-uint8", family="TensorFlow, IPEX", variant="symmetric", signed=False,
            rule="non-negative", corrected="affine-uint8",
            error="max/255 holds for data that are never negative: all below 0 become 0",
        ),
        GridScheme(
            name="ristretto-parameters", family="Caffe (Ristretto)", variant="parameters",
            rule="fixed-parameters",
        ),
        GridScheme(
            name="ristretto-activations", family="Caffe (Ristretto)", variant="activations",
            rule="fixed-activations",
        ),
        GridScheme(
            name="intel-int8-asymmetric", family="Intel's table", variant="asymmetric",
            rule="affine-half", corrected="affine-int8",
            error="divides the whole range by 127: half of the codes are never used",
        ),
        GridScheme(
            name="intel-uint8-symmetric", family="Intel's table", variant="symmetric",
            signed=False, rule="absmax-whole", corrected="ort-uint8-symmetric",
            error="divides a by 255, but has only 127 codes above the zero point: values beyond "
            "a/2 are clipped",
        ),
    )  # fmt: skip


SCHEMES: dict[str, GridScheme] = {scheme.name: scheme for scheme in _scheme_list()}
"""Every scheme by name.

Sources: the quantizers' own code (onnxruntime.quantization, torch.ao.quantization's observers,
TensorFlow Lite's quantization specification, apache/mxnet's `_contrib_quantize`, pmgysel/caffe's
Ristretto), and of Intel Neural Compressor its documents "Quantization" and "Quantization Support
Matrix", whose formulas with errors are kept as published.
"""


def dequantized(
    values: NDArray[Any], scheme: GridScheme, scale: float, zero_point: float
) -> _Array:
    """What values become: float64, same shape; NaN stays NaN, infinity becomes the last level.

    Args:
        values: of any shape and real dtype.
        scheme: how to round and where to stop.
        scale: as from `GridScheme.parameters`.
        zero_point: likewise.
    """
    steps = np.asarray(values).astype(np.float64) / scale
    first, last = scheme.codes
    if scheme.rounding == "mid-rise":
        codes = np.clip(np.floor(steps + zero_point), first, last) + 0.5
    elif scheme.rounding == "truncating":
        codes = np.clip(np.trunc(steps) + zero_point, first, last)
    elif zero_point != round(zero_point):
        codes = np.clip(np.floor(steps + zero_point + 0.5), first, last)
    elif scheme.ties == "even":
        codes = np.clip(np.rint(steps) + zero_point, first, last)
    else:
        away = np.copysign(np.floor(np.abs(steps) + 0.5), steps)
        codes = np.clip(away + zero_point, first, last)
    real: _Array = (codes - zero_point) * scale
    return real
