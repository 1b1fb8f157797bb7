"""Retrying failed items, and extending a cache with added samples."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.thumbnails import Thumbnails
from embedcache.errors import FingerprintError, PathError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract, open_job, plan, retry_failed, run_job
from embedcache.extract.settings import ExtractSettings
from embedcache.progress import NullProgress
from embedcache.reports.summary import summarize
from embedcache.search.index import build_index
from embedcache.search.search import search
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from embedcache.train.settings import OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.extract.cases import FEATURES, run, tree
from tests.images import write_images
from tests.toy import IMAGE, TEXT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty images, of which 3 and 9 are broken; the good files are in `good`."""
    folder = write_images(tmp_path / "source", 20)
    (tmp_path / "good").mkdir()
    for number in (3, 9):
        name = f"{number:05d}.png"
        shutil.copy(folder / name, tmp_path / "good" / name)
        (folder / name).write_bytes(b"junk")
    return folder


def retry(source: Path, cache: Path) -> list[str]:
    settings = ExtractSettings(features=FEATURES)
    reports = retry_failed(open_source(source), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return [report.line() for report in reports]


@pytest.mark.slow
def test_retry_writes_only_failed_rows(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "c", features=FEATURES, chunk_size=8)
    before = tree(tmp_path / "c")
    shutil.copy(tmp_path / "good/00003.png", source / "00003.png")
    (line,) = retry(source, tmp_path / "c")
    assert line.startswith("open_toy (cls, patches): encoded 2 images, reused 18, failed 1: 1 not an image")
    after = tree(tmp_path / "c")
    differing = {name for name in after if before.get(name) != after[name]}
    assert differing == {
        "cache.json",
        "image/items-0.1.parquet",
        "image/open_toy/chunks/00000.json",
        "image/open_toy/cls/c/0/0",
        "image/open_toy/patches/c/0/0/0",
    }
    assert set(before) - set(after) == {"image/items-0.parquet"}


@pytest.mark.slow
def test_retried_cache_equals_one_of_good_files(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "c", features=FEATURES, chunk_size=8)
    for path in (tmp_path / "good").iterdir():
        shutil.copy(path, source / path.name)
    retry(source, tmp_path / "c")
    run(source, tmp_path / "whole", features=FEATURES, chunk_size=8)
    for name in ("cls", "patches"):
        repaired, whole = (Cache(tmp_path / cache).feature("image", f"open_toy/{name}") for cache in ("c", "whole"))
        np.testing.assert_array_equal(repaired.load(), whole.load())
        assert repaired.hashes == whole.hashes
        assert repaired.failures == {}
    assert [report.computed for report in run(source, tmp_path / "c", features=FEATURES)] == [0, 0]


def test_retry_rejects_changed_good_file(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "c", chunk_size=8)
    shutil.copy(source / "00005.png", source / "00006.png")
    (source / "00006.png").write_bytes((source / "00006.png").read_bytes() + b"more")
    before = tree(tmp_path / "c")
    with pytest.raises(FingerprintError, match="other bytes in 1 of its images, such as 00006.png in row 6"):
        retry(source, tmp_path / "c")
    assert tree(tmp_path / "c") == before


def test_second_encoder_rejects_a_file_of_equal_length(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number * 60, 0, 0)).save(folder / f"{number}.bmp")
    cache = tmp_path / "c"
    extract(open_source(folder), cache, image_encoder=[IMAGE], settings=ExtractSettings(chunk_size=2))
    shutil.copy(folder / "0.bmp", folder / "3.bmp")
    with pytest.raises(FingerprintError, match="image 3.bmp in row 3 has other bytes now than when open_toy was"):
        extract(open_source(folder), cache, image_encoder=["tests.toy:open_other"])
    assert [commit is None for commit in Cache(cache).feature("image", "open_other").commits] == [False, True]
    assert verify(Cache(cache))[-1].is_damage is False


def test_file_changed_after_indexing_is_rejected(source: Path, tmp_path: Path) -> None:
    opened = open_source(source)
    job = open_job(opened, tmp_path / "c", {"image": (IMAGE,)}, progress=NullProgress())
    shutil.copy(tmp_path / "good/00003.png", source / "00007.png")
    with pytest.raises(
        FingerprintError, match=r"image 00007.png: expected [\d,]+ bytes, as when the source was indexed"
    ):
        run_job(job, NullProgress())


def test_replaced_file_is_retried_with_its_source(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "c", chunk_size=8)
    shutil.copy(tmp_path / "good/00003.png", source / "00003.png")
    with pytest.raises(FingerprintError, match="00003.png: expected .*; if all encoders .* on it, give its source"):
        retry_failed(tmp_path / "c", tmp_path / "c", image_encoder=IMAGE)
    (report,) = retry_failed(source, tmp_path / "c", image_encoder=IMAGE)
    assert (report.computed, sum(report.failures.values())) == (2, 1)


@pytest.mark.slow
def test_extend_encodes_new_rows_only(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 20)
    run(source, tmp_path / "c", features=FEATURES, chunk_size=8)
    before = Cache(tmp_path / "c").feature("image", "open_toy/cls").load()
    first = (tmp_path / "c/image/open_toy/cls/c/1/0").stat().st_mtime_ns
    for number in (0, 7):
        shutil.copy(source / f"{number:05d}.png", source / f"{number:05d}-again.png")
        (source / f"{number:05d}-again.txt").write_text("once more\n")
    reports = run(source, tmp_path / "c", features=FEATURES, extend=True)
    assert [report.line() for report in reports] == [
        "open_toy (cls, patches): encoded 2 images, reused 20, failed 0",
        "open_toy (tokens): encoded 2 texts, reused 20, failed 0",
    ]
    cache = Cache(tmp_path / "c")
    after = cache.feature("image", "open_toy/cls").load()
    np.testing.assert_array_equal(after[:20], before)
    np.testing.assert_array_equal(after[20:], before[[0, 7]])
    assert cache.samples["key"].to_pylist()[20:] == ["00000-again", "00007-again"]
    assert (tmp_path / "c/image/open_toy/cls/c/1/0").stat().st_mtime_ns == first
    tokens = cache.feature("text", "open_toy/tokens").gather_tokens(np.array([19, 20, 21]))
    np.testing.assert_array_equal(tokens[1], tokens[2])


@pytest.mark.slow
def test_extend_one_feature_then_the_other(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 20)
    run(source, tmp_path / "c", features=("cls", "patches"), chunk_size=8)
    shutil.copy(source / "00000.png", source / "a.png")
    run(source, tmp_path / "c", features=("cls",), extend=True)
    patches = Cache(tmp_path / "c").feature("image", "open_toy/patches")
    assert patches.valid.tolist() == [True] * 20 + [False]
    assert patches.failures == {20: "not extracted yet"}
    assert summarize(tmp_path / "c").sections[0].table[1][1][5] == "0", "not extracted yet is no failure"
    run(source, tmp_path / "c", features=("patches",))
    patches = Cache(tmp_path / "c").feature("image", "open_toy/patches")
    np.testing.assert_array_equal(patches.load()[20], patches.load()[0])


@pytest.mark.slow
def test_run_and_index_survive_extend(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 60)
    run(source, tmp_path / "c", chunk_size=16)
    settings = TrainSettings(split=SplitSettings(kind="key"), optimizer=OptimizerSettings(epochs=2, batch_size=16))
    train(tmp_path / "c", tmp_path / "run", settings=settings)
    build_index(tmp_path / "c", tmp_path / "index", IndexSettings(run=tmp_path / "run"))
    before = evaluate_retrieval(tmp_path / "c", [tmp_path / "run"]).recalls
    hits = search(tmp_path / "index", ["a red bar"])
    for suffix in ("png", "txt"):
        shutil.copy(source / f"00000.{suffix}", source / f"00000-again.{suffix}")
    run(source, tmp_path / "c", extend=True)
    assert evaluate_retrieval(tmp_path / "c", [tmp_path / "run"]).recalls == before
    assert search(tmp_path / "index", ["a red bar"]) == hits
    with pytest.raises(FingerprintError, match="may have been extended"):
        train(tmp_path / "c", tmp_path / "run", settings=settings)


def test_place_of_a_moved_source_is_recorded(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "old", 20)
    rows = (f"{path.name},{path.with_suffix('.txt').read_text().strip()}" for path in sorted(folder.glob("*.png")))
    (folder / "captions.csv").write_text("filename,caption\n" + "\n".join(rows))
    run(folder / "captions.csv", tmp_path / "c")
    cache_json = (tmp_path / "c/cache.json").read_text()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(folder)
    moved = "does not exist; check the path; or run the same extract on the place where they are"
    with pytest.raises(PathError, match=f"^images are not shown: .*{moved}"):
        Thumbnails(Cache(tmp_path / "c"))
    before = tree(tmp_path / "c")
    assert all(report.computed == 0 for report in run(copy / "captions.csv", tmp_path / "c"))
    after = tree(tmp_path / "c")
    assert {name for name in after if after[name] != before.get(name)} == {"cache.json"}
    now = cache_json.replace(str(folder), str(copy))
    assert (tmp_path / "c/cache.json").read_text() == now, "other fields and the digest stay"
    assert Thumbnails(Cache(tmp_path / "c")).webp(3, 16)
    assert not any(finding.is_damage for finding in verify(Cache(tmp_path / "c")))


@pytest.mark.slow
def test_limited_cache_grows_to_the_whole_one(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "source", 12)
    run(folder, tmp_path / "c", features=FEATURES, chunk_size=8, limit=5)
    assert [report.computed for report in run(folder, tmp_path / "c", features=FEATURES, limit=5)] == [0, 0]
    made = plan(
        open_source(folder), tmp_path / "c", image_encoder=["tests.toy:open_other"], settings=ExtractSettings(limit=5)
    )
    assert [feature.num_items for feature in made.features] == [5]
    run(folder, tmp_path / "c", features=FEATURES, limit=10, extend=True)
    run(folder, tmp_path / "c", features=FEATURES, extend=True)
    run(folder, tmp_path / "whole", features=FEATURES, chunk_size=8)
    grown, whole = tree(tmp_path / "c"), tree(tmp_path / "whole")
    arrays = [name for name in whole if "/c/" in name]
    assert arrays
    assert {name: grown[name] for name in arrays} == {name: whole[name] for name in arrays}
    assert not any(finding.is_damage for finding in verify(Cache(tmp_path / "c")))
