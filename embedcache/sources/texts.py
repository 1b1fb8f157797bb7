"""Texts without images, such as prompts and class names: a `.txt` with a text a line, or a `.npy` of strings.

Another source with one caption a sample, so that captions can be chosen one by one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import is_remote, open_path
from embedcache.sources.base import ImageItem, Sample, Source
from embedcache.sources.captions import text_items
from embedcache.sources.files import TEXT_SUFFIXES, file_size, has_suffix
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import damage_named

_BATCH_ROWS = 1024
_SAVE = "save the texts with numpy.save(path, numpy.array(texts, dtype=str))"


class TextsSource:
    """One sample a text, in the order of the file; `<name of the file without suffix>/<row>` is the key.

    A blank line of a `.txt` is an empty caption, so that rows stay those of the file; spaces around a text are taken
    off. A `.npy` holds a one-dimensional array of strings, or of bytes that are UTF-8, and is memory-mapped.

    Args:
        location: the file.
        settings: none of them is used.

    Raises:
        PathError: there is no such file.
        SourceError: the file is neither a `.txt` nor a `.npy`.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("texts")
        self._path = open_path(location).absolute()
        if file_size(self._path) is None:
            raise PathError(f"no such file: {self._path}")
        if not has_suffix(location, TEXT_SUFFIXES):
            raise SourceError(f"{self._path} is no list of texts; it must be {' or '.join(sorted(TEXT_SUFFIXES))}")

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "texts", "path": str(self._path), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through the texts. Memory holds one line, or a batch of an array."""
        is_array = self._path.suffix.lower() == ".npy"
        with damage_named(self._path):
            for row, text in enumerate(_array_texts(self._path) if is_array else _lines(self._path)):
                yield Sample(key=f"{self._path.stem}/{row}", texts=text_items([text], None))

    def read(self, item: ImageItem) -> bytes:
        """Refuse: there is no image."""
        raise ItemError(f"{self._path} holds texts, no image such as {item.path}")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from lines


def _array_texts(path: Path) -> Iterator[str]:
    texts_N = _open_array(path)
    for start in range(0, len(texts_N), _BATCH_ROWS):
        for text in texts_N[start : start + _BATCH_ROWS].tolist():
            yield text.decode() if isinstance(text, bytes) else text


def _open_array(path: Path) -> npt.NDArray[Any]:
    """Map a .npy file.

    Raises:
        SourceError: it is damaged, or is no one-dimensional array of strings.
    """
    try:
        texts_N: npt.NDArray[Any] = (
            np.lib.format.read_array(BytesIO(path.read_bytes()), allow_pickle=False)
            if is_remote(path)
            else np.lib.format.open_memmap(path, mode="r")
        )
    except ValueError as error:
        is_pickle = "Python objects" in str(error) or "Object arrays" in str(error)
        reason = "objects in it are a pickle, which may run code" if is_pickle else f"it is damaged: {error}"
        raise SourceError(f"{path} cannot be read: {reason}; {_SAVE}") from None
    if texts_N.dtype.kind not in "US" or texts_N.ndim != 1:
        raise SourceError(
            f"{path} holds {texts_N.dtype} of shape {texts_N.shape}; expected strings of shape (N,); {_SAVE}"
        )
    return texts_N


class PairsSource:
    """The samples of another source, a sample for each caption with all of the images.

    The key is that of the sample, `#` and the caption's number from 0; the column `sample` keeps the former, `language`
    is the caption's. A sample without a caption is left out. Each of its images is encoded once a caption.

    Args:
        location: of the other source, as for `open_source`: `photos/`, `openmoji:en+de`.
        settings: those of the other source.

    Raises:
        SourceError: the other source is of the same kind.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        from embedcache.sources.open import open_source  # which imports this

        if location.startswith("pairs:"):
            raise SourceError(f"{location} has one caption a sample already; leave one pairs: out")
        self._source: Source = open_source(location, settings=settings)

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        said = self._source.describe()
        return {**said, "type": "pairs", "path": f"{said['type']}:{said['path']}"}

    def samples(self) -> Iterator[Sample]:
        """Go through the captions, in the order of the samples."""
        for sample in self._source.samples():
            for number, text in enumerate(sample.texts):
                columns = {**sample.columns, "sample": sample.key, "language": text.language}
                yield replace(sample, key=f"{sample.key}#{number}", texts=(text,), columns=columns)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image."""
        return self._source.read(item)
