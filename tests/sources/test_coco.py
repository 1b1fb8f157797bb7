import json
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import SourceError
from embedcache.sources import FileItem, Source, SourceSettings, open_source
from embedcache.testing.sources import SourceContract
from tests.sources.files import COLORS, jpeg, write

IMAGES = [
    {"id": 100 + n, "file_name": f"00000000{n}.jpg", "license": n % 2, "width": 20, "height": 10} for n in range(5)
]
ANNOTATIONS = [
    {"id": 10 * n + k, "image_id": 100 + n, "caption": f"A {COLORS[n]} image, {k}.\n"} for k in (0, 1) for n in range(4)
]
COCO = {"info": {"year": 2017}, "images": IMAGES, "annotations": ANNOTATIONS}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "imgid": n,
            "split": split,
            "sentids": [n],
            "sentences": [{"tokens": ["a"], "raw": f"A {COLORS[n]} image.", "imgid": n, "sentid": n}],
        }
        for n, split in enumerate(["train", "restval", "val", "test", "test"])
    ],
}


def write_coco(folder: Path, fields: object = COCO) -> Path:
    """Write COCO as it is unpacked: `annotations` beside the folder of its images."""
    write(folder / "val2017", {f"00000000{n}.jpg": jpeg(color) for n, color in enumerate(COLORS)})
    write(folder, {"annotations/captions_val2017.json": json.dumps(fields)})
    return folder / "annotations/captions_val2017.json"


def write_karpathy(folder: Path) -> Path:
    write(folder / "val2014", {f"{n}.jpg": jpeg(color) for n, color in enumerate(COLORS)})
    write(folder, {"dataset_coco.json": json.dumps(KARPATHY)})
    return folder / "dataset_coco.json"


class TestCoco(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write_coco(tmp_path))


class TestKarpathy(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write_karpathy(tmp_path))


def test_coco_samples_have_all_captions_and_columns(tmp_path: Path) -> None:
    samples = list(open_source(write_coco(tmp_path)).samples())
    assert [sample.key for sample in samples] == [f"00000000{n}" for n in range(5)]
    assert samples[1].images == (FileItem(path="000000001.jpg"),)
    assert [text.text for text in samples[1].texts] == ["A green image, 0.", "A green image, 1."]
    assert samples[4].texts == ()
    assert samples[1].columns == {"license": 1, "width": 20, "height": 10, "image_id": 101}


def test_name_of_an_image_may_be_spelled_as_by_karpathy(tmp_path: Path) -> None:
    images = [{"id": 100, "filename": "000000000.jpg"}, *IMAGES[1:]]
    first, *_ = open_source(write_coco(tmp_path, changed(images=images))).samples()
    assert (first.key, len(first.texts), first.columns) == ("000000000", 2, {"image_id": 100})


def test_karpathy_samples_have_the_parts_that_others_train_on(tmp_path: Path) -> None:
    samples = list(open_source(write_karpathy(tmp_path)).samples())
    assert [sample.key for sample in samples] == [f"val2014/{n}" for n in range(5)]
    assert [sample.columns["split"] for sample in samples] == ["train", "train", "val", "test", "test"]
    assert samples[1].columns == {"imgid": 1, "split": "train"}
    assert [text.text for text in samples[2].texts] == ["A blue image."]


@pytest.mark.parametrize("folder", ["annotations/val2017", "images/val2017", "annotations", "elsewhere"])
def test_images_are_found(tmp_path: Path, folder: str) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "moved")
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    if folder == "annotations":
        path = path.rename(tmp_path / "moved/captions.json")
        folder = "moved"
    else:
        (tmp_path / "moved").rename(tmp_path / folder)
    settings = SourceSettings(root=str(tmp_path / folder)) if folder == "elsewhere" else SourceSettings()
    source = open_source(path, settings=settings)
    assert source.describe()["settings"] == {"root": str(tmp_path / folder)}
    assert len(source.read(next(iter(source.samples())).images[0])) > 100


def test_missing_images_raise(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="--root"):
        list(open_source(path).samples())


def changed(**fields: Any) -> dict[str, Any]:
    return {**COCO, **fields}


ONE = {"file_name": "000000000.jpg"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ([1], "object"),
        ({"annotations": []}, "images"),
        ({"images": IMAGES}, "annotations"),
        (changed(annotations=[{"id": 1, "image_id": 100, "bbox": [0, 0, 1, 1]}]), "caption"),
        (changed(annotations=[{"image_id": [100], "caption": "a"}]), "image_id"),
        (changed(images=[{"id": 1}]), "file_name"),
        (changed(images=[ONE]), "expected id"),
        (changed(images=[IMAGES[0], IMAGES[0]]), "twice"),
        (changed(images=IMAGES[:3]), "103"),
        ({"images": [{**ONE, "sentences": ["a"]}]}, "sentences"),
        ({"images": [{**ONE, "sentences": [{"raw": 1}]}]}, "raw"),
    ],
)
def test_invalid_file_raises(tmp_path: Path, fields: Any, word: str) -> None:
    with pytest.raises(SourceError, match=word):
        list(open_source(write_coco(tmp_path, fields)).samples())
