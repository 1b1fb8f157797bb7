"""The cache, run and index that 0.1.0 wrote are read by every later version; see `make_artifacts`."""

import shutil
from pathlib import Path

import numpy as np
import zarr

from embedcache.registry import trust_files
from embedcache.runs import PAIR, Run
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex
from embedcache.store.cache import Cache
from embedcache.store.verify import verify

GOLDEN = Path(__file__).parent / "0.1.0"
KEYS = [f"{number:05d}" for number in range(6)]


def test_artifacts_of_0_1_0_are_read(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    cache = Cache(folder / "cache")
    assert verify(cache) == []
    images = cache.feature("image", "open_toy/cls").load()
    np.testing.assert_array_equal(images, zarr.open_array(folder / "cache/image/open_toy/cls", mode="r")[:])
    tokens = cache.feature("text", "open_toy/tokens")
    assert (images.shape, tokens.num_items, tokens.item_shape) == ((6, 48), 6, (-1, 32))

    run = Run.open(folder / "run", kind=PAIR)
    assert (run.projector, run.shared_width, run.modalities) == ("linear", 8, ("image", "text"))
    assert not run.module.training

    with trust_files():
        hits = OpenIndex(folder / "index").search(Queries(keys=KEYS), k=1)
    assert [query.key for [query] in hits] == KEYS
