import pyarrow as pa
import pytest

from embedcache.errors import UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache, describe_cache, describe_feature, failure_lines
from tests.images import write_images
from tests.toy import IMAGE


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of 20 images, of which 7 cannot be read."""
    folder = tmp_path_factory.mktemp("failures")
    source = write_images(folder / "source", 20)
    for row in range(3, 10):
        (source / f"{row:05d}.png").write_bytes(b"")
    settings = ExtractSettings(features=("cls",), chunk_size=4)
    extract(open_source(source), folder / "cache", image_encoder=[IMAGE], settings=settings)
    return Cache(folder / "cache")


def test_describe(cache: Cache) -> None:
    assert "20 samples with 20 images, 20 texts" in describe_cache(cache)
    assert describe_feature(cache.feature("image"))[:6] == ["open_toy/cls", "image", "20 × 48", "float16", "5/5", "7"]


def test_failure_lines_read_single_chunks(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    items = Cache.items

    def items_of_chunk(self: Cache, modality: str, *, chunk: int | None = None) -> pa.Table:
        assert chunk is not None, "the whole item table is read for one row"
        return items(self, modality, chunk=chunk)

    monkeypatch.setattr(Cache, "items", items_of_chunk)
    lines = failure_lines(cache, cache.feature("image"), num_shown=2)
    assert lines[0].startswith("  7 failed: ")
    assert "row 3, key 00003, 00003.png: " in lines[1]
    assert lines[-1] == "    … and 5 more"


def test_failures_are_collected_once(cache: Cache) -> None:
    feature = cache.feature("image")
    assert feature.failures is feature.failures


@pytest.mark.parametrize("name", ["open_toy/clss", "other"])
def test_unknown_feature_raises(cache: Cache, name: str) -> None:
    with pytest.raises(UnknownNameError, match="known: open_toy/cls"):
        cache.feature("image", name)


def test_unknown_modality_raises(cache: Cache) -> None:
    with pytest.raises(UnknownNameError, match="unknown modality 'imag'; known: image, text, audio, video, points"):
        cache.feature("imag")
