"""Vectors of other tools by the name of their format: files to import, and exports of a cache."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.encoders.base import Modality
from embedcache.errors import SettingError, pluralize
from embedcache.files import AnyPath
from embedcache.interop.clip_retrieval import open_clip_retrieval, write_clip_retrieval
from embedcache.interop.exporting import IMAGES_AND_TEXTS, MODALITY_NAMES, VectorExport
from embedcache.interop.npy import open_datacomp, open_npy_vectors, write_npy
from embedcache.interop.parquet import open_parquet_vectors, write_parquet
from embedcache.interop.settings import VectorExportSettings
from embedcache.interop.vector_files import VectorImport
from embedcache.progress import AnyProgress, to_progress
from embedcache.registry import unknown_name
from embedcache.settings import merge_settings

_OPENERS: Mapping[str, tuple[Callable[..., VectorImport], tuple[str, ...]]] = {
    "clip-retrieval": (open_clip_retrieval, ("path",)),
    "datacomp": (open_datacomp, ("path", "arrays")),
    "npy": (open_npy_vectors, ("files", "table")),
    "parquet": (open_parquet_vectors, ("path", "vector_columns")),
}
_PATHS = ("path", "table")
_BY_MODALITY = ("arrays", "files", "vector_columns")
_WRITERS: Mapping[str, tuple[Callable[..., int], Sequence[Modality]]] = {
    "clip-retrieval": (write_clip_retrieval, IMAGES_AND_TEXTS),
    "npy": (write_npy, MODALITY_NAMES),
    "parquet": (write_parquet, MODALITY_NAMES),
}
"""Name of a format -> what writes it, and the modalities that it has."""


def open_vectors(format_name: str, path: AnyPath | None = None, **options: Any) -> VectorImport:
    """Open vectors that another tool computed, to be imported by `import_vectors`.

    Args:
        format_name: `clip-retrieval`, `datacomp`, `npy` or `parquet`.
        path: the folder or file; `npy` has none.
        options: `arrays` of `datacomp` (modality -> array or arrays), `files` (modality -> file) and `table` of `npy`,
            and `vector_columns` (modality -> column or columns) of `parquet`.

    Raises:
        UnknownNameError: there is no such format, option, column or array.
        SettingError: nothing to read is named.
        PathError: a file does not exist.
        DataError: files that belong together differ in their rows, width or dtype.
        CorruptError: a file is damaged.
    """
    if format_name not in _OPENERS:
        raise unknown_name("import format", format_name, _OPENERS)
    opener, names = _OPENERS[format_name]
    given = {name: value for name, value in {"path": path, **options}.items() if value is not None}
    for name in given:
        if name not in names:
            raise unknown_name("argument", name, names, where=f"of the import format {format_name}")
    for name, value in given.items():
        if name in _BY_MODALITY and not _is_by_modality(value):
            raise SettingError(f"{name}: expected modality -> name, such as {{'audio': 'clap'}}, got {value!r}")
    if "path" in names and path is None:
        raise SettingError(f"path: expected a folder or file of the format {format_name}, got none")
    return opener(**{name: Path(value) if name in _PATHS else value for name, value in given.items()})


def _is_by_modality(value: Any) -> bool:
    kinds = (str, os.PathLike, list, tuple)
    return isinstance(value, Mapping) and all(isinstance(name, kinds) for name in value.values())


@dataclass(frozen=True, kw_only=True)
class VectorExportReport:
    """Result of an export of vectors.

    Args:
        num_rows: number of rows, one per sample.
        left_out: what of the cache the rows do not hold, in a few words; empty if nothing.
    """

    path: Path
    num_rows: int
    left_out: str

    def line(self) -> str:
        """Return a summary in one line."""
        return f"{self.path}: {pluralize(self.num_rows, 'row')}" + (
            f"; left out: {self.left_out}" if self.left_out else ""
        )


def export_vectors(
    format_name: str,
    cache: AnyPath,
    out: AnyPath,
    settings: VectorExportSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> VectorExportReport:
    """Write the vectors of a cache, with keys, captions and columns, for another tool; whole or not at all.

    A row is a sample that has a vector of each exported modality, that of its first item. Memory: a block of vectors,
    and blocks of the tables.

    Args:
        format_name: `clip-retrieval`, `npy` or `parquet`.
        cache: path or URL of the cache.
        out: a new `.parquet` file for `parquet`, else a new folder.
        settings: features, run, selection.
        progress: progress in vectors.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        UnknownNameError: there is no such format, feature or language.
        SettingError: a modality that the format does not have.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the run was trained on other features.
        DataError: no sample has all requested vectors.
        PathError: the file or folder exists.
    """
    if format_name not in _WRITERS:
        raise unknown_name("export format", format_name, _WRITERS)
    write, allowed = _WRITERS[format_name]
    out = Path(out)
    export = VectorExport(cache, merge_settings(VectorExportSettings, settings, options), allowed=allowed)
    num_rows = write(export, out, progress=to_progress(progress))
    return VectorExportReport(path=out, num_rows=num_rows, left_out=export.left_out)
