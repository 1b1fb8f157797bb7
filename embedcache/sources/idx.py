"""IDX files, MNIST's: all pictures of a set in one file, all labels in another, plain or gzipped."""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Array
from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import open_path
from embedcache.sources.base import ImageItem, Sample
from embedcache.sources.files import IDX_IMAGES, file_size, is_folder, read_bytes, reading, walk_files
from embedcache.sources.settings import SourceSettings

_ZIPPED = ".gz"
_SPLITS = {"train": "train", "t10k": "test", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_BYTES = 8  # the code of an IDX file's type: unsigned bytes


class IdxSource:
    """One sample a picture; `<set>/<row>` is the key, such as `train/00000` or `t10k/09999`.

    A set is the part of a file's name before `-images-idx3-ubyte`; `<set>-labels-idx1-ubyte` lies beside it. The
    column `label` is the number there, and `split` is `train`, `test` (of `t10k`, too) or `val`, where the set's name
    ends in one. Of a file that is there plain and gzipped, the plain one is taken.

    Memory: each set is read whole, once a process, and kept: 47 MB for MNIST's 60,000 pictures.

    Args:
        location: a folder with such files, at any depth, or one file of pictures, which is that set alone.
        settings: none of them is used.

    Raises:
        PathError: there is no such folder or file.
        SourceError: no file is named as those of pictures are.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("idx")
        self._location = open_path(location).absolute()
        is_one = not is_folder(self._location, frozenset({_ZIPPED}))
        self._root = self._location.parent if is_one else self._location
        self._sets = _one_set(self._location) if is_one else _all_sets(self._root)
        self._pictures: dict[str, Array] = {}
        self._lock = Lock()

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "idx", "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through the pictures, set after set by name. Memory holds all pictures and one set's labels."""
        for name, path in self._sets.items():
            pictures_NHW = self._open(path)
            labels_N = _read(self._root / _labels_path(self._root, path), num_dimensions=1)
            if len(labels_N) != len(pictures_NHW):
                raise SourceError(
                    f"{self._root / path} holds {len(pictures_NHW):,} pictures and the file of its labels "
                    f"{len(labels_N):,} labels; copy both again"
                )
            split = _SPLITS.get(name.replace("/", "-").rpartition("-")[2])
            columns = {"split": split} if split else {}
            width = max(5, len(str(len(labels_N) - 1)))
            for row, label in enumerate(labels_N.tolist()):
                image = ImageItem(path=path, offset=row)
                yield Sample(key=f"{name}/{row:0{width}}", images=(image,), columns={**columns, "label": label})

    def read(self, item: ImageItem) -> bytes:
        """Get one picture: the bytes of a gray PNG, the same on every machine, as nothing in it is compressed."""
        try:
            pictures_NHW = self._open(item.path)
        except (SourceError, PathError) as error:
            raise ItemError(str(error)) from None
        if not 0 <= item.offset < len(pictures_NHW):
            raise ItemError(f"{item.path} has no picture {item.offset}, but {len(pictures_NHW):,}")
        out = io.BytesIO()
        Image.fromarray(pictures_NHW[item.offset]).save(out, "PNG", compress_level=0)
        return out.getvalue()

    def _open(self, path: str) -> Array:
        with self._lock:
            if path not in self._pictures:
                self._pictures[path] = _read(self._root / path, num_dimensions=3)
            return self._pictures[path]


def _all_sets(root: Path) -> dict[str, str]:
    """Find the files of pictures below a folder: name of the set -> path below the folder."""
    sets: dict[str, str] = {}
    for path, _ in walk_files(root):  # sorted: a plain file comes before the same one gzipped
        found = IDX_IMAGES.fullmatch(path)
        if found:
            sets.setdefault(found["set"], path)
    if not sets:
        raise SourceError(f"{root} holds no file of pictures such as train-images-idx3-ubyte or the same with .gz")
    return sets


def _one_set(file: Path) -> dict[str, str]:
    if file_size(file) is None:
        raise PathError(f"no such file or folder: {file}")
    found = IDX_IMAGES.fullmatch(file.name)
    if found is None:
        raise SourceError(f"{file} is not named as a file of pictures is, such as t10k-images-idx3-ubyte.gz")
    return {found["set"]: file.name}


def _labels_path(root: Path, path: str) -> str:
    """Find the file of labels beside one of pictures."""
    name = PurePosixPath(path).name.replace("images", "labels").replace("idx3", "idx1")
    plain = str(PurePosixPath(path).with_name(name.removesuffix(_ZIPPED)))
    for candidate in (plain, plain + _ZIPPED):
        if file_size(root / candidate) is not None:
            return candidate
    raise SourceError(f"{root / path} has no labels beside it: {plain} or {plain}{_ZIPPED} is missing")


def _read(path: Path, *, num_dimensions: int) -> Array:
    """Read an IDX file of unsigned bytes: a header of big-endian numbers, and the values in C order.

    Raises:
        PathError: it cannot be read.
        SourceError: it is another kind of file, or damaged.
    """
    data = _unzipped(path)
    header_bytes = 4 + 4 * num_dimensions
    begin = bytes([0, 0, _BYTES, num_dimensions])
    if data[:4] != begin or len(data) < header_bytes:
        raise SourceError(
            f"{path} is no IDX file of bytes in {num_dimensions} dimensions: it begins with {data[:4].hex(' ')}, "
            f"expected {begin.hex(' ')} and {num_dimensions} lengths"
        )
    shape = struct.unpack_from(f">{num_dimensions}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=header_bytes)
    if len(values) != np.prod(shape, dtype=np.int64) or 0 in shape[1:]:
        sizes = " x ".join(map(str, shape))
        raise SourceError(f"{path} is damaged: its header says {sizes} bytes, {len(values):,} follow; copy it again")
    return values.reshape(shape)


def _unzipped(path: Path) -> bytes:
    with reading(path):
        data = read_bytes(path)
    if path.suffix != _ZIPPED:
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is damaged: {error}; copy it again") from None
