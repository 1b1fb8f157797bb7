"""Files of arrays: their metadata, which bytes of a chunk are compared, and how many chunks stay open."""

import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from embedcache.errors import CorruptError, PathError
from embedcache.files import open_path
from embedcache.store import arrays
from embedcache.store.arrays import (
    array_metadata,
    check_file,
    file_checksum,
    fill_value,
    has_metadata,
    max_maps,
    open_chunk,
    write_chunk,
    write_metadata,
)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int32"])
def test_zarr_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 9)
    metadata = array_metadata((3, 4), (2, 4), dtype, {"a": 1})
    assert not has_metadata(tmp_path, metadata)
    write_metadata(tmp_path, metadata)
    assert has_metadata(tmp_path, metadata)
    values = np.arange(12).reshape(3, 4).astype(dtype)
    for number in (0, 1):
        write_chunk(tmp_path, number, [values[2 * number : 2 * number + 2]], (2, 4), dtype)
    array = zarr.open_array(tmp_path, mode="r+")
    assert (array.shape, array.chunks, array.dtype, dict(array.attrs)) == ((3, 4), (2, 4), dtype, {"a": 1})
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array.fill_value, fill_value(dtype))
    for changed in ({**metadata, "shape": [3, 5]}, [metadata]):
        (tmp_path / "zarr.json").write_text(json.dumps(changed))
        assert not has_metadata(tmp_path, metadata)


@pytest.mark.parametrize(("once", "num_compared"), [(False, 3), (True, 1)])
def test_chunk_is_compared_each_time_or_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: bool, num_compared: int
) -> None:
    values, compared = np.arange(12, dtype=np.int16).reshape(3, 4), []
    crc = write_chunk(tmp_path, 7, [values[:1], values[1:]], (4, 4), "int16")
    value = google_crc32c.value
    monkeypatch.setattr("google_crc32c.value", lambda data: compared.append(len(data)) or value(data))
    for _ in range(3):
        found = open_chunk(tmp_path, 7, (4, 4), "int16", crc, once=once)
    assert found.tolist() == [*values.tolist(), [-1] * 4]
    assert compared == [32] * num_compared
    padded = np.append(values, np.full(4, -1, np.int16))
    assert crc == f"{google_crc32c.value(padded.tobytes()):08x}"


def test_chunk_that_cannot_be_opened_raises(tmp_path: Path) -> None:
    (tmp_path / "c/0/0").mkdir(parents=True)
    with pytest.raises(PathError, match=f"cannot read {tmp_path}/c/0/0: "):
        open_chunk(tmp_path, 0, (4, 4), "int16", "0" * 8)


def test_files_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_CHECKED", set())
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    checksum = file_checksum(path)
    assert checksum == f"{google_crc32c.value(path.read_bytes()):08x}"
    check_file(path, checksum, next_step="again")
    with pytest.raises(CorruptError, match=f"expected checksum 00000001, got {checksum}: .*; again"):
        check_file(path, "00000001", next_step="again")
    with pytest.raises(PathError, match="none does not exist; again"):
        check_file(tmp_path / "none", checksum, next_step="again")
    monkeypatch.setattr(arrays, "file_checksum", lambda *_, **__: "00000002")
    check_file(path, checksum, next_step="again")
    with pytest.raises(CorruptError, match="got 00000002"):
        check_file(path, checksum, next_step="again", once=False)


@pytest.mark.parametrize(("limit", "expected"), [(4096, 512), (136, 17), (100, 16)])
def test_open_chunks_take_an_eighth_of_the_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    arrays._raise_open_file_limit.cache_clear()
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, limit))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: None)
    assert max_maps(tmp_path, 1) == expected
    arrays._raise_open_file_limit.cache_clear()


@pytest.mark.parametrize(("chunk_bytes", "expected"), [(2**20, 1024), (2**30, 1), (2**31, 1)])
def test_open_chunks_of_a_remote_feature_take_a_gibibyte(chunk_bytes: int, expected: int) -> None:
    assert max_maps(open_path("memory://tests-of-arrays/f"), chunk_bytes) == expected
