import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.curate.leaks import find_leaks, write_clean_selection
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.matches import ItemSet
from embedcache.dataset.pairs import read_items
from embedcache.dataset.settings import NEAR_DUPLICATE_COSINES
from embedcache.errors import CorruptError, DataError
from embedcache.evaluate import runs as overlap
from embedcache.evaluate.encoder_pairs import evaluate_pairs
from embedcache.evaluate.retrieval import evaluate_retrieval, rank
from embedcache.evaluate.runs import (
    Run,
    load_runs,
    read_eval_split,
    read_part,
    read_run_split,
    run_input,
    training_items,
)
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.extract.extract import extract
from embedcache.provenance import read_json
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.cli.run import succeed
from tests.evaluate.conftest import make_cache
from tests.evaluate.test_retrieval import train_run
from tests.images import write_images
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def run(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_runs([train_run(cache_path, tmp_path_factory.mktemp("run") / "run-0")])[0]


@pytest.fixture(scope="module")
def other(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eighty samples that the run never saw, with a split; the first is a copy of a training sample."""
    folder = tmp_path_factory.mktemp("other")
    source = write_images(folder / "source" / "test", 50, seed=9)
    write_images(folder / "source" / "train", 30, seed=8)
    shutil.copy(image_folder / "00000.png", source / "00000.png")
    extract(open_source(folder / "source"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    return folder / "cache"


def unit(feature: object, rows: np.ndarray) -> np.ndarray:
    vectors = feature.read(rows).values.astype(np.float64)  # type: ignore[attr-defined]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_other_cache_uses_its_column_split(run: Run, other: Path, two_caches: list[Path]) -> None:
    cache = Cache(other)
    assert read_eval_split(cache, run).samples.tolist() == [
        row for row, part in enumerate(cache.samples["split"].to_pylist()) if part == "test"
    ]
    assert len(read_eval_split(cache, run, "all").samples) == 80
    assert evaluate_retrieval(other, [run.path]).num_items["image"] == [50]
    with pytest.raises(DataError, match="val"):
        read_eval_split(cache, run, "val")
    whole = read_eval_split(Cache(two_caches[0]), run)  # which has no column
    assert (whole.part, len(whole.samples)) == ("all samples", 40)
    with pytest.raises(DataError, match="test"):
        read_eval_split(Cache(two_caches[0]), run, "test")


def test_only_selected_samples_are_evaluated(run: Run, other: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("".join(f"test/{number:05d}\n" for number in range(12)) + "train/00003\n")
    selection = tmp_path / "keys.txt"
    report = evaluate_retrieval(other, run.path, selection=selection)
    assert (report.num_items["image"], str(selection) in report.line()) == ([12], True)
    with pytest.raises(DataError, match="got 13"):
        evaluate_pairs(other, selection=selection)
    (tmp_path / "keys.txt").write_text("train/00003\n")
    with pytest.raises(DataError, match="selection"):
        evaluate_retrieval(other, run.path, selection=selection)


def test_column_split_may_write_parts_otherwise(tmp_path: Path) -> None:
    names = ["TRAIN", "validation", "Test", "extra", None]
    path = make_cache(tmp_path, lambda number, _: {"split": names[number % 5]}, count=25)
    found = {part: read_part(Cache(path), part).samples.tolist() for part in (None, "train", "val", "test")}
    assert found == {
        part: list(range(first, 25, 5)) for part, first in ((None, 2), ("train", 0), ("val", 1), ("test", 2))
    }


@pytest.mark.slow
def test_overlap_matches_comparing_all_pairs(cache_path: Path, run: Run, other: Path) -> None:
    for path in (cache_path, other):
        cache = Cache(path)
        ranking = rank(cache, run, RetrievalSettings())
        trained = training_items(run, Cache(cache_path))
        assert all((seen.items.contents == -1).all() for seen in trained.values()), "numbering takes seconds"
        exact, near = set(), set()
        for modality, name in (("image", "open_toy/cls"), ("text", "open_toy/mean")):
            found, seen = getattr(ranking.pairs, {"image": "first", "text": "second"}[modality]), trained[modality]
            own = type(seen.feature)([cache.feature(modality, name)])
            cosines = unit(own, found.rows) @ unit(seen.feature, seen.items.rows).T
            near |= set(found.samples[(cosines > NEAR_DUPLICATE_COSINES[modality]).any(axis=1)])
            hashes = {seen.feature.hashes[row] for row in seen.items.rows}
            exact |= {s for s, row in zip(found.samples, found.rows, strict=True) if own.hashes[row] in hashes}
        assert ranking.overlap is not None
        assert (ranking.overlap.exact, ranking.overlap.near) == (len(exact), len(near | exact))
        assert ranking.overlap.exact > 0


def test_training_without_leaks_is_not_warned_of(cache_path: Path, run: Run, other: Path, tmp_path: Path) -> None:
    cosines = {"image": 0.999, "text": 0.99}
    report = find_leaks(cache_path, other, feature=["image=open_toy/cls", "text=open_toy/mean"], cosine=cosines)
    assert 0 < write_clean_selection(tmp_path / "clean.parquet", report) < 300
    clean = train_run(cache_path, tmp_path / "run", selection=str(tmp_path / "clean.parquet"), cosines=cosines)
    for trained, is_clean in ((run.path, False), (clean, True)):
        found = evaluate_retrieval(other, [trained], part="all").overlap
        assert found is not None
        assert (found.cosines == cosines, found.warning is None) == (is_clean, is_clean)


def test_some_of_many_samples_are_checked(run: Run, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_MAX_PRODUCTS", 1)
    monkeypatch.setattr(overlap, "_MIN_CHECKED", 7)
    found = rank(Cache(other), run, RetrievalSettings()).overlap
    assert found is not None
    assert (found.num_checked, found.num_samples) == (7, 50)
    assert found.near <= 7


@pytest.mark.slow
def test_missing_training_cache_is_reported(cache_path: Path, run: Run, other: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run.path, tmp_path / "run-0"))
    name_caches(moved, [str(tmp_path / "gone")])
    report = evaluate_retrieval(other, [moved])
    assert report.overlap is not None
    assert f"not compared with missing training caches: {tmp_path / 'gone'}" in report.overlap.line()
    assert report.warning is None
    again = evaluate_retrieval(other, [moved], RetrievalSettings(trained_on=(str(cache_path),)))
    assert again.warning is not None
    with pytest.raises(DataError, match="trained on"):
        evaluate_retrieval(other, [moved], RetrievalSettings(trained_on=(str(other),)))


def test_training_part_of_another_cache_is_compared(cache_path: Path, run: Run, other: Path) -> None:
    assert rank(Cache(cache_path), run, RetrievalSettings(part="train")).overlap is None
    found = rank(Cache(other), run, RetrievalSettings(part="train")).overlap
    assert found is not None
    assert found.num_samples == 30


def test_path_of_a_training_cache_may_have_a_comma(cache_path: Path, run: Run, other: Path, tmp_path: Path) -> None:
    (tmp_path / "a, b").symlink_to(cache_path)
    shown = succeed("evaluate", "retrieval", other, run.path, "--trained-on", "a, b", cwd=tmp_path)
    assert "WARNING" in shown


def test_only_the_selection_was_seen(cache_path: Path, other: Path, tmp_path: Path) -> None:
    keys = [key for key in Cache(cache_path).samples["key"].to_pylist() if key != "00000"]  # which `other` has, too
    (tmp_path / "keys.txt").write_text("\n".join(keys[:20]))
    path = train_run(cache_path, tmp_path / "run", selection=str(tmp_path / "keys.txt"))
    (tmp_path / "keys.txt").unlink()
    chosen = load_runs([path])[0]
    seen = training_items(chosen, Cache(cache_path))["image"].items.samples
    parts = read_run_split(chosen, Cache(cache_path)).parts
    assert seen.tolist() == [row for row in range(1, 21) if parts[row] == "train"]
    images = ItemSet(chosen_image(chosen, other), read_items([Cache(other)], [chosen_image(chosen, other)]))
    found = overlap.find_overlap(chosen, Cache(other), {"image": images}, RetrievalSettings(part="all"))
    assert found is not None
    assert found.exact == 0
    (path / "selection.txt").write_text("\n".join(keys[:21]))
    with pytest.raises(CorruptError, match=r"selection\.txt: expected checksum"):
        training_items(chosen, Cache(cache_path))


def test_copy_of_the_first_training_item_counts(other: Path, runs: list[Path]) -> None:
    run = load_runs(runs[1:])[0]  # with the first image in its training part
    images = ItemSet(chosen_image(run, other), read_items([Cache(other)], [chosen_image(run, other)]))
    found = overlap.find_overlap(run, Cache(other), {"image": images}, RetrievalSettings(part="all"))
    assert found is not None
    assert found.exact == 1


def chosen_image(run: Run, cache_path: Path) -> InputFeature:
    return run_input(Cache(cache_path), run, "image")


@pytest.mark.slow
def test_training_caches_are_found_from_any_folder(
    cache_path: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache_path.parent)
    run = Path(shutil.copytree(train_run(Path("cache"), tmp_path / "here" / "run"), tmp_path / "here" / "moved"))
    monkeypatch.chdir(tmp_path)
    report = evaluate_retrieval(other, [run])
    assert report.overlap is not None
    assert (report.overlap.not_compared, report.overlap.exact > 0) == ([], True)
    name_caches(run, ["gone"])
    assert evaluate_retrieval(other, [run]).overlap.not_compared == ["gone"]  # type: ignore[union-attr]
    of_itself = evaluate_retrieval(cache_path, [run]).overlap
    assert of_itself is not None
    assert (of_itself.not_compared, of_itself.exact > 0) == ([], True)


def name_caches(run: Path, caches: list[str]) -> None:
    """Write other paths of caches into a run by hand, which its digest leaves out."""
    (run / "run.json").write_text(json.dumps({**read_json(run / "run.json"), "caches": caches}))
