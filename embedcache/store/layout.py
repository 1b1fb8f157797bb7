"""Where things lie in a cache, and what `cache.json` says. The page docs/formats.md describes every byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedcache.provenance import digest, fields_of, from_record, read_manifest, to_record, write_json

FORMAT_VERSION = 1
DEFAULT_CHUNK_SIZE = 2048
_LEFT_OUT_EMPTY = ("parts", "earlier", "tables")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples that were numbered together: those of the first indexing, or those that one `--extend` added.

    Args:
        num_samples: how many.
        digest: SHA-256 over them in row order.
    """

    num_samples: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """A state of the numbering before samples were added or items mended: commits made then are still good.

    Args:
        index_digest: its identity, as those commits have it.
        num_items: modality -> how many items it had.
    """

    index_digest: str
    num_items: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The content of `cache.json`.

    Args:
        chunk_size: items in a chunk; the last chunk of a modality may hold fewer.
        source: what reopens the source.
        index_digest: digest of all samples and items in row order: the identity of the rows.
        num_samples: rows of `samples.parquet`.
        num_items: rows of each modality's `items.parquet`; a modality without items is absent.
        format: version of the format on disk.
        parts: in row order; none where all samples were numbered together.
        earlier: the states before this one, the first first.
        tables: `samples`, `image`, `text` -> digest of the keys, or of all items, in row order.
    """

    chunk_size: int
    source: Mapping[str, Any]
    index_digest: str
    num_samples: int
    num_items: Mapping[str, int]
    format: int = FORMAT_VERSION
    parts: Sequence[Part] = ()
    earlier: Sequence[Earlier] = ()
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_parts(self) -> list[Part]:
        """The parts; one where all samples were numbered together."""
        return list(self.parts) or [Part(num_samples=self.num_samples, digest=self.index_digest)]

    def num_chunks(self, modality: str) -> int:
        """Count the chunks of a modality."""
        return -(-self.num_items.get(modality, 0) // self.chunk_size)

    def chunk_rows(self, modality: str, chunk: int) -> slice:
        """Get the rows of one chunk."""
        start = chunk * self.chunk_size
        return slice(start, min(start + self.chunk_size, self.num_items[modality]))

    def has_rows_of(self, index_digest: str) -> bool:
        """Say whether rows mean here what they meant under that identity: samples may have been added since."""
        return index_digest == self.index_digest or any(state.index_digest == index_digest for state in self.earlier)

    def num_rows_then(self, index_digest: str, modality: str, chunk: int) -> int | None:
        """Count the rows that a chunk had when the numbering had that identity; None where it never had it."""
        states = [*self.earlier, Earlier(index_digest=self.index_digest, num_items=self.num_items)]
        for state in states:
            if state.index_digest == index_digest:
                rows_left = state.num_items.get(modality, 0) - chunk * self.chunk_size
                return min(max(rows_left, 0), self.chunk_size)
        return None


def index_digest_of(parts: Sequence[Part]) -> str:
    """Get the identity of the rows that some parts make up."""
    return parts[0].digest if len(parts) == 1 else digest([part.digest for part in parts])


def info_path(cache_path: Path) -> Path:
    """Get the file whose presence says that the sample and item tables are complete."""
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
    """Write `cache.json`, which completes the cache; fields that a cache in one part does not need are left out."""
    values = to_record(info)
    values["earlier"] = [to_record(state) for state in info.earlier]
    write_json(
        info_path(cache_path), {name: value for name, value in values.items() if value or name not in _LEFT_OUT_EMPTY}
    )


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
    return fields_of(path, lambda: _info(**values))


def _info(*, parts: Sequence[Any] = (), earlier: Sequence[Any] = (), **values: Any) -> CacheInfo:
    return CacheInfo(
        parts=tuple(Part(**part) for part in parts),
        earlier=tuple(Earlier(**from_record(state)) for state in earlier),
        **from_record(values),
    )
