"""Texts without images, and samples split into one per caption."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import ItemError, SourceError
from embedcache.files import TEXT_ENCODING, check_regular, is_remote, open_path, reading
from embedcache.sources.base import FileItem, Sample, Source
from embedcache.sources.captions import to_text_items
from embedcache.sources.files import TEXT_SUFFIXES, has_suffix, require_file
from embedcache.sources.open import open_source
from embedcache.sources.settings import SourceSettings

_BATCH_ROWS = 1024
_HINT = "save the texts with numpy.save(path, numpy.array(texts, dtype=str))"


class TextsSource:
    """One sample per text, in the order of the file; the key is `<name of the file without suffix>/<row>`.

    A `.txt` holds one text per line; a blank line is an empty caption, so that row numbers are line numbers, and spaces
    around a text are stripped. A `.npy` holds a one-dimensional array of strings, or of UTF-8 bytes; it is
    memory-mapped.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("texts", hint=f"; if the file is a table: table:{location}")
        self._path = open_path(location).absolute()
        require_file(self._path)
        if not has_suffix(location, TEXT_SUFFIXES):
            raise SourceError(f"{self._path}: expected a file of texts, {' or '.join(sorted(TEXT_SUFFIXES))}")

    def describe(self) -> Mapping[str, Any]:
        return {"type": "texts", "path": str(self._path), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the texts. Memory holds one line, or one batch of an array."""
        with reading(self._path, "save it again as UTF-8 or NumPy", damage_class=SourceError):
            for row, text in enumerate(_texts(self._path)):
                yield Sample(key=f"{self._path.stem}/{row}", texts=to_text_items([text], None))

    def read(self, item: FileItem) -> bytes:
        raise ItemError(f"{self._path} holds texts, no image such as {item.path}")


def _texts(path: Path) -> Iterator[str]:
    check_regular(path)
    if path.suffix.lower() != ".npy":
        with path.open(encoding=TEXT_ENCODING) as lines:
            yield from lines
        return
    texts_N = _open_array(path)
    for start in range(0, len(texts_N), _BATCH_ROWS):
        for text in texts_N[start : start + _BATCH_ROWS].tolist():
            yield text.decode() if isinstance(text, bytes) else text


def _open_array(path: Path) -> npt.NDArray[Any]:
    """Open a one-dimensional array of strings, memory-mapped if local."""
    try:
        texts_N: npt.NDArray[Any] = (
            np.lib.format.read_array(BytesIO(path.read_bytes()), allow_pickle=False)
            if is_remote(path)
            else np.lib.format.open_memmap(path, mode="r")
        )
    except ValueError as error:
        is_pickle = "Python objects" in str(error) or "Object arrays" in str(error)
        reason = "it holds pickled objects, which may run code" if is_pickle else f"it is damaged: {error}"
        raise SourceError(f"{path} cannot be read: {reason}; {_HINT}") from None
    if texts_N.dtype.kind not in "US" or texts_N.ndim != 1:
        raise SourceError(
            f"{path}: expected strings of shape (N,), got {texts_N.dtype} of shape {texts_N.shape}; {_HINT}"
        )
    return texts_N


class PairsSource:
    """Samples of another source, split into one sample per caption, so that captions can be selected individually.

    The key is the key of the original sample, `#` and the number of the caption from 0; the column `sample` holds the
    original key and `language` the language of the caption. Samples without captions are skipped. Each sample keeps all
    images of the original, so an image is encoded once per caption. Location and settings are those of that source.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        if location.startswith("pairs:"):
            raise SourceError(f"{location} already has one caption per sample; remove one 'pairs:'")
        self._source: Source = open_source(location, settings=settings)

    def describe(self) -> Mapping[str, Any]:
        inner = self._source.describe()
        return {**inner, "type": "pairs", "path": f"{inner['type']}:{inner['path']}"}

    @property
    def skipped(self) -> Mapping[str, int]:
        """Return the count per kind of file that the other source left out."""
        return getattr(self._source, "skipped", {})

    def samples(self) -> Iterator[Sample]:
        for sample in self._source.samples():
            for number, text in enumerate(sample.texts):
                columns = {**sample.columns, "sample": sample.key, "language": text.language}
                yield replace(sample, key=f"{sample.key}#{number}", texts=(text,), columns=columns)

    def read(self, item: FileItem) -> bytes:
        return self._source.read(item)
