"""How gradient rows are stored: float32, float16 with one power-of-two scale per row, or bfloat16 as uint16.

A power of two shifts exponents and rounds nothing, so float16 keeps 11 bits of every element within a factor 2^29 of the
row's largest, however long or short the row is. Sums and scores are left to the engine.
"""

from typing import Any

import numpy as np

STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
NAN_BFLOAT16 = 0x7FC0
TOP_EXPONENT = 15  # the largest element of a row lands in [2^14, 2^15), below float16's 65504
SMALLEST_EXPONENT = -126  # of a normal float32, so that a scale is never flushed to zero


def row_scales(
    arrays: dict[str, np.ndarray],  # each float32 [n, D]
) -> np.ndarray:  # float32 [n]
    """Return each row's scale, a power of two over all arrays of the row; 1 for rows of zeros and of NaN."""
    largest = np.max([np.abs(array).max(axis=1, initial=0) for array in arrays.values()], axis=0)
    usable = np.isfinite(largest) & (largest > 0)
    _, exponents = np.frexp(np.where(usable, largest, 1))
    exponents = np.where(usable, np.maximum(exponents - TOP_EXPONENT, SMALLEST_EXPONENT), 0)
    return np.ldexp(np.float32(1), exponents).astype(np.float32)


def to_stored(array: np.ndarray, dtype: str, scales: np.ndarray | None) -> np.ndarray:
    """Return float32 [n, D] in the stored type; `scales` [n] divide float16 rows."""
    if dtype == "float16":
        assert scales is not None
        return (array / scales[:, None]).astype(np.float16)
    return _to_bfloat16(array) if dtype == "bfloat16" else array


def from_stored(stored: np.ndarray, dtype: str, scales: np.ndarray | None) -> np.ndarray:
    """Return the float32 [n, D] that a stored array stands for."""
    if dtype == "float16":
        assert scales is not None
        return stored.astype(np.float32) * scales[:, None]
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; any NaN becomes the one quiet NaN."""
    bits = np.ascontiguousarray(array).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(NAN_BFLOAT16), rounded)
