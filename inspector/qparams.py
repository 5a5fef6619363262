"""Affine arithmetic between reals and integers: ``real = (q - zero_point) * scale``.

Everything is computed in float64 and int64, because the same arithmetic in the file's own dtypes
wraps around: ``(w - zero_point)`` in uint8 is the best-known way to report -13 dB for a healthy
weight. The formulas are those of ONNX QuantizeLinear/DequantizeLinear; the ranges are those of
ONNX Runtime's quantizer (see `qparams_from_range`). The 8-bit and 4-bit float types of ONNX are
codes as well: ``real = q * scale`` with q one of a few unevenly spaced numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

INTEGER_DTYPES: dict[str, tuple[int, int]] = {
    "int2": (-2, 1),
    "uint2": (0, 3),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}
# The largest code of each small float type, and how far the one below it is.
FLOAT_CODES: dict[str, tuple[float, float]] = {
    "float8_e4m3fn": (448.0, 32.0),
    "float8_e4m3fnuz": (240.0, 16.0),
    "float8_e5m2": (57344.0, 8192.0),
    "float8_e5m2fnuz": (57344.0, 8192.0),
    "float4_e2m1fn": (6.0, 2.0),
}


def code_range(dtype: str) -> tuple[float, float]:
    """The smallest and the largest code of a type of `INTEGER_DTYPES` or `FLOAT_CODES`.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype in FLOAT_CODES:
        return -FLOAT_CODES[dtype][0], FLOAT_CODES[dtype][0]
    if dtype not in INTEGER_DTYPES:
        known = [*INTEGER_DTYPES, *FLOAT_CODES]
        raise ValueError(f"unknown quantized dtype {dtype!r}, expected one of {known}")
    return INTEGER_DTYPES[dtype]


def integer_range(
    dtype: str, *, symmetric: bool = False, reduce_range: bool = False
) -> tuple[int, int]:
    """The smallest and the largest integer that ONNX Runtime's quantizer uses for `dtype`.

    Args:
        dtype: one of `INTEGER_DTYPES`.
        symmetric: int8 and int16 leave out their lowest code, so that +a and -a both fit.
        reduce_range: 7 bits for 8-bit types (int8 -64..64, uint8 0..127).

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in INTEGER_DTYPES:
        raise ValueError(f"unknown integer dtype {dtype!r}, expected one of {[*INTEGER_DTYPES]}")
    if reduce_range and dtype in ("int8", "uint8"):
        return (-64, 64) if dtype == "int8" else (0, 127)
    low, high = INTEGER_DTYPES[dtype]
    if symmetric and dtype in ("int8", "int16"):
        low += 1
    return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class QParams:
    """Scale and zero point of one tensor.

    Attributes:
        scale: float64, shape () per tensor, (channels,) per channel, or the blocked shape.
        zero_point: int64, the shape of `scale`; 0 for the types of `FLOAT_CODES`. float64 for the
            fractions of a step that MatMulNBits allows.
        dtype: the type of the codes, e.g. ``"int8"`` or ``"float8_e4m3fn"``.
        axis: channel axis >= 0, None per tensor.
        block_size: values per block along `axis`, the last one may be shorter; None where not
            blocked.
        saturate: whether reals beyond the range of a float type become its largest code (ONNX's
            default) or NaN (infinity, where the type has one). Integers always saturate.
    """

    scale: NDArray[np.float64]
    zero_point: NDArray[Any]
    dtype: str
    axis: int | None = None
    block_size: int | None = None
    saturate: bool = True

    @property
    def per_tensor(self) -> bool:
        return self.scale.ndim == 0 or (self.scale.size == 1 and self.block_size is None)

    def aligned(
        self, array: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[Any]]:
        """`array`, scale and zero point in shapes that broadcast against one another.

        The first is a view of `array`: splitting an axis into blocks never copies.

        Raises:
            ValueError: the parameters do not fit the array's shape.
        """
        if self.per_tensor:
            return array, self.scale.reshape(()), self.zero_point.reshape(())
        axis, block, shape = self.axis, self.block_size, array.shape
        wanted = None
        if axis is not None and axis < len(shape):
            blocks = -(-shape[axis] // (block or 1))
            wanted = (blocks,) if block is None else (*shape[:axis], blocks, *shape[axis + 1 :])
        if axis is None or self.scale.shape != wanted:
            raise ValueError(
                f"a scale of shape {self.scale.shape} (axis {axis}, block size {block}) "
                f"does not fit a tensor of shape {shape}"
            )
        if block is None:
            along = [1] * len(shape)
            along[axis] = -1
            return array, self.scale.reshape(along), self.zero_point.reshape(along)
        if shape[axis] % block == 0:
            # Blocks as an axis of their own: no copy of the parameters per element.
            view = array.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
            at = axis + 1
            return view, np.expand_dims(self.scale, at), np.expand_dims(self.zero_point, at)
        cut = (slice(None),) * axis + (slice(0, shape[axis]),)
        scale = np.repeat(self.scale, block, axis=axis)[cut]
        return array, scale, np.repeat(self.zero_point, block, axis=axis)[cut]

    def dequantize(self, quantized: NDArray[Any]) -> NDArray[np.float64]:
        """The real values of codes, float64, same shape as `quantized`.

        Raises:
            ValueError: the parameters do not fit the shape.
        """
        real = np.array(quantized, np.float64)  # holds every code exactly
        view, scale, zero_point = self.aligned(real)
        if zero_point.any():
            view -= zero_point
        with np.errstate(invalid="ignore"):  # 0 * inf, where a file holds such a scale
            view *= scale
        return real

    def quantize(self, real: NDArray[Any]) -> NDArray[Any]:
        """The codes of real values, same shape: divide, round half to even, shift, clip.

        int64 for integer types; float64 for those of `FLOAT_CODES`, which keep NaN. NaN has no
        integer; it becomes the lowest code, as ONNX Runtime's kernels for x86 have it, and with
        it what a scale of 0 makes of 0. The division is in float64, a kernel's in float32: where
        the quotient lies within float32's rounding of a tie the two may differ by one code.

        Raises:
            ValueError: the parameters do not fit the shape.
        """
        steps = np.array(real, np.float64)
        view, scale, zero_point = self.aligned(steps)
        low, high = code_range(self.dtype)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            view /= scale
            if self.dtype in FLOAT_CODES:
                if self.saturate:
                    np.clip(steps, low, high, out=steps)
                return steps.astype(np.dtype(getattr(ml_dtypes, self.dtype))).astype(np.float64)
        np.rint(steps, out=steps)
        view += zero_point
        np.clip(steps, low, high, out=steps)
        steps[np.isnan(steps)] = low
        return steps.astype(np.int64)

    def representable_range(self) -> tuple[float, float]:
        """The smallest and the largest real value that any channel can hold; nan for no channel."""
        low, high = code_range(self.dtype)
        if not self.scale.size:
            return math.nan, math.nan
        with np.errstate(invalid="ignore"):  # 0 * inf, where a file holds such a scale
            ends = (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale
        return float(min(e.min() for e in ends)), float(max(e.max() for e in ends))


def qparams_from_constants(
    scale: NDArray[Any],
    zero_point: NDArray[Any] | None,
    *,
    dtype: str,
    shape: tuple[int | str | None, ...] | None,
    axis: int = 1,
    block_size: int = 0,
    saturate: bool = True,
) -> QParams:
    """Parameters as a QuantizeLinear or DequantizeLinear node reads them.

    Args:
        scale: of any float type; one element is per tensor whatever its shape.
        zero_point: of any integer type; None for zeros.
        dtype: the type of the codes, one of `INTEGER_DTYPES` or `FLOAT_CODES`.
        shape: of the quantized tensor as far as known; None where its rank is unknown.
        axis: as in the file, negative ones count from the end.
        block_size: 0 where not blocked.
        saturate: see `QParams`.

    Raises:
        ValueError: what does not fit, as a sentence without a subject's name.
    """
    code_range(dtype)
    if block_size < 0:
        raise ValueError(f"block size {block_size} is negative")
    scales = np.asarray(scale).astype(np.float64)
    zeros = np.zeros(1, np.int64) if zero_point is None else np.asarray(zero_point)
    if dtype in FLOAT_CODES and np.any(zeros.astype(np.float64)):
        raise ValueError(f"the zero point of {dtype} is not 0")
    zeros = zeros.astype(np.int64)
    if zeros.size == 1:
        zeros = np.broadcast_to(zeros.reshape(()), scales.shape)
    elif zeros.shape != scales.shape:
        raise ValueError(f"zero point of shape {zeros.shape}, but scale of shape {scales.shape}")
    if scales.size == 1 and not block_size:
        return QParams(
            scale=scales.reshape(()), zero_point=zeros.reshape(()), dtype=dtype, saturate=saturate
        )
    rank = len(shape) if shape is not None else scales.ndim if block_size else None
    if rank is None and axis < 0:
        raise ValueError(f"axis {axis} of a tensor of unknown rank")
    at = axis + rank if axis < 0 and rank is not None else axis
    if not 0 <= at < (at + 1 if rank is None else rank):
        raise ValueError(f"axis {axis} is outside a tensor of rank {rank}")
    if scales.ndim != (rank if block_size else 1):
        expected = f"{rank} axes, blocks of {block_size}" if block_size else "one axis"
        raise ValueError(f"scale of shape {scales.shape}, expected {expected}")
    dims = shape if block_size and shape is not None else (shape[at],) if shape is not None else ()
    for place, (dim, have) in enumerate(zip(dims, scales.shape, strict=False)):
        if not isinstance(dim, int):
            continue
        wanted = -(-dim // block_size) if block_size and place == at else dim
        if have != wanted:
            raise ValueError(f"scale of shape {scales.shape} for a tensor of shape {shape}")
    return QParams(
        scale=scales, zero_point=zeros, dtype=dtype, axis=at, block_size=block_size or None,
        saturate=saturate,
    )  # fmt: skip


def qparams_from_range(
    low: float,
    high: float,
    *,
    dtype: str,
    symmetric: bool = False,
    reduce_range: bool = False,
) -> QParams:
    """Per-tensor parameters for an observed real range, as ONNX Runtime's quantizer computes them.

    The range is widened to contain 0. Symmetric: ``scale = 2*max(|low|, |high|)/(qmax - qmin)``
    with the zero point in the middle of the codes; else ``scale = (high - low)/(qmax - qmin)`` and
    ``zero_point = round(qmin - low/scale)``. An empty range (all zero) gives scale 1, zero point 0.

    Raises:
        ValueError: low > high, or a limit that is not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"not a range: low={low}, high={high}")
    low, high = min(low, 0.0), max(high, 0.0)
    qmin, qmax = integer_range(dtype, symmetric=symmetric, reduce_range=reduce_range)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = (high - low) / (qmax - qmin)
    if scale < np.finfo(np.float32).tiny:
        scale, zero_point = 1.0, 0
    elif symmetric:
        zero_point = int(np.rint((qmin + qmax) / 2.0))
    else:
        zero_point = int(np.rint(qmin - low / scale))
    return QParams(scale=np.array(scale), zero_point=np.array(zero_point, np.int64), dtype=dtype)
