"""Builds resume to the same bytes, and an index grows with its cache."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.dataset.vectors import Vectors
from embedcache.errors import FingerprintError, SettingError
from embedcache.extract.extract import extract, retry_failed
from embedcache.extract.settings import ExtractSettings
from embedcache.files import partial_path
from embedcache.maintain.remove import remove_samples
from embedcache.progress import NullProgress
from embedcache.search import building
from embedcache.search.card import read_card
from embedcache.search.faiss_index import read_index
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.sources import open_source
from tests.crash import crash_function
from tests.edits import edit_record
from tests.images import write_images
from tests.toy import IMAGE

pytestmark = pytest.mark.slow

KINDS = ("Flat", "HNSW8", "IVF4,SQ8", "IVF4,SQfp16")
FEATURE: dict[str, Any] = {"feature": "open_toy/cls", "min_recall": 0.0}
Whole = Callable[[str], Path]


def write_cache(folder: Path, count: int, chunk_size: int = 16) -> Path:
    source = open_source(write_images(folder / "source", count))
    settings = ExtractSettings(chunk_size=chunk_size, extend=(folder / "cache").exists())
    extract(source, folder / "cache", image_encoder=[IMAGE], settings=settings)
    return folder / "cache"


def kill_at(moment: str, pattern: str, number: int, cache: Path, index: Path, factory: str) -> None:
    crash_function(build, (cache, index, factory), moment, pattern, number)


def build(cache: Path, index: Path, factory: str) -> None:
    settings: dict[str, Any] = {"factory": factory, "checkpoint_s": 0}
    if factory == "on disk":
        building.PART_BYTES = 100 * 96
        settings = ON_DISK
    build_index(cache, index, IndexSettings(**{**FEATURE, **settings}))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PART_BYTES", 100 * 96)  # two chunks of 64 a part


@pytest.fixture(scope="module")
def whole(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Build the index of a kind without an interruption, once. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def build_whole(factory: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "PART_BYTES", 100 * 96)
            build(cache_path, folder / factory, factory)
        return folder / factory

    return build_whole


def bytes_of(index_path: Path) -> bytes:
    return (index_path / "index.faiss").read_bytes()


KILLS = [  # moment, file, how often, chunks that the checkpoint holds
    ("before", r"index\.partial\.faiss", 3, 1),
    ("after", r"index\.partial\.faiss", 3, 2),
    ("before", r"/index\.faiss", 1, 5),
    ("after", r"/index\.faiss", 1, 5),
    ("before", r"record\.json", 1, 5),
    ("before", r"card\.json", 1, 5),
    ("after", r"card\.json", 1, 5),
]
RESUMES = [("Flat", *kill) for kill in KILLS] + [(kind, *kill) for kind in KINDS[1:] for kill in KILLS[1:3]]
"""Only what checkpoints and finished files hold depends on the kind of index."""


@pytest.mark.no_mutants
@pytest.mark.parametrize(
    ("factory", "moment", "pattern", "number", "num_in"), RESUMES, ids=lambda value: str(value).replace("\\", "")
)
def test_resume_after_kill_is_identical(
    cache_path: Path, whole: Whole, tmp_path: Path, factory: str, moment: str, pattern: str, number: int, num_in: int
) -> None:
    kill_at(moment, pattern, number, cache_path, tmp_path / "index", factory)
    if (tmp_path / "index" / "index.partial.faiss").is_file():
        is_trained_first = factory.startswith("IVF")
        in_it = len(read_index(tmp_path / "index" / "index.partial.faiss"))
        assert in_it == min(300, 64 * (num_in + 1 - is_trained_first))
    card = build_index(cache_path, tmp_path / "index", IndexSettings(factory=factory, **FEATURE))
    assert card.num_vectors == 300
    assert bytes_of(tmp_path / "index") == bytes_of(whole(factory))
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {".lock", "index.faiss", "card.json", "record.json"} or pattern == r"card\.json"


class Stop(NullProgress):
    """Interrupts the build after two chunks."""

    what, chunks = "", 0

    def start(self, what: str, total: int, unit: str) -> None:
        self.what = what

    def advance(self, count: int) -> None:
        self.chunks += self.what.startswith("indexing")
        if self.chunks > 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_unreadable_unfinished_index_is_absent(cache_path: Path, whole: Whole, tmp_path: Path, factory: str) -> None:
    settings = IndexSettings(factory=factory, checkpoint_s=0, **FEATURE)
    with pytest.raises(KeyboardInterrupt):
        build_index(cache_path, tmp_path / "index", settings, progress=Stop())
    for name in ("index.partial.faiss", "index.faiss"):  # what a full disk once left
        (tmp_path / "index" / name).write_bytes(bytes_of(whole(factory))[:-100])
    assert build_index(cache_path, tmp_path / "index", settings).num_vectors == 300
    assert bytes_of(tmp_path / "index") == bytes_of(whole(factory))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.no_mutants
@pytest.mark.parametrize(
    ("factory", "moment", "pattern", "number", "damaged"),
    [
        ("Flat", "after", r"index\.partial\.faiss", 3, "index.partial.faiss"),
        ("Flat", "after", r"/index\.faiss", 1, "index.faiss"),
        ("on disk", "after", r"index\.part-.*", 2, "index.partial.faiss"),
        ("on disk", "after", r"index\.part-.*", 2, "index.part-*.faiss"),
        ("on disk", "after", r"/index\.faiss", 1, "lists-300.ivfdata"),
        ("on disk", "before", r"card\.json", 1, "lists-300.ivfdata"),
    ],
)
def test_flipped_bit_in_an_unfinished_index_is_found(
    cache_path: Path, whole: Whole, tmp_path: Path, factory: str, moment: str, pattern: str, number: int, damaged: str
) -> None:
    kill_at(moment, pattern, number, cache_path, tmp_path / "index", factory)
    for position in (0.02, 0.5, 0.97):  # FAISS reads all of these without an error
        shutil.copytree(tmp_path / "index", tmp_path / f"index-{position}")
        path = next((tmp_path / f"index-{position}").glob(damaged))
        data = bytearray(path.read_bytes())
        data[round(position * len(data))] ^= 1
        path.write_bytes(data)
        build(cache_path, tmp_path / f"index-{position}", factory)
        assert files_of(tmp_path / f"index-{position}") == files_of(whole(factory))


@pytest.mark.no_mutants
@pytest.mark.parametrize("pattern", [r"index\.partial\.faiss", r"/index\.faiss", r"card\.json"])
def test_kill_while_growing_keeps_old_index(tmp_path: Path, pattern: str) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(factory="Flat", **FEATURE))
    before = search(tmp_path / "index", Queries(keys=["00003"]), SearchSettings(k=1))
    write_cache(tmp_path, 70)
    kill_at("before", pattern, 1, cache, tmp_path / "index", "Flat")
    assert search(tmp_path / "index", Queries(keys=["00003"]), SearchSettings(k=1)) == before
    assert build_index(cache, tmp_path / "index", IndexSettings(factory="Flat", **FEATURE)).num_vectors == 70
    build_index(cache, tmp_path / "anew", IndexSettings(factory="Flat", **FEATURE))
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "anew")


@pytest.mark.no_mutants
def test_unfinished_index_of_other_feature_raises(cache_path: Path, tmp_path: Path) -> None:
    kill_at("after", r"index\.partial\.faiss", 2, cache_path, tmp_path / "index", "Flat")
    with pytest.raises(FingerprintError, match="modality"):
        build_index(cache_path, tmp_path / "index", IndexSettings(modality="text", feature="open_toy/mean"))


@pytest.mark.parametrize("factory", KINDS)
def test_new_samples_are_added(tmp_path: Path, factory: str) -> None:
    cache = write_cache(tmp_path, 40)
    before = build_index(cache, tmp_path / "index", IndexSettings(factory=factory, **FEATURE))
    old = read_index(tmp_path / "index" / "index.faiss")
    write_cache(tmp_path, 70)
    after = build_index(cache, tmp_path / "index", IndexSettings(factory=factory, **FEATURE))
    assert (before.num_vectors, after.num_vectors) == (40, 70)
    assert after.index_digest != before.index_digest
    assert read_card(tmp_path / "index") == after
    new = read_index(tmp_path / "index" / "index.faiss")
    assert new.rows[:40].tolist() == old.rows.tolist()
    if factory in ("Flat", "HNSW8"):
        vectors = Vectors(cache, "image", "open_toy/cls").read(np.array([65, 2]))
        np.testing.assert_allclose(new.read(np.array([65, 2])), vectors, atol=1e-6)
    assert sorted(new.rows.tolist()) == list(range(70))
    found = search(tmp_path / "index", Queries(keys=["00065", "00003"]), SearchSettings(k=20))
    assert [hits[0].score for hits in found] == pytest.approx([1, 1], abs=0.1)
    assert "00065" in [hit.key for hit in found[0]]
    if factory == "Flat":  # the others would be trained on more, or be given other blocks
        build_index(cache, tmp_path / "anew", IndexSettings(factory=factory, **FEATURE))
        assert bytes_of(tmp_path / "anew") == bytes_of(tmp_path / "index")


def test_retried_item_is_added(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "source", 20)
    good = (folder / "00004.png").read_bytes()
    (folder / "00004.png").write_bytes(b"")
    source = open_source(folder)
    extract(source, tmp_path / "cache", image_encoder=[IMAGE], settings=ExtractSettings(chunk_size=8))
    assert build_index(tmp_path / "cache", tmp_path / "index").num_vectors == 19
    (folder / "00004.png").write_bytes(good)
    retry_failed(open_source(folder), tmp_path / "cache", image_encoder=[IMAGE], settings=ExtractSettings(chunk_size=8))
    assert build_index(tmp_path / "cache", tmp_path / "index").num_vectors == 20
    assert read_index(tmp_path / "index" / "index.faiss").rows[-1] == 4
    (hits,) = search(tmp_path / "index", Queries(keys=["00004"]), SearchSettings(k=1))
    assert hits[0].score == pytest.approx(1)


def test_low_recall_keeps_old_index(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(factory="IVF1,PQ4x4", **FEATURE))
    card_path = tmp_path / "index" / "card.json"
    edit_record(card_path, recall_at_10=0.99)
    before = (bytes_of(tmp_path / "index"), card_path.read_bytes())
    write_cache(tmp_path, 70)
    with pytest.raises(SettingError, match="unchanged"):
        build_index(cache, tmp_path / "index", IndexSettings(feature="open_toy/cls"))
    assert (bytes_of(tmp_path / "index"), card_path.read_bytes()) == before
    assert len(search(tmp_path / "index", Queries(keys=["00001"]), SearchSettings(k=40))[0]) == 40


def test_build_on_other_samples_raises(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 20)
    build_index(cache, tmp_path / "index", IndexSettings(**FEATURE))
    shutil.rmtree(cache)
    shutil.rmtree(tmp_path / "source")
    write_images(tmp_path / "source", 30, seed=3)
    extract(open_source(tmp_path / "source"), cache, image_encoder=[IMAGE])
    with pytest.raises(FingerprintError, match="samples"):
        build_index(cache, tmp_path / "index", IndexSettings(**FEATURE))


ON_DISK: dict[str, Any] = {**FEATURE, "factory": "IVF4,SQfp16", "on_disk": True}


def files_of(index_path: Path) -> dict[str, bytes]:
    unlike = (".lock", "record.json", "card.json")
    return {path.name: path.read_bytes() for path in index_path.iterdir() if path.name not in unlike}


@pytest.mark.usefixtures("small_parts")
def test_on_disk_equals_in_memory(cache_path: Path, whole: Whole, tmp_path: Path) -> None:
    card = build_index(cache_path, tmp_path / "built", IndexSettings(**ON_DISK))
    within = read_card(whole("IVF4,SQfp16"))
    assert card.lists == "lists-300.ivfdata"
    assert set(files_of(tmp_path / "built")) == {"index.faiss", "lists-300.ivfdata"}
    assert (tmp_path / "built" / "index.faiss").stat().st_size < 0.5 * (within.file_bytes or 0)
    shutil.move(tmp_path / "built", tmp_path / "moved")
    one, other = (read_index(path / "index.faiss") for path in (tmp_path / "moved", whole("IVF4,SQfp16")))
    assert one.rows.tolist() == other.rows.tolist()
    queries = Vectors(cache_path, "image", "open_toy/cls").read(one.rows[:40])
    here, there = (index.search(queries, 9, {"nprobe": 3})[0] for index in (one, other))
    assert here == pytest.approx(there, abs=1e-6)
    assert (
        search(tmp_path / "moved", Queries(keys=["00007"]), SearchSettings(k=1, cache=cache_path))[0][0].key == "00007"
    )


def test_on_disk_new_samples_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PART_BYTES", 20 * 96)
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    write_cache(tmp_path, 70)
    card = build_index(cache, tmp_path / "index", IndexSettings(**FEATURE))
    assert (card.num_vectors, card.lists) == (70, "lists-70.ivfdata")
    assert set(files_of(tmp_path / "index")) == {"index.faiss", "lists-70.ivfdata"}
    index = read_index(tmp_path / "index" / "index.faiss")
    assert sorted(index.rows.tolist()) == list(range(70))
    vectors = Vectors(cache, "image", "open_toy/cls").read(index.rows)
    scores, rows = index.search(vectors, 10, {"nprobe": 4})
    assert (rows == index.rows[:, None]).any(axis=1).all()  # some images look alike
    assert scores[:, 0] == pytest.approx(1, abs=2e-3)


def test_on_disk_one_sample_removed_and_one_added(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    before = files_of(tmp_path / "index")
    remove_samples(cache, ["00003"])
    write_cache(tmp_path, 41)
    kill_at("before", r"card\.json", 1, cache, tmp_path / "index", "on disk")
    assert files_of(tmp_path / "index")["lists-40.ivfdata"] == before["lists-40.ivfdata"]  # the old card needs them
    card = build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    assert (card.num_vectors, card.lists) == (40, "lists-40-again.ivfdata")
    assert "lists-40.ivfdata" not in files_of(tmp_path / "index")
    (hits,) = search(tmp_path / "index", Queries(keys=["00040"]), SearchSettings(k=40))
    assert sorted(hit.row for hit in hits) == [*range(3), *range(4, 41)]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.no_mutants
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("pattern", "number"),
    [(r"index\.partial\.faiss", 1), (r"index\.part-.*", 2), (r"/index\.faiss", 1), (r"card\.json", 1)],
)
def test_on_disk_resume_after_kill_is_identical(
    cache_path: Path, whole: Whole, tmp_path: Path, moment: str, pattern: str, number: int
) -> None:
    kill_at(moment, pattern, number, cache_path, tmp_path / "index", "on disk")
    build_index(cache_path, tmp_path / "index", IndexSettings(**ON_DISK))
    assert files_of(tmp_path / "index") == files_of(whole("on disk"))


def test_concurrent_builds_build_once(cache_path: Path, whole: Whole, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        cards = pool.map(
            lambda _: build_index(cache_path, tmp_path / "index", IndexSettings(factory="Flat", **FEATURE)), range(2)
        )
        first, second = list(cards)
    assert first == second  # the seconds it took too: one was built
    assert bytes_of(tmp_path / "index") == bytes_of(whole("Flat"))


def test_build_ignores_file_that_another_process_writes(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    partial_path(tmp_path / "building.json").touch()  # of a living process, as in a concurrent build
    assert build_index(cache_path, tmp_path, IndexSettings(factory="Flat", **FEATURE)).num_vectors == 300


def test_on_disk_without_lists_raises(cache_path: Path, tmp_path: Path) -> None:
    for factory in ("Flat", "HNSW8", "SQ8"):
        with pytest.raises(SettingError, match="lists"):
            build_index(cache_path, tmp_path / factory, factory=factory, on_disk=True, feature="open_toy/cls")


@pytest.mark.parametrize("factory", KINDS)
def test_mapped_index_searches_the_same(cache_path: Path, whole: Whole, factory: str) -> None:
    card = read_card(whole(factory))
    loaded, mapped = (read_index(whole(factory) / "index.faiss", is_mapped=is_mapped) for is_mapped in (False, True))
    queries = Vectors(cache_path, "image", "open_toy/cls").read(loaded.rows[:20])
    for one, other in zip(loaded.search(queries, 5, card.search), mapped.search(queries, 5, card.search), strict=True):
        assert (one == other).all()
