"""Building an index over one feature of a cache, with a card that says what it holds and how good it is."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.arrays import Floats, Ints
from embedcache.artifact import check_same, claim_folder, fields_of, read_manifest, run_record, write_json
from embedcache.curate import faiss_index
from embedcache.curate.vectors import Vectors
from embedcache.disk import disk_errors
from embedcache.paths import is_remote
from embedcache.progress import Progress, Silent

FORMAT_VERSION = 1
_NUM_QUERIES = 200
_K = 10
_NUM_TRAINING = 100_000
_FILES = ("index.faiss", "record.json")


@dataclass(frozen=True, kw_only=True)
class IndexCard:
    """The content of an index's `card.json`, written after the index.

    Args:
        cache: path of the cache, seen from the index's folder: what moves together goes on working.
        spine: identity of its rows.
        modality: of the indexed items.
        feature: `encoder/feature` that was indexed.
        spec: what opens that feature's encoder again.
        fingerprint: what decided the feature.
        run: path of the run whose tower projected it, alike; None for the plain feature.
        run_weights: SHA-256 of that run's weights.
        factory: FAISS factory string.
        num_vectors: how many items.
        width: of a vector.
        recall_at_10: share of the true 10 nearest that the index finds, on `num_queries` queries.
        num_queries: captions or images of the other modality for a projected index, else rows of its own.
        latency_ms: median of single queries, on the machine that built it.
        format: version of the format on disk.
    """

    cache: str
    spine: str
    modality: str
    feature: str
    spec: str
    fingerprint: Mapping[str, Any]
    run: str | None
    run_weights: str | None
    factory: str
    num_vectors: int
    width: int
    recall_at_10: float
    num_queries: int
    latency_ms: float
    format: int = FORMAT_VERSION


def build_index(
    cache_path: Path | str,
    index_path: Path | str,
    *,
    run_path: Path | str | None = None,
    feature: str | None = None,
    modality: str = "image",
    factory: str | None = None,
    progress: Progress | None = None,
) -> IndexCard:
    """Index all valid items of a feature, and measure the index against exact search.

    Memory: the index, and a chunk of the feature.

    Args:
        cache_path: the cache.
        index_path: a folder for `index.faiss` and `card.json`; an index of the same is used again.
        run_path: project the feature with this run; None indexes the plain feature.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        modality: `image` or `text`.
        factory: FAISS factory string; None is exact up to 200,000 items and a graph beyond.
        progress: told about items.

    Raises:
        FingerprintError: the run was trained on another encoder's features, or the folder holds another index.
        PathError: the folder holds other things.
        UnfinishedError: the feature has missing chunks.
        DataError: the feature has several vectors an item, or no valid item.
    """
    index_path, progress = Path(index_path), progress or Silent()
    vectors = Vectors(cache_path, modality, feature, run_path)
    factory = factory or faiss_index.choose_factory(len(vectors.rows))
    if (index_path / "card.json").is_file():
        return _reuse(index_path, _about(vectors, index_path, factory))
    claim_folder(index_path, kind="an index", sign="index.faiss", ours=_FILES)
    about = {
        "cache": str(cache_path),
        "feature": vectors.side.name,
        "run": str(run_path),
        "factory": factory,
    }
    with run_record(index_path / "record.json", "index", about) as outcome, disk_errors(index_path):
        card = _build(vectors, index_path, factory, progress)
        outcome.update({"recall_at_10": card.recall_at_10, "num_vectors": card.num_vectors})
    write_json(index_path / "card.json", asdict(card))
    return card


def read_card(index_path: Path) -> IndexCard:
    """Read an index's card.

    Raises:
        PathError: the folder is no finished index.
        ArtifactError: it is of a later format.
        CorruptError: it does not hold what it should.
    """
    path = index_path / "card.json"
    make = f"embedcache curate index CACHE {index_path}"
    values = read_manifest(path, kind="index", latest_format=FORMAT_VERSION, make=make)
    return fields_of(path, lambda: IndexCard(**values))


def _build(vectors: Vectors, index_path: Path, factory: str, progress: Progress) -> IndexCard:
    training = vectors.sample(_NUM_TRAINING)
    progress.start("indexing", len(vectors.rows), f"{vectors.modality}s")
    index = faiss_index.build(factory, vectors.width, training, _told(vectors.blocks(), progress))
    progress.finish()
    faiss_index.write_index(index_path / "index.faiss", index)
    queries, k = _queries(vectors), min(_K, len(vectors.rows))
    exact = faiss_index.exact_search(queries, vectors.blocks(), k)
    scores, _ = faiss_index.search(index, queries, k)
    return IndexCard(
        **_about(vectors, index_path, factory),
        num_vectors=len(vectors.rows),
        width=vectors.width,
        recall_at_10=faiss_index.recall_against(exact, scores),
        num_queries=len(queries),
        latency_ms=round(faiss_index.latency_ms(index, queries, k), 4),
    )


def _about(vectors: Vectors, index_path: Path, factory: str) -> dict[str, Any]:
    """Say what an index is made from: all of its card but what is measured."""
    return {
        "cache": _relative(vectors.cache.path, index_path),
        "spine": vectors.cache.info.spine,
        "modality": vectors.modality,
        "feature": vectors.side.name,
        "spec": vectors.side.spec,
        "fingerprint": vectors.side.fingerprint,
        "run": None if vectors.run_path is None else _relative(vectors.run_path, index_path),
        "run_weights": None if vectors.config is None else vectors.config.weights,
        "factory": factory,
    }


def _reuse(index_path: Path, about: Mapping[str, Any]) -> IndexCard:
    card = read_card(index_path)
    found = {name: getattr(card, name) for name in about}
    check_same(f"index {index_path}", found, about, next_step="give the path of a new folder")
    return card


def _relative(path: Path, index_path: Path) -> str:
    return str(path) if is_remote(path) else os.path.relpath(path.resolve(), index_path.resolve())


def _told(blocks: Iterator[tuple[Ints, Floats]], progress: Progress) -> Iterator[tuple[Ints, Floats]]:
    for rows, vectors in blocks:
        yield rows, vectors
        progress.advance(len(rows))


def _queries(vectors: Vectors) -> Floats:
    """Take what people will ask with: the other modality where a run gives it, else the items themselves."""
    if vectors.run_path is None:
        return vectors.sample(_NUM_QUERIES)
    other = "text" if vectors.modality == "image" else "image"
    return Vectors(vectors.cache.path, other, run_path=vectors.run_path).sample(_NUM_QUERIES)
