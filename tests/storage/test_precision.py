"""What a stored row keeps of a float32 row."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from storage.precision import from_stored, row_scales, to_stored


def through(rows: np.ndarray, dtype: str) -> np.ndarray:
    scales = row_scales({"rows": rows})
    return from_stored(to_stored(rows, dtype, scales), dtype, scales)


def rows_of_norm(norm: float, columns: int = 64) -> np.ndarray:
    rows = np.random.default_rng(3).normal(size=(500, columns))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) * norm).astype(np.float32)


@pytest.mark.parametrize("norm", [1e6, 1.0, 1e-9, 1e30, 1e-36])
def test_float16_keeps_the_ranks_of_scores(norm: float) -> None:
    rows = rows_of_norm(norm)
    query = np.random.default_rng(4).normal(size=64)
    exact, stored = rows.astype(np.float64) @ query, through(rows, "float16").astype(np.float64) @ query
    assert spearmanr(exact, stored).statistic >= 0.999
    assert np.abs(stored - exact).max() <= 2**-11 * norm * np.linalg.norm(query)


def test_rows_of_very_different_norm_do_not_disturb_each_other() -> None:
    rows = np.concatenate([rows_of_norm(1e6), rows_of_norm(1e-9)])
    error = np.abs(through(rows, "float16") - rows).max(axis=1) / np.abs(rows).max(axis=1)
    assert error.max() <= 2**-11


def test_scales_are_powers_of_two_over_all_arrays_of_a_row() -> None:
    scales = row_scales({"a": np.array([[1, 2], [0, 0]], np.float32), "b": np.array([[-40000], [3]], np.float32)})
    assert scales.tolist() == [2.0, 2.0**-13]  # 40000 / 2 and 3 * 2^13 lie in [2^14, 2^15)
    assert scales.dtype == np.float32


def test_exact_values_survive() -> None:
    rows = np.array([[0, 0], [1, -0.5], [65504 * 4, 4], [np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(through(rows, "float16"), rows)
    smallest = np.array([[np.finfo(np.float32).smallest_subnormal, 0]], np.float32)
    assert np.isfinite(row_scales({"rows": smallest})).all()


@pytest.mark.parametrize("norm", [1e30, 1.0, 1e-30])
def test_float32_is_kept_to_the_bit(norm: float) -> None:
    rows = rows_of_norm(norm)
    np.testing.assert_array_equal(through(rows, "float32").view(np.uint32), rows.view(np.uint32))


def test_bfloat16_values_are_kept_to_the_bit() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    exact = bits.view(np.float32)[~np.isnan(bits.view(np.float32))][:, None]
    np.testing.assert_array_equal(through(exact, "bfloat16").view(np.uint32), exact.view(np.uint32))
    assert np.isnan(through(np.array([[np.nan, -np.nan]], np.float32), "bfloat16")).all()


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x3F807FFF, 0x3F80), (0xBF818000, 0xBF82)],
)
def test_bfloat16_rounds_to_nearest_even(bits: int, rounded: int) -> None:
    value = np.array([[bits]], np.uint32).view(np.float32)
    assert to_stored(value, "bfloat16", None)[0, 0] == rounded
