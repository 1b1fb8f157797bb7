"""Builds: cards and settings, resuming to the same bytes, an index that grows with its cache, and damage to its files.

Kills at each rename of a build and of an extension are in `tests/net/test_kill.py`.
"""

import gc
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Inputs, normalize
from embedcache.dataset.vectors import Vectors
from embedcache.errors import CorruptError, DataError, DiskFullError, FingerprintError, PathError, SettingError
from embedcache.extract.extract import extract, retry_failed
from embedcache.extract.settings import ExtractSettings
from embedcache.files import partial_path, relative_location
from embedcache.maintain.remove import remove_samples
from embedcache.processes import announce
from embedcache.progress import NullProgress
from embedcache.projectors.base import project
from embedcache.provenance import read_json
from embedcache.registry import trust_files
from embedcache.runs import Run
from embedcache.search import faiss_index
from embedcache.search import index as index_module
from embedcache.search.faiss_index import IndexCard, RowIndex, open_row_index, read_card, read_index, verify_index
from embedcache.search.index import Configuration, build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.edits import edit_record, exchange
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE

pytestmark = pytest.mark.slow


def test_card_content(cache_path: Path, index_path: Path) -> None:
    card = read_card(index_path)
    assert card.feature == "open_toy/cls"
    assert (card.num_vectors, card.width, card.factory) == (300, 16, "Flat")
    assert card.recall_at_10 == 1
    assert card.recall_at_1 == 1
    assert card.num_queries == 150  # half of the captions; the other half tunes
    assert card.search == {}
    assert card.memory_bytes == 300 * (16 * 4 + 8)
    assert {path.name for path in index_path.iterdir()} == {".lock", "card.json", "record.json", *card.files}
    assert list(card.files) == ["index-0.faiss", "index-0.rows.npy"]
    for name, file in card.files.items():
        assert file.num_bytes == (index_path / name).stat().st_size
    assert card.files["index-0.faiss"].num_bytes == pytest.approx(card.memory_bytes, rel=0.01)
    assert card.run_weights == Run.open(index_path / str(card.run)).info.weights


def test_same_index_is_reused(cache_path: Path, run_path: Path, index_path: Path, tmp_path: Path) -> None:
    before = (index_path / "index-0.faiss").stat().st_mtime_ns
    assert build_index(cache_path, index_path, IndexSettings(run=run_path)) == read_card(index_path)
    assert (index_path / "index-0.faiss").stat().st_mtime_ns == before
    with pytest.raises(FingerprintError, match="factory: stored 'Flat', requested 'HNSW8'"):
        build_index(cache_path, index_path, IndexSettings(run=run_path, factory="HNSW8"))


def test_folder_with_other_files_raises(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PathError, match=r"is not an index and not empty: it holds thesis\.tex"):
        build_index(cache_path, tmp_path, IndexSettings(run=run_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_index_of_a_smaller_width(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    card = build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path, width=5))
    assert (card.width, card.recall_at_10) == (5, 1)
    pair = Run.open(run_path).pair
    cache = Cache(cache_path)
    images, texts = (
        normalize(project(pair.tower(modality), Inputs(cache.feature(modality, name).load()))[:, :5])
        for modality, name in (("image", "open_toy/cls"), ("text", "open_toy/mean"))
    )
    words = cache.items("text")["text"].to_pylist()[:3]
    for query, scored in zip(search(tmp_path / "index", words, SearchSettings(k=5)), texts, strict=False):
        expected = np.sort(images @ scored)[::-1][:5]
        np.testing.assert_allclose([hit.score for hit in query], expected, atol=2e-3)  # float16 at rest
    (hits,) = search(tmp_path / "index", Queries(keys=["00007"]), SearchSettings(k=1))
    assert hits[0].key == "00007"
    with pytest.raises(FingerprintError, match="width: stored 5, requested 16"):
        build_index(cache_path, tmp_path / "index", IndexSettings(run=run_path))
    with pytest.raises(SettingError, match="17"):
        build_index(cache_path, tmp_path / "other", IndexSettings(run=run_path, width=17))


def test_plain_index_of_a_smaller_width(cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(feature="open_toy/cls", width=3))
    values = normalize(Cache(cache_path).feature("image", "open_toy/cls").load()[:, :3])
    (hits,) = search(tmp_path / "index", Queries(rows=[4]), SearchSettings(k=4))
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(values @ values[4])[::-1][:4], atol=1e-5)


def test_cache_of_an_index_may_be_a_url(cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(feature="open_toy/cls"))
    for url, given in ((f"file://{cache_path}", None), ("file:///nowhere", cache_path)):
        edit_record(tmp_path / "index" / "card.json", cache=url)
        with trust_files():
            assert str(OpenIndex(tmp_path / "index", cache=given).cache.path).endswith(str(cache_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk_leaves_no_index(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        index = faiss_index.make_index("Flat", 48)
        index.add(np.arange(400), np.zeros((400, 48), np.float32))
        with pytest.raises(DiskFullError, match="free some space and rerun the same command"):
            index.write(tmp_path / "index.faiss")
        assert [path.name for path in tmp_path.iterdir()] == ["index.rows.npy"]
        subprocess.run(["mount", "-o", "remount,size=1m", tmp_path], check=True)
        index.write(tmp_path / "index.faiss")
        assert len(read_index([tmp_path / "index.faiss"])) == 400
    finally:
        gc.collect()  # what still maps a file of the disk keeps it busy
        subprocess.run(["umount", tmp_path], check=True)


def test_invalid_settings_raise(cache_path: Path, tmp_path: Path) -> None:
    for options, error, word in (
        ({"feature": "open_toy/cls", "factory": "HNS32"}, SettingError, "HNS32"),
        ({"feature": "open_toy/cls", "factory": "Flat", "memory": 10**6}, SettingError, "both"),
        ({"feature": "open_toy/patches"}, DataError, "patches"),
    ):
        with pytest.raises(error, match=word):
            build_index(cache_path, tmp_path / "x", **options)


FEATURE: dict[str, Any] = {"feature": "open_toy/cls", "min_recall": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"factory": "Flat"},
    "graph": {"factory": "HNSW8"},
    "codes": {"factory": "IVF4,SQ8"},
    "on disk": {"factory": "IVF4,SQfp16", "on_disk": True},
}
PART_BYTES = 100 * 96
"""Two chunks of 64 vectors a part."""

Whole = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(index_module, "CHECKPOINT_S", 0)


def write_cache(folder: Path, count: int, chunk_size: int = 16) -> Path:
    """Extract images, or more of them."""
    source = open_source(write_images(folder / "source", count))
    settings = ExtractSettings(chunk_size=chunk_size, extend=(folder / "cache").exists())
    extract(source, folder / "cache", image_encoder=[IMAGE], settings=settings)
    return folder / "cache"


def build(cache: Path, index: Path, kind: str, progress: RecordedProgress | None = None, **options: Any) -> IndexCard:
    settings: dict[str, Any] = {**FEATURE, **KINDS[kind], **options}
    return build_index(cache, index, IndexSettings(**settings), progress=progress)


class Stop(NullProgress):
    """Interrupts the build after two chunks."""

    what, chunks = "", 0

    def start(self, what: str, total: int, unit: str) -> None:
        self.what = what

    def advance(self, count: int) -> None:
        self.chunks += self.what.startswith("indexing")
        if self.chunks > 2:
            raise KeyboardInterrupt


class StopAtTraining(NullProgress):
    """Interrupts the build when the second kind is trained."""

    def start(self, what: str, total: int, unit: str) -> None:
        if "IVF" in what:
            raise KeyboardInterrupt


def interrupt(cache: Path, index: Path, kind: str) -> None:
    """Build an index of which two chunks are in a checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        build(cache, index, kind, Stop())  # type: ignore[arg-type]


def interrupt_at(name: str, cache: Path, index: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build an index up to a call of `embedcache.search.index`."""

    def stop(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            build(cache, index, kind)


def contents(index_path: Path) -> dict[str, bytes]:
    """Return the files of vectors."""
    return {path.name: path.read_bytes() for path in index_path.glob("*-*")}


def opened(path: Path) -> RowIndex:
    return open_row_index(path, read_card(path), device="cpu")


def check_rows(cache: Path, path: Path, rows: list[int]) -> None:
    """Check that an index contains these rows, each with its own vector."""
    index = opened(path)
    tolerance = 0.2 if read_card(path).factory.endswith("SQ8") else 2e-3  # trained on the first samples
    assert sorted(index.rows.tolist()) == rows
    vectors = Vectors(cache, "image", "open_toy/cls").read(np.array(rows))
    scores, found = index.search(vectors, 10, {"nprobe": 4, "efSearch": 100})
    assert scores[:, 0] == pytest.approx(1, abs=tolerance)
    assert (found == np.array(rows)[:, None]).any(axis=1).all()  # some images look alike


@pytest.fixture(scope="module")
def whole(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Build the index of a kind without an interruption, once. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def build_whole(kind: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_module, "PART_BYTES", PART_BYTES)
            build(cache_path, folder / kind, kind)
        return folder / kind

    return build_whole


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_build_resumes(cache_path: Path, whole: Whole, tmp_path: Path, kind: str) -> None:
    interrupt(cache_path, tmp_path, kind)
    progress = RecordedProgress()
    assert build(cache_path, tmp_path, kind, progress).num_vectors == 300
    assert contents(tmp_path) == contents(whole(kind))
    assert progress.notes == []  # nothing is trained again
    assert progress.started[0][1] < 300


@pytest.mark.parametrize(
    ("checkpoint_s", "times", "sizes"),
    [
        # of each chunk when it is added, and of each checkpoint its end
        (60, [0, 59, 60, 66, 125, 126, 127, 186], [128, 256, 300]),
        (60, [0, 60, 70, 169, 170, 171, 230, 231, 232], [64, 192, 300, 300]),
        (0, [0, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9], [64, 128, 192, 256, 300, 300]),
    ],
)
def test_checkpoints_are_rarer_where_writing_takes_long(
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_s: float,
    times: list[int],
    sizes: list[int],
) -> None:
    clock = iter(times)
    written: list[int] = []
    write = RowIndex.write
    monkeypatch.setattr(RowIndex, "write", lambda self, path: [written.append(len(self)), write(self, path)])
    monkeypatch.setattr(index_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(index_module, "CHECKPOINT_S", checkpoint_s)
    build(cache_path, tmp_path, "exact")
    assert written == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_index_grows_with_its_cache(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_cache(tmp_path, 200)
    index = tmp_path / "index"
    build(cache, index, kind)
    first = read_card(index)
    before = search(index, Queries(keys=["00003"]), SearchSettings(k=1))
    write_cache(tmp_path, 250)
    interrupt_at("write_card", cache, index, kind, monkeypatch)
    assert search(index, Queries(keys=["00003"]), SearchSettings(k=1)) == before  # the old files are there

    progress = RecordedProgress()
    card = build_index(cache, index, IndexSettings(**FEATURE), progress=progress)
    assert progress.notes == []
    assert [total for title, total, _ in progress.started if "indexing" in title] == [0]
    assert read_card(index) == card
    assert (card.num_vectors, card.index_digest != first.index_digest) == (250, True)
    assert set(contents(index)) == set(card.files)
    assert len(set(first.files) & set(card.files)) == (2 if kind == "on disk" else 0)  # of a part that is complete
    check_rows(cache, index, list(range(250)))
    outcome = read_json(index / "record.json")["outcome"]
    assert (outcome["num_vectors_before"], outcome["num_vectors"]) == (200, 250)
    assert build_index(cache, index, IndexSettings(**FEATURE)) == card  # nothing has changed
    assert opened(index).rows[:200].tolist() == list(range(200))


def test_interrupted_build_of_a_cache_that_has_grown(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    interrupt(cache, tmp_path / "index", "exact")
    write_cache(tmp_path, 70)
    progress = RecordedProgress()
    build(cache, tmp_path / "index", "exact", progress)
    assert progress.started[0] == ("indexing as Flat", 38, "images")  # two chunks of 16 were there
    build(cache, tmp_path / "anew", "exact")
    assert contents(tmp_path / "index") == contents(tmp_path / "anew")


def test_retried_item_is_added(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "source", 20)
    good = (folder / "00004.png").read_bytes()
    (folder / "00004.png").write_bytes(b"")
    settings = ExtractSettings(chunk_size=8)
    extract(open_source(folder), tmp_path / "cache", image_encoder=[IMAGE], settings=settings)
    assert build(tmp_path / "cache", tmp_path / "index", "exact").num_vectors == 19
    (folder / "00004.png").write_bytes(good)
    retry_failed(open_source(folder), tmp_path / "cache", image_encoder=[IMAGE], settings=settings)
    assert build(tmp_path / "cache", tmp_path / "index", "exact").num_vectors == 20
    assert opened(tmp_path / "index").rows[-1] == 4
    check_rows(tmp_path / "cache", tmp_path / "index", list(range(20)))


@pytest.mark.parametrize("kind", KINDS)
def test_removed_samples_leave_the_index(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one sample removed and one added, also while an index is being extended."""
    cache = write_cache(tmp_path, 60)
    index = tmp_path / "index"
    build(cache, index, kind)
    edit_record(index / "card.json", recall_at_10=1.0)
    write_cache(tmp_path, 70)
    interrupt_at("measure_index", cache, index, kind, monkeypatch)
    remove_samples(cache, ["00003"])
    write_cache(tmp_path, 71)
    progress = RecordedProgress()
    card = build(cache, index, kind, progress, min_recall=1.0)  # kept whatever its recall
    assert card.num_vectors == 70
    assert ["removed" in note for note in progress.notes] == [True]  # not trained again
    assert set(contents(index)) == set(card.files)
    check_rows(cache, index, [*range(3), *range(4, 71)])
    assert build(cache, index, kind, min_recall=0.0) == card


def test_low_recall_keeps_the_old_index(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    index = tmp_path / "index"
    build(cache, index, "exact", factory="IVF1,PQ4x4")
    edit_record(index / "card.json", recall_at_10=0.99)
    before = [contents(index), read_card(index)]
    write_cache(tmp_path, 70)
    for _ in range(2):
        with pytest.raises(SettingError, match="unchanged"):
            build_index(cache, index, IndexSettings(feature="open_toy/cls"))
        assert [contents(index), read_card(index)] == before
    assert len(search(index, Queries(keys=["00001"]), SearchSettings(k=40))[0]) == 40
    assert build_index(cache, index, IndexSettings(**FEATURE)).num_vectors == 70


@pytest.mark.parametrize("first", ["exact", "codes"])
@pytest.mark.parametrize("is_complete", [False, True])
def test_interrupted_index_is_not_taken_for_one_of_another_kind(
    cache_path: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, is_complete: bool
) -> None:
    if is_complete:
        interrupt_at("write_card", cache_path, tmp_path, first, monkeypatch)
    else:
        interrupt(cache_path, tmp_path, first)
    interrupt_at("measure_index", cache_path, tmp_path, "on disk", monkeypatch)
    build(cache_path, tmp_path, "on disk")
    assert contents(tmp_path) == contents(whole("on disk"))


def test_index_on_disk_moves_to_memory(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at("write_card", cache_path, tmp_path / "index", "on disk", monkeypatch)
    for name in ("index", "anew"):
        build(cache_path, tmp_path / name, "codes", factory="IVF4,SQfp16")
    assert contents(tmp_path / "index") == contents(tmp_path / "anew")


def test_index_whose_card_was_deleted_is_built_again(cache_path: Path, whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole("exact"), tmp_path / "index")
    (tmp_path / "index" / "card.json").unlink()
    build(cache_path, tmp_path / "index", "codes")
    assert contents(tmp_path / "index") == contents(whole("codes"))


def test_unfinished_index_of_another_feature_raises(cache_path: Path, tmp_path: Path) -> None:
    interrupt(cache_path, tmp_path, "exact")
    with pytest.raises(FingerprintError, match="modality"):
        build_index(cache_path, tmp_path, IndexSettings(modality="text", feature="open_toy/mean"))
    with pytest.raises(FingerprintError, match="width"):
        build_index(cache_path, tmp_path, IndexSettings(feature="open_toy/cls", width=5))


def test_build_on_other_samples_raises(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 20)
    build(cache, tmp_path / "index", "exact")
    shutil.rmtree(cache)
    shutil.rmtree(tmp_path / "source")
    write_images(tmp_path / "source", 30, seed=3)
    extract(open_source(tmp_path / "source"), cache, image_encoder=[IMAGE])
    with pytest.raises(FingerprintError, match="samples"):
        build(cache, tmp_path / "index", "exact")


def test_concurrent_builds_build_once(cache_path: Path, whole: Whole, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    partial_path(tmp_path / "building.json").touch()  # of a living process, as in a concurrent build
    with ThreadPoolExecutor(2) as pool:
        first, second = list(pool.map(lambda _: build(cache_path, tmp_path, "exact"), range(2)))
    assert first == second  # the seconds it took too: one was built
    assert contents(tmp_path) == contents(whole("exact"))


def test_kinds_with_fewer_bits_are_not_tried(cache_path: Path, tmp_path: Path) -> None:
    """Check 300 vectors of 48: of the kinds that fit, all have fewer bits than the first."""
    settings = IndexSettings(feature="open_toy/cls", memory=28_000, min_recall=1.0)
    progress = RecordedProgress()
    with pytest.raises(SettingError, match=r"got 0\.9\d\d from the best, IVF7,SQ8"):
        build_index(cache_path, tmp_path, settings, progress=progress)
    assert len(progress.notes) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    card = build_index(cache_path, tmp_path, settings, min_recall=0.9)
    assert (card.factory, card.recall_at_10 >= 0.9) == ("IVF7,SQ8", True)


def test_rejected_kinds_are_not_built_again(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a build that is killed after its first kind has missed the recall."""
    kinds = [Configuration(factory=factory, memory_bytes=10**9) for factory in ("HNSW2", "IVF4,PQ4x4")]
    monkeypatch.setattr(index_module, "_candidates", lambda *_: kinds)
    with pytest.raises(KeyboardInterrupt):
        build_index(cache_path, tmp_path, feature="open_toy/cls", min_recall=1.0, progress=StopAtTraining())
    progress = RecordedProgress()
    card = build_index(cache_path, tmp_path, feature="open_toy/cls", min_recall=0.0, progress=progress)
    assert card.factory == "IVF4,PQ4x4"
    assert not any("HNSW2" in step for step, _, _ in progress.started)


def test_index_on_disk_equals_one_in_memory(cache_path: Path, whole: Whole, tmp_path: Path) -> None:
    build(cache_path, tmp_path / "memory", "codes", factory="IVF4,SQfp16")
    shutil.copytree(whole("on disk"), tmp_path / "moved")
    one = opened(tmp_path / "moved")
    other = opened(tmp_path / "memory")
    card = read_card(tmp_path / "moved")
    assert (card.on_disk, len(card.files), len(one)) == (True, 6, 300)
    assert one.rows.tolist() == other.rows.tolist()
    queries = Vectors(cache_path, "image", "open_toy/cls").read(one.rows[:80])
    is_allowed = np.arange(300) % 3 == 0
    for options in ({}, {"is_allowed_N": is_allowed}):
        here, there = (index.search(queries, 9, {"nprobe": 3}, **options)[0] for index in (one, other))
        assert here == pytest.approx(there, abs=1e-6)
    found = search(tmp_path / "moved", Queries(keys=["00007"]), SearchSettings(k=1, cache=cache_path))
    assert found[0][0].key == "00007"


def test_kinds_without_lists_do_not_go_to_disk(cache_path: Path, tmp_path: Path) -> None:
    for factory in ("Flat", "HNSW8", "SQ8"):
        with pytest.raises(SettingError, match="lists"):
            build(cache_path, tmp_path / factory, "exact", factory=factory, on_disk=True)


def test_damage_is_found_when_an_index_is_opened(cache_path: Path, whole: Whole, tmp_path: Path) -> None:
    for kind in ("exact", "on disk"):
        for number, name in enumerate(read_card(whole(kind)).files):
            copy = Path(shutil.copytree(whole(kind), tmp_path / f"{kind} {number}"))
            data = bytearray((copy / name).read_bytes())
            data[-1] ^= 1
            exchange(copy / name, data)
            for read in (opened, lambda path: verify_index(path, read_card(path))):
                with pytest.raises(CorruptError, match=rf"{name}: expected checksum .* build it again"):
                    read(copy)
            (copy / name).unlink()
            with pytest.raises(PathError, match=rf"{name} does not exist"):
                opened(copy)
    (copy / "card.json").unlink()
    with pytest.raises(PathError, match="make one with"):
        read_card(copy)


def test_large_indexes_are_compared_by_verify_alone(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(whole("on disk"), tmp_path / "index"))
    name = list(read_card(copy).files)[2]
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    exchange(copy / name, data)
    monkeypatch.setattr("embedcache.search.faiss_index._COMPARED_BYTES", read_card(copy).file_bytes - 1)
    announce.cache_clear()
    with caplog.at_level(logging.INFO, "embedcache.processes"):
        opened(copy)
    assert f"not compared with its checksums; to do so: embedcache verify {copy}" in caplog.text
    with pytest.raises(CorruptError, match=name):
        verify_index(copy, read_card(copy))
    exchange(copy / name, data[:-1])  # mapped, its end would kill the process
    with pytest.raises(CorruptError, match="bytes"):
        opened(copy)


@pytest.mark.parametrize("kind", ["exact", "on disk"])
def test_damaged_files_are_not_extended(tmp_path: Path, kind: str) -> None:
    cache = write_cache(tmp_path, 40)
    build(cache, tmp_path / "index", kind)
    write_cache(tmp_path, 70)
    for number, path in enumerate(sorted((tmp_path / "index").glob("index-*"))):
        copy = Path(shutil.copytree(tmp_path / "index", tmp_path / f"index {number}"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        (copy / path.name).write_bytes(data)
        with pytest.raises(CorruptError, match="build it again"):
            build(cache, copy, kind)


@pytest.mark.parametrize("kind", ["exact", "on disk"])
def test_damaged_checkpoint_is_named(cache_path: Path, whole: Whole, tmp_path: Path, kind: str) -> None:
    interrupt(cache_path, tmp_path, kind)
    for path in [*tmp_path.glob("*.faiss"), *tmp_path.glob("*.npy")]:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(CorruptError, match=r"delete .*building\.json to begin again"):
            build(cache_path, tmp_path, kind)
        path.write_bytes(before)
    (tmp_path / "building.json").unlink()
    build(cache_path, tmp_path, kind)
    assert contents(tmp_path) == contents(whole(kind))


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"source": {}, "files": 3}'])
def test_damaged_state_of_an_unfinished_index_is_named(cache_path: Path, tmp_path: Path, content: str) -> None:
    interrupt(cache_path, tmp_path, "exact")
    (tmp_path / "building.json").write_text(content)
    with pytest.raises(CorruptError, match=r"building\.json"):
        build(cache_path, tmp_path, "exact")


def test_card_of_another_index_is_refused(whole: Whole, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole("exact"), tmp_path / "index"))
    for changed, word in (({"num_vectors": 301}, "301 vectors"), ({"num_vectors": 300, "width": 47}, "width 47")):
        edit_record(copy / "card.json", **changed)
        with pytest.raises(CorruptError, match=word):
            opened(copy)


def test_memory_and_recall_of_an_index_are_compared_with_the_limits(
    cache_path: Path, whole: Whole, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(whole("exact"), tmp_path / "index"))
    edit_record(copy / "card.json", cache=relative_location(cache_path, copy), recall_at_10=0.75)
    for memory_bytes, counted in ((12_000, 12_000), (None, read_card(copy).file_bytes)):
        edit_record(copy / "card.json", memory_bytes=memory_bytes)
        settings = {**FEATURE, "min_recall": 0.75}
        assert build_index(cache_path, copy, IndexSettings(**settings, memory=counted)).recall_at_10 == 0.75
        with pytest.raises(SettingError, match=f"{counted:,}"):
            build_index(cache_path, copy, IndexSettings(**settings, memory=counted - 1))
    edit_record(copy / "card.json", memory_bytes=6000, num_vectors=150)  # which grows to 300
    with pytest.raises(SettingError, match="at most 11,999 bytes, got 12,000 with 300 items"):
        build_index(cache_path, copy, IndexSettings(**FEATURE, memory=11_999))
    with pytest.raises(SettingError, match=r"0\.750"):
        build_index(cache_path, copy, IndexSettings(**{**FEATURE, "min_recall": 0.76}))


def test_one_image_has_no_neighbor(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 1)
    card = build_index(cache, tmp_path / "index")
    assert (card.num_vectors, card.num_queries, card.recall_at_1, card.recall_at_10) == (1, 1, 1, 1)
    assert card.memory_bytes == 4 * 48 + 8
    vectors = normalize(Vectors(cache, "image").read(np.array([0])))
    assert read_index([tmp_path / "index" / "index-0.faiss"]).search(vectors, 1)[1].tolist() == [[0]]
