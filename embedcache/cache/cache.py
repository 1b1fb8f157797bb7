"""Opening a cache: its tables, and its features by the names people give them."""

from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.cache.feature import Feature
from embedcache.cache.group import EncoderGroup, open_group
from embedcache.cache.layout import CacheInfo, items_path, read_info, samples_path
from embedcache.cache.tables import open_table, read_table, table_errors
from embedcache.errors import UnknownNameError
from embedcache.paths import open_path
from embedcache.registry import unknown_name
from embedcache.sources.reading import reading


class Cache:
    """One dataset's samples and features, read-only.

    Args:
        path: the cache's folder.

    Raises:
        PathError: the folder is no cache.
        ArtifactError: it is of a later format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = open_path(path)
        with reading(self.path):
            self.info: CacheInfo = read_info(self.path)
        # Parsing a footer takes longer than reading a chunk's rows.
        self._footers: dict[tuple[str, int, float], pq.FileMetaData] = {}

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns of `samples`, without reading it."""
        path = samples_path(self.path)
        with table_errors(path), open_table(path) as table:
            return list(table.schema_arrow.names)

    @cached_property
    def samples(self) -> pa.Table:
        """One row a sample, in row order: `key`, and the source's columns.

        A process killed while it added samples leaves longer tables than `cache.json` counts; only what it counts is
        there.
        """
        with table_errors(samples_path(self.path)):
            return read_table(samples_path(self.path)).slice(0, self.info.num_samples)

    def items(self, modality: str, *, chunk: int | None = None) -> pa.Table:
        """Get one row an item, in row order.

        Args:
            modality: `image` (sample, path, offset, length) or `text` (sample, text, language).
            chunk: only the rows of one chunk; None is all of them.
        """
        path = items_path(self.path, modality)
        with table_errors(path):
            if chunk is None:
                return read_table(path).slice(0, self.info.num_items.get(modality, 0))
            rows = self.info.chunk_rows(modality, chunk)
            status = path.stat()
            stamp = (modality, status.st_size, status.st_mtime)  # another process may add samples at any time
            with open_table(path, self._footers.get(stamp)) as file:
                self._footers = {stamp: file.metadata}
                return file.read_row_group(chunk, use_threads=False).slice(0, rows.stop - rows.start)

    def encoders(self, modality: str) -> list[EncoderGroup]:
        """Get the encoders that have features of a modality, by name."""
        found = sorted((self.path / modality).glob("*/zarr.json"))
        return [open_group(self.path, modality, path.parent.name, self.info) for path in found]

    def features(self, modality: str) -> list[Feature]:
        """Get all features of a modality, complete or not, by name."""
        return [Feature(group, name) for group in self.encoders(modality) for name in group.features]

    def feature(self, modality: str, name: str | None = None) -> Feature:
        """Find a feature by name.

        Args:
            modality: `image` or `text`.
            name: `encoder/feature`; the encoder alone where it has one feature; None where the modality has one.

        Raises:
            UnknownNameError: no feature is named so, or the name fits several; all that exist are listed.
        """
        features = self.features(modality)
        kind = f"{modality} feature of {self.path}"
        matches = [feature for feature in features if name in (None, feature.name, feature.group.name)]
        if len(matches) == 1:
            return matches[0]
        names = [feature.name for feature in features]
        if not features:
            raise UnknownNameError(
                f"{self.path} has no {modality} features; add some: embedcache extract --{modality} ENCODER"
            )
        if not matches:
            raise unknown_name(kind, name or "", names)
        raise UnknownNameError(
            f"{kind}: {'none named' if name is None else repr(name) + ' fits several'}; "
            f"choose one with --{modality}: {', '.join(feature.name for feature in matches)}"
        )
