import json
import shutil
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pytest

from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.provenance import DERIVED, read_json
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.feature import create_group
from embedcache.store.layout import fit_path
from embedcache.store.verify import verify
from tests.edits import edit_record, table_file, write_tables
from tests.extract.cases import tree
from tests.images import write_images
from tests.store.features import random_items, write_feature
from tests.toy import IMAGE, TEXT


@pytest.fixture
def copy(cache_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_path, tmp_path / "cache"))


def flip_a_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])


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
    (commits / "00003.json").unlink()
    shutil.copy(copy / "text/open_toy/chunks/00001.json", commits)
    findings = verify(Cache(copy))
    assert {(finding.location, finding.chunk, finding.is_damage) for finding in findings} == {
        ("open_toy/cls", 1, True),
        ("open_toy/cls", 3, False),
        ("open_toy/patches", 1, True),
        ("open_toy/patches", 3, False),
    }
    assert "belongs to another encoder" in findings[0].reason


def test_verify_compares_the_number_of_rows(copy: Path) -> None:
    """As a stranger may write it."""
    record = read_json(copy / "cache.json")
    record["parts"][0]["tables"]["samples"]["num_rows"] += 1
    edit_record(copy / "cache.json", parts=record["parts"])
    (finding,) = verify(Cache(copy))
    assert "samples-0.parquet: expected 301 rows, got 300; restore the file" in finding.line()


def lines_of(cache: Path) -> list[str]:
    """Return what `verify` finds in a cache."""
    return [finding.line() for finding in verify(Cache(cache))]


def test_verify_finds_changed_arrays_of_a_rule(tmp_path: Path) -> None:
    info = write_feature(tmp_path, random_items(4, (4,), seed=0), (4,), chunk_size=4).group.info
    data = b"fitted"
    fingerprint = {"family": DERIVED, "model": "pca", "fit": {"a": 1}, "weights": sha256(data).hexdigest()}
    group = create_group(tmp_path, "image", "pca", info, spec="derived:pca", fingerprint=fingerprint)
    write_tables(tmp_path, image=pa.table({"sample": range(4)}), samples=pa.table({"key": list("abcd")}))
    fit_path(group.path).write_bytes(data)
    assert lines_of(tmp_path) == []
    fit_path(group.path).write_bytes(b"other")
    (line,) = lines_of(tmp_path)
    assert line.startswith("pca/fit.safetensors: ")
    fit_path(group.path).unlink()
    assert lines_of(tmp_path) == [line]


def test_metadata_of_a_single_chunk_are_repaired_if_its_commit_confirms_them(tmp_path: Path) -> None:
    group = write_feature(tmp_path, random_items(3, (4,), seed=0), (4,), chunk_size=4).group
    write_tables(tmp_path, image=pa.table({"sample": range(3)}), samples=pa.table({"key": list("abc")}))
    path = group.path / "f/zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fill_value": 0}))
    (finding,) = (finding for finding in verify(Cache(tmp_path)) if finding.name == "f")
    assert (finding.can_repair, finding.chunk, finding.location) == (True, -1, "test/f")
    (group.path / "zarr.json").unlink()
    (finding,) = verify(Cache(tmp_path))
    assert finding.line().endswith("zarr.json does not exist; run the same embedcache extract, derive or import again")


def test_verify_ignores_files_that_are_not_listed(copy: Path) -> None:
    """Those of a process that was killed while it added samples."""
    shutil.copy(table_file(copy, "image"), copy / "image/items-1.parquet")
    assert verify(Cache(copy)) == []


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("samples-0.parquet", {"samples-0.parquet"}),
        ("image/items-0.parquet", {"image/items-0.parquet"}),
        ("image/open_toy/cls/zarr.json", {"open_toy/cls"}),
        ("image/open_toy/zarr.json", {"open_toy/cls", "open_toy/patches"}),
        ("image/open_toy/chunks/00002.json", {"open_toy/cls", "open_toy/patches"}),
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


METADATA = (
    "image/open_toy/cls",
    "text/open_toy/tokens/lengths",
    "text/open_toy/tokens/values",
    "text/open_toy/tokens/values/00001",
)


@pytest.mark.slow
def test_metadata_that_follow_are_found_and_written_again(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 12)
    cache = tmp_path / "c"
    settings = ExtractSettings(features=("cls", "tokens"), chunk_size=8)
    extract(open_source(source), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    whole = tree(cache)
    for name in METADATA:
        path = cache / name / "zarr.json"
        if name.endswith("lengths"):
            path.unlink()
        else:
            record = json.loads(path.read_text())
            key = "fill_value" if "fill_value" in record else "node_type"
            path.write_text(json.dumps({**record, key: 0}))
    findings = verify(Cache(cache))
    assert [finding.chunk for finding in findings] == [-1, -1, -1, 1]
    assert all(name in finding.reason for name, finding in zip(METADATA, findings, strict=True))
    assert verify_cache(cache, VerifySettings(repair=True)).is_sound
    assert tree(cache) == whole
