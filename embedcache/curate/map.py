"""The map of an index: its items as points on a plane, in clusters with names. It is stored with the index.

Projection and clusters are fitted to a random sample, and all other items are placed block by block, so that time and
memory hardly grow with the index.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pyarrow as pa

from embedcache.arrays import Floats, Ints, blocks
from embedcache.curate.coverage import estimate_background
from embedcache.curate.select.methods import draw_balanced, find_centroids
from embedcache.curate.settings import MapSettings
from embedcache.dataset.vectors import Vectors
from embedcache.derive.rules import principal_components
from embedcache.errors import CorruptError
from embedcache.files import AnyPath, replacing
from embedcache.modalities import noun
from embedcache.neighbors.knn import knn
from embedcache.progress import NullProgress, Progress, watch
from embedcache.projectors.base import Moments
from embedcache.provenance import FORMAT, read_metadata, to_metadata
from embedcache.registry import is_installed, require
from embedcache.search.concepts import Concepts, open_concepts
from embedcache.search.search import Hit, OpenIndex
from embedcache.settings import merge_settings
from embedcache.store.tables import read_table, write_table

if TYPE_CHECKING:
    from embedcache.options import MapOptions

FILE = "map.parquet"
_MIN_POINTS = 4  # fewer cannot be projected
_MAX_FITTED = 10_000  # UMAP of as many takes 20 s on one core
_MAX_CLUSTERS = 48
_NUM_NEIGHBORS = 15
_NUM_ANCHORS = 5
_NEAREST = 24
_BLOCK = 4096
_MAX_QUESTION = 80
_NAMED_SHARE = 1 / 3  # of the items of a cluster
_WORD = re.compile(r"[^\W\d_]{2,}")
STOP_WORDS = frozenset(
    _WORD.findall(
        "about above after again against all also am an and any are as at back be because been before behind being "
        "below between both but by can could did do does down during each few for from front further had has have "
        "having he her here hers him his how if in into is it its itself just like may me more most my near next "
        "no nor not now of off on once one only onto or other our out over own same she side so some such than "
        "that the their them then there these they this those through to too top two under until up upon us very "
        "was we were what when where which while who whom why will with within without would you your kind made "
        "many pair piece set type used "
    )
)
"""Words that name nothing."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of similar items.

    Args:
        name: the concept that most of its items have, or words that distinguish its captions from the captions of
            other clusters. Empty if too few items have a concept.
        size: number of items on the map.
        x: median position.
        y: median position.
        nearest: rows of the items nearest to its center, nearest first.
        question: a short caption of one of these items, empty if they have none.
    """

    name: str
    size: int
    x: float
    y: float
    nearest: Sequence[int]
    question: str = ""


@dataclass(frozen=True, kw_only=True)
class IndexMap:
    """Items of an index on a plane.

    Args:
        rows: rows of the items, ascending: (N,) int64.
        points: positions from 0 to 1: (N, 2) float32.
        clusters_N: number of each item's cluster: (N,) int64.
        clusters: the clusters, at most 48, largest first.
        projection: `umap` or `pca`.
        seed: random seed.
    """

    rows: Ints
    points: Floats
    clusters_N: Ints
    clusters: Sequence[Cluster]
    projection: str
    seed: int

    def sample(self, size: int) -> Ints:
        """Draw rows evenly from the clusters, in round-robin order: (S,)."""
        chosen = draw_balanced(self.clusters_N[:, None], min(size, len(self.rows)), seed=self.seed)
        clusters_S = self.clusters_N[chosen]

        # An item's turn is the number of earlier items of its cluster.
        turn_S = np.array([np.count_nonzero(clusters_S[:place] == one) for place, one in enumerate(clusters_S)])
        return self.rows[chosen[np.lexsort((clusters_S, turn_S))]]


def build_map(
    index: AnyPath,
    settings: MapSettings | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack["MapOptions"],
) -> IndexMap:
    """Compute the map of an index, and write it into the index's folder as `map.parquet`.

    Memory: 10,000 vectors as float32, a block of 4,096 vectors, and 32 bytes per item of the map.

    Args:
        index: index built by `build_index`.
        settings: projection, names of clusters, and where the run and the cache are if they have moved.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        PathError: the index, its run or its cache does not exist, or no map may be written there.
        FingerprintError: the run or the cache is not the one that the index was built from.
        CorruptError: the card or a file of the index has changed.
        MissingExtraError: umap-learn is not installed.
        DataError: the concepts cannot be compared with the items.

    Example:
        >>> card = embedcache.build_index("cache", "index", modality="text")
        >>> index_map = embedcache.build_map("index", projection="pca")
        >>> index_map.points.shape
        (600, 2)
    """
    settings = merge_settings(MapSettings, settings, options)
    opened = OpenIndex(index, run=settings.run, cache=settings.cache, device=settings.device)
    computed = compute_map(opened, settings, progress=progress)
    write_map(opened, computed)
    return computed


def compute_map(index: OpenIndex, settings: MapSettings, *, progress: Progress | None = None) -> IndexMap:
    """Compute the map of an open index without writing it. See `build_map`."""
    progress = progress or NullProgress()
    rng = np.random.default_rng(settings.seed)
    card = index.card
    vectors = Vectors(
        index.cache.path, card.modality, card.feature, index.run_path, width=card.width, device=settings.device
    )
    opened = None
    if settings.concepts is not None:
        opened = open_concepts(settings.concepts, vectors, label=index.label, progress=progress)

    # Clusters and projection are fitted to a sample, so that time and memory hardly grow with the index.
    rows_N = np.sort(rng.permutation(index.rows)[: settings.max_items])
    fitted_SP = vectors.read(np.sort(rng.permutation(rows_N)[:_MAX_FITTED]))
    num_clusters = max(1, min(_MAX_CLUSTERS, math.isqrt(len(rows_N)) // 2))
    centroids_CP = find_centroids(
        fitted_SP, num_clusters, seed=settings.seed, progress=progress, device=settings.device
    )

    projection = _choose_projection(settings.projection, len(fitted_SP))
    if projection == "umap":
        progress.note(f"fitting UMAP to {len(fitted_SP):,} {noun(vectors.modality)}")
    place = _fit(fitted_SP, projection, seed=settings.seed)

    # A concept whose scores do not separate items from the background names no cluster.
    if opened is not None:
        background = estimate_background(opened.vectors, fitted_SP, 1)
        thresholds_C = np.where(background.scale.separates, background.thresholds, np.inf)

    points = []
    numbers = []
    cosines = []
    concepts = []
    parts = watch(blocks(len(rows_N), _BLOCK), progress, "placing on the map", len(rows_N), vectors.unit)
    for block in parts:
        vectors_BP = vectors.read(rows_N[block])
        points.append(place(vectors_BP))
        numbers_B1, cosines_B1 = knn(vectors_BP, centroids_CP, 1)
        numbers.append(numbers_B1[:, 0])
        cosines.append(cosines_B1[:, 0])
        if opened is not None:
            concepts_B1, scores_B1 = knn(vectors_BP, opened.vectors, 1)
            concepts.append(np.where(scores_B1 > thresholds_C[concepts_B1], concepts_B1, -1)[:, 0])

    points_N2 = _to_unit_square(np.concatenate(points))
    clusters_N = _largest_first(np.concatenate(numbers), num_clusters)
    members = [np.flatnonzero(clusters_N == number) for number in range(clusters_N.max() + 1)]
    nearest = [_nearest(rows_N, np.concatenate(cosines), inside) for inside in members]
    hits = [index.hits.read(np.zeros(len(rows), np.float32), rows) for rows in nearest]

    # Names come from all clusters together, as they must tell them apart.
    names = name_clusters(hits) if opened is None else _name_by_concepts(opened, np.concatenate(concepts), clusters_N)
    clusters = []
    for name, inside, rows, shown in zip(names, members, nearest, hits, strict=True):
        clusters.append(_to_cluster(name, points_N2[inside], rows, shown))

    return IndexMap(
        rows=rows_N,
        points=points_N2,
        clusters_N=clusters_N,
        clusters=clusters,
        projection=projection,
        seed=settings.seed,
    )


def write_map(index: OpenIndex, computed: IndexMap) -> None:
    """Write a map into the folder of its index, whole or not at all. A map that is there is replaced."""
    columns = {
        "row": computed.rows,
        "x": computed.points[:, 0],
        "y": computed.points[:, 1],
        "cluster": computed.clusters_N.astype(np.int16),
    }
    header = {
        "format": FORMAT,
        **_about(index),
        "projection": computed.projection,
        "seed": computed.seed,
        "clusters": [asdict(cluster) for cluster in computed.clusters],
    }

    with replacing(index.path / FILE) as temporary:
        table = pa.table(columns)
        write_table(temporary, table.replace_schema_metadata(to_metadata(header)))


def read_map(index: OpenIndex) -> IndexMap | None:
    """Read the map of an index. Return None if it has none, or one that is damaged or shows other items."""
    path = index.path / FILE
    if not path.is_file():
        return None

    # A damaged map is not an error, as it can be computed again.
    try:
        table = read_table(path)
        header = read_metadata(path, table.schema)
        about = {"format": FORMAT, **_about(index)}
        if header != {**header, **about}:
            return None

        stored = IndexMap(
            rows=table["row"].to_numpy().astype(np.int64),
            points=np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1).astype(np.float32),
            clusters_N=table["cluster"].to_numpy().astype(np.int64),
            clusters=[Cluster(**cluster) for cluster in header["clusters"]],
            projection=str(header["projection"]),
            seed=int(header["seed"]),
        )
        return stored if _is_valid(stored, index) else None

    except (CorruptError, pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def _about(index: OpenIndex) -> dict[str, Any]:
    """Return the fields of the index's card by which a map is matched to its index."""
    card = index.card.to_json()
    return {
        name: card[name] for name in ("cache", "index_digest", "feature", "fingerprint", "run_weights", "num_vectors")
    }


def _is_valid(stored: IndexMap, index: OpenIndex) -> bool:
    """Return whether a map, which may come from a stranger, names only items that exist and clusters that it has."""
    nearest = np.concatenate([np.asarray(cluster.nearest, np.int64) for cluster in stored.clusters])
    num_rows = index.cache.num_rows(index.card.modality)
    return bool(
        len(stored.rows)
        and (np.diff(stored.rows) > 0).all()
        and min(stored.rows[0], nearest.min()) >= 0
        and max(stored.rows[-1], nearest.max()) < num_rows
        and ((stored.points >= 0) & (stored.points <= 1)).all()
        and 0 <= stored.clusters_N.min() <= stored.clusters_N.max() < len(stored.clusters)
        and not index.cache.removed_items(index.card.modality)[stored.rows].any()
    )


def _to_cluster(name: str, points_M2: Floats, nearest: Ints, hits: Sequence[Hit]) -> Cluster:
    """Return the cluster of M points, at their median, which far members do not move."""
    x, y = np.median(points_M2, axis=0).tolist()
    return Cluster(name=name, size=len(points_M2), x=x, y=y, nearest=nearest.tolist(), question=_question(hits))


def _largest_first(clusters_N: Ints, num_clusters: int) -> Ints:
    """Number the clusters by size, without empty ones: (N,)."""
    sizes_C = np.bincount(clusters_N, minlength=num_clusters)
    order = np.argsort(-sizes_C, kind="stable")[: np.count_nonzero(sizes_C)]
    numbers_C = np.zeros(num_clusters, np.int64)
    numbers_C[order] = np.arange(len(order))
    return numbers_C[clusters_N]


def _nearest(rows_N: Ints, cosines_N: Floats, inside: Ints) -> Ints:
    """Return the rows of some items that are nearest to the center of their cluster, nearest first."""
    return rows_N[inside[np.argsort(-cosines_N[inside], kind="stable")[:_NEAREST]]]


Placement = Callable[[Floats], Floats]
"""Places (B, P) vectors on the plane: (B, 2) float32."""


def _choose_projection(projection: Literal["umap", "pca"] | None, num_fitted: int) -> Literal["umap", "pca"]:
    if projection is not None:
        return projection
    return "umap" if is_installed("umap") and num_fitted > _NUM_NEIGHBORS else "pca"


def _fit(fitted_SP: Floats, projection: Literal["umap", "pca"], *, seed: int) -> Placement:
    """Fit a projection to a sample. UMAP places an item between its nearest neighbors in the sample."""
    if len(fitted_SP) < _MIN_POINTS:
        return lambda vectors_BP: np.zeros((len(vectors_BP), 2), np.float32)
    if projection == "pca":
        return _fit_pca(fitted_SP)

    fitted_S2 = _run_umap(fitted_SP, seed=seed)

    def place(vectors_BP: Floats) -> Floats:
        rows_BK, cosines_BK = knn(vectors_BP, fitted_SP, min(_NUM_ANCHORS, len(fitted_SP)))
        weights_BK = (1e-4 + np.maximum(1 - cosines_BK, 0)) ** -2  # so large that an item of the sample stays in place
        weights_BK /= weights_BK.sum(axis=1, keepdims=True)
        placed: Floats = np.einsum("bk,bke->be", weights_BK, fitted_S2[rows_BK])
        return placed

    return place


def _fit_pca(fitted_SP: Floats) -> Placement:
    moments = Moments(fitted_SP.shape[1])
    moments.add(fitted_SP)
    width = min(2, fitted_SP.shape[1])
    center_P, components_PE = principal_components(moments, width, whiten=False)
    return lambda vectors_BP: np.pad((vectors_BP - center_P) @ components_PE, ((0, 0), (0, 2 - width)))


def _run_umap(vectors_NP: Floats, *, seed: int) -> Floats:
    num_neighbors = min(_NUM_NEIGHBORS, len(vectors_NP) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns of missing TensorFlow and of few points
        umap = require("umap", package="umap-learn")
        model = umap.UMAP(metric="cosine", n_neighbors=num_neighbors, random_state=seed, n_jobs=1)
        points = model.fit_transform(vectors_NP)
    return np.ascontiguousarray(points, np.float32)


def _to_unit_square(points_N2: Floats) -> Floats:
    low = points_N2.min(axis=0)
    span = np.ptp(points_N2, axis=0)
    middle_N2 = np.full(points_N2.shape, 0.5, np.float32)
    unit_N2: Floats = np.divide(points_N2 - low, span, out=middle_N2, where=span > 0)
    return unit_N2


def _name_by_concepts(concepts: Concepts, concepts_N: Ints, clusters_N: Ints) -> list[str]:
    """Return the most frequent concept of each cluster, empty if less than a third of its items have it."""
    names = []
    for number in range(clusters_N.max() + 1):
        inside = concepts_N[clusters_N == number]
        counts_C = np.bincount(inside[inside >= 0], minlength=len(concepts.names))
        best = int(counts_C.argmax())
        names.append(concepts.names[best] if counts_C[best] >= _NAMED_SHARE * len(inside) else "")
    return names


def name_clusters(hits: Sequence[Sequence[Hit]]) -> list[str]:
    """Return a name per cluster: one or two words that are more frequent in its captions than in other clusters.

    A word's weight is its term p log (p / q) of the Kullback-Leibler divergence. p is the fraction of the cluster's
    captions that contain it, q that of all captions. English stop words are left out. Labels replace words if there are
    no captions.
    """
    fractions = []
    mean: dict[str, float] = {}
    for cluster in hits:
        counts: Counter[str] = Counter()
        for hit in cluster:
            counts.update(_words(hit))
        words = {word: number / len(cluster) for word, number in counts.items()}
        fractions.append(words)

        # Clusters count equally, however many items of each are read.
        for word, fraction in words.items():
            mean[word] = mean.get(word, 0.0) + fraction / len(hits)

    names = []
    for number, words in enumerate(fractions):
        weights = {}
        for word, fraction in words.items():
            weights[word] = fraction * math.log(fraction / mean[word])
        best = sorted(weights, key=lambda word: (-weights[word], -words[word], word))[:2]

        # A second word that distinguishes much less would only blur the name.
        if len(best) == 2 and weights[best[1]] < 0.6 * weights[best[0]]:
            best = best[:1]
        names.append(", ".join(best) or f"group {number + 1}")
    return names


def _words(hit: Hit) -> set[str]:
    """Return the words of an item's first caption, or its label."""
    if hit.captions:
        return set(_WORD.findall(hit.captions[0].lower())) - STOP_WORDS
    return {hit.label} if hit.label else set()


def _question(hits: Sequence[Hit]) -> str:
    """Return a short caption of the nearest items, for an example question."""
    captions = []
    for hit in hits[:8]:
        caption = hit.captions[0].strip() if hit.captions else ""
        if hit.captions and len(caption) <= _MAX_QUESTION and "\n" not in caption:
            captions.append(caption)
    return min(captions, key=len, default="")
