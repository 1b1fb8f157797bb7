"""Decoding of point clouds: formats, limits, and damage."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import ItemError
from embedcache.sources import points
from embedcache.sources.points import decode_points
from tests.media_files import cloud, las, npz, ply, points_parquet

CLOUD = cloud(50)


def test_npz_values() -> None:
    decoded = decode_points(npz(CLOUD))
    assert list(decoded) == ["xyz", "uv", "label"]
    for name, values in CLOUD.items():
        assert decoded[name].dtype == values.dtype
        np.testing.assert_array_equal(decoded[name], values)


def test_parquet_values() -> None:
    decoded = decode_points(points_parquet(CLOUD))
    assert list(decoded) == ["xyz", "uv", "label"]
    for name, values in CLOUD.items():
        np.testing.assert_array_equal(decoded[name], values)


def test_ply_values() -> None:
    decoded = decode_points(ply(CLOUD))
    np.testing.assert_array_equal(decoded["xyz"], CLOUD["xyz"])
    np.testing.assert_array_equal(decoded["label"], CLOUD["label"])


@pytest.mark.parametrize("origin", [0.0, 4_500_000.0])
def test_las_values_are_relative_to_its_offset(origin: float) -> None:
    decoded = decode_points(las(CLOUD, origin=origin))
    np.testing.assert_allclose(decoded["xyz"], CLOUD["xyz"], atol=0.0006)
    np.testing.assert_array_equal(decoded["classification"], CLOUD["label"])


def test_float64_becomes_float32() -> None:
    arrays = {"xyz": CLOUD["xyz"].astype(np.float64), "intensity": np.arange(50.0)}
    assert {str(values.dtype) for values in decode_points(npz(arrays)).values()} == {"float32"}


def with_value(name: str, value: float) -> dict[str, np.ndarray]:
    arrays = {key: values.copy() for key, values in CLOUD.items()}
    arrays[name][3] = value
    return arrays


def in_table(columns: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def pickled() -> bytes:
    file = io.BytesIO()
    np.savez(file, xyz=CLOUD["xyz"], names=np.array([{}] * 50, object))
    return file.getvalue()


REFUSED: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "text": (b"x y z\n1 2 3\n", "not a point cloud"),
    "NaN": (npz(with_value("xyz", np.nan)), "invalid values: xyz has NaN, infinity"),
    "infinite uv": (npz(with_value("uv", np.inf)), "invalid values: uv has NaN, infinity"),
    "no coordinates": (npz({"label": CLOUD["label"]}), "no coordinates.*got none"),
    "two coordinates": (npz({"xyz": CLOUD["uv"]}), r"no coordinates.*\(50, 2\)"),
    "no points": (npz({"xyz": np.zeros((0, 3))}), "no points"),
    "other length": (
        npz({**CLOUD, "label": CLOUD["label"][:7]}),
        "one row of label per point, 50",
    ),
    "no points in a table": (
        in_table({**dict.fromkeys("xyz", pa.array([], pa.float32())), "uv": pa.array([], pa.list_(pa.float32()))}),
        "^no points",
    ),
    "lists of several lengths": (
        in_table({**dict.fromkeys("xyz", pa.array([0.0, 1.0])), "color": [[1.0], [2.0, 3.0, 4.0]]}),
        "a column holds lists of different lengths",
    ),
    "texts": (npz({**CLOUD, "name": np.array(["a"] * 50)}), "expected numbers in name"),
    "objects": (pickled(), "pickled objects"),
    "far away": (npz({"xyz": CLOUD["xyz"].astype(np.float64) + 5e6}), "float32 resolves 0.5 there; subtract an origin"),
    "cut npz": (npz(CLOUD)[:300], "damaged point cloud"),
    "cut parquet": (points_parquet(CLOUD)[:-20], "damaged point cloud"),
    "cut ply": (ply(CLOUD)[:-20], "damaged point cloud"),
    "cut las": (las(CLOUD)[:100], "damaged point cloud"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_point_cloud(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ItemError, match=reason):
        decode_points(data)


@pytest.mark.parametrize("write", [npz, points_parquet, ply, las])
def test_too_many_points_fail(write: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "MAX_POINTS", 49)
    with pytest.raises(ItemError, match="too many points: 50, more than 49"):
        decode_points(write(CLOUD))


def test_archive_bomb_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "_MAX_BYTES", 2**20)
    bomb = npz({"xyz": np.zeros((2**17, 3), np.float32)})
    assert len(bomb) < 2**14
    with pytest.raises(ItemError, match="too large: 1,572,992 bytes uncompressed, more than 1,048,576"):
        decode_points(bomb)


@pytest.mark.parametrize("write", [npz, points_parquet, ply, las])
def test_random_damage_never_crashes(write: Callable[..., bytes]) -> None:
    rng, intact = np.random.default_rng(0), write(CLOUD)
    for _ in range(150):
        data = bytearray(intact)
        for position in rng.integers(0, len(data), 4):
            data[position] = rng.integers(0, 256)
        data[rng.integers(len(data) // 2, len(data) + 1) :] = b""
        try:
            decoded = decode_points(bytes(data))
        except ItemError:
            continue
        assert all(len(values) == len(decoded["xyz"]) for values in decoded.values())
