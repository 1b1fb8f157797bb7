"""Drift of features that are encoded again, and repair of damaged chunks."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedcache.derive.derive import derive
from embedcache.derive.rules import Derivation
from embedcache.errors import CorruptError, FingerprintError
from embedcache.extract.repair import AGREEMENT_COSINE, measure_drift, repair
from embedcache.provenance import read_json
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import open_vectors
from tests import toy
from tests.edits import edit_record, write_rows
from tests.extract.cases import FEATURES, run, tree
from tests.images import write_images


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "source", 20)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views and features of all shapes, of twenty images in chunks of 8. Not to be changed."""
    folder = tmp_path_factory.mktemp("drift")
    source = write_images(folder / "source", 20)
    run(source, folder / "c", features=FEATURES, views=("crop:0.5",), chunk_size=8)
    return folder / "c"


@pytest.fixture
def cache(extracted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(extracted, tmp_path / "c"))


def test_no_drift_of_unchanged_encoder(extracted: Path) -> None:
    drifts = measure_drift(Cache(extracted), 0.2)
    assert [drift.feature for drift in drifts] == [
        "open_toy/cls", "open_toy/patches", "open_toy@crop-0.5/cls", "open_toy@crop-0.5/patches", "open_toy/tokens",
    ]  # fmt: skip
    for drift in drifts:
        assert len(drift.cosines) == 4
        assert drift.cosines.min() > 1 - 1e-6
        assert not drift.is_bad
        assert "4 items encoded again, cosine to the stored feature: mean 1.000000" in drift.line()


def test_changed_preprocessing_drifts(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: toy.ToyImages, items: list[Image.Image]) -> list[np.ndarray]:
        return [255 - np.asarray(image.resize((4, 4)), np.float32).transpose(2, 0, 1) for image in items]

    monkeypatch.setattr(toy.ToyImages, "prepare", prepare)
    drifts = {drift.feature: drift for drift in measure_drift(Cache(extracted), 1)}
    assert drifts["open_toy/cls"].cosines.mean() < AGREEMENT_COSINE
    worst = drifts["open_toy/cls"].cosines.argmin()
    assert drifts["open_toy/cls"].line().startswith("DRIFT open_toy/cls: 20 items encoded again, cosine")
    assert drifts["open_toy/cls"].line().endswith(f", in row {worst}")
    assert not drifts["open_toy/tokens"].is_bad


def test_zero_vectors_do_not_drift(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.ToyImages, "prepare", lambda self, items: [np.zeros((3, 4, 4), np.float32)] * len(items))
    run(source, tmp_path / "c")
    assert not any(drift.is_bad for drift in measure_drift(Cache(tmp_path / "c"), 0.1))


def test_repair_rejects_damaged_table(cache: Path) -> None:
    table = pq.read_table(cache / "image/items-0.parquet")
    write_rows(cache / "image/items-0.parquet", table.take([1, 0, *range(2, len(table))]), row_group_size=8)
    (cache / "image/open_toy/cls/c/1/0").unlink()
    before = tree(cache)
    with pytest.raises(CorruptError, match="image/items-0.parquet: .*expected checksum"):
        repair(Cache(cache), verify(Cache(cache)))
    assert tree(cache) == before


def test_changed_weights_are_named(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = toy._fingerprint
    monkeypatch.setattr(toy, "_fingerprint", lambda modality, scale: fingerprint(modality, scale + 1))
    drift = measure_drift(Cache(extracted), 0.1)[0]
    assert not drift.is_bad
    assert "the encoder has changed: weights:" in drift.line()


def test_texts_need_no_source(cache: Path, extracted: Path) -> None:
    edit_record(cache / "cache.json", source={**read_json(cache / "cache.json")["source"], "path": "/nowhere"})
    shutil.rmtree(cache / "image/open_toy")
    shutil.rmtree(cache / "image/open_toy@crop-0.5")
    (drift,) = measure_drift(Cache(cache), 1)
    assert (drift.feature, len(drift.cosines), drift.is_bad) == ("open_toy/tokens", 20, False)
    damaged = cache / "text/open_toy/tokens/values/00001/c/0/0"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    repair(Cache(cache), verify(Cache(cache)))
    assert damaged.read_bytes() == (extracted / damaged.relative_to(cache)).read_bytes()


def test_imported_vectors_are_not_compared(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(6, dtype=np.float32))
    import_vectors(open_vectors("npy", files={"image": tmp_path / "v.npy"}), tmp_path / "c")
    derive(tmp_path / "c", Derivation(name="small", inputs=[("image", "image/vector")], rule="concat"))
    imported, derived = measure_drift(Cache(tmp_path / "c"), 1)
    assert imported.line() == "image/vector: not compared: its vectors were imported, and their encoder is unknown"
    assert (derived.feature, len(derived.cosines)) == ("small/vector", 6)


def test_changed_source_drifts(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    run(source, cache, chunk_size=8)
    shutil.copy(source / "00001.png", source / "00000.png")
    (source / "00002.png").unlink()
    drift = measure_drift(Cache(cache), 1)[0]
    assert (drift.num_changed, drift.num_unreadable, len(drift.cosines)) == (1, 1, 19)
    assert "1 item can no longer be read, the bytes of 1 item have changed" in drift.line()


DAMAGES = {
    "bit": ("image/open_toy/cls/c/1/0", lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:]),
    "view": ("image/open_toy@crop-0.5/patches/c/2/0/0", lambda data: data[:-1]),
    "tokens": ("text/open_toy/tokens/values/00001/c/0/0", lambda data: data + b"x"),
    "lengths": ("text/open_toy/tokens/lengths/c/0", lambda data: bytes(len(data))),
    "commit": ("image/open_toy/chunks/00002.json", lambda data: data[:-20]),
    "missing": ("image/open_toy/patches/c/0/0/0", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_restores_the_damaged_chunk_only(cache: Path, damage: str) -> None:
    before = tree(cache)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    file, change = DAMAGES[damage]
    path = cache / file
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    findings = verify(Cache(cache))
    assert findings
    (line,) = repair(Cache(cache), findings)
    assert re.search(r"encoded \d+ (images|texts), reused", line)
    assert tree(cache) == before
    assert verify(Cache(cache)) == []
    group = path.relative_to(cache).parts[1]
    written = {path for path, time in times.items() if path.stat().st_mtime_ns != time and path.suffix != ".claims"}
    assert {path.relative_to(cache).parts[1] for path in written if path.name not in (".lock", ".claims")} == {group}


def test_repair_rejects_changed_encoder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache / "image/open_toy/cls/c/1/0"
    path.write_bytes(path.read_bytes()[:-1])
    before = tree(cache)
    fingerprint = toy._fingerprint
    monkeypatch.setattr(toy, "_fingerprint", lambda modality, scale: fingerprint(modality, scale + 1))
    with pytest.raises(FingerprintError, match="weights: stored .*, requested .*; restore the versions"):
        repair(Cache(cache), verify(Cache(cache)))
    assert tree(cache) == before
