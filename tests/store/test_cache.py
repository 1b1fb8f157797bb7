from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import DataError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import SourceSettings, open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.toy import IMAGE, TEXT


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


@pytest.mark.parametrize(
    ("read", "error", "word"),
    [
        (lambda cache: cache.key(-1), DataError, "-1"),
        (lambda cache: cache.key(20), DataError, "20"),
        (lambda cache: cache[20], IndexError, "20"),
        (lambda cache: cache[-21], IndexError, "-21"),
        (lambda cache: cache["label"], UnknownNameError, "label"),
        (lambda cache: cache.items("imag"), UnknownNameError, "imag"),
        (lambda cache: cache.items("image", chunk=5), DataError, "5"),
        (lambda cache: cache.items("image", chunk=-1), DataError, "-1"),
        (lambda cache: cache.features("imag"), UnknownNameError, "imag"),
        (lambda cache: cache.feature("audio"), UnknownNameError, "audio"),
        (lambda cache: cache.feature("image", "other"), UnknownNameError, "other"),
        (lambda cache: cache.to_pandas("audio"), UnknownNameError, "audio"),
    ],
)
def test_unknown_rows_and_names_raise(
    cache: Cache, read: Callable[[Cache], object], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        read(cache)


def test_items_of_a_modality_without_any(cache: Cache) -> None:
    assert cache.items("video").num_rows == 0
    assert cache.items("audio", columns=["sample", "stop_s"]).column_names == ["sample", "stop_s"]
    assert not len(cache.removed_items("points"))


def test_repr_has_counts(cache: Cache) -> None:
    assert repr(cache) == f"Cache({str(cache.path)!r}: 20 samples, 20 images, 20 texts)"
    assert repr(cache.features()) == "[Feature(open_toy/cls: image, (20, 48) float16)]"
    assert cache.features("text") == []


def test_rows_are_samples(cache: Cache) -> None:
    assert len(cache) == 20
    texts = cache.items("text")["text"].to_pylist()
    samples = [{"key": f"{n:05d}", "image": [f"{n:05d}.png"], "text": [texts[n]]} for n in range(20)]
    assert list(cache) == samples
    assert (cache[3], cache[-1], cache[-20], cache[np.int64(4)]) == (samples[3], samples[19], samples[0], samples[4])
    assert (cache[5:8], cache[18:99], cache[9:3], cache[8:2:-3]) == (samples[5:8], samples[18:], [], samples[8:2:-3])
    assert cache[2:9:2] == samples[2:9:2]
    assert cache["key"].to_pylist() == [sample["key"] for sample in samples]


def test_samples_have_several_items_or_none(tmp_path: Path) -> None:
    rows = {"id": ["a", "b", "c"], "caption": [["x", "y"], [], ["z"]], "label": [1, 2, 3]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet", settings=SourceSettings(key_column="id"))
    extract(source, tmp_path / "cache", text_encoder=TEXT, chunk_size=2)
    cache = Cache(tmp_path / "cache")
    assert [(sample["key"], sample["label"], sample["text"]) for sample in cache] == [
        ("a", 1, ["x", "y"]),
        ("b", 2, []),
        ("c", 3, ["z"]),
    ]
    frame = cache.to_pandas("text")
    assert frame[["key", "text", "label", "sample"]].to_numpy().tolist() == [
        ["a", "x", 1, 0],
        ["a", "y", 1, 0],
        ["c", "z", 3, 2],
    ]
    assert cache.to_pandas()["label"].tolist() == [1, 2, 3]
