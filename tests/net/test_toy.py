"""What commands computed on toy caches when the net was recorded, they compute today."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net import commands
from tests.net.checks import check_features, check_values
from tests.net.modalities import make_modalities

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of `make_toy`, which is the working directory."""
    path = tmp_path_factory.mktemp("net")
    with contextlib.chdir(path):
        commands.make_toy()
        yield path


def test_features() -> None:
    check_features("toy", commands.features_of("cache"))


def test_features_of_all_modalities(folder: Path) -> None:
    check_features("modalities", commands.features_of(make_modalities(folder)))


def test_figures() -> None:
    check_values("toy", commands.toy_figures())


@pytest.mark.parametrize("recipe", commands.RECIPES)
def test_recipe(recipe: str) -> None:
    # Rounding grows in fusemix: its later losses differ by up to 0.8% between processors.
    check_values("toy", commands.train_figures(recipe), relative=0.01 if recipe == "fusemix" else 1e-4)


@pytest.mark.parametrize("projector", commands.PROJECTORS)
def test_projector(projector: str) -> None:
    check_values("toy", commands.projector_figures(projector), relative=1e-3)
