"""Images on pages are read only where the user allows it, whatever a stranger's cache says."""

from pathlib import Path

import pytest
from PIL import Image

from embedcache.dataset.thumbnails import Thumbnails
from embedcache.errors import PathError
from embedcache.registry import trust_files
from embedcache.reports.base import ItemRenderer
from embedcache.reports.speech import read_rows
from embedcache.store.cache import Cache
from tests.cli.run import TOY, embedcache
from tests.images import write_images
from tests.serve.test_untrusted import tamper


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A cache whose first image is outside the folder of its source."""
    write_images(tmp_path / "photos", 12)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "secret.png")
    assert embedcache("extract", "photos", "cache", *TOY, cwd=tmp_path).code == 0
    tamper(tmp_path / "cache", path=str(tmp_path / "secret.png"))
    return tmp_path


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A cache in the folder of its source."""
    write_images(tmp_path / "photos", 12)
    assert embedcache("extract", "photos", "photos/cache", *TOY, cwd=tmp_path).code == 0
    return tmp_path / "photos"


def shown(renderer: ItemRenderer) -> list[bool]:
    return [renderer.render(row).image_url is not None for row in (0, 1)]


def test_images_below_the_folder_of_the_source(hostile: Path) -> None:
    cache = Cache(hostile / "cache")
    renderer = ItemRenderer(cache, "image")
    assert shown(renderer) == [False, True]
    (warning,) = renderer.warnings()
    assert warning.startswith("1 image is not shown: ")
    assert "outside the source's folder" in warning
    assert shown(ItemRenderer(cache, "image", [hostile])) == [True, True]
    assert shown(ItemRenderer(cache, "image", [hostile / "cache"])) == [False, False]


def test_source_that_holds_the_cache(inside: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(inside / "cache")
    renderer = ItemRenderer(cache, "image")
    (line,) = caplog.messages
    assert line.startswith("images are not shown: the cache says that they are in "), "before anybody opens the page"
    assert shown(renderer) == [False, False]
    (warning,) = renderer.warnings()
    assert warning.startswith("2 images are not shown: the cache says that they are in ")
    assert "which holds the cache; name a folder of images with --image-folder, or use --trust" in warning
    for read in (lambda: Thumbnails(cache), lambda: read_rows(cache, ["00000"])):
        with pytest.raises(PathError, match="which holds the cache"):
            read()
    with trust_files():
        assert shown(ItemRenderer(cache, "image")) == [True, True]


def test_source_that_is_gone(hostile: Path) -> None:
    (hostile / "photos").rename(hostile / "moved")
    renderer = ItemRenderer(Cache(hostile / "cache"), "image")
    assert shown(renderer) == [False, False]
    (warning,) = renderer.warnings()
    assert (
        "photos is not a folder of this machine; if they have moved, run the same extract on their new place" in warning
    )


def test_page_says_how_many_images_are_left_out(inside: Path) -> None:
    words = ("curate", "dedup", "cache", "--feature", "open_toy/cls", "--html", "page.html", "--overwrite")
    done = embedcache(*words, cwd=inside)
    assert done.code == 0, done.stderr
    assert "images are not shown: the cache says" in (inside / "page.html").read_text()
    done = embedcache(*words, "--image-folder", inside, cwd=inside)
    assert done.code == 0, done.stderr
    page = (inside / "page.html").read_text()
    assert "data:image/webp" in page
    assert "not shown" not in page
