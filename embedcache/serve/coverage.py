"""Coverage for the page, read from a report or measured when the server starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.curate.coverage import measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import DataError, FingerprintError, PathError, quoted
from embedcache.modalities import noun
from embedcache.outputs import read_report_json
from embedcache.progress import Progress
from embedcache.provenance import INDEX_DIGEST, construct
from embedcache.reports.coverage import coverage_json
from embedcache.search.search import OpenIndex

_NUM_ITEMS = 24


@dataclass(frozen=True, kw_only=True)
class CoverageData:
    """Coverage of concepts by the indexed items.

    Args:
        summary: `rule`, `min_count`, `warnings`, `parts` (`name`, `items`, `covered`, `gaps`, `gini`) and `overlaps`.
        concepts: `number`, `name`, `counts` per part, `assigned`, `threshold` and `is_gap` of each concept.
        best: `row` and `cosine` of the most similar items of each concept, best first.
    """

    summary: Mapping[str, Any]
    concepts: Sequence[Mapping[str, Any]]
    best: Sequence[Sequence[Mapping[str, Any]]]


def read_coverage(path: Path, index: OpenIndex) -> CoverageData:
    """Read a report of `embedcache curate coverage --output`, without items that were removed from the cache since.

    Raises:
        PathError: the file does not exist.
        CorruptError: it is not such a report, or has changed since it was written.
        FingerprintError: it was built from other samples than the index.
        DataError: it covers the other modality.
    """
    if not path.is_file():
        raise PathError(
            f"expected a report, got {path}, which does not exist; write it with: "
            f"embedcache curate coverage CACHE CONCEPTS --output {quoted(path)}"
        )
    values = read_report_json(path)
    data, index_digest, modality = construct(
        path, lambda: (_coverage_data(values), str(values["pool"][INDEX_DIGEST]), str(values["pool"]["modality"]))
    )
    if not index.cache.info.has_rows_of(index_digest):
        raise FingerprintError(f"{path}: expected samples of {index.cache.path}, got other samples; measure it again")
    if modality != index.card.modality:
        raise DataError(
            f"{path}: expected coverage by {noun(index.card.modality)} as in the index, got {noun(modality)}"
        )
    return _without_removed(data, index)


def _without_removed(data: CoverageData, index: OpenIndex) -> CoverageData:
    """Return coverage without the removed items among the most similar ones; a warning says that counts have them."""
    rows = {hit["row"] for hits in data.best for hit in hits}
    gone = rows.intersection(np.flatnonzero(index.cache.removed_items(index.card.modality)).tolist())
    if not gone:
        return data
    warning = (
        "measured before samples were removed from the cache: the counts include them, the most similar items do not; "
        "measure it again"
    )
    best = [[hit for hit in hits if hit["row"] not in gone] for hits in data.best]
    return replace(data, best=best, summary={**data.summary, "warnings": [*data.summary["warnings"], warning]})


def measure_served_coverage(
    concepts_path: Path | str, index: OpenIndex, progress: Progress, *, settings: CoverageSettings | None = None
) -> CoverageData:
    """Measure coverage in the index's space; see `measure_coverage`."""
    report = measure_coverage(
        index.cache.path,
        concepts_path,
        settings or CoverageSettings(k=min(_NUM_ITEMS, index.card.num_vectors), label=index.label),
        progress=progress,
        modality=index.card.modality,
        feature=index.card.feature,
        run=index.run_path,
    )
    return _coverage_data(coverage_json(report))


def _coverage_data(values: Mapping[str, Any]) -> CoverageData:
    least, rule = values["min_count"], "{deviations:g} deviations above each concept's background"
    if values["threshold"] is not None:
        rule = "{threshold:g} for all concepts"
    concepts = [
        {
            "number": number,
            "name": str(concept["name"]),
            "counts": [int(count) for count in concept["counts"]],
            "assigned": int(concept["assigned"][0]),
            "threshold": float(concept["threshold"]),
            "is_gap": int(concept["counts"][-1]) < least,
        }
        for number, concept in enumerate(values["concepts"])
    ]
    summary = {
        "rule": rule.format_map(values),
        "min_count": int(least),
        "warnings": values["warnings"],
        "parts": [
            {name: part[name] for name in ("name", "items", "covered", "gini")} | {"gaps": len(part["gaps"])}
            for part in values["parts"]
        ],
        "overlaps": values["overlaps"][:20],
    }
    best = [
        [{"row": int(hit["row"]), "cosine": float(hit["cosine"])} for hit in concept["best"]]
        for concept in values["concepts"]
    ]
    return CoverageData(summary=summary, concepts=concepts, best=best)
