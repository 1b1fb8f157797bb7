"""IDX files, the format of MNIST: a file of all images of a set, and a file of its labels, plain or gzipped."""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Array
from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import open_path
from embedcache.sources.base import FileItem, Sample
from embedcache.sources.files import IDX_IMAGES, file_size, is_folder, read_bytes, walk_files, wrap_io_errors
from embedcache.sources.settings import SourceSettings

_GZIP = ".gz"
_SPLITS = {"train": "train", "t10k": "test", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_UNSIGNED_BYTES = 8  # data type code of the IDX format


class IdxSource:
    """One sample per image; the key is `<set>/<row>`, such as `train/00000` or `t10k/09999`.

    A set is named by the part of a file name before `-images-idx3-ubyte`; `<set>-labels-idx1-ubyte` is beside it.
    The column `label` is the class number from that file; `split` is `train`, `test` (also for `t10k`) or `val` if the
    name of the set ends in one. If a file exists plain and gzipped, the plain one is read.

    The location is a folder with such files, at any depth, or one file of images, which is that set alone.

    Memory: each set is read completely, once per process, and stays in memory: 47 MB for MNIST's 60,000 images.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("idx")
        self._location = open_path(location).absolute()
        is_file = not is_folder(self._location, frozenset({_GZIP}))
        self._root = self._location.parent if is_file else self._location
        self._sets = _set_of_file(self._location) if is_file else _find_sets(self._root)
        self._images: dict[str, Array] = {}
        self._lock = Lock()

    def describe(self) -> Mapping[str, Any]:
        return {"type": "idx", "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images, set by set. Memory holds all images and the labels of one set."""
        for name, path in self._sets.items():
            images_NHW = self._open(path)
            labels_N = _read(_labels_file(self._root / path), num_dimensions=1)
            if len(labels_N) != len(images_NHW):
                raise SourceError(
                    f"{self._root / path}: expected one label per image, got {len(images_NHW):,} images and "
                    f"{len(labels_N):,} labels; download both files again"
                )
            split = _SPLITS.get(name.replace("/", "-").rpartition("-")[2])
            columns = {"split": split} if split else {}
            width = max(5, len(str(len(labels_N) - 1)))
            for row, label in enumerate(labels_N.tolist()):
                image = FileItem(path=path, offset=row)
                yield Sample(key=f"{name}/{row:0{width}}", images=(image,), columns={**columns, "label": label})

    def read(self, item: FileItem) -> bytes:
        """Return one image as an uncompressed gray PNG, whose bytes are the same on every machine."""
        try:
            images_NHW = self._open(item.path)
        except (SourceError, PathError) as error:
            raise ItemError(str(error)) from None
        if not 0 <= item.offset < len(images_NHW):
            raise ItemError(f"{item.path}: expected an image below {len(images_NHW):,}, got {item.offset}")
        out = io.BytesIO()
        Image.fromarray(images_NHW[item.offset]).save(out, "PNG", compress_level=0)
        return out.getvalue()

    def _open(self, path: str) -> Array:
        with self._lock:
            if path not in self._images:
                self._images[path] = _read(self._root / path, num_dimensions=3)
            return self._images[path]


def _find_sets(root: Path) -> dict[str, str]:
    """Return name of the set -> path relative to the folder of its file of images."""
    sets: dict[str, str] = {}
    for path, _ in walk_files(root):  # sorted, so that a plain file comes before its gzipped copy
        match = IDX_IMAGES.fullmatch(path)
        if match:
            sets.setdefault(match["set"], path)
    if not sets:
        raise SourceError(f"{root}: expected a file such as train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
    return sets


def _set_of_file(file: Path) -> dict[str, str]:
    if file_size(file) is None:
        raise PathError(f"expected a file or folder, got {file}, which does not exist; check the path")
    match = IDX_IMAGES.fullmatch(file.name)
    if match is None:
        raise SourceError(f"{file}: expected a file name such as t10k-images-idx3-ubyte.gz")
    return {match["set"]: file.name}


def _labels_file(images: Path) -> Path:
    plain = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(_GZIP)
    for name in (plain, plain + _GZIP):
        if file_size(images.with_name(name)) is not None:
            return images.with_name(name)
    raise SourceError(f"{images} has no labels: expected {plain} or {plain}{_GZIP} beside it")


def _read(path: Path, *, num_dimensions: int) -> Array:
    """Read an IDX file of unsigned bytes: a header of big-endian numbers, then the values in C order."""
    with wrap_io_errors(path):
        data = read_bytes(path)
    if path.suffix == _GZIP:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{path} is damaged: {error}; copy it again") from None
    header_bytes = 4 + 4 * num_dimensions
    magic = bytes([0, 0, _UNSIGNED_BYTES, num_dimensions])
    if data[:4] != magic or len(data) < header_bytes:
        raise SourceError(
            f"{path} is not an IDX file of unsigned bytes in {num_dimensions} dimensions: expected {magic.hex(' ')} "
            f"and {num_dimensions} lengths, got {data[:4].hex(' ')}"
        )
    shape = struct.unpack_from(f">{num_dimensions}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=header_bytes)
    if len(values) != np.prod(shape, dtype=np.int64) or 0 in shape[1:]:
        sizes = " x ".join(map(str, shape))
        raise SourceError(f"{path} is damaged: expected {sizes} bytes of pixels, got {len(values):,}; copy it again")
    return values.reshape(shape)
