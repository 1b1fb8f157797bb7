"""Checkpoints of a build, and what an interrupted one continues with."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedcache.dataset.vectors import Vectors
from embedcache.errors import SettingError
from embedcache.maintain.remove import remove_samples
from embedcache.search import building, index
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.search.settings import IndexSettings, SearchSettings
from tests.edits import edit_record
from tests.recorded import RecordedProgress
from tests.search.test_building import FEATURE, ON_DISK, Stop, bytes_of, files_of, write_cache

pytestmark = pytest.mark.slow

Written = list[tuple[str, int]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """The files of indexes that are written, with their numbers of vectors."""
    found: Written = []
    write = RowIndex.write
    monkeypatch.setattr(RowIndex, "write", lambda row_index, path: write_and_note(row_index, path))

    def write_and_note(row_index: RowIndex, path: Path) -> None:
        found.append((path.name, len(row_index)))
        write(row_index, path)

    return found


@pytest.mark.parametrize(
    ("checkpoint_s", "times", "sizes"),
    [
        # of each chunk when it is added, and of each checkpoint its start and end
        (60, [0, 60, (100, 109), 198, 199, (200, 201), 260, 261, (262, 263)], [64, 192, 300]),
        (60, [0, 59, 60, (61, 66), 125, 126, (126, 127), 186], [128, 256]),
        (0, [0, 1, (2, 9), 9, (9, 9), 9, (9, 9), 9, (9, 9), 9, (9, 9)], [64, 128, 192, 256, 300]),
    ],
)
def test_checkpoints_are_rarer_where_writing_takes_long(
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: Written,
    checkpoint_s: float,
    times: list[Any],
    sizes: list[int],
) -> None:
    clock = iter([moment for time in times for moment in (time if isinstance(time, tuple) else (time,))])
    monkeypatch.setattr(building, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    build_index(cache_path, tmp_path, IndexSettings(factory="Flat", checkpoint_s=checkpoint_s, **FEATURE))
    assert written == [*(("index.partial.faiss", size) for size in sizes), ("index.faiss", 300)]
    assert next(clock, None) is None


def test_interrupted_build_of_a_cache_that_has_grown(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    settings = IndexSettings(factory="Flat", checkpoint_s=0, **FEATURE)
    with pytest.raises(KeyboardInterrupt):
        build_index(cache, tmp_path / "index", settings, progress=Stop())
    write_cache(tmp_path, 70)
    progress = RecordedProgress()
    assert build_index(cache, tmp_path / "index", settings, progress=progress).num_vectors == 70
    assert progress.started[0] == ("indexing as Flat", 38, "images")  # two chunks of 16 were there
    build_index(cache, tmp_path / "anew", settings)
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "anew")


def test_growing_trains_nothing(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, 40)
    for factory in ("IVF4,SQ8", "on disk"):
        settings = IndexSettings(**(ON_DISK if factory == "on disk" else {**FEATURE, "factory": factory}))
        progress = RecordedProgress()
        build_index(cache, tmp_path / factory, settings, progress=progress)
        assert progress.notes == [f"training {settings.factory}"]
        assert progress.started == [
            ("reading vectors", 40, "images"),
            ("indexing on disk" if factory == "on disk" else f"indexing as {factory}", 40, "images"),
            ("searching exactly", 40, "images"),
            ("tuning the search", 0, "settings"),
        ]
        assert progress.counts.pop("tuning the search") > 0
        assert progress.counts == {what: total for what, total, _ in progress.started if total}
    write_cache(tmp_path, 70)
    for factory, title in (("IVF4,SQ8", "indexing as IVF4,SQ8"), ("on disk", "indexing on disk")):
        progress = RecordedProgress()
        build_index(cache, tmp_path / factory, IndexSettings(**FEATURE), progress=progress)
        assert progress.notes == []
        assert (title, 30, "images") in progress.started


def test_parts_on_disk_are_kept(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Written
) -> None:
    monkeypatch.setattr(building, "PART_BYTES", 128 * 96)  # exactly two chunks
    build_index(cache_path, tmp_path / "whole", IndexSettings(**ON_DISK))
    parts = [(f"index.part-{first:012d}.faiss", min(128, 300 - first)) for first in (0, 128, 256)]
    assert written == [("index.partial.faiss", 0), *parts, ("index.faiss", 300)]
    with pytest.raises(KeyboardInterrupt):
        build_index(cache_path, tmp_path / "index", IndexSettings(**ON_DISK), progress=Stop())
    progress = RecordedProgress()
    written.clear()
    build_index(cache_path, tmp_path / "index", IndexSettings(**ON_DISK), progress=progress)
    assert written == [*parts[1:], ("index.faiss", 300)]
    assert progress.started[0] == ("indexing on disk", 172, "images")
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "added"),
    [(ON_DISK, []), ({**FEATURE, "factory": "Flat"}, [0]), ({**FEATURE, "factory": "IVF4,SQ8"}, [300])],
    ids=["on disk", "exact", "trained"],
)
def test_index_without_a_card_is_not_trained_again(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], added: list[int]
) -> None:
    """Check a build that ends before its last file: all it had is there, or its last checkpoint, here the training."""

    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    write_card = index.write_card
    monkeypatch.setattr(index, "write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        build_index(cache_path, tmp_path, IndexSettings(**settings))
    monkeypatch.setattr(index, "write_card", write_card)
    before = files_of(tmp_path)
    progress = RecordedProgress()
    card = build_index(cache_path, tmp_path, IndexSettings(**settings), progress=progress)
    assert card.num_vectors == 300
    after = files_of(tmp_path)
    assert {name: before[name] for name in after} == after
    assert progress.notes == []
    assert [total for title, total, _ in progress.started if "indexing" in title] == added


def interrupt(
    cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch, *, at: str = "write_card", **settings: Any
) -> None:
    """Build an index up to a step: its last file, the card, or another one."""

    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index, at, stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(cache, path, IndexSettings(**{**FEATURE, **settings}))


@pytest.mark.parametrize("on_disk", [False, True])
def test_interrupted_index_is_not_taken_for_one_of_another_kind(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    interrupt(cache_path, tmp_path / "index", monkeypatch, factory="Flat")
    (tmp_path / "index" / "index.partial.faiss").unlink(missing_ok=True)
    other: dict[str, Any] = {**FEATURE, "factory": "IVF4,SQfp16", "on_disk": on_disk}
    build_index(cache_path, tmp_path / "index", **other)
    build_index(cache_path, tmp_path / "anew", **other)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "anew")


def test_interrupted_index_that_misses_the_recall_is_removed(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cache_path, tmp_path / "index", monkeypatch, memory=30_000)
    recalls = []
    for name in ("index", "anew"):
        with pytest.raises(SettingError, match="recall@10 of at least 1"):
            build_index(cache_path, tmp_path / name, feature="open_toy/cls", memory=30_000, min_recall=1.0)
        recalls.append(json.loads((tmp_path / name / "building.json").read_text())["rejected"])
    assert recalls[0] == recalls[1]
    assert not (tmp_path / "index" / "index.faiss").exists()


def test_index_whose_card_was_deleted_is_built_again(cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(factory="Flat", **FEATURE))
    (tmp_path / "index" / "card.json").unlink()
    for name in ("index", "anew"):
        build_index(cache_path, tmp_path / name, IndexSettings(factory="IVF4,SQ8", **FEATURE))
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "anew")


@pytest.mark.parametrize("is_complete", [False, True])
def test_interrupted_index_in_memory_moves_to_disk(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_complete: bool
) -> None:
    kind = {**FEATURE, "factory": "IVF4,SQfp16", "checkpoint_s": 0}
    if is_complete:
        interrupt(cache_path, tmp_path / "index", monkeypatch, **kind)
    else:
        with pytest.raises(KeyboardInterrupt):
            build_index(cache_path, tmp_path / "index", IndexSettings(**kind), progress=Stop())
    for name in ("index", "anew"):
        build_index(cache_path, tmp_path / name, IndexSettings(**kind, on_disk=True))
    assert files_of(tmp_path / "index") == files_of(tmp_path / "anew")


def test_training_of_another_kind_that_is_killed_is_repeated(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(cache_path, tmp_path / "index", factory="Flat", checkpoint_s=0, progress=Stop(), **FEATURE)
    with monkeypatch.context() as patch:
        patch.setattr(RowIndex, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(cache_path, tmp_path / "index", factory="IVF4,SQ8", **FEATURE)
    for name in ("index", "anew"):
        build_index(cache_path, tmp_path / name, factory="IVF4,SQ8", **FEATURE)
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "anew")


@pytest.mark.parametrize("kind", [{"factory": "IVF1,PQ4x4"}, {"factory": "IVF4,PQ4x4", "on_disk": True}])
def test_rejected_extension_that_was_killed_before_its_card_can_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(**FEATURE, **kind))
    edit_record(tmp_path / "index" / "card.json", recall_at_10=1.0)
    write_cache(tmp_path, 70)
    interrupt(cache, tmp_path / "index", monkeypatch)
    with pytest.raises(SettingError, match="recall@10 of at least 1, got"):
        build_index(cache, tmp_path / "index", feature="open_toy/cls", min_recall=1.0)
    (hits,) = search(tmp_path / "index", Queries(keys=["00069"]), SearchSettings(k=40))
    assert max(hit.row for hit in hits) >= 40
    assert build_index(cache, tmp_path / "index", IndexSettings(**FEATURE)).num_vectors == 70


def test_lists_of_an_interrupted_extension_stay_until_the_next_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check two extensions to as many items, of others, both killed: `index.faiss` is that of the first one."""
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    write_cache(tmp_path, 50)
    interrupt(cache, tmp_path / "index", monkeypatch, **ON_DISK)
    remove_samples(cache, ["00003"])
    write_cache(tmp_path, 51)
    interrupt(cache, tmp_path / "index", monkeypatch, at="measure_index", **ON_DISK)
    card = build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    assert (card.num_vectors, card.lists) == (50, "lists-50-again.ivfdata")
    check_rows(cache, tmp_path / "index", [*range(3), *range(4, 51)])


def check_rows(cache: Path, path: Path, rows: list[int]) -> None:
    """Check that an index on disk holds these rows, each with its own vector."""
    row_index = read_index(path / "index.faiss")
    assert sorted(row_index.rows.tolist()) == rows
    scores, found = row_index.search(Vectors(cache, "image", "open_toy/cls").read(np.array(rows)), 10, {"nprobe": 4})
    assert scores[:, 0] == pytest.approx(1, abs=2e-3)
    assert (found == np.array(rows)[:, None]).any(axis=1).all()  # some images look alike


@pytest.mark.parametrize("lost", [0, 1])
def test_parts_behind_a_lost_one_are_added_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """Check parts whose positions in the index would be those of other vectors: an earlier part is damaged or stale."""
    cache = write_cache(tmp_path, 80)
    monkeypatch.setattr(building, "PART_BYTES", 16 * 96)
    interrupt(cache, tmp_path / "index", monkeypatch, at="measure_index", **ON_DISK)
    parts = sorted((tmp_path / "index").glob("index.part-*"))
    assert len(parts) == 5
    if lost:
        parts[lost].write_bytes(b"")
    else:
        remove_samples(cache, ["00003"])
    build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    check_rows(cache, tmp_path / "index", [row for row in range(80) if lost or row != 3])


def test_parts_of_an_extension_are_added_again_without_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path, 40)
    build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    write_cache(tmp_path, 70)
    interrupt(cache, tmp_path / "index", monkeypatch, at="measure_index", **ON_DISK)
    remove_samples(cache, ["00003"])
    build_index(cache, tmp_path / "index", IndexSettings(**ON_DISK))
    check_rows(cache, tmp_path / "index", [*range(3), *range(4, 70)])
