"""Prompts of classes: which are encoded, and the mean direction of each class."""

import json
from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import normalize
from embedcache.dataset.inputs import open_input
from embedcache.dataset.labels import check_prompts, class_vectors, has_prompts, read_prompts
from embedcache.errors import DataError
from embedcache.extract.extract import extract
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.toy import TEXT


@pytest.fixture(scope="module")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with two and three prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    classes = {"red": ["red bar", "a red bar"], "blue": ["blue bar", "blue bar left", "bar on blue"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    extract(open_source(f"prompts:{folder / 'classes.json'}"), folder / "c", text_encoder=[TEXT])
    return folder / "c"


def test_class_vectors_are_mean_directions(prompts_path: Path, run_path: Path) -> None:
    cache = Cache(prompts_path)
    check_prompts(cache, "st:x")
    prompts = read_prompts(cache, open_input(cache, "text", "open_toy/mean"))
    assert prompts.names == ["red", "blue"]
    assert prompts.counts.tolist() == [2, 3]
    assert prompts.rows.tolist() == [0, 1, 2, 3, 4]
    assert prompts.classes.tolist() == [0, 0, 1, 1, 1]
    tower = Run.open(run_path).pair.tower("text")
    projected_TP = project(tower, prompts.feature.read(prompts.rows))
    expected = normalize(np.stack([projected_TP[:2].mean(axis=0), projected_TP[2:].mean(axis=0)]))
    np.testing.assert_allclose(class_vectors(prompts, tower), expected, atol=1e-6)


def test_classes_without_prompts_raise(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("class,caption\nred,red bar\ngone,\nblue,blue\nnone,\n")
    extract(open_source(tmp_path / "p.csv"), tmp_path / "c", text_encoder=[TEXT])
    cache = Cache(tmp_path / "c")
    with pytest.raises(DataError, match="gone"):
        read_prompts(cache, open_input(cache, "text"))


def test_cache_without_prompts_raises(cache_path: Path) -> None:
    cache = Cache(cache_path)
    assert not has_prompts(cache)
    for spec in ("st:x", "imported:text", "derived:mean"):
        with pytest.raises(DataError, match="prompts"):
            check_prompts(cache, spec)
