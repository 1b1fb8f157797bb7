"""Decoding of point clouds: values, limits, and damage."""

import io
import tracemalloc
import zipfile
from collections.abc import Mapping

import numpy as np
import pytest

from embedcache.errors import ItemError
from embedcache.sources import points
from embedcache.sources.points import decode_points
from tests.media_files import cloud, npz

CLOUD = cloud(50)


def test_npz_values() -> None:
    decoded = decode_points(npz(CLOUD))
    assert list(decoded) == ["xyz", "uv", "label"]
    for name, values in CLOUD.items():
        assert decoded[name].dtype == values.dtype
        np.testing.assert_array_equal(decoded[name], values)


def with_value(name: str, value: float) -> dict[str, np.ndarray]:
    arrays = {key: values.copy() for key, values in CLOUD.items()}
    arrays[name][3] = value
    return arrays


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
    "other length": (npz({**CLOUD, "label": CLOUD["label"][:7]}), "one row of label per point, 50"),
    "texts": (npz({**CLOUD, "name": np.array(["a"] * 50)}), "expected numbers in name"),
    "objects": (pickled(), "Object arrays cannot be loaded"),
    "far away": (npz({"xyz": CLOUD["xyz"].astype(np.float64) + 5e6}), "too far from the origin.*subtract an origin"),
    "cut npz": (npz(CLOUD)[:300], "damaged point cloud"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_point_cloud(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ItemError, match=reason):
        decode_points(data)


def test_too_many_points_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "MAX_POINTS", 49)
    with pytest.raises(ItemError, match="too many points: 50, more than 49"):
        decode_points(npz(CLOUD))


def test_archive_bomb_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "_MAX_BYTES", 2**20)
    bomb = npz({"xyz": np.zeros((2**17, 3), np.float32)})
    assert len(bomb) < 2**14
    with pytest.raises(ItemError, match="too large: 1,572,992 bytes uncompressed, more than 1,048,576"):
        decode_points(bomb)


def claiming(num_bytes: int, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return an archive of 64 MiB of zeros whose directory states another size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("xyz.npy", bytes(2**26))
        archive.infolist()[0].file_size = num_bytes
    return file.getvalue()


@pytest.mark.parametrize(
    ("compression", "reason"),
    [
        (zipfile.ZIP_DEFLATED, "damaged point cloud"),
        (zipfile.ZIP_BZIP2, "unsupported compression"),
        (zipfile.ZIP_LZMA, "unsupported compression"),
    ],
)
def test_no_more_is_decoded_than_the_directory_states(compression: int, reason: str) -> None:
    bomb = claiming(188, compression)
    tracemalloc.start()
    with pytest.raises(ItemError, match=reason):
        decode_points(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_random_damage_never_crashes() -> None:
    rng, intact = np.random.default_rng(0), npz(CLOUD)
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
