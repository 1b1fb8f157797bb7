"""SIGKILL at each point where a file takes its place, then the same command again. docs/guarantees.md lists them."""

import shutil
from pathlib import Path

import pytest

from embedcache.cli.main import root_command
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.crash import crash
from tests.extract.cases import tree
from tests.images import write_images

ENCODERS = ["--image-encoder", "tests.toy:open_toy", "--text-encoder", "tests.toy:open_toy", "--device", "cpu"]
FEATURES = ["--feature", "cls,patches,tokens"]
CHUNKS = ["--chunk-size", "8"]
MOMENTS = ("before", "after")

pytestmark = pytest.mark.slow


def command(source: Path, cache: Path, *options: str) -> list[str]:
    return ["extract", str(source), str(cache), *ENCODERS, *(options or FEATURES)]


def finish(arguments: list[str]) -> None:
    """Run a command in this process, to its end."""
    root_command()(arguments, standalone_mode=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images; those in `later` are the good file of a broken one, and one to add."""
    folder = write_images(tmp_path_factory.mktemp("crash") / "source", 20)
    later = folder.parent / "later"
    later.mkdir()
    shutil.copy(folder / "00003.png", later / "00003.png")
    for suffix in ("png", "txt"):
        shutil.copy(folder / f"00010.{suffix}", later / f"00010-again.{suffix}")
    (folder / "00003.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """The cache of an uninterrupted run, in three chunks."""
    cache = source.parent / "whole"
    finish([*command(source, cache), *CHUNKS])
    return cache


NEW = {
    "samples": "samples.parquet",
    "items": "text/items.parquet",
    "index": "cache.json",
    "encoder": "open_toy/zarr.json",
    "feature": "patches/zarr.json",
    "array": "cls/c/1/0",
    "tokens": "values/00001/c/0/0",
    "lengths": "lengths/c/1",
    "commit": "image/open_toy/chunks/00001.parquet",
    "last commit": "text/open_toy/chunks/00002.parquet",
    "record": "records/extract-.*.json",
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("point", NEW)
def test_new_cache(source: Path, whole: Path, tmp_path: Path, point: str, moment: str) -> None:
    arguments = [*command(source, tmp_path / "c"), *CHUNKS]
    crash(arguments, moment, NEW[point])
    finish(arguments)
    assert tree(tmp_path / "c") == tree(whole)


@pytest.fixture(scope="module")
def without_patches(source: Path) -> Path:
    cache = source.parent / "without-patches"
    finish([*command(source, cache, "--feature", "cls,tokens"), *CHUNKS])
    return cache


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("pattern", ["patches/c/1/0/0", "chunks/00001.parquet"])
def test_added_feature(
    source: Path, whole: Path, without_patches: Path, tmp_path: Path, pattern: str, moment: str
) -> None:
    cache = Path(shutil.copytree(without_patches, tmp_path / "c"))
    before = Cache(cache).feature("image", "open_toy/cls").load()
    crash(command(source, cache), moment, pattern)
    assert (Cache(cache).feature("image", "open_toy/cls").load() == before).mean() > 0.9  # NaN where it failed
    finish(command(source, cache))
    assert tree(cache) == tree(whole)


class Changed:
    """A source that changed after it was extracted, and its cache before and after the change was taken over.

    A cache names its source, so every copy of the cache is used with the same source.
    """

    def __init__(self, source: Path, folder: Path, names: tuple[str, ...], option: str) -> None:
        self.source, self._before, self.after = folder / "source", folder / "before", folder / "after"
        self._option = option
        shutil.copytree(source, self.source)
        finish([*command(self.source, self._before), *CHUNKS])
        for name in names:
            shutil.copy(source.parent / "later" / name, self.source / name)
        shutil.copytree(self._before, self.after)
        finish(self.command(self.after))

    def command(self, cache: Path) -> list[str]:
        return [*command(self.source, cache), self._option]

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self._before, folder / "c"))


@pytest.fixture(scope="module")
def extended(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    return Changed(source, tmp_path_factory.mktemp("extended"), ("00010-again.png", "00010-again.txt"), "--extend")


@pytest.fixture(scope="module")
def retried(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    return Changed(source, tmp_path_factory.mktemp("retried"), ("00003.png",), "--retry-failed")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "pattern", ["samples.parquet", "image/items.parquet", "cache.json", "cls/zarr.json", "cls/c/2/0", "00002.parquet"]
)
def test_extend(extended: Changed, tmp_path: Path, pattern: str, moment: str) -> None:
    cache = extended.copy(tmp_path)
    crash(extended.command(cache), moment, pattern)
    assert Cache(cache).feature("image", "open_toy/cls").valid[:16].sum() == 15
    finish(extended.command(cache))
    assert tree(cache) == tree(extended.after)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "pattern", ["mending.json", "image/items.parquet", "text/items.parquet", "cache.json", "cls/c/0/0", "00000.parquet"]
)
def test_retry_failed(retried: Changed, tmp_path: Path, pattern: str, moment: str) -> None:
    cache = retried.copy(tmp_path)
    crash(retried.command(cache), moment, pattern)
    finish(retried.command(cache))
    finish(command(retried.source, cache))  # a chunk that was withdrawn at the kill counts as not extracted
    assert tree(cache) == tree(retried.after)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("pattern", ["chunks/00000.parquet", "cls/c/1/0"])
def test_repair(source: Path, whole: Path, tmp_path: Path, pattern: str, moment: str) -> None:
    cache = Path(shutil.copytree(whole, tmp_path / "c"))
    for chunk in range(2):
        path = cache / f"image/open_toy/cls/c/{chunk}/0"
        path.write_bytes(b"x" + path.read_bytes()[1:])
    crash(["verify", str(cache), "--repair", "--trust"], moment, pattern)
    assert sum(not finding.is_damage for finding in verify(Cache(cache))) <= 1  # of two that are repaired
    finish(["verify", str(cache), "--repair", "--trust"])
    assert verify(Cache(cache)) == []
    assert tree(cache) == tree(whole)
