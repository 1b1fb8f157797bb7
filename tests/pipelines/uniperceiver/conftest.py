"""Shared by the tests of Uni-Perceiver: caches of colored squares, and a run on them."""

from pathlib import Path

import pytest

from tests.pipelines.uniperceiver.cases import Squares, make_caches, open_caches, train_together


@pytest.fixture(scope="session")
def squares_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Caches of colored squares with captions, for training and validation, and of their words. Not to be changed."""
    return make_caches(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def squares(squares_paths: tuple[Path, Path, Path]) -> Squares:
    """These caches, opened with their examples."""
    return open_caches(squares_paths)


@pytest.fixture(scope="session")
def squares_run(squares: Squares, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four tasks on colored squares; none of them answers questions. Not to be changed."""
    return train_together(squares, tmp_path_factory.mktemp("squares-runs") / "all")
