"""The example of `docs/reference/on_disk.md` that reads a cache with DuckDB, pyarrow, zarr-python and NumPy alone."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.extract.extract import extract
from embedcache.maintain.remove import remove_samples
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.blocks import ROOT, blocks_of
from tests.images import write_images

TOY = "tests.toy:open_toy"


@pytest.mark.slow
def test_other_libraries_read_what_embedcache_reads(tmp_path: Path) -> None:
    """A cache of two parts in which an image has failed and a sample was removed."""
    source = write_images(tmp_path / "source", 9)
    (source / "00003.png").write_bytes(b"")
    options: dict[str, Any] = {"image_encoder": TOY, "text_encoder": TOY, "device": "cpu"}
    extract(open_source(source), tmp_path / "flickr", **options, chunk_size=4)
    for suffix in ("png", "txt"):
        shutil.copy(source / f"00002.{suffix}", source / f"99999.{suffix}")
    extract(open_source(source), tmp_path / "flickr", **options, extend=True)
    remove_samples(tmp_path / "flickr", ["00001"])

    (code,) = [block.code for block in blocks_of(ROOT / "docs/reference/on_disk.md") if block.language == "python"]
    read: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(code, read)  # noqa: S102

    cache = Cache(tmp_path / "flickr")
    feature = cache.feature("image", "open_toy/cls")
    assert len(cache.info.parts) == 2
    keys = cache.column("key").to_pylist()
    paths = cache.items("image")["path"].to_pylist()
    assert read["images"] == [(row, *pair) for row, pair in enumerate(zip(keys, paths, strict=True))]
    assert read["captions"].equals(cache.items("text").select(["sample", "text"]))
    assert read["reasons"] == feature.failures
    assert set(read["reasons"]) == {1, 3}
    np.testing.assert_array_equal(read["vectors"], feature.load())
    np.testing.assert_array_equal(read["second_chunk"], read["vectors"][4:8])
