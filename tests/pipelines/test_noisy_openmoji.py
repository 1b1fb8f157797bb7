import json

import pytest

from embedcache.dataset.splits import Split
from embedcache.errors import DataError
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from pipelines.noisy_openmoji import spread_split, swap_parts
from tests.images import write_images
from tests.toy import TEXT

SPLIT = Split(keys=["00000", "00001", "00002"], parts=["train", "val", "test"], groups=[0, 5, 2])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Cache of pairs: one each of samples 00000 and 00003, two of 00001."""
    folder = tmp_path_factory.mktemp("pairs")
    images = write_images(folder / "images", 4)
    (images / "00001.json").write_text(json.dumps({"captions": ["one"]}))
    (images / "00002.txt").unlink()
    extract(open_source(f"pairs:{images}"), folder / "cache", text_encoder=[TEXT])
    return Cache(folder / "cache")


def test_spread_split_follows_the_samples(pairs: Cache) -> None:
    spread = spread_split(SPLIT, pairs, "sample")
    assert pairs.samples["sample"].to_pylist() == ["00000", "00001", "00001", "00003"]
    assert spread.parts == ["train", "val", "val", ""]
    assert spread.groups == [0, 5, 5, 9]


@pytest.mark.parametrize(("column", "message"), [("nothing", "no column 'nothing'"), ("key", "no key in column 'key'")])
def test_spread_split_refuses_other_columns(pairs: Cache, column: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        spread_split(SPLIT, pairs, column)


def test_swap_parts() -> None:
    assert swap_parts(SPLIT, "train", "val").parts == ["val", "train", "test"]
