"""Features that are named with and without their modality."""

import pytest

from embedcache.dataset.inputs import choose_pair, features_by_modality
from embedcache.errors import SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("named")
    source = open_source(write_images(folder / "photos", 4))
    settings = ExtractSettings(features=("cls", "patches", "mean", "tokens"))
    extract(source, folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return Cache(folder / "cache")


def test_a_name_of_one_modality_needs_no_modality(cache: Cache) -> None:
    by_modality = {"image": ["open_toy/cls"], "text": ["open_toy/mean"]}
    for feature in (
        by_modality,
        {"image": "open_toy/cls", "text": "open_toy/mean"},
        ["open_toy/mean", "open_toy/cls"],
        ["text=open_toy/mean", "image=open_toy/cls"],
    ):
        assert features_by_modality(cache, feature) == by_modality
    assert features_by_modality(cache, "open_toy/cls+open_toy/patches") == {"image": ["open_toy/cls+open_toy/patches"]}


def test_a_pair_is_completed(cache: Cache) -> None:
    assert choose_pair(cache, None) == {"image": None, "text": None}
    assert choose_pair(cache, "open_toy/mean") == {"image": None, "text": "open_toy/mean"}
    several = {"image": ["open_toy/cls", "open_toy/patches"], "text": None}
    assert choose_pair(cache, several) == {"image": "open_toy/cls+open_toy/patches", "text": None}


def test_wrong_names_raise(cache: Cache) -> None:
    with pytest.raises(UnknownNameError, match="known: open_toy/cls"):
        features_by_modality(cache, "open_toy/clz")
    with pytest.raises(SettingError, match="images and texts"):
        features_by_modality(cache, "open_toy")
    with pytest.raises(SettingError, match="two modalities"):
        choose_pair(cache, {"audio": "a"})
