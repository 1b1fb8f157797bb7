"""A run, prompts and a selection for the coverage of the session's cache. Not to be changed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedcache.curate.coverage import CoverageReport, measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.selections import Selection, write_selection
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.removal import erase, remove_rows
from tests.search.test_concepts import NAMES, prompt_cache
from tests.toy import TEXT
from tests.vectors.runs import SIDES, train_run


@pytest.fixture(scope="session")
def run_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(cache_path, tmp_path_factory.mktemp("run") / "run", *SIDES["vectors"])


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_cache(tmp_path_factory.mktemp("prompts"), NAMES)


@pytest.fixture(scope="session")
def half(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection of every second sample."""
    path, rows = tmp_path_factory.mktemp("half") / "half.parquet", np.arange(0, 300, 2)
    write_selection(path, Cache(cache_path), Selection(rows=rows), {"method": "test"})
    return path


@pytest.fixture(scope="session")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captions, concepts, and a selection of every second caption. Not to be changed.

    The first 50 of 600 captions are of zebras, 10 of yaks and the others random words; the third concept has none.
    """
    folder, rng = tmp_path_factory.mktemp("clear"), np.random.default_rng(0)
    others = rng.integers(0, 500, (600, 5))
    words = [["zebra"] * 5, *[["zebra"] * 4 + ["and"]] * 49, *[["yak"] * 4 + ["and"]] * 10]
    captions = [" ".join(chosen) for chosen in words] + [" ".join(f"w{word}" for word in row) for row in others[60:]]
    (folder / "captions.txt").write_text("\n".join(captions))
    (folder / "names.txt").write_text("zebra\nyak\ngnu")
    (folder / "templates.txt").write_text("{c}")
    extract(open_source(folder / "captions.txt"), folder / "cache", text_encoder=[TEXT])
    prompts = open_source(f"prompts:{folder / 'names.txt'}+{folder / 'templates.txt'}")
    extract(prompts, folder / "concepts", text_encoder=[TEXT])
    selection = Selection(rows=np.arange(0, 600, 2))
    write_selection(folder / "half.parquet", Cache(folder / "cache"), selection, {"method": "test"})
    return folder


def of_texts(cache_path: Path, prompts: Path, **options: Any) -> CoverageReport:
    return measure_coverage(cache_path, prompts, CoverageSettings(modality="text", feature="open_toy/mean", **options))


@pytest.fixture(scope="session")
def without(two_caches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Forty samples, of which three were removed. Not to be changed."""
    path = Path(shutil.copytree(two_caches[0], tmp_path_factory.mktemp("removed") / "cache"))
    removed = np.array([3, 7, 39])
    remove_rows(Cache(path), removed, Cache(path).column("key").take(pa.array(removed)).to_pylist())
    erase(path)
    return Cache(path)
