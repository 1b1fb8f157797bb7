"""Building an index over one feature of a cache, with a card that says what it holds and how good it is."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Floats, Inputs, Ints, normalize
from embedcache.artifact import check_same, claim_folder, fields_of, read_manifest, run_record, write_json
from embedcache.cache.cache import Cache
from embedcache.cache.side import SideFeature, open_side
from embedcache.curate import faiss_index
from embedcache.disk import disk_errors
from embedcache.errors import DataError
from embedcache.paths import is_remote
from embedcache.progress import Progress, Silent
from embedcache.projectors.pair import TokenTower, Tower
from embedcache.projectors.saved import PairConfig, check_feature, load_pair, project

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
    cache, index_path, progress = Cache(cache_path), Path(index_path), progress or Silent()
    run = _Run.open(run_path) if run_path is not None else None
    indexed = _open_feature(cache, modality, feature, run)
    factory = factory or faiss_index.choose_factory(int(indexed.valid.sum()))
    if (index_path / "card.json").is_file():
        return _reuse(index_path, _about(cache, index_path, indexed, run, factory))
    claim_folder(index_path, kind="an index", sign="index.faiss", ours=_FILES)
    about = {
        "cache": str(cache_path),
        "feature": indexed.name,
        "run": str(run_path),
        "factory": factory,
    }
    with run_record(index_path / "record.json", "index", about) as outcome, disk_errors(index_path):
        card = _build(cache, index_path, indexed, run, factory, progress)
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


@dataclass(frozen=True)
class _Run:
    path: Path
    towers: Mapping[str, Tower | TokenTower]
    config: PairConfig

    @classmethod
    def open(cls, path: Path | str) -> "_Run":
        pair, config = load_pair(Path(path))
        return cls(Path(path), {"image": pair.image, "text": pair.text}, config)


def _open_feature(cache: Cache, modality: str, name: str | None, run: _Run | None) -> SideFeature:
    if name is None and run is not None:
        name = run.config.side(modality).feature
    feature = open_side(cache, modality, name)
    feature.require_complete()
    if run is not None:
        check_feature(run.config, modality, feature.name, feature.fingerprint)
    elif feature.has_tokens:
        raise DataError(f"feature {feature.name} has several vectors an item; index a vector feature")
    if not feature.valid.any():
        raise DataError(f"feature {feature.name} has no valid item to index")
    return feature


def _build(
    cache: Cache,
    index_path: Path,
    feature: SideFeature,
    run: _Run | None,
    factory: str,
    progress: Progress,
) -> IndexCard:
    num_vectors = int(feature.valid.sum())
    training = _sample(feature, run, _NUM_TRAINING)
    progress.start("indexing", num_vectors, f"{feature.modality}s")
    index = faiss_index.build(factory, training.shape[1], training, _told(_vectors(feature, run), progress))
    progress.finish()
    faiss_index.write_index(index_path / "index.faiss", index)
    queries, k = _queries(cache, feature, run), min(_K, num_vectors)
    exact = faiss_index.exact_search(queries, _vectors(feature, run), k)
    scores, _ = faiss_index.search(index, queries, k)
    return IndexCard(
        **_about(cache, index_path, feature, run, factory),
        num_vectors=num_vectors,
        width=training.shape[1],
        recall_at_10=faiss_index.recall_against(exact, scores),
        num_queries=len(queries),
        latency_ms=round(faiss_index.latency_ms(index, queries, k), 4),
    )


def _about(cache: Cache, index_path: Path, feature: SideFeature, run: _Run | None, factory: str) -> dict[str, Any]:
    """Say what an index is made from: all of its card but what is measured."""
    return {
        "cache": _relative(cache.path, index_path),
        "spine": cache.info.spine,
        "modality": feature.modality,
        "feature": feature.name,
        "spec": feature.spec,
        "fingerprint": feature.fingerprint,
        "run": None if run is None else _relative(run.path, index_path),
        "run_weights": None if run is None else run.config.weights,
        "factory": factory,
    }


def _reuse(index_path: Path, about: Mapping[str, Any]) -> IndexCard:
    card = read_card(index_path)
    found = {name: getattr(card, name) for name in about}
    check_same(f"index {index_path}", found, about, next_step="give the path of a new folder")
    return card


def _relative(path: Path, index_path: Path) -> str:
    return str(path) if is_remote(path) else os.path.relpath(path.resolve(), index_path.resolve())


def _vectors(feature: SideFeature, run: _Run | None) -> Iterator[tuple[Ints, Floats]]:
    for rows, inputs in feature.blocks():
        yield rows, _unit(inputs, feature.modality, run)


def _unit(inputs: Inputs, modality: str, run: _Run | None) -> Floats:
    return normalize(inputs.values) if run is None else project(run.towers[modality], inputs)


def _told(blocks: Iterator[tuple[Ints, Floats]], progress: Progress) -> Iterator[tuple[Ints, Floats]]:
    for rows, vectors in blocks:
        yield rows, vectors
        progress.advance(len(rows))


def _sample(feature: SideFeature, run: _Run | None, size: int) -> Floats:
    valid = np.flatnonzero(feature.valid)
    chosen = np.sort(np.random.default_rng(0).permutation(valid)[:size])
    return _unit(feature.read(chosen), feature.modality, run)


def _queries(cache: Cache, feature: SideFeature, run: _Run | None) -> Floats:
    """Take what people will ask with: the other modality where a run gives it, else the items themselves."""
    if run is None:
        return _sample(feature, run, _NUM_QUERIES)
    other = "text" if feature.modality == "image" else "image"
    return _sample(_open_feature(cache, other, None, run), run, _NUM_QUERIES)
