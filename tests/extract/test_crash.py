"""kill -9 at each point where a file comes to be, then the same command again. docs/guarantees.md lists them."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embedcache.cli.main import app
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.extract.cases import tree
from tests.pictures import write_pictures

ENCODERS = ["--image-encoder", "tests.toy:open_toy", "--text-encoder", "tests.toy:open_toy", "--device", "cpu"]
FEATURES = ["--feature", "cls,patches,tokens"]
MOMENTS = ("before", "after")

pytestmark = pytest.mark.slow


def command(source: Path, cache: Path, *options: str) -> list[str]:
    return ["extract", str(source), str(cache), *ENCODERS, *(options or FEATURES)]


def crash(arguments: list[str], moment: str, pattern: str, number: int = 1) -> None:
    words = [sys.executable, "-m", "tests.extract.crash", moment, pattern, str(number), *arguments]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr


def finish(arguments: list[str]) -> None:
    """The same in this process, which lives."""
    app(arguments, standalone_mode=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures; those in `later` are the good file of a broken one, and one to add."""
    folder = write_pictures(tmp_path_factory.mktemp("crash") / "source", 40)
    later = folder.parent / "later"
    later.mkdir()
    shutil.copy(folder / "00003.png", later / "00003.png")
    for suffix in ("png", "txt"):
        shutil.copy(folder / f"00020.{suffix}", later / f"00020-again.{suffix}")
    (folder / "00003.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """The cache of a run that was never stopped, in chunks of 16."""
    cache = source.parent / "whole"
    finish([*command(source, cache), "--chunk-size", "16"])
    return cache


NEW = {
    "samples": "samples.parquet",
    "items": "text/items.parquet",
    "numbering": "cache.json",
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
def test_a_new_cache(source: Path, whole: Path, tmp_path: Path, point: str, moment: str) -> None:
    arguments = [*command(source, tmp_path / "c"), "--chunk-size", "16"]
    crash(arguments, moment, NEW[point])
    finish(arguments)
    assert tree(tmp_path / "c") == tree(whole)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("pattern", ["patches/c/1/0/0", "chunks/00001.parquet"])
def test_a_feature_that_is_added(source: Path, whole: Path, tmp_path: Path, pattern: str, moment: str) -> None:
    finish([*command(source, tmp_path / "c", "--feature", "cls,tokens"), "--chunk-size", "16"])
    before = Cache(tmp_path / "c").feature("image", "open_toy/cls").load()
    crash(command(source, tmp_path / "c"), moment, pattern)
    assert (Cache(tmp_path / "c").feature("image", "open_toy/cls").load() == before).mean() > 0.9  # NaN where it failed
    finish(command(source, tmp_path / "c"))
    assert tree(tmp_path / "c") == tree(whole)


def changed_source(source: Path, folder: Path, *names: str) -> Path:
    """Copy a source, and put files of `later` into it."""
    copy = Path(shutil.copytree(source, folder / "source"))
    for name in names:
        shutil.copy(source.parent / "later" / name, copy / name)
    return copy


def start_over(source: Path, folder: Path) -> tuple[Path, Path]:
    """Extract a copy of the source into a cache of its own: two caches of different paths have different `source`s."""
    copy = changed_source(source, folder)
    finish([*command(copy, folder / "c"), "--chunk-size", "16"])
    return copy, folder / "c"


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "pattern", ["samples.parquet", "image/items.parquet", "cache.json", "cls/zarr.json", "cls/c/2/0", "00002.parquet"]
)
def test_samples_that_are_added(source: Path, tmp_path: Path, pattern: str, moment: str) -> None:
    copy, cache = start_over(source, tmp_path)
    for name in ("00020-again.png", "00020-again.txt"):
        shutil.copy(source.parent / "later" / name, copy / name)
    calm = Path(shutil.copytree(cache, tmp_path / "calm"))
    finish([*command(copy, calm), "--extend"])
    crash([*command(copy, cache), "--extend"], moment, pattern)
    assert Cache(cache).feature("image", "open_toy/cls").valid[:32].sum() == 31
    finish([*command(copy, cache), "--extend"])
    assert tree(cache) == tree(calm)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "pattern", ["mending.json", "image/items.parquet", "text/items.parquet", "cache.json", "cls/c/0/0", "00000.parquet"]
)
def test_a_failed_item_that_is_tried_again(source: Path, tmp_path: Path, pattern: str, moment: str) -> None:
    copy, cache = start_over(source, tmp_path)
    shutil.copy(source.parent / "later/00003.png", copy / "00003.png")
    calm = Path(shutil.copytree(cache, tmp_path / "calm"))
    finish([*command(copy, calm), "--retry-failed"])
    crash([*command(copy, cache), "--retry-failed"], moment, pattern)
    finish([*command(copy, cache), "--retry-failed"])
    finish(command(copy, cache))  # what was withdrawn when it was killed is a chunk that was never extracted
    assert tree(cache) == tree(calm)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("pattern", ["chunks/00001.parquet", "cls/c/1/0"])
def test_a_repair(source: Path, whole: Path, tmp_path: Path, pattern: str, moment: str) -> None:
    cache = Path(shutil.copytree(whole, tmp_path / "c"))
    path = cache / "image/open_toy/cls/c/1/0"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    crash(["verify", str(cache), "--repair"], moment, pattern)
    finish([*command(source, cache)])
    finish(["verify", str(cache), "--repair"])
    assert verify(Cache(cache)) == []
    assert tree(cache) == tree(whole)
