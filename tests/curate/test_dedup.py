import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import Floats, normalize
from embedcache.curate.dedup import analyze, dedup
from embedcache.curate.settings import DedupSettings
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.neighbors.pairs import cosine_limit
from embedcache.reports.dedup import threshold_table
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.toy import IMAGE, TEXT

NUM, COPIES = 60, {"00050": "00003", "00051": "00003", "00057": "00020"}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of sixty images with scores: three are copies of others, and one cannot be read."""
    folder = tmp_path_factory.mktemp("copied")
    source = write_images(folder / "source", NUM)
    for copy, original in COPIES.items():
        shutil.copy(source / f"{original}.png", source / f"{copy}.png")
    (source / "00030.png").write_bytes(b"not an image")
    for number in range(NUM):
        (source / f"{number:05d}.json").write_text(json.dumps({"score": number if number % 7 else None}))
    extract(
        open_source(source),
        folder / "cache",
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        settings=ExtractSettings(chunk_size=16),
    )
    return folder / "cache"


def unit(path: Path) -> Floats:
    values = Cache(path).feature("image").load()
    return normalize(np.nan_to_num(values))


def test_copies_only(copied: Path, tmp_path: Path) -> None:
    done = dedup(copied, tmp_path / "kept.parquet", DedupSettings(pixels=False, copies_only=True))
    removed = pq.read_table(done.removed_path).to_pylist()
    assert {row["key"]: row["kept_key"] for row in removed} == COPIES
    assert all(row["is_copy"] and row["cosine"] == 1 for row in removed)
    kept = {row["key"]: row["num_copies"] for row in pq.read_table(done.path).to_pylist()}
    assert len(kept) == NUM - 3
    assert [kept[key] for key in ("00003", "00020", "00030", "00000")] == [2, 1, None, 0]
    assert len(read_selection(done.path, [Cache(copied)])) == NUM - 3
    copies = done.analysis.copies
    assert 30 not in copies.item_rows
    assert (len(copies.item_rows), copies.num_copies) == (NUM - 1, 3)
    assert (np.diff(copies.unique_rows) > 0).all()


@pytest.mark.parametrize("all_pairs", [True, False])
@pytest.mark.parametrize("keep", ["first", "best:score"])
def test_removed_samples_are_near_kept_ones(copied: Path, tmp_path: Path, keep: str, all_pairs: bool) -> None:
    settings = DedupSettings(cosine=0.97, keep=keep, all_pairs=all_pairs, scratch=tmp_path, pixels=False)
    done = dedup(copied, tmp_path / "kept.parquet", settings)
    vectors = unit(copied)
    stay = set(read_selection(done.path, [Cache(copied)]).tolist())
    removed = pq.read_table(done.removed_path).to_pylist()
    assert stay == set(range(NUM)) - {row["row"] for row in removed}
    assert len(removed) > 3
    numbers = pq.read_table(done.path, columns=["num_copies", "num_near_duplicates", "closest_cosine"]).to_pandas()
    assert numbers["num_copies"].sum() == sum(row["is_copy"] for row in removed)
    assert numbers["num_near_duplicates"].sum() == sum(not row["is_copy"] for row in removed)
    assert numbers["closest_cosine"].max() == max(row["cosine"] for row in removed if not row["is_copy"])
    for row in removed:
        assert row["kept_row"] in stay
        assert row["cosine"] == pytest.approx(vectors[row["row"]] @ vectors[row["kept_row"]], abs=1e-3)
        assert row["cosine"] >= 0.97
    order = sorted(stay - {30})
    cosines = vectors[order] @ vectors[order].T - 2 * np.eye(len(order))
    assert cosines.max() < 0.97 + 1e-3


def test_only_a_selection_is_compared(copied: Path, tmp_path: Path) -> None:
    keys = [f"{number:05d}" for number in range(NUM) if number not in (3, 20)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    settings = DedupSettings(pixels=False, copies_only=True, selection=tmp_path / "keys.txt")
    done = dedup(copied, tmp_path / "kept.parquet", settings)
    removed = pq.read_table(done.removed_path).to_pylist()
    assert {row["key"]: row["kept_key"] for row in removed} == {"00051": "00050"}
    assert pq.read_table(done.path)["key"].to_pylist() == [key for key in keys if key != "00051"]
    assert (done.to_json()["num_samples"], done.to_json()["within"]) == (58, str(tmp_path / "keys.txt"))
    levels = {
        level.cosine: level.num_gone for level in analyze(copied, selection=settings.selection, pixels=False).levels()
    }
    assert levels[None] == 1


def test_copies_need_no_vectors(cache_path: Path, copied: Path, tmp_path: Path) -> None:
    """Check with tokens, which have no cosine."""
    settings = DedupSettings(pixels=False, copies_only=True, feature="open_toy/patches")
    assert dedup(cache_path, tmp_path / "a.parquet", settings).analysis.feature.name == "open_toy/patches"


def test_cosine_that_no_pair_reaches_removes_nothing(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("00000\n00001\n00002\n")
    settings = DedupSettings(cosine=0.99999, pixels=False, selection=tmp_path / "keys.txt")
    done = dedup(copied, tmp_path / "kept.parquet", settings)
    assert pq.read_table(done.path)["key"].to_pylist() == ["00000", "00001", "00002"]
    assert not len(pq.read_table(done.removed_path))
    assert "kept all 3 samples" in repr(done)


def test_keep_rule(copied: Path, tmp_path: Path) -> None:
    done = dedup(copied, tmp_path / "kept.parquet", DedupSettings(pixels=False, copies_only=True, keep="best:score"))
    rows = {row["key"]: row["kept_key"] for row in pq.read_table(done.removed_path).to_pylist()}
    assert rows == {"00003": "00051", "00050": "00051", "00020": "00057"}


def test_analyze_levels(copied: Path, tmp_path: Path) -> None:
    analysis = analyze(copied, pixels=False)
    levels = {level.cosine: level for level in analysis.levels()}
    assert levels[None].num_gone == 3
    assert threshold_table(analysis)[1][0] == ["copies only", "", "3", str(NUM - 3), "5.0%"]
    for cosine in (0.9, 0.97, 0.99):
        done = dedup(copied, tmp_path / "kept.parquet", DedupSettings(cosine=cosine, pixels=False))
        assert levels[cosine].num_gone == len(done.removed)
    assert analysis.near is not None
    near = replace(analysis.near, limit=0.97, highest=np.full(5, cosine_limit(0.97)))
    of_limit = {level.cosine: level for level in replace(analysis, near=near).levels()}
    assert [of_limit[cosine].num_near for cosine in (0.95, 0.97, 0.98)] == [5, 5, 0]
    assert [of_limit[cosine].num_gone is None for cosine in (0.95, 0.97)] == [True, False]
    for highest, expected in (([0.5, 0.5, -2], 0.5), ([0.5, 1.25], 1.0), ([0.5], None), ([-2, -2], None), ([-2], None)):
        two = replace(analysis.near, highest=np.array(highest, np.float32))
        assert replace(analysis, near=two).highest == expected
    assert replace(analysis, near=None).highest is None


def test_too_many_pairs(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.curate.dedup.MAX_PAIRS", 2)
    assert analyze(copied).levels()[-1].num_gone is None
    with pytest.raises(SettingError, match="at most 2 pairs"):
        dedup(copied, tmp_path / "kept.parquet", DedupSettings(cosine=0.5))


def test_texts(copied: Path, tmp_path: Path) -> None:
    done = dedup(copied, tmp_path / "a.parquet", DedupSettings(pixels=False, copies_only=True, modality="text"))
    captions = Cache(copied).items("text")["text"].to_pylist()
    assert NUM - len(done.removed) == len(set(captions))


def test_invalid_settings_raise(copied: Path, cache_path: Path, tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: dedup(copied, tmp_path / "kept.txt", DedupSettings(cosine=0.9)), PathError, ".parquet"),
        (lambda: dedup(copied, tmp_path / "x.parquet", DedupSettings()), SettingError, "neither"),
        (lambda: analyze(copied, DedupSettings(keep="last")), UnknownNameError, "last"),
        (lambda: analyze(copied, DedupSettings(keep="best:scoer")), UnknownNameError, "scoer"),
        (lambda: analyze(copied, DedupSettings(keep="best:key")), SettingError, "numbers"),
        (lambda: analyze(copied, DedupSettings(cosine=0.9)), SettingError, "OUT"),
        (lambda: analyze(cache_path, DedupSettings(feature="open_toy/patches")), DataError, "patches"),
    ]
    for call, error, word in calls:
        with pytest.raises(error, match=word):
            call()


def test_removed_samples_do_not_stay(without: Cache, tmp_path: Path) -> None:
    done = dedup(
        without.path, tmp_path / "kept.parquet", DedupSettings(pixels=False, copies_only=True, feature="open_toy/cls")
    )
    kept = pq.read_table(tmp_path / "kept.parquet")["row"].to_pylist()
    assert len(done.analysis.samples) == 37 == len(kept) + len(done.removed)
    assert not set(kept) & set(without.removed.tolist())
