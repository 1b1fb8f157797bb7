"""What every source must do; each kind subclasses this and gives a good source of its kind."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedcache.sources import ImageItem, Source, reopen_source
from embedcache.sources.images import decode_image


class SourceContract:
    has_images = True
    has_texts = True

    @pytest.fixture
    def source(self) -> Source:
        """Give a small source in which every image is good."""
        raise NotImplementedError

    def test_the_order_is_the_same_twice(self, source: Source) -> None:
        assert list(source.samples()) == list(source.samples())

    def test_it_has_captions_and_the_images_it_should(self, source: Source) -> None:
        samples = list(source.samples())
        assert any(sample.images for sample in samples) == self.has_images
        assert any(sample.texts for sample in samples) == self.has_texts

    def test_keys_are_unique(self, source: Source) -> None:
        keys = [sample.key for sample in source.samples()]
        assert len(set(keys)) == len(keys)

    def test_every_image_decodes(self, source: Source) -> None:
        for item in _items(source):
            assert decode_image(source.read(item)).mode == "RGB"

    def test_its_description_survives_json_and_reopens_it(self, source: Source) -> None:
        again = reopen_source(json.loads(json.dumps(source.describe())))
        assert list(again.samples()) == list(source.samples())
        assert again.describe() == source.describe()
        assert [again.read(item) for item in _items(again)] == [source.read(item) for item in _items(source)]

    def test_eight_threads_read_what_one_does(self, source: Source) -> None:
        items = _items(source) * 8
        with ThreadPoolExecutor(8) as executor:
            assert list(executor.map(source.read, items)) == [source.read(item) for item in items]


def _items(source: Source) -> list[ImageItem]:
    return [item for sample in source.samples() for item in sample.images]
