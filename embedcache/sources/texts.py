"""Texts without images, one per line of a file."""

from collections.abc import Iterator, Mapping
from typing import Any

from embedcache.errors import ItemError, SourceError
from embedcache.files import TEXT_ENCODING, check_regular, open_path, reading
from embedcache.samples import FileItem, Sample
from embedcache.sources.captions import to_text_items
from embedcache.sources.files import TEXT_SUFFIXES, has_suffix, require_file
from embedcache.sources.settings import SourceSettings


class TextsSource:
    """One sample per line of a `.txt`, in the order of the file; the key is `<name of the file without suffix>/<row>`.

    A blank line is an empty caption, so that row numbers are line numbers, and spaces around a text are stripped.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("texts", hint=f"; if the file is a table: table:{location}")
        self._path = open_path(location).absolute()
        require_file(self._path)
        if not has_suffix(location, TEXT_SUFFIXES):
            raise SourceError(f"{self._path}: expected a file of texts, .txt; save an array as a column of a .parquet")

    def describe(self) -> Mapping[str, Any]:
        return {"type": "texts", "path": str(self._path), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the texts. Memory holds one line."""
        with reading(self._path, "save it again as UTF-8", damage_class=SourceError):
            check_regular(self._path)
            with self._path.open(encoding=TEXT_ENCODING) as lines:
                for row, text in enumerate(lines):
                    yield Sample(key=f"{self._path.stem}/{row}", texts=to_text_items([text], None))

    def read(self, item: FileItem) -> bytes:
        raise ItemError(f"{self._path} holds texts, no image such as {item.path}")
