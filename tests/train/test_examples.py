import doctest
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import embedcache
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.evaluate import adapter as adapter_evaluation
from embedcache.train import adapter, losses, pair_dataset, settings, train
from tests.images import write_images
from tests.toy import TEXT, open_toy


def old(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    return open_toy(spec, modality=modality, settings=settings)


def new(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    return open_toy(spec, modality=modality, settings=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty photos, a cache of them, and one with a second image encoder. Not to be changed."""
    path = tmp_path_factory.mktemp("examples")
    write_images(path / "photos", 60)
    image_encoder = f"{__name__}:old"
    embedcache.extract_features(path / "photos", path / "cache", image_encoder=image_encoder, text_encoder=TEXT)
    shutil.copytree(path / "cache", path / "two-encoders")
    embedcache.extract_features(path / "photos", path / "two-encoders", image_encoder=f"{__name__}:new")
    return path


@pytest.mark.parametrize("module", [adapter, adapter_evaluation, losses, pair_dataset, settings, train])
def test_docstring_examples(module: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder / "cache", folder / "two-encoders", *(folder / "photos").iterdir()):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"embedcache": embedcache})
    assert result.attempted
    assert not result.failed
