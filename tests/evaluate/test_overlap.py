import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError
from embedcache.evaluate import held_out as overlap
from embedcache.evaluate.held_out import held_out, trained_items
from embedcache.evaluate.retrieval import evaluate_retrieval, rank
from embedcache.evaluate.runs import Run, load_runs
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.evaluate.test_retrieval import train_run
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def run(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_runs([train_run(cache_path, tmp_path_factory.mktemp("run") / "run-0")])[0]


@pytest.fixture(scope="module")
def other(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty samples that the run never saw, with a split; the first is a copy of one of training's."""
    folder = tmp_path_factory.mktemp("other")
    source = write_pictures(folder / "source" / "test", 50, seed=9)
    write_pictures(folder / "source" / "train", 30, seed=8)
    shutil.copy(pictures / "00000.png", source / "00000.png")
    extract(open_source(folder / "source"), folder / "cache", image_encoders=[IMAGE], text_encoders=[TEXT])
    return folder / "cache"


def unit(side: object, rows: np.ndarray) -> np.ndarray:
    vectors = side.read(rows).values.astype(np.float64)  # type: ignore[attr-defined]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_another_cache_is_measured_whole_or_by_its_column(run: Run, other: Path) -> None:
    cache = Cache(other)
    assert held_out(cache, run).samples.tolist() == [
        row for row, part in enumerate(cache.samples["split"].to_pylist()) if part == "test"
    ]
    assert len(held_out(cache, run, "all").samples) == 80
    assert evaluate_retrieval(other, [run.path]).num_images == [50]
    with pytest.raises(DataError, match="no val samples for this run: its column split holds test, train; use --part"):
        held_out(cache, run, "val")


def test_a_cache_without_a_split_is_measured_whole(run: Run, two_caches: list[Path]) -> None:
    assert held_out(Cache(two_caches[0]), run).part == "all samples"
    assert len(held_out(Cache(two_caches[0]), run).samples) == 40
    with pytest.raises(DataError, match="no test samples for this run: it has no column split"):
        held_out(Cache(two_caches[0]), run, "test")


def test_what_training_saw_is_found_as_comparing_all_with_all_finds_it(cache_path: Path, run: Run, other: Path) -> None:
    for path in (cache_path, other):
        cache = Cache(path)
        ranking = rank(cache, run, compares=True)
        trained = trained_items(run, Cache(cache_path))
        exact, near = set(), set()
        for modality, feature in (("image", "open_toy/cls"), ("text", "open_toy/mean")):
            held, seen = getattr(ranking.pairs, modality), trained[modality]
            side = type(seen.side)([cache.feature(modality, feature)])
            cosines = unit(side, held.rows) @ unit(seen.side, seen.items.rows).T
            near |= set(held.samples[(cosines > overlap.COSINES[modality]).any(axis=1)])
            hashes = {seen.side.hashes[row] for row in seen.items.rows}
            exact |= {s for s, row in zip(held.samples, held.rows, strict=True) if side.hashes[row] in hashes}
        assert ranking.overlap is not None
        assert (ranking.overlap.exact, ranking.overlap.near) == (len(exact), len(near | exact))
        assert ranking.overlap.exact > 0


def test_of_many_samples_some_are_drawn(run: Run, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_MOST_PRODUCTS", 1)
    monkeypatch.setattr(overlap, "_FEWEST_CHECKED", 7)
    found = rank(Cache(other), run, compares=True).overlap
    assert found is not None
    assert (found.num_checked, found.num_samples) == (7, 50)
    assert found.near <= 7


def test_training_data_that_is_gone_is_said(cache_path: Path, run: Run, other: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run.path, tmp_path / "run-0"))
    record = json.loads((moved / "record.json").read_text())
    record["settings"]["caches"] = [str(tmp_path / "gone")]
    (moved / "record.json").write_text(json.dumps(record))
    report = evaluate_retrieval(other, [moved])
    assert report.overlap is not None
    assert f"not compared with training data that is not there: {tmp_path / 'gone'}" in report.overlap.line()
    assert report.warning is None
    again = evaluate_retrieval(other, [moved], trained_on=[cache_path])
    assert again.warning is not None
    with pytest.raises(DataError, match=r"was not trained on .*cache; give the caches it was trained on"):
        evaluate_retrieval(other, [moved], trained_on=[other])
