import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.toy import IMAGE, TEXT


@pytest.fixture
def copy(cache_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_path, tmp_path / "cache"))


def flip_a_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])


def test_verify_intact_cache(copy: Path) -> None:
    assert verify(Cache(copy)) == []


@pytest.mark.parametrize(
    ("damage", "feature", "chunk", "words"),
    [
        (lambda c: flip_a_bit(c / "image/open_toy/cls/c/2/0"), "open_toy/cls", 2, "the bytes changed on disk"),
        (
            lambda c: flip_a_bit(c / "text/open_toy/tokens/lengths/c/1"),
            "open_toy/tokens",
            1,
            "the bytes changed on disk",
        ),
        (lambda c: (c / "image/open_toy/patches/c/1/0/0").unlink(), "open_toy/patches", 1, "is committed but missing"),
        (lambda c: (c / "text/open_toy/mean/c/4/0").write_bytes(b"x"), "open_toy/mean", 4, "bytes, got 1; "),
    ],
)
def test_verify_finds_damage(copy: Path, damage: object, feature: str, chunk: int, words: str) -> None:
    damage(copy)  # type: ignore[operator]
    (finding,) = verify(Cache(copy))
    assert (finding.location, finding.chunk, finding.is_damage) == (feature, chunk, True)
    assert words in finding.reason


def test_verify_foreign_and_missing_commit(copy: Path) -> None:
    commits = copy / "image/open_toy/chunks"
    (commits / "00003.parquet").unlink()
    shutil.copy(copy / "text/open_toy/chunks/00001.parquet", commits)
    findings = verify(Cache(copy))
    assert {(finding.location, finding.chunk, finding.is_damage) for finding in findings} == {
        ("open_toy/cls", 1, True),
        ("open_toy/cls", 3, False),
        ("open_toy/patches", 1, True),
        ("open_toy/patches", 3, False),
    }
    assert "belongs to another encoder" in findings[0].reason


@pytest.mark.parametrize("name", ["samples.parquet", "image/items.parquet", "text/items.parquet"])
def test_verify_finds_reordered_table(copy: Path, name: str) -> None:
    table = pq.read_table(copy / name)
    pq.write_table(table.take([1, 0, *range(2, len(table))]), copy / name, row_group_size=64)
    findings = verify(Cache(copy))
    assert (findings[0].location, findings[0].can_repair) == (name, False)
    assert findings[0].line().startswith(f"{name}: its rows or their order changed since they were indexed")
    assert {finding.chunk for finding in findings[1:]} == ({0} if name.startswith("text") else set())


def test_verify_ignores_uncounted_rows(copy: Path) -> None:
    """Files left by a process that was killed while it added samples."""
    table = pq.read_table(copy / "image/items.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 5)]), copy / "image/items.parquet", row_group_size=64)
    assert verify(Cache(copy)) == []


def test_repair_after_verify(copy: Path, cache_path: Path, image_folder: Path) -> None:
    path = copy / "image/open_toy/cls/c/2/0"
    flip_a_bit(path)
    (finding,) = verify(Cache(copy))
    assert f"{path}: expected checksum" in finding.reason
    assert "repair it with: embedcache verify CACHE --repair" in finding.reason
    path.unlink()
    extract(open_source(image_folder), copy, image_encoders=[IMAGE], text_encoders=[TEXT])
    assert verify(Cache(copy)) == []
    assert path.read_bytes() == (cache_path / "image/open_toy/cls/c/2/0").read_bytes()


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("samples.parquet", {"samples.parquet"}),
        ("image/items.parquet", {"image/items.parquet"}),
        ("image/open_toy/cls/zarr.json", {"open_toy/cls"}),
        ("image/open_toy/zarr.json", {"open_toy/cls", "open_toy/patches"}),
        ("image/open_toy/chunks/00002.parquet", {"open_toy/cls", "open_toy/patches"}),
    ],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_verify_finds_unreadable_file(copy: Path, name: str, places: set[str], damage: str) -> None:
    path = copy / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"{}" * 99)
    findings = verify(Cache(copy))
    assert {finding.location for finding in findings} == places
    assert all(finding.is_damage != (damage == "gone" and "chunks" in name) for finding in findings)


def test_extract_restores_metadata(copy: Path, image_folder: Path) -> None:
    for name in ("image/open_toy/zarr.json", "image/open_toy/cls/zarr.json"):
        (copy / name).unlink()
    assert "run the same embedcache extract or derive again" in verify(Cache(copy))[0].line()
    reports = extract(
        open_source(image_folder),
        copy,
        image_encoders=[IMAGE],
        text_encoders=[TEXT],
        settings=ExtractSettings(features=("cls", "patches", "mean", "tokens")),
    )
    assert {report.encoded for report in reports} == {0}
    assert verify(Cache(copy)) == []


@pytest.mark.parametrize(("name", "old", "new"), [("tokens", '"float16"', '"int16"'), ("cls", '"dtype"', '"dtype_"')])
def test_verify_finds_changed_attributes(copy: Path, name: str, old: str, new: str) -> None:
    (path,) = copy.glob(f"*/open_toy/{name}/zarr.json")
    path.write_text(path.read_text().replace(old, new))
    findings = [finding for finding in verify(Cache(copy)) if finding.name == name]
    assert findings
    assert all(finding.is_damage and not finding.can_repair for finding in findings)


def test_changed_cache_json_raises(copy: Path) -> None:
    path = copy / "cache.json"
    path.write_text(path.read_text().replace('"chunk_size": 64', '"chunk_size": 46'))
    with pytest.raises(CorruptError, match=r"cache\.json has changed since it was written; restore the file"):
        Cache(copy)


def test_source_may_be_corrected_by_hand(copy: Path) -> None:
    path = copy / "cache.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "source": {**record["source"], "path": "/moved"}}))
    assert verify(Cache(copy)) == []
