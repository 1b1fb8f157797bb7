"""A run, prompts and a selection for the coverage of the session's cache. Not to be changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.curate.coverage import CoverageReport, measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.selections import Selection, write_selection
from embedcache.store.cache import Cache
from tests.interop.runs import SIDES, train_run
from tests.search.test_concepts import NAMES, prompt_cache

FIXED: dict[str, Any] = {"threshold": 0.45, "k": 5}


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
    write_selection(path, Cache(cache_path), Selection(rows=rows, reasons=["even"] * 150), {"method": "test"})
    return path


def of_texts(cache_path: Path, prompts: Path, **options: Any) -> CoverageReport:
    return measure_coverage(cache_path, prompts, CoverageSettings(modality="text", feature="open_toy/mean", **options))
