"""Comparison of today's values with those that `tests.net.record` wrote."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.net.record import FEATURES, VALUES

EXACT = ("image", "text", "points")
"""Modalities whose features are the same to the byte; libraries that decode others differ a little."""


def check_values(kind: str, values: Iterable[tuple[str, Any]], *, relative: float = 1e-4) -> None:
    """Check that values equal the recorded ones: numbers with a decimal point closely, all others exactly."""
    recorded = json.loads(VALUES.read_text())[kind]
    for name, value in values:
        _check_close(value, recorded[name], name, relative)


def check_features(kind: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Check that features equal the recorded ones: to the byte, or to a cosine of .9999 for other modalities."""
    with np.load(FEATURES) as recorded:
        names = {name.removeprefix(f"{kind} ") for name in recorded.files if name.startswith(f"{kind} ")}
        assert names == set(arrays)
        for name, array in arrays.items():
            expected = recorded[f"{kind} {name}"]
            if name.startswith(EXACT) or array.ndim == 1:
                np.testing.assert_array_equal(array, expected, err_msg=name)
            else:
                assert _cosines(array, expected).min() >= 0.9999, name


def _cosines(vectors_ND: np.ndarray, expected_ND: np.ndarray) -> np.ndarray:
    products_N = np.einsum("nd,nd->n", vectors_ND, expected_ND, dtype=np.float64)
    lengths_N = np.linalg.norm(vectors_ND.astype(float), axis=1) * np.linalg.norm(expected_ND.astype(float), axis=1)
    are_zero_N = (lengths_N == 0) & (vectors_ND == expected_ND).all(axis=1)
    return np.where(are_zero_N, 1, products_N / np.maximum(lengths_N, 1e-12))


def _check_close(value: Any, expected: Any, name: str, relative: float) -> None:
    if isinstance(expected, dict):
        assert set(value) == set(expected), name
        for key in expected:
            _check_close(value[key], expected[key], f"{name}/{key}", relative)
    elif isinstance(expected, list):
        assert len(value) == len(expected), name
        for number, item in enumerate(expected):
            _check_close(value[number], item, f"{name}[{number}]", relative)
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=relative, abs=1e-5), name
    else:
        assert value == expected, name
