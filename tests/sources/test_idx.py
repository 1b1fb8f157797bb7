import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.arrays import Array
from embedcache.errors import ItemError, PathError, SettingError, SourceError
from embedcache.sources import FileItem, Source, SourceSettings, open_source
from embedcache.sources.images import decode_image
from embedcache.testing.sources import SourceContract
from tests.sources.files import write

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 5), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)


def idx(values: Array) -> bytes:
    """Return an array of bytes as an IDX file."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(folder: Path, *, suffix: str = "") -> Path:
    """Write a set `train` of 5 images and a set `t10k` of 2."""
    pack = gzip.compress if suffix else bytes
    for name, rows in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        write(folder, {f"{name}-images-idx3-ubyte{suffix}": pack(idx(IMAGES[rows]))})
        write(folder, {f"{name}-labels-idx1-ubyte{suffix}": pack(idx(LABELS[rows]))})
    return folder


class TestPlain(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(f"idx:{write_idx(tmp_path)}")


class TestGzipped(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write_idx(tmp_path, suffix=".gz"))


class TestOneFile(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write_idx(tmp_path, suffix=".gz") / "t10k-images-idx3-ubyte.gz")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_keys_splits_and_labels(tmp_path: Path, suffix: str) -> None:
    samples = list(open_source(write_idx(tmp_path, suffix=suffix)).samples())
    keys = ["t10k/00000", "t10k/00001", *(f"train/0000{row}" for row in range(5))]
    assert [sample.key for sample in samples] == keys
    assert [dict(sample.columns) for sample in samples] == [
        *({"split": "test", "label": label} for label in (9, 2)),
        *({"split": "train", "label": label} for label in (3, 1, 4, 1, 5)),
    ]


def test_pixels_are_unchanged(tmp_path: Path) -> None:
    source = open_source(write_idx(tmp_path, suffix=".gz"))
    rows = [5, 6, 0, 1, 2, 3, 4]
    for sample, row in zip(source.samples(), rows, strict=True):
        data = source.read(sample.images[0])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), IMAGES[row])
        assert np.array_equal(np.asarray(decode_image(data))[..., 1], IMAGES[row])


def test_single_file_is_one_set(tmp_path: Path) -> None:
    source = open_source(write_idx(tmp_path) / "train-images-idx3-ubyte")
    assert [sample.key for sample in source.samples()] == [f"train/0000{row}" for row in range(5)]


def test_set_names_with_folders_and_prefixes(tmp_path: Path) -> None:
    write_idx(tmp_path / "raw")
    for kind, dimensions in (("images", 3), ("labels", 1)):
        for split in ("train", "extra"):
            old = tmp_path / "raw" / f"train-{kind}-idx{dimensions}-ubyte"
            write(tmp_path, {f"emnist-{split}-{kind}.idx{dimensions}-ubyte": old.read_bytes()})
    found = {(s.key.rpartition("/")[0], s.columns.get("split")) for s in open_source(tmp_path).samples()}
    assert found == {
        ("emnist-train", "train"), ("emnist-extra", None), ("raw/train", "train"), ("raw/t10k", "test"),
    }  # fmt: skip


def test_gzipped_copy_is_skipped(tmp_path: Path) -> None:
    write_idx(tmp_path)
    write_idx(tmp_path, suffix=".gz")
    assert {s.images[0].path for s in open_source(tmp_path).samples()} == {
        "train-images-idx3-ubyte", "t10k-images-idx3-ubyte",
    }  # fmt: skip


BROKEN = {
    "another file": (b"not IDX at all", "expected 00 00 08 03 and 3 lengths, got 6e 6f 74 20"),
    "empty": (b"", "expected 00 00 08 03 and 3 lengths, got $"),
    "labels": (idx(LABELS), "expected 00 00 08 03 and 3 lengths, got 00 00 08 01"),
    "header cut short": (idx(IMAGES)[:9], "expected 00 00 08 03 and 3 lengths"),
    "cut short": (idx(IMAGES[:5])[:-1], "expected 5 x 6 x 5 bytes of pixels, got 149"),
    "too long": (idx(IMAGES[:5]) + b"x", "expected 5 x 6 x 5 bytes of pixels, got 151"),
    "no pixels": (idx(IMAGES[:5, :0]), "expected 5 x 0 x 5 bytes of pixels"),
    "other count": (idx(IMAGES[:4]), "got 4 images and 5 labels"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_file_raises(tmp_path: Path, case: str, suffix: str) -> None:
    content, message = BROKEN[case]
    name = f"train-images-idx3-ubyte{suffix}"
    write(write_idx(tmp_path, suffix=suffix), {name: gzip.compress(content) if suffix else content})
    with pytest.raises(SourceError, match=f"train-images-idx3-ubyte{suffix}.*{message}"):
        list(open_source(tmp_path).samples())


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_damaged_gzip_raises(tmp_path: Path, keep: int) -> None:
    path = write_idx(tmp_path, suffix=".gz") / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"t10k-images-idx3-ubyte\.gz"):
        list(open_source(tmp_path).samples())


def test_missing_labels_raise(tmp_path: Path) -> None:
    write_idx(tmp_path, suffix=".gz")
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SourceError, match=r"has no labels: expected train-labels-idx1-ubyte or .*\.gz"):
        list(open_source(tmp_path).samples())


def test_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="nowhere"):
        open_source(f"idx:{tmp_path / 'nowhere'}")
    with pytest.raises(SourceError, match="expected a file such as train-images-idx3-ubyte"):
        open_source(f"idx:{tmp_path}")
    with pytest.raises(SourceError, match="expected a file name such as"):
        open_source(f"idx:{write_idx(tmp_path) / 'train-labels-idx1-ubyte'}")
    with pytest.raises(SettingError, match="type idx does not support the setting 'key_column'"):
        open_source(tmp_path, settings=SourceSettings(key_column="x"))


def test_missing_image_raises_item_error(tmp_path: Path) -> None:
    source = open_source(write_idx(tmp_path))
    with pytest.raises(ItemError, match="expected an image below 5, got 5"):
        source.read(FileItem(path="train-images-idx3-ubyte", offset=5))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    again = open_source(tmp_path)
    with pytest.raises(ItemError, match="no such file"):
        again.read(FileItem(path="train-images-idx3-ubyte"))
