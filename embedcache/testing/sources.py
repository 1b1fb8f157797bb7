"""Contract tests of a source."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedcache.errors import ItemError
from embedcache.registry import trust_files
from embedcache.sources import FileItem, Source, reopen_source
from embedcache.sources.images import decode_image


class SourceContract:
    """Tests that every source must pass.

    Subclasses override the fixture `source` with a small source whose images all decode. A source without images or
    without texts sets `has_images` or `has_texts` to False.

    Example:
        >>> class TestMine(SourceContract):
        ...     has_images = False
        ...     @pytest.fixture
        ...     def source(self, tmp_path):
        ...         (tmp_path / "captions.xyz").write_text("a red box")
        ...         return embedcache.open_source(tmp_path / "captions.xyz", kind="my_sources:MySource")
    """

    has_images = True
    has_texts = True

    @pytest.fixture
    def source(self) -> Source:
        """Return a small source in which every image decodes."""
        raise NotImplementedError("override the fixture `source`")

    def test_order_is_deterministic(self, source: Source) -> None:
        assert list(source.samples()) == list(source.samples())

    def test_modalities(self, source: Source) -> None:
        has_images = False
        has_texts = False
        for sample in source.samples():
            has_images |= bool(sample.images)
            has_texts |= bool(sample.texts)
        assert has_images == self.has_images, "set has_images to whether the source has images"
        assert has_texts == self.has_texts, "set has_texts to whether the source has texts"

    def test_columns_hold_scalars(self, source: Source) -> None:
        for sample in source.samples():
            for value in sample.columns.values():
                assert isinstance(value, str | int | float | None)

    def test_keys_are_unique(self, source: Source) -> None:
        keys = [sample.key for sample in source.samples()]
        assert len(set(keys)) == len(keys)

    def test_images_decode(self, source: Source) -> None:
        for sample in source.samples():
            for item in sample.images:
                assert decode_image(source.read(item)).mode == "RGB"

    def test_lengths_are_those_of_the_bytes(self, source: Source) -> None:
        for item in _all_items(source):
            # A source may not know the length of an item before it is read.
            if item.length:
                assert len(source.read(item)) == item.length

    def test_reopens_from_its_description(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reopen it in another folder. Open `source` from a relative path, which would lead elsewhere from there."""
        monkeypatch.chdir("/")

        # A source may come from a file of the user's, which runs only if it is trusted.
        with trust_files():
            reopened = reopen_source(json.loads(json.dumps(source.describe())))

        assert list(reopened.samples()) == list(source.samples())
        assert reopened.describe() == source.describe()
        contents = list(map(source.read, _all_items(source)))
        assert list(map(reopened.read, _all_items(reopened))) == contents

    def test_item_that_cannot_be_read_is_an_item_error(self, source: Source) -> None:
        """A file may be removed after it was indexed. Its row then contains the reason."""
        with pytest.raises(ItemError):
            source.read(FileItem(path="nowhere/there is no such file.png", length=1))

    def test_read_is_thread_safe(self, source: Source) -> None:
        items = _all_items(source)[:8]
        with ThreadPoolExecutor(8) as executor:
            assert list(executor.map(source.read, items * 4)) == list(map(source.read, items)) * 4


def _all_items(source: Source) -> list[FileItem]:
    """Return the images and other files of all samples."""
    items: list[FileItem] = []
    for sample in source.samples():
        items += sample.images
        for files in sample.files.values():
            items += files
    return items
