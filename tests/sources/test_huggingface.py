from pathlib import Path
from typing import Any

import datasets
import pytest

from embedcache.errors import ItemError, SourceError
from embedcache.extract.extract import extract
from embedcache.sources import FileItem, Source, SourceSettings, TextItem, open_source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.testing.sources import SourceContract
from tests.sources.files import COLORS, jpeg, noise, reopen, write
from tests.toy import IMAGE, TEXT

IMAGES = [jpeg(color) for color in COLORS]


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def dataset(**columns: object) -> Any:
    """Return a dataset in memory; `image` holds images, `label` class labels."""
    known = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    made = datasets.Dataset.from_dict(columns)
    for name in columns:
        made = made.cast_column(name, known[name]) if name in known else made
    return made


def colored(start: int = 0, stop: int = 5) -> Any:
    """Return a dataset of images with two captions each."""
    captions = [[color, f"all {color}"] for color in COLORS]
    return dataset(image=IMAGES, sentences=captions, label=[0, 1, 0, -1, 0]).select(range(start, stop))


def saved(folder: Path, given: Any) -> Path:
    given.save_to_disk(folder / "saved")
    return folder / "saved"


class TestSavedDatasetDict(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(saved(tmp_path, datasets.DatasetDict(train=colored(0, 3), test=colored(3))))


class TestSavedWithSettings(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        given = colored().rename_columns({"image": "photo", "sentences": "said"}).add_column("n", list("abcde"))
        settings = SourceSettings(item_columns={"image": "photo"}, caption_columns=("said",), key_column="n")
        return open_source(saved(tmp_path, given), settings=settings)


def test_splits_labels_keys_and_rows(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, datasets.DatasetDict(train=colored(0, 2), test=colored(3))))
    first, _, third, _ = source.samples()
    assert (first.key, third.key) == ("train/0", "test/0")
    assert first.columns == {"split": "train", "label": "cat"}
    assert third.columns == {"split": "test", "label": None}
    assert third.images == (FileItem(path="test#image", offset=0),)
    assert third.texts == (TextItem(text="black"), TextItem(text="all black"))


def test_memory_dataset_extracts_but_never_reopens(tmp_path: Path) -> None:
    source = open_source(colored().shuffle(seed=1))
    for _ in range(2):
        extract(source, tmp_path / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
    assert Cache(tmp_path / "cache").info.num_items == {"image": 5, "text": 10}
    with pytest.raises(SourceError, match=r"in memory \([0-9a-f]+\).*open_source\(dataset\).*save_to_disk"):
        reopen(Cache(tmp_path / "cache").info.source)


def test_stored_images_are_read_undecoded(tmp_path: Path) -> None:
    write(tmp_path, {"x.jpg": IMAGES[0]})
    image = noise()
    source = open_source(dataset(image=[image, str(tmp_path / "x.jpg"), b"no image"]))
    items = [sample.images[0] for sample in source.samples()]
    assert decode_image(source.read(items[0])).tobytes() == image.tobytes()
    assert [source.read(item) for item in items[1:]] == [IMAGES[0], b"no image"]


def test_image_column_is_found_by_feature() -> None:
    given = dataset(file_name=["nowhere.jpg"], image=[IMAGES[1]], caption=["x"]).rename_column("image", "img")
    source = open_source(given)
    (sample,) = source.samples()
    assert source.read(sample.images[0]) == IMAGES[1]
    assert sample.columns == {"file_name": "nowhere.jpg"}


def test_unreadable_image_raises_item_error() -> None:
    source = open_source(dataset(image=[None, "/nowhere/x.jpg"]))
    empty, gone = (sample.images[0] for sample in source.samples())
    for item, words in (
        (empty, "no item in column image: row 0 of"),
        (gone, "no such file"),
        (FileItem(path="#image", offset=2), "no item in row 2"),
        (FileItem(path="test#image"), "of 'test#image'"),
    ):
        with pytest.raises(ItemError, match=words):
            source.read(item)


def test_iterable_dataset_raises() -> None:
    with pytest.raises(SourceError, match=r"Dataset or DatasetDict.*IterableDataset"):
        open_source(colored().to_iterable_dataset())


def test_rows_after_select(tmp_path: Path) -> None:
    source = open_source(colored().select([4, 0]))
    samples = list(source.samples())
    assert [sample.texts[0].text for sample in samples] == ["white", "red"]
    assert [source.read(sample.images[0]) for sample in samples] == [IMAGES[4], IMAGES[0]]
