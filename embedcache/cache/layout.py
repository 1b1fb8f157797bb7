"""Where things lie in a cache, and what `cache.json` says. The page docs/formats.md describes every byte."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.artifact import fields_of, read_manifest, write_json

FORMAT_VERSION = 1
DEFAULT_CHUNK_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The content of `cache.json`.

    Args:
        chunk_size: items in a chunk; the last chunk of a modality may hold fewer.
        source: what reopens the source.
        spine: digest of all samples and items in row order: the identity of the rows.
        num_samples: rows of `samples.parquet`.
        num_items: rows of each modality's `items.parquet`; a modality without items is absent.
        format: version of the format on disk.
    """

    chunk_size: int
    source: Mapping[str, Any]
    spine: str
    num_samples: int
    num_items: Mapping[str, int]
    format: int = FORMAT_VERSION

    def num_chunks(self, modality: str) -> int:
        """Count the chunks of a modality."""
        return -(-self.num_items.get(modality, 0) // self.chunk_size)

    def chunk_rows(self, modality: str, chunk: int) -> slice:
        """Get the rows of one chunk."""
        start = chunk * self.chunk_size
        return slice(start, min(start + self.chunk_size, self.num_items[modality]))


def info_path(cache_path: Path) -> Path:
    """Get the file whose presence says that the spine is complete."""
    return cache_path / "cache.json"


def samples_path(cache_path: Path) -> Path:
    """Get the table of samples."""
    return cache_path / "samples.parquet"


def items_path(cache_path: Path, modality: str) -> Path:
    """Get the table of one modality's items."""
    return cache_path / modality / "items.parquet"


def encoder_path(cache_path: Path, modality: str, encoder: str) -> Path:
    """Get the folder of all features of one encoder."""
    return cache_path / modality / encoder


def commit_path(encoder_folder: Path, chunk: int) -> Path:
    """Get the record that is written last and says that a chunk exists."""
    return encoder_folder / "chunks" / f"{chunk:05d}.parquet"


def write_info(cache_path: Path, info: CacheInfo) -> None:
    """Write `cache.json`: from now on the spine exists."""
    write_json(info_path(cache_path), asdict(info))


def read_info(cache_path: Path) -> CacheInfo:
    """Read `cache.json`.

    Raises:
        PathError: the folder is no cache.
        ArtifactError: the cache is of a later format than this version reads.
        CorruptError: the file does not hold what it should.
    """
    path = info_path(cache_path)
    make = f"embedcache extract SOURCE {cache_path}"
    values = read_manifest(path, kind="cache", latest_format=FORMAT_VERSION, make=make)
    return fields_of(path, lambda: CacheInfo(**values))
