"""Measure how much of a new encoder's search an adapter keeps, compared with encoding everything again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from embedcache.arrays import Array, Floats, Ints
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, SettingError, summary
from embedcache.evaluate.runs import read_eval_split
from embedcache.evaluate.settings import AdapterEvalSettings
from embedcache.files import AnyPath
from embedcache.metrics import Estimate, bootstrap_means, chance_estimate, neighbor_overlap
from embedcache.neighbors.knn import knn
from embedcache.processes import products_on
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_same
from embedcache.runs import ADAPTER, Run
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import AdapterEvalOptions

_K = 10


@dataclass(frozen=True, kw_only=True)
class NeighborsReport:
    """The neighbors that queries find in the old encoder's vectors.

    Args:
        part: description of the queries' part.
        feature: feature of the new encoder.
        target: feature of the old encoder, in which the queries search.
        num_queries: number of queries.
        num_items: number of searched items, without the query itself.
        reencoded: name of the queries -> fraction of the 10 nearest neighbors among the new encoder's vectors.
        old: name -> fraction of the 10 nearest neighbors that the old encoder's query finds.
        own: name -> fraction of queries whose own old vector is the nearest of all.
    """

    part: str
    feature: str
    target: str
    num_queries: int
    num_items: int
    reencoded: Mapping[str, Estimate]
    old: Mapping[str, Estimate]
    own: Mapping[str, Estimate]

    __repr__ = summary

    def lines(self) -> list[str]:
        """Summarize the measurement, with the fraction of neighbors that each kind of query finds."""
        fractions = ", ".join(f"{name} {fraction}" for name, fraction in self.reencoded.items())
        return [self.line(), f"of the {_K} nearest by {self.feature}: {fractions}"]

    def line(self) -> str:
        """Summarize the measurement in one line."""
        return (
            f"{self.part}: {self.num_queries:,} queries by {self.feature} among {self.num_items:,} items of "
            f"{self.target}; 95% intervals over near-duplicate groups"
        )


def evaluate_adapter(
    cache: AnyPath,
    adapter: AnyPath,
    settings: AdapterEvalSettings | None = None,
    *,
    control: AnyPath | None = None,
    progress: AnyProgress = None,
    **options: Unpack["AdapterEvalOptions"],
) -> NeighborsReport:
    """Compare the neighbors that mapped queries find in the old vectors with their neighbors among the new vectors.

    Items of the part are the queries. All items that both encoders have encoded are searched. The old encoder's queries
    are measured as well, as they show how far the two encoders agree without any map. Memory: a chunk of each feature,
    the queries, and tiles of their cosines.

    Args:
        cache: cache with both features.
        adapter: adapter of a plain feature.
        settings: part, and number of queries.
        control: adapter that was fitted on shuffled rows.
        progress: progress in items.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        DataError: the run is not an adapter of a plain feature, or the part or the cache has too few items.
        FingerprintError: the cache has features of other encoders.
        SettingError: the control was not fitted on shuffled rows.

    Example:
        >>> _ = embedcache.fit_adapter("two-encoders", "adapter", feature="new/cls", target="old/cls", split="key")
        >>> report = embedcache.evaluate_adapter("two-encoders", "adapter", part="test")
        >>> report.num_queries
        15
        >>> report.old["adapter"].value > report.old["chance"].value
        True
    """
    settings = merge_settings(AdapterEvalSettings, settings, options)
    progress = to_progress(progress)
    cache = Cache(cache)
    run = Run.open(adapter, kind=ADAPTER)
    (modality,) = run.modalities
    new = Vectors(cache.path, modality, run.input(modality).feature)
    old = _open_target(cache, run, modality)

    # A control on the same target shows what an adapter finds that has learned nothing of the pairs.
    mapped = {"adapter": Vectors(cache.path, modality, run_path=run.path, device=settings.device)}
    if control is not None:
        control_run = Run.open(control, kind=ADAPTER)
        if not control_run.is_control:
            raise SettingError(f"{control}: expected a control fitted with --shuffle-pairs, got another adapter")
        check_same(f"control {control}", control_run.info.settings["target"], run.info.settings["target"], next_step="")
        mapped["shuffled rows"] = Vectors(cache.path, modality, run_path=control, device=settings.device)

    # Only items that both encoders have encoded can be compared.
    rows = np.intersect1d(new.rows, old.rows, assume_unique=True)
    split = read_eval_split(cache, run, settings.part, settings.selection)
    samples = cache.items(modality, columns=["sample"])["sample"].to_numpy()
    queries = rows[np.isin(samples[rows], split.samples)]
    if len(queries) > settings.num_queries:
        queries = np.sort(np.random.default_rng(0).choice(queries, settings.num_queries, replace=False))
    if not len(queries) or len(rows) <= _K + 1:
        raise DataError(
            f"{split.part} of {cache.path}: expected queries among more than {_K + 1} items with both features, got "
            f"{len(queries)} among {len(rows)}; check --part, or encode more items with both encoders"
        )

    reencoded, _ = _neighbors({"new": new}, new, rows, queries, settings.device, progress)["new"]
    neighbors = _neighbors({"old encoder": old, **mapped}, old, rows, queries, settings.device, progress)
    old_places, _ = neighbors["old encoder"]
    groups = split.groups[samples[queries]]
    reencoded_estimates = {}
    old_estimates = {}
    own_estimates = {}
    for name, (places, is_own) in neighbors.items():
        # The three fractions are estimated on the same resamples of groups.
        columns: list[Array] = [neighbor_overlap(places, reencoded), neighbor_overlap(places, old_places), is_own]
        estimates = bootstrap_means(np.stack(columns, axis=1), groups)
        reencoded_estimates[name], old_estimates[name], own_estimates[name] = estimates

    num_items = len(rows) - 1
    chance = chance_estimate(_K / num_items, _K * len(queries))
    reencoded_estimates["chance"] = chance
    old_estimates["chance"] = chance
    own_estimates["chance"] = chance_estimate(1 / (num_items + 1), len(queries))

    return NeighborsReport(
        part=split.part,
        feature=new.feature.name,
        target=old.feature.name,
        num_queries=len(queries),
        num_items=num_items,
        reencoded=reencoded_estimates,
        old=old_estimates,
        own=own_estimates,
    )


def _open_target(cache: Cache, run: Run, modality: str) -> Vectors:
    """Open the feature that an adapter maps onto, made by the same encoder."""
    target = run.info.settings["target"]
    old = Vectors(cache.path, modality, target["feature"])
    next_step = "use a cache that the same encoders have encoded"
    check_same(f"the target of {run.path}", target["fingerprint"], old.feature.fingerprint, next_step=next_step)
    return old


def _neighbors(
    queries: Mapping[str, Vectors], searched: Vectors, rows: Ints, query_rows: Ints, device: str, progress: Progress
) -> dict[str, tuple[Ints, Floats]]:
    """Find the nearest other items of each kind of query in one pass.

    Returns:
        name -> (Q, 10) places among `rows`, and (Q,) whether the query's own item is nearer than all of them.
    """
    # All kinds of queries are searched together, so that the vectors are read once.
    own_places = np.searchsorted(rows, query_rows)
    vectors = {name: kind.read(query_rows) for name, kind in queries.items()}
    blocks = (block_BP for _, block_BP in searched.select(rows).blocks("searching exactly", progress))
    places, sims = knn(
        np.concatenate([*vectors.values()]),
        blocks,
        _K,
        own=np.tile(own_places, len(vectors)),
        products=products_on(device),
    )

    # The search leaves out a query's own item, which is compared here.
    own_QP = searched.read(query_rows)
    neighbors = {}
    for number, (name, vectors_QP) in enumerate(vectors.items()):
        part = slice(number * len(query_rows), (number + 1) * len(query_rows))
        own_sims = np.einsum("qp,qp->q", vectors_QP, own_QP)
        neighbors[name] = (places[part], (own_sims > sims[part, 0]).astype(np.float32))
    return neighbors
