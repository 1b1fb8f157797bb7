"""Links between the tokens of two features: moments by their rates, points to pixels by `uv`. Pure functions."""

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.axis import Axis
from embedcache.errors import DataError

_ROUNDING = 1e-6


def align_times(first_TD: Array, first_axis: Axis, second_UE: Array, second_axis: Axis) -> tuple[Array, Array]:
    """Align two features of one item in time: both get the frames of the slower one.

    Consecutive frames of the faster one are concatenated: 2 for rates of 50 and 25 Hz. It is cut, or padded with its
    last frame, by at most one frame of the slower one.

    Args:
        first_TD: (T, D), one row per frame of `first_axis`.
        second_UE: (U, E), one row per frame of `second_axis`.

    Returns:
        The two features with equal numbers of rows: (U, k D) and (U, E) if the first one is faster, by a factor of k;
        (T, D) and (T, k E) if the second one is.

    Raises:
        DataError: an axis is not of kind time, the rates have no whole ratio, the starts differ by a frame or more, or
            the lengths by more than one frame.
    """
    if first_axis.rate_hz is None or second_axis.rate_hz is None:
        kinds = f"{first_axis.kind} and {second_axis.kind}"
        raise DataError(f"expected two features with axes of kind time, got {kinds}; name features of frames")
    if first_axis.rate_hz < second_axis.rate_hz:
        second, first = align_times(second_UE, second_axis, first_TD, first_axis)
        return first, second
    ratio = first_axis.rate_hz / second_axis.rate_hz
    count = round(ratio)
    if abs(ratio - count) > _ROUNDING * ratio:
        raise DataError(
            f"expected rates of which one is a multiple of the other, got {first_axis.rate_hz:g} and "
            f"{second_axis.rate_hz:g} Hz; extract one of them at another rate"
        )
    shift_s = (first_axis.start_s or 0) - (second_axis.start_s or 0)
    if abs(shift_s) * second_axis.rate_hz >= 1:
        raise DataError(f"expected starts that differ by less than a frame, got {shift_s:g} s; cut the later feature")
    num_missing = len(second_UE) * count - len(first_TD)
    if abs(num_missing) > count or not len(first_TD):
        raise DataError(
            f"expected {len(second_UE) * count} frames at {first_axis.rate_hz:g} Hz for {len(second_UE)} at "
            f"{second_axis.rate_hz:g} Hz, {count} more or fewer, got {len(first_TD)}; are they of the same recording?"
        )
    padding = np.repeat(first_TD[-1:], max(num_missing, 0), axis=0)
    stacked_TD = np.concatenate([first_TD[: len(second_UE) * count], padding])
    return stacked_TD.reshape(len(second_UE), -1), second_UE


def lift(values_TD: Array, axis: Axis, uv_N2: Array) -> Floats:
    """Interpolate a feature on a grid of an image bilinearly at places in the image: (N, D) float32.

    A cell's value is that of its center; beyond the outermost centers, the nearest ones count.

    Args:
        values_TD: (T, D), one row per cell, row by row.
        axis: of kind grid, with the part of the image that it covers.
        uv_N2: (N, 2) float32 or float64, fractions of the image's width, from left, and height, from top.

    Raises:
        DataError: the axis is no grid of T cells, has no box, `uv_N2` is float16 or not finite, or lies outside of the
            box.
    """
    if axis.kind != "grid":
        raise DataError(f"expected a feature with an axis of kind grid, got {axis.kind}; name one such as patches")
    if axis.box is None:
        raise DataError(
            "expected a grid that covers a known part of each image, got one after a crop or a view; extract the image "
            "encoder with the option fit=whole"
        )
    cells = (axis.rows or 0) * (axis.columns or 0)
    if len(values_TD) != cells:
        raise DataError(f"expected {axis.rows} x {axis.columns} cells, got {len(values_TD)}")
    _check_in_box(uv_N2, axis.box)
    return sample_grid(values_TD, axis, uv_N2)


def sample_grid(values_TD: Array, axis: Axis, uv_N2: Array) -> Floats:
    """Interpolate a feature on a grid as `lift` does, without its checks: (N, D) float32.

    A place outside of the box has the value of the nearest place in it. The rule `lift` stores the result, so that
    another order of the operations would change the bits of derived features.

    Args:
        values_TD: (T, D), one row per cell, row by row.
        axis: of kind grid; without a box it covers the whole image.
        uv_N2: (N, 2) fractions of the image's width and height.
    """
    assert axis.rows is not None  # both are checked by `Axis`
    assert axis.columns is not None
    x0, y0, x1, y1 = axis.box or (0.0, 0.0, 1.0, 1.0)
    corners = []
    for position_N, low, high, size in ((uv_N2[:, 1], y0, y1, axis.rows), (uv_N2[:, 0], x0, x1, axis.columns)):
        place_N = np.clip((position_N - low) / (high - low) * size - 0.5, 0, size - 1)
        before_N = np.minimum(place_N.astype(np.int64), max(size - 2, 0))
        corners.append((before_N, np.minimum(before_N + 1, size - 1), (place_N - before_N).astype(np.float32)[:, None]))
    (top, bottom, down), (left, right, along) = corners
    grid_HWD = np.asarray(values_TD, np.float32).reshape(axis.rows, axis.columns, -1)
    upper_ND = (1 - along) * grid_HWD[top, left] + along * grid_HWD[top, right]
    lower_ND = (1 - along) * grid_HWD[bottom, left] + along * grid_HWD[bottom, right]
    sampled_ND: Floats = ((1 - down) * upper_ND + down * lower_ND).astype(np.float32)
    return sampled_ND


def _check_in_box(uv_N2: Array, box: tuple[float, float, float, float]) -> None:
    """Check that places are precise enough and lie in the box, up to rounding."""
    if uv_N2.dtype not in (np.float32, np.float64) or uv_N2.ndim != 2 or uv_N2.shape[1] != 2:
        raise DataError(
            f"uv: expected float32 of shape (N, 2), got {uv_N2.dtype} of shape {uv_N2.shape}; float16 is off by "
            "pixels: store uv with the dtype float32"
        )
    x0, y0, x1, y1 = box
    places_N2 = (uv_N2.astype(np.float64) - (x0, y0)) / (x1 - x0, y1 - y0)
    is_outside_N = ~((places_N2 >= -_ROUNDING) & (places_N2 <= 1 + _ROUNDING)).all(axis=1)
    if is_outside_N.any():
        u, v = uv_N2[is_outside_N][0]
        raise DataError(
            f"uv: expected places from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), got ({u:g}, {v:g}), and "
            f"{int(is_outside_N.sum()):,} such points; leave them out"
        )
