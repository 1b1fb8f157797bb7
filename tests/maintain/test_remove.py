"""After a removal no byte of the samples is left, all other rows are the same, and it can be killed at any rename."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.curate.outliers import find_outliers
from embedcache.curate.score import score
from embedcache.curate.settings import ScoreSettings
from embedcache.dataset.splits import read_split
from embedcache.errors import (
    CorruptError,
    DataError,
    PathError,
    UnfinishedError,
)
from embedcache.evaluate.probe import read_labeled
from embedcache.evaluate.runs import read_part
from embedcache.evaluate.settings import ProbeSettings
from embedcache.maintain.copy import cut_cache
from embedcache.maintain.remove import RemovalReport, remove_samples
from embedcache.maintain.settings import RemoveSettings
from embedcache.search.faiss_index import open_row_index, read_card
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex
from embedcache.store.cache import Cache
from embedcache.store.commits import removed_hash
from embedcache.store.feature import create_group
from embedcache.store.verify import verify
from embedcache.store.writer import add_feature, commit_chunk
from embedcache.vectors.exporting import VectorExport
from tests.cli.run import embedcache, succeed
from tests.crash import crash_function
from tests.extract.cases import tree
from tests.maintain.cases import (
    CAPTIONS,
    KEYS,
    contents_of,
    make_cache,
    make_index,
    make_selection,
    traces,
    write_source,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, its cache and an index. Not to be changed."""
    folder = tmp_path_factory.mktemp("remove")
    cache = make_cache(write_source(folder / "source"), folder / "c")
    make_index(cache, folder / "index")
    (folder / "index" / "map.parquet").write_text(CAPTIONS[0])  # a map names clusters by captions
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of it, without the source, which belongs to both."""
    return Path(shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("source")))


def test_reports_are_those_of_a_cache_that_never_had_them(labeled: Path, tmp_path: Path) -> None:
    """Compare numbers of samples and items with those of a copy without the rows."""
    keys, cache = Cache(labeled).column("key").to_pylist(), Path(shutil.copytree(labeled, tmp_path / "cache"))
    (tmp_path / "kept.txt").write_text("".join(f"{key}\n" for key in [*keys[3:20], *keys[25:]]))
    cut_cache(labeled, tmp_path / "kept.txt", tmp_path / "cut")
    remove_samples(cache, [*keys[:3], *keys[20:25]])
    np.save(tmp_path / "head.npy", np.ones(48))

    def measure(path: Path) -> list[Any]:
        head = ScoreSettings(weights=tmp_path / "head.npy")
        reports = score(path, tmp_path / "scores.parquet", head), find_outliers(path, k=5)
        data = read_labeled(Cache(path), ProbeSettings(part="val"))
        values = [{**report.to_json(), "cache": "", "lowest": ""} for report in reports]
        return [*values, data.num_left_out, VectorExport(path).left_out, len(read_part(Cache(path), "all").samples)]

    assert measure(cache) == measure(tmp_path / "cut")
    assert "of 52 samples" in succeed("curate", "outliers", cache, "odd.parquet", "-k", "5", cwd=tmp_path)


def remove(folder: Path) -> RemovalReport:
    return remove_samples(folder / "c", KEYS, index=[folder / "index"])


@pytest.fixture(scope="module")
def removed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after an uninterrupted removal. Not to be changed."""
    folder = tmp_path_factory.mktemp("removed") / "copy"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("source"))
    remove(folder)
    return folder


def test_no_byte_is_left(made: Path, removed: Path) -> None:
    contents = contents_of(made / "c")
    assert {name for _, name in traces(made / "c", contents)} == {name for name in contents if "float32" not in name}
    assert ("index/index-0.faiss", "image/open_toy/cls as float32") in traces(made, contents)
    assert list(traces(removed, contents)) == []
    assert verify(Cache(removed / "c")) == []


def test_other_rows_are_the_same(made: Path, removed: Path) -> None:
    before, after = Cache(made / "c"), Cache(removed / "c")
    assert before.info.num_items == after.info.num_items
    assert after.removed.tolist() == [3, 9]
    others = np.setdiff1d(np.arange(12), after.removed)
    assert after.samples.take(pa.array(others)).equals(before.samples.take(pa.array(others)))
    assert after.column("key").take(pa.array(after.removed)).to_pylist() == ["removed-3", "removed-9"]
    for modality in ("image", "text"):
        for old, new in zip(before.features(modality), after.features(modality), strict=True):
            assert new.failures == {3: "removed", 9: "removed"}
            for one, other in zip(old.gather_tokens(others), new.gather_tokens(others), strict=True):
                assert (one == other).all()
    record = json.loads(next((removed / "c" / "records").glob("remove-*.json")).read_text())
    assert record["outcome"]["rows"] == [3, 9]
    assert not any(key in json.dumps(record) for key in KEYS)


@pytest.mark.slow
def test_interrupted_removal_is_named(made: Path, copy: Path) -> None:
    crash_function(remove, (copy,), "before", r"c/image/open_toy/cls/c/0/0")
    with pytest.raises(UnfinishedError, match="a removal of samples was interrupted; run the same embedcache cache"):
        make_cache(made / "source", copy / "c")
    with pytest.raises(UnfinishedError, match="a removal of samples was interrupted"):
        remove_samples(copy / "c", ["00001"])
    with pytest.raises(UnfinishedError, match="a removal of samples was interrupted"):
        Cache(copy / "c").feature("image")
    assert [finding.name for finding in verify(Cache(copy / "c")) if finding.chunk < 0] == ["cache.json"]


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize(("modality", "name"), [("image", "open_toy/cls"), ("text", "open_toy/mean")])
def test_items_read_before_a_removal_are_not_committed_after_it(
    copy: Path, modality: str, name: str, *, is_killed: bool
) -> None:
    cache = Cache(copy / "c")
    read = cache.feature(modality, name)
    fingerprint = {**read.fingerprint, "model": "late"}
    late = create_group(cache.path, modality, "late", cache.info, spec="test:late", fingerprint=fingerprint)
    add_feature(late, "f", read.item_shape, read.dtype)
    commit = read.group.commit(0)
    assert commit is not None
    items, hashes = read.items(commit), list(commit.hashes)
    if is_killed:  # before other features lack the samples
        crash_function(remove, (copy,), "before", r"c/image/open_toy/cls/c/0/0")
    else:
        remove(copy)
    commit_chunk(late, 0, {"f": items}, hashes, {"f": [None] * len(items)})
    late_commit = late.commit(0)
    assert late_commit is not None
    assert list(late_commit.failures["f"]) == [None, None, None, "removed"]
    assert late_commit.hashes[3] == removed_hash(modality)
    if is_killed:
        remove(copy)
    assert np.isnan(next(Cache(cache.path).feature(modality, "late/f").chunks())[1][3]).all()
    assert [finding for finding in verify(Cache(cache.path)) if finding.is_damage] == []


def test_cache_that_changed_while_it_was_verified_is_not_called_damaged(copy: Path) -> None:
    cache = Cache(copy / "c")
    remove_samples(cache.path, KEYS[0])
    with pytest.raises(UnfinishedError, match="another process appended or removed samples while it was verified"):
        verify(cache)


def test_reader_beside_a_removal_gets_no_empty_rows(copy: Path) -> None:
    vectors, tokens = (Cache(copy / "c").feature("image", f"open_toy/{name}") for name in ("cls", "patches"))
    assert vectors.valid.all()
    assert tokens.valid.all()
    remove_samples(copy / "c", KEYS[0])
    for feature in (vectors, tokens):
        with pytest.raises(UnfinishedError, match="samples were removed from the cache while it was read"):
            feature.gather_tokens(np.array([3]))
    assert np.isfinite(vectors.gather(np.array([5]))).all()


def test_second_removal_waits_for_the_first(copy: Path, removed: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(lambda _: remove(copy), range(2)))
    assert sorted((len(report.rows), report.num_before) for report in reports) == [(0, 2), (2, 0)]
    assert tree(copy / "c") == tree(removed / "c")


@pytest.mark.slow
def test_source_with_removed_samples_extracts_nothing(made: Path, removed: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(removed / "c", tmp_path / "c"))
    before = tree(cache)
    make_cache(made / "source", cache, extend=True)
    assert tree(cache) == before
    source = Path(shutil.copytree(made / "source", tmp_path / "source"))
    shutil.copy(source / "00001.png", source / "00001-new.png")
    make_cache(source, cache, extend=True)
    opened = Cache(cache)
    assert opened.column("key").to_pylist()[9:] == ["removed-9", "00010", "00011", "00001-new"]
    assert opened.feature("image", "open_toy/cls").valid.sum() == 11
    assert verify(opened) == []


def test_new_encoder_knows_removed_samples(made: Path, removed: Path, tmp_path: Path) -> None:
    from embedcache.derive.derive import derive
    from embedcache.derive.rules import Derivation
    from embedcache.extract.extract import extract
    from embedcache.reports.summary import summarize
    from embedcache.sources import open_source

    cache = Path(shutil.copytree(removed / "c", tmp_path / "c"))
    other = "tests.toy:open_other"
    extracted = extract(open_source(made / "source"), cache, image_encoder=[other], text_encoder=[other])
    for modality, name in (("image", "open_other/cls"), ("text", "open_other/mean")):
        assert Cache(cache).feature(modality, name).failures == {3: "removed", 9: "removed"}
    derived = derive(cache, Derivation(name="unit", inputs=[("image", "open_other/cls")], rule="standardize"))
    for line in (*(report.line() for report in extracted), derived.line()):
        assert line.endswith("reused 0, removed 2, failed 0"), line
    summary = summarize(cache)
    assert {row[5] for row in summary.sections[0].table[1]} == {"0"}
    assert {(entry["num_failed"], entry["num_removed"]) for entry in summary.record()["features"]} == {(0, 2)}


@pytest.mark.parametrize(
    ("keys", "options", "error", "word"),
    [
        ([KEYS[0], "nobody"], {}, DataError, "nobody"),
        ([KEYS[0], 3], {}, DataError, "position 1"),
        ([], {}, DataError, "none"),
        (KEYS, {"index": "none"}, PathError, "exist"),
        (KEYS, {"index": "c"}, PathError, "index"),
        (KEYS, {"check": "none.parquet"}, PathError, "none.parquet"),
        (KEYS, {"check": "c/cache.json"}, PathError, "expected a selection"),
        (KEYS, {"check": "shard.tar"}, CorruptError, "shard.tar"),
    ],
)
def test_wrong_requests_change_nothing(
    copy: Path, keys: list[Any], options: dict[str, str], error: type[Exception], word: str
) -> None:
    (copy / "shard.tar").write_bytes(b"no tar" * 200)
    before = tree(copy)
    with pytest.raises(error, match=word):
        remove_samples(copy / "c", keys, **{name: [copy / path] for name, path in options.items()})
    assert tree(copy) == before


def test_nothing_is_removed_from_a_damaged_cache(copy: Path) -> None:
    path = copy / "c" / "image" / "open_toy" / "cls" / "c" / "2" / "0"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(CorruptError, match="repair it with: embedcache verify CACHE --repair"):
        remove_samples(copy / "c", KEYS)
    assert not Cache(copy / "c").info.removed


@pytest.mark.slow
def test_index_of_another_kind(copy: Path) -> None:
    index = make_index(copy / "c", copy / "other", "IVF2,SQ8")
    report = remove_samples(copy / "c", KEYS, RemoveSettings(indexes=(index,)))
    assert report.indexes[str(index)]["num_vectors"] == 10
    assert sorted(open_row_index(index, read_card(index)).rows.tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]
    assert read_card(index).index_digest == Cache(copy / "c").info.index_digest


@pytest.mark.slow
def test_index_that_was_not_named_hides_samples(copy: Path) -> None:
    remove_samples(copy / "c", KEYS)
    (hits,) = OpenIndex(copy / "index").search(Queries(keys=["00001"]))
    assert len(hits) == 10
    assert {3, 9}.isdisjoint(hit.row for hit in hits)
    assert make_index(copy / "c", copy / "index")
    assert len(open_row_index(copy / "index", read_card(copy / "index"))) == 10


@pytest.mark.slow
def test_run_is_told_and_cleaned(
    cache_path: Path, run_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Path(shutil.copytree(cache_path, tmp_path / "cache"))
    run = Path(shutil.copytree(run_path, tmp_path / "run"))
    keys = ["00005", "00207"]
    remove_samples(cache, keys)
    with caplog.at_level(logging.WARNING):
        split = read_split(run / "split.parquet", [Cache(cache)])
    assert "split.parquet: 2 samples were removed" in caplog.text
    assert [split.parts[row] for row in (5, 207)] == ["", ""]
    report = remove_samples(cache, keys, check=[run])
    assert report.named == {str(run): 2}


def test_outputs_that_name_samples_are_listed(made: Path, copy: Path) -> None:
    from embedcache.curate.select.export import export_selection

    selection = make_selection(made / "c", copy / "kept.parquet")
    export_selection(made / "c", selection, copy / "tars", "webdataset")
    pq.write_table(pa.table({"key": ["a", "b"], "kept_key": [KEYS[0], None]}), copy / "kept.removed.parquet")
    (copy / "mine.txt").write_bytes(f"\ufeff{KEYS[0]}\r\nb\r\n".encode())
    (copy / "keys.txt").write_text("\n".join(KEYS))
    checked = [copy / name for name in ("kept.parquet", "tars", "kept.removed.parquet", "mine.txt")]
    before = tree(copy / "tars")
    report = remove_samples(copy / "c", KEYS, check=checked)
    assert list(report.named.values()) == [2, 2, 1, 1]
    assert tree(copy / "tars") == before

    options = [word for path in checked for word in ("--check", path)]
    assert embedcache("cache", "remove", copy / "c", copy / "keys.txt", "--yes", *options, cwd=copy).code == 1
    (copy / "mine.txt").write_text("b\n")
    assert embedcache("cache", "remove", copy / "c", copy / "keys.txt", "--yes", *options[-2:], cwd=copy).code == 0
