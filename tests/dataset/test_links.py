"""Links of moments by rates, and of points to cells of a grid."""

import numpy as np
import pytest
import torch
from embedcache.dataset.links import align_times, lift
from hypothesis import given
from hypothesis import strategies as st

from embedcache.axis import Axis
from embedcache.errors import DataError

FAST, SLOW = Axis(kind="time", rate_hz=50.0, start_s=0.0), Axis(kind="time", rate_hz=25.0, start_s=0.0)
WHOLE = (0.0, 0.0, 1.0, 1.0)


def frames(count: int, width: int = 2) -> np.ndarray:
    return np.arange(count * width, dtype=np.float16).reshape(count, width)


@pytest.mark.parametrize("extra", [-2, -1, 0, 1, 2])
def test_two_frames_side_by_side(extra: int) -> None:
    fast, slow = frames(8 + extra), frames(4, width=3)
    stacked, same = align_times(fast, FAST, slow, SLOW)
    np.testing.assert_array_equal(same, slow)
    expected = np.concatenate([fast, np.repeat(fast[-1:], 2, axis=0)])[:8] if extra < 0 else fast[:8]
    np.testing.assert_array_equal(stacked, expected.reshape(4, 4))
    assert stacked.dtype == fast.dtype
    other, also = align_times(slow, SLOW, fast, FAST)
    np.testing.assert_array_equal(also, stacked)
    np.testing.assert_array_equal(other, slow)


@pytest.mark.parametrize(
    ("fast", "first", "second", "message"),
    [
        (11, FAST, SLOW, "expected 8 frames at 50 Hz for 4 at 25 Hz, 2 more or fewer, got 11"),
        (5, FAST, SLOW, "expected 8 frames .* got 5"),
        (8, Axis(kind="time", rate_hz=49.0), SLOW, "one is a multiple of the other, got 49 and 25 Hz"),
        (8, Axis(kind="time", rate_hz=50.0, start_s=0.04), SLOW, "starts that differ by less than a frame, got 0.04 s"),
        (8, Axis(kind="words"), SLOW, "axes of kind time, got words and time"),
    ],
)
def test_frames_that_do_not_fit_raise(fast: int, first: Axis, second: Axis, message: str) -> None:
    with pytest.raises(DataError, match=message):
        align_times(frames(fast), first, frames(4), second)


def at(rate_hz: float, start_s: float | None) -> Axis:
    return Axis(kind="time", rate_hz=rate_hz, start_s=start_s)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (at(25, 0), at(25, 0)),
        (at(50.00002, 0), at(25, 0)),  # off by less than one millionth
        (at(50, None), at(25, 0.02)),
        (at(50, 0.02), at(25, None)),
        (at(50, 0.02), at(25, 0)),
        (at(50, 3.5), at(25, 3.5)),
    ],
)
def test_rates_and_starts_that_fit(first: Axis, second: Axis) -> None:
    count = 2 if first.rate_hz != second.rate_hz else 1
    stacked, same = align_times(frames(4 * count), first, frames(4), second)
    np.testing.assert_array_equal(stacked, frames(4 * count).reshape(4, -1))
    np.testing.assert_array_equal(same, frames(4))


@pytest.mark.parametrize(
    ("fast", "first", "slow", "second", "message"),
    [
        (8, at(50.0002, 0), 4, at(25, 0), "a multiple of the other, got 50.0002 and 25 Hz; extract one of them at an"),
        (8, at(50, 0), 4, at(25, 0.04), "starts that differ by less than a frame, got -0.04 s; cut the later feature"),
        (8, at(50, None), 4, at(25, 0.05), "less than a frame, got -0.05 s"),
        (8, at(50, 0.05), 4, at(25, None), "less than a frame, got 0.05 s"),
        (0, at(50, 0), 1, at(25, 0), "expected 2 frames at 50 Hz for 1 at 25 Hz, 2 more or fewer, got 0; are they"),
        (0, at(50, 0), 4, Axis(kind="points"), "kind time, got time and points; name features of frames"),
    ],
)
def test_rates_and_starts_that_do_not_fit_raise(fast: int, first: Axis, slow: int, second: Axis, message: str) -> None:
    with pytest.raises(DataError, match=message):
        align_times(frames(fast), first, frames(slow), second)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_lift_is_bilinear_interpolation(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.standard_normal((rows, columns, 3)).astype(np.float16)
    uv = rng.uniform(0, 1, (20, 2)).astype(np.float32)
    axis = Axis(kind="grid", rows=rows, columns=columns, box=WHOLE)
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(grid.astype(np.float32)).permute(2, 0, 1)[None],
        torch.from_numpy(uv)[None, None] * 2 - 1,
        padding_mode="border",
        align_corners=False,
    )[0, :, 0].T
    np.testing.assert_allclose(lift(grid.reshape(-1, 3), axis, uv), expected, atol=1e-4)


def test_lift_maps_through_the_box() -> None:
    values, uv = frames(12), np.array([[0.1, 0.4], [0.9, 0.6]], np.float64)
    inner = Axis(kind="grid", rows=3, columns=4, box=(0.25, 0.25, 0.75, 0.75))
    whole = Axis(kind="grid", rows=3, columns=4, box=WHOLE)
    np.testing.assert_allclose(lift(values, inner, 0.25 + uv / 2), lift(values, whole, uv), atol=1e-5)
    with pytest.raises(DataError, match=r"from \(0.25, 0.25\) to \(0.75, 0.75\), got \(0.1, 0.4\), and 2 such points"):
        lift(values, inner, uv)


def test_places_at_the_border_may_be_rounded() -> None:
    values, axis = frames(12), Axis(kind="grid", rows=3, columns=4, box=WHOLE)
    corners = np.array([[-5e-7, -5e-7], [1 + 5e-7, 1 + 5e-7]])
    np.testing.assert_allclose(lift(values, axis, corners), [values[0], values[-1]])
    for places in ([[0, 0], [0.5, 1.5], [0, 2]], [[0, 0.5], [-2e-6, 0.5], [0.5, -1]]):
        u, v = places[1]
        with pytest.raises(DataError, match=rf"got \({u:g}, {v:g}\), and 2 such points; leave them out"):
            lift(values, axis, np.array(places))


@pytest.mark.parametrize(
    ("axis", "uv", "message"),
    [
        (Axis(kind="grid", rows=3, columns=4), np.zeros((1, 2), np.float32), "after a crop or a view.*fit=whole"),
        (Axis(kind="points"), np.zeros((1, 2), np.float32), "kind grid, got points"),
        (Axis(kind="grid", rows=4, columns=4, box=WHOLE), np.zeros((1, 2), np.float32), "4 x 4 cells, got 12"),
        (Axis(kind="grid", rows=3, columns=4, box=WHOLE), np.zeros((1, 2), np.float16), "got float16.*dtype float32"),
        (Axis(kind="grid", rows=3, columns=4, box=WHOLE), np.full((1, 2), np.nan, np.float32), "got .nan, nan."),
        (Axis(kind="grid", rows=3, columns=4, box=WHOLE), np.zeros((1, 3), np.float32), r"float32 of shape \(1, 3\)"),
        (Axis(kind="grid", rows=3, columns=4, box=WHOLE), np.zeros(2), r"got float64 of shape \(2,\)"),
        (Axis(kind="grid", rows=3, columns=4, box=WHOLE), np.zeros((2, 2, 2)), r"float64 of shape \(2, 2, 2\)"),
    ],
)
def test_lift_refuses(axis: Axis, uv: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lift(frames(12), axis, uv)


@pytest.mark.parametrize(
    "axis",
    [
        FAST,
        Axis(kind="grid", rows=7, columns=5, box=(0.1, 0.0, 0.9, 1.0)),
        Axis(kind="grid", rows=2, columns=2),
        Axis(kind="points"),
    ],
)
def test_axis_survives_json(axis: Axis) -> None:
    assert Axis.from_json(axis.to_json()) == axis


@pytest.mark.parametrize(
    "record",
    [{"kind": "time"}, {"kind": "grid", "rows": 2}, {"kind": "depth"}, {"kind": "points", "unknown": 1}, {}]
    + [{"kind": "grid", "rows": 1, "columns": 1, "box": box} for box in ([0, 0, 1], [1, 0, 0, 1])],
)
def test_wrong_axis_raises(record: dict[str, object]) -> None:
    with pytest.raises(DataError, match="axis"):
        Axis.from_json(record)
