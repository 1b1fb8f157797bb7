"""An index that was stopped goes on to the same bytes, and one whose cache grew gains what it lacks."""

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import FingerprintError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.repair import retry_failed
from embedcache.extract.settings import ExtractSettings
from embedcache.search import building as on_disk
from embedcache.search.faiss_index import read_index
from embedcache.search.index import build_index, read_card
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.search.vectors import Vectors
from embedcache.sources import open_source
from tests.pictures import write_pictures
from tests.toy import IMAGE

KINDS = ("Flat", "HNSW8", "IVF4,SQ8", "IVF4,RaBitQ,Refine(SQ8)")
ASKED: dict[str, Any] = {"feature": "open_toy/cls", "min_recall": 0.0}
PROGRAM = """
import sys
from tests.extract.crash import crash_at
from embedcache.curate.indexes import on_disk
from embedcache.search.index import build_index
moment, pattern, number, cache, index, factory = sys.argv[1:]
crash_at(moment, pattern, int(number))
if factory == "on disk":
    on_disk.PART_BYTES = 100 * 96
    build_index(cache, index, feature="open_toy/cls", factory="IVF4,SQfp16", min_recall=0.0, leaves_on_disk=True)
build_index(cache, index, feature="open_toy/cls", factory=factory, min_recall=0.0, checkpoint_s=0)
"""


def write_cache(folder: Path, count: int, chunk_size: int = 16) -> Path:
    source = open_source(write_pictures(folder / "source", count))
    settings = ExtractSettings(chunk_size=chunk_size, extend=(folder / "cache").exists())
    extract(source, folder / "cache", image_encoders=[IMAGE], settings=settings)
    return folder / "cache"


def kill_at(moment: str, pattern: str, number: int, cache: Path, index: Path, factory: str) -> None:
    words = [sys.executable, "-c", PROGRAM, moment, pattern, number, cache, index, factory]
    done = subprocess.run(list(map(str, words)), check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def bytes_of(index_path: Path) -> bytes:
    return (index_path / "index.faiss").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("factory", KINDS)
@pytest.mark.parametrize(
    ("moment", "pattern", "number", "num_in"),
    [
        ("before", r"index\.partial\.faiss", 3, 1),
        ("after", r"index\.partial\.faiss", 3, 2),
        ("before", r"/index\.faiss", 1, 5),
        ("after", r"/index\.faiss", 1, 5),
        ("before", r"record\.json", 1, 5),
        ("before", r"card\.json", 1, 5),
        ("after", r"card\.json", 1, 5),
    ],
    ids=lambda value: str(value).replace("\\", ""),
)
def test_killed_and_run_again_gives_the_same_bytes(
    cache_path: Path, tmp_path: Path, factory: str, moment: str, pattern: str, number: int, num_in: int
) -> None:
    build_index(cache_path, tmp_path / "whole", factory=factory, **ASKED)
    kill_at(moment, pattern, number, cache_path, tmp_path / "index", factory)
    if (tmp_path / "index" / "index.partial.faiss").is_file():
        is_trained_first = factory.startswith("IVF")
        in_it = len(read_index(tmp_path / "index" / "index.partial.faiss"))
        assert in_it == min(300, 64 * (num_in + 1 - is_trained_first))
    card = build_index(cache_path, tmp_path / "index", factory=factory, **ASKED)
    assert card.num_vectors == 300
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {".lock", "index.faiss", "card.json", "record.json"} or pattern == r"card\.json"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"index\.partial\.faiss", r"/index\.faiss", r"card\.json"])
def test_killed_while_it_grows_it_answers_as_before_and_then_grows(tmp_path: Path, pattern: str) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", factory="Flat", **ASKED)
    before = search(tmp_path / "index", Queries(keys=["00003"]), k=1)
    write_cache(tmp_path, 70)
    kill_at("before", pattern, 1, cache, tmp_path / "index", "Flat")
    assert search(tmp_path / "index", Queries(keys=["00003"]), k=1) == before
    assert build_index(cache, tmp_path / "index", factory="Flat", **ASKED).num_vectors == 70
    build_index(cache, tmp_path / "anew", factory="Flat", **ASKED)
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "anew")


@pytest.mark.slow
def test_an_unfinished_index_of_another_feature_is_refused(cache_path: Path, tmp_path: Path) -> None:
    kill_at("after", r"index\.partial\.faiss", 2, cache_path, tmp_path / "index", "Flat")
    with pytest.raises(FingerprintError, match=r"the unfinished index .* modality: stored 'image', requested 'text'"):
        build_index(cache_path, tmp_path / "index", modality="text", feature="open_toy/mean")


@pytest.mark.parametrize("factory", KINDS)
def test_samples_that_were_added_are_added(tmp_path: Path, factory: str) -> None:
    cache = write_cache(tmp_path, 40)
    before = build_index(cache, tmp_path / "index", factory=factory, **ASKED)
    old = read_index(tmp_path / "index" / "index.faiss")
    write_cache(tmp_path, 70)
    after = build_index(cache, tmp_path / "index", factory=factory, **ASKED)
    assert (before.num_vectors, after.num_vectors) == (40, 70)
    assert after.index_digest != before.index_digest
    assert read_card(tmp_path / "index") == after
    new = read_index(tmp_path / "index" / "index.faiss")
    assert new.rows[:40].tolist() == old.rows.tolist()
    assert sorted(new.rows.tolist()) == list(range(70))
    found = search(tmp_path / "index", Queries(keys=["00065", "00003"]), k=20)
    assert [hits[0].score for hits in found] == pytest.approx([1, 1], abs=0.1)
    assert "00065" in [hit.key for hit in found[0]]
    if factory == "Flat":  # the others would be trained on more, or be given other blocks
        build_index(cache, tmp_path / "anew", factory=factory, **ASKED)
        assert bytes_of(tmp_path / "anew") == bytes_of(tmp_path / "index")


def test_an_item_that_failed_and_is_mended_is_added(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "source", 20)
    good = (folder / "00004.png").read_bytes()
    (folder / "00004.png").write_bytes(b"")
    source = open_source(folder)
    extract(source, tmp_path / "cache", image_encoders=[IMAGE], settings=ExtractSettings(chunk_size=8))
    assert build_index(tmp_path / "cache", tmp_path / "index").num_vectors == 19
    (folder / "00004.png").write_bytes(good)
    retry_failed(
        open_source(folder), tmp_path / "cache", image_encoders=[IMAGE], settings=ExtractSettings(chunk_size=8)
    )
    assert build_index(tmp_path / "cache", tmp_path / "index").num_vectors == 20
    assert read_index(tmp_path / "index" / "index.faiss").rows[-1] == 4
    (hits,) = search(tmp_path / "index", Queries(keys=["00004"]), k=1)
    assert hits[0].score == pytest.approx(1)


def test_an_index_that_grew_too_poor_stays_as_it_was(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", factory="PQ4x4", **ASKED)
    card_path = tmp_path / "index" / "card.json"
    card_path.write_text(json.dumps({**json.loads(card_path.read_text()), "recall_at_10": 0.99}))
    before = (bytes_of(tmp_path / "index"), card_path.read_bytes())
    write_cache(tmp_path, 70)
    with pytest.raises(SettingError, match=r"the best, PQ4x4, finds 0\.\d+ .*; the old index stays as it was"):
        build_index(cache, tmp_path / "index", feature="open_toy/cls")
    assert (bytes_of(tmp_path / "index"), card_path.read_bytes()) == before
    assert len(search(tmp_path / "index", Queries(keys=["00001"]), k=40)[0]) == 40


def test_an_index_of_a_cache_made_anew_is_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 20)
    build_index(cache, tmp_path / "index", **ASKED)
    shutil.rmtree(cache)
    shutil.rmtree(tmp_path / "source")
    write_pictures(tmp_path / "source", 30, seed=3)
    extract(open_source(tmp_path / "source"), cache, image_encoders=[IMAGE])
    with pytest.raises(FingerprintError, match="was made from other samples than .*; give the path of a new folder"):
        build_index(cache, tmp_path / "index", **ASKED)


ON_DISK: dict[str, Any] = {**ASKED, "factory": "IVF4,SQfp16", "leaves_on_disk": True}


def files_of(index_path: Path) -> dict[str, bytes]:
    unlike = (".lock", "record.json", "card.json")
    return {path.name: path.read_bytes() for path in index_path.iterdir() if path.name not in unlike}


def test_lists_on_the_disk_hold_what_those_in_memory_do(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "PART_BYTES", 100 * 96)  # two chunks of 64 a part
    card = build_index(cache_path, tmp_path / "built", **ON_DISK)
    within = build_index(cache_path, tmp_path / "within", factory="IVF4,SQfp16", **ASKED)
    assert card.lists == "lists-300.ivfdata"
    assert set(files_of(tmp_path / "built")) == {"index.faiss", "lists-300.ivfdata"}
    assert (tmp_path / "built" / "index.faiss").stat().st_size < 0.5 * (within.file_bytes or 0)
    shutil.move(tmp_path / "built", tmp_path / "moved")
    one, other = (read_index(tmp_path / name / "index.faiss") for name in ("moved", "within"))
    assert one.rows.tolist() == other.rows.tolist()
    queries = Vectors(cache_path, "image", "open_toy/cls").read(one.rows[:40])
    here, there = (index.search(queries, 9, {"nprobe": 3})[0] for index in (one, other))
    assert here == pytest.approx(there, abs=1e-6)
    assert search(tmp_path / "moved", Queries(keys=["00007"]), k=1, cache_path=cache_path)[0][0].key == "00007"


def test_lists_on_the_disk_gain_samples_that_were_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "PART_BYTES", 20 * 96)
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", **ON_DISK)
    write_cache(tmp_path, 70)
    card = build_index(cache, tmp_path / "index", **ASKED)
    assert (card.num_vectors, card.lists) == (70, "lists-70.ivfdata")
    assert set(files_of(tmp_path / "index")) == {"index.faiss", "lists-70.ivfdata"}
    index = read_index(tmp_path / "index" / "index.faiss")
    assert sorted(index.rows.tolist()) == list(range(70))
    vectors = Vectors(cache, "image", "open_toy/cls").read(index.rows)
    scores, rows = index.search(vectors, 10, {"nprobe": 4})
    assert (rows == index.rows[:, None]).any(axis=1).all()  # some pictures look alike
    assert scores[:, 0] == pytest.approx(1, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("pattern", "number"),
    [(r"index\.partial\.faiss", 1), (r"index\.part-.*", 2), (r"/index\.faiss", 1), (r"card\.json", 1)],
)
def test_killed_while_parts_are_made_it_goes_on_to_the_same_bytes(
    cache_path: Path, tmp_path: Path, moment: str, pattern: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "PART_BYTES", 100 * 96)
    build_index(cache_path, tmp_path / "whole", **ON_DISK)
    kill_at(moment, pattern, number, cache_path, tmp_path / "index", "on disk")
    build_index(cache_path, tmp_path / "index", **ON_DISK)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


def test_two_that_build_into_one_folder_wait_for_each_other(cache_path: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        cards = pool.map(lambda _: build_index(cache_path, tmp_path / "index", factory="Flat", **ASKED), range(2))
        first, second = list(cards)
    assert first == second  # the seconds it took too: one was built
    build_index(cache_path, tmp_path / "alone", factory="Flat", **ASKED)
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "alone")


def test_only_lists_are_left_on_the_disk(cache_path: Path, tmp_path: Path) -> None:
    for factory in ("Flat", "HNSW8", "IVF4,RaBitQ,Refine(SQ8)"):
        with pytest.raises(SettingError, match="has no lists to leave on the disk; give one such as IVF4096,SQfp16"):
            build_index(
                cache_path, tmp_path / factory[:4], factory=factory, leaves_on_disk=True, feature="open_toy/cls"
            )


@pytest.mark.parametrize("factory", KINDS)
def test_an_index_left_on_the_disk_finds_the_same(cache_path: Path, tmp_path: Path, factory: str) -> None:
    card = build_index(cache_path, tmp_path / "index", factory=factory, **ASKED)
    loaded, mapped = (
        read_index(tmp_path / "index" / "index.faiss", is_mapped=is_mapped) for is_mapped in (False, True)
    )
    queries = Vectors(cache_path, "image", "open_toy/cls").read(loaded.rows[:20])
    for one, other in zip(loaded.search(queries, 5, card.search), mapped.search(queries, 5, card.search), strict=True):
        assert (one == other).all()
