"""Affine arithmetic between reals and integers: ``real = (q - zero_point) * scale``.

Everything is computed in float64 and int64, because the same arithmetic in the file's own dtypes
wraps around: ``(w - zero_point)`` in uint8 is the best-known way to report -13 dB for a healthy
weight. The formulas are those of ONNX QuantizeLinear/DequantizeLinear; the ranges are those of
ONNX Runtime's quantizer (see `qparams_from_range`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INTEGER_DTYPES: dict[str, tuple[int, int]] = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}


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
        zero_point: int64, the shape of `scale`.
        dtype: the integer type, e.g. ``"int8"``.
        axis: channel axis >= 0, None per tensor.
        block_size: values per block along `axis`; None where not blocked.
    """

    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    dtype: str
    axis: int | None = None
    block_size: int | None = None

    @property
    def per_tensor(self) -> bool:
        return self.scale.ndim == 0 or (self.scale.size == 1 and self.block_size is None)

    def _spread(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scale and zero point in a shape that broadcasts against `shape`."""
        if self.per_tensor:
            return self.scale.reshape(()), self.zero_point.reshape(())
        assert self.axis is not None
        if self.block_size is not None:
            repeat = np.repeat(self.scale, self.block_size, axis=self.axis)
            zeros = np.repeat(self.zero_point, self.block_size, axis=self.axis)
            cut = tuple(slice(0, n) for n in shape)
            return repeat[cut], zeros[cut]
        along = [1] * len(shape)
        along[self.axis] = -1
        return self.scale.reshape(along), self.zero_point.reshape(along)

    def dequantize(self, quantized: NDArray[Any]) -> NDArray[np.float64]:
        """The real values of integers, float64, same shape as `quantized`."""
        scale, zero_point = self._spread(quantized.shape)
        return (quantized.astype(np.int64) - zero_point) * scale

    def quantize(self, real: NDArray[Any]) -> NDArray[np.int64]:
        """The integers of real values: divide, round half to even, shift, clip. NaN becomes 0."""
        scale, zero_point = self._spread(real.shape)
        low, high = INTEGER_DTYPES[self.dtype]
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.rint(real.astype(np.float64) / scale) + zero_point
        clipped: NDArray[np.int64] = np.clip(np.nan_to_num(steps), low, high).astype(np.int64)
        return clipped

    def representable_range(self) -> tuple[float, float]:
        """The smallest and the largest real value that any channel can hold."""
        low, high = INTEGER_DTYPES[self.dtype]
        reals = np.concatenate(
            [
                ((low - self.zero_point) * self.scale).ravel(),
                ((high - self.zero_point) * self.scale).ravel(),
            ]
        )
        return float(reals.min()), float(reals.max())


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
