"""Sources that never end or are too large: devices, pipes, brace patterns, tar headers and captions."""

import os
from pathlib import Path

import pytest

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.sources import open_source
from embedcache.sources.files import CAPTION_ERROR, read_sidecar
from embedcache.sources.webdataset import expand_braces
from embedcache.vectors.opening import open_npy
from tests.sources.files import jpeg, write


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "source", {"a.jpg": jpeg("red"), "b.jpg": jpeg("red")})
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("c.png", "/dev/zero"), ("d.png", tmp_path / "pipe"), ("b.txt", tmp_path / "pipe")):
        (tmp_path / "source" / name).symlink_to(target)
    os.mkfifo(tmp_path / "source" / "e.png")
    source = open_source(tmp_path / "source")
    _, b, c, d = source.samples()
    assert b.columns[CAPTION_ERROR] == f"cannot read b.txt: not a regular file: {tmp_path}/source/b.txt"
    for sample in (c, d):
        with pytest.raises(ItemError, match="not a regular file: "):
            source.read(sample.images[0])
    with pytest.raises(PathError, match="expected a regular file, got a pipe"):
        open_npy(tmp_path / "pipe")


def test_brace_patterns_are_bounded(tmp_path: Path) -> None:
    assert len(list(expand_braces("{00..11}-{a,b}.tar"))) == 24
    for pattern in ("{000..999999999}.tar", "{0..999}{0..999}{a,b}.tar"):
        with pytest.raises(SourceError, match="expected at most 1,000,000 shards, got"):
            open_source(str(tmp_path / pattern))


@pytest.mark.parametrize(
    "value",
    ["1" * 5000, '"\\ud800"', "[" * 100_000, '"a", "language": ["de", "en"]', '"a", "language": 1'],
    ids=["digits", "half", "deep", "languages", "number"],
)
def test_bad_caption_file_is_a_row_with_a_reason(value: str) -> None:
    sidecar = read_sidecar({".json": f'{{"caption": {value}}}'.encode()}, "a")
    assert not sidecar.texts
    assert str(sidecar.columns[CAPTION_ERROR]).startswith("a.json")
