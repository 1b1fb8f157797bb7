"""Vectors of other tools by the name of their format: files to import, and exports of a cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from embedcache.encoders.base import Modality
from embedcache.errors import pluralize
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

if TYPE_CHECKING:
    from embedcache.options import VectorExportOptions

_OPENERS: Mapping[str, Callable[..., VectorImport]] = {
    "clip-retrieval": open_clip_retrieval,
    "datacomp": open_datacomp,
    "npy": open_npy_vectors,
    "parquet": open_parquet_vectors,
}
_WRITERS: Mapping[str, tuple[Callable[..., int], Sequence[Modality]]] = {
    "clip-retrieval": (write_clip_retrieval, IMAGES_AND_TEXTS),
    "npy": (write_npy, MODALITY_NAMES),
    "parquet": (write_parquet, MODALITY_NAMES),
}
"""Name of a format -> what writes it, and the modalities that it has."""


def open_vectors(
    format_name: str,
    path: AnyPath | None = None,
    *,
    arrays: Mapping[str, str | Sequence[str]] | None = None,
    files: Mapping[str, AnyPath] | None = None,
    table: AnyPath | None = None,
    vector_columns: Mapping[str, str | Sequence[str]] | None = None,
) -> VectorImport:
    """Open vectors that another tool computed, to be imported by `import_vectors`.

    Args:
        format_name: `clip-retrieval`, `datacomp`, `npy` or `parquet`.
        path: the folder or file; `npy` has none.
        arrays: modality -> array or arrays, of `datacomp`.
        files: modality -> file, of `npy`.
        table: table of the rows, of `npy`.
        vector_columns: modality -> column or columns, of `parquet`.

    Raises:
        UnknownNameError: there is no such format, column or array.
        SettingError: nothing to read is named.
        PathError: a file does not exist.
        DataError: files that belong together differ in their rows, width or dtype.
        CorruptError: a file is damaged.
    """
    if format_name not in _OPENERS:
        raise unknown_name("import format", format_name, _OPENERS)
    paths = [] if path is None else [Path(path)]
    options = {"arrays": arrays, "files": files, "table": table, "vector_columns": vector_columns}
    return _OPENERS[format_name](*paths, **{name: value for name, value in options.items() if value is not None})


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
    **options: Unpack["VectorExportOptions"],
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
