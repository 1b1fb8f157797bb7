"""What a coverage report says, for the page: read from a file, or measured when the server starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.curate.coverage import CoverageSettings, measure_coverage
from embedcache.errors import DataError, FingerprintError, PathError
from embedcache.progress import Progress
from embedcache.provenance import fields_of, read_json
from embedcache.reports.coverage import coverage_json
from embedcache.search.search import OpenIndex

_NUM_BEST = 24


@dataclass(frozen=True, kw_only=True)
class ServedCoverage:
    """How well the indexed items cover some concepts.

    Args:
        about: `rule`, `min_count`, `warnings`, `parts` (`name`, `items`, `covered`, `gaps`, `gini`) and `overlaps`.
        concepts: each with `number`, `name`, `counts` a part, `assigned`, `threshold` and whether it is a gap.
        best: of each concept, `row` and `cosine` of its most similar items, best first.
    """

    about: Mapping[str, Any]
    concepts: Sequence[Mapping[str, Any]]
    best: Sequence[Sequence[Mapping[str, Any]]]


def read_coverage(path: Path, index: OpenIndex) -> ServedCoverage:
    """Read what `embedcache curate coverage --output` wrote.

    Raises:
        PathError: there is no such file.
        CorruptError: it does not hold what it should.
        FingerprintError: it is of other samples than the index.
        DataError: it is of the other modality.
    """
    if not path.is_file():
        raise PathError(
            f"{path} does not exist; write it with: embedcache curate coverage CACHE CONCEPTS --output {path}"
        )
    values = read_json(path)
    served, index_digest, modality = fields_of(
        path, lambda: (_served(values), str(values["pool"]["spine"]), str(values["pool"]["modality"]))
    )
    if not index.cache.info.has_rows_of(index_digest):
        raise FingerprintError(f"{path} is of other samples than {index.cache.path} holds; measure coverage again")
    if modality != index.card.modality:
        raise DataError(f"{path} counts {modality}s, and the index holds {index.card.modality}s")
    return served


def compute_coverage(
    concepts_path: Path | str, index: OpenIndex, progress: Progress, *, settings: CoverageSettings | None = None
) -> ServedCoverage:
    """Measure how well the cache covers some concepts, in the index's space; see `measure_coverage`."""
    report = measure_coverage(
        index.cache.path,
        concepts_path,
        modality=index.card.modality,
        feature=index.card.feature,
        run_path=index.run_path,
        settings=settings or CoverageSettings(k=min(_NUM_BEST, index.card.num_vectors)),
        progress=progress,
    )
    return _served(coverage_json(report))


def _served(values: Mapping[str, Any]) -> ServedCoverage:
    least = values["min_count"]
    concepts = [
        {
            "number": number,
            "name": str(one["name"]),
            "counts": [int(count) for count in one["counts"]],
            "assigned": int(one["assigned"][0]),
            "threshold": float(one["threshold"]),
            "is_gap": int(one["counts"][-1]) < least,
        }
        for number, one in enumerate(values["concepts"])
    ]
    about = {
        "rule": _rule(values),
        "min_count": int(least),
        "warnings": values["warnings"],
        "parts": [
            {name: part[name] for name in ("name", "items", "covered", "gini")} | {"gaps": len(part["gaps"])}
            for part in values["parts"]
        ],
        "overlaps": values["overlaps"][:20],
    }
    best = [
        [{"row": int(hit["row"]), "cosine": float(hit["cosine"])} for hit in one["best"]] for one in values["concepts"]
    ]
    return ServedCoverage(about=about, concepts=concepts, best=best)


def _rule(values: Mapping[str, Any]) -> str:
    if values["threshold"] is not None:
        return f"{values['threshold']:g} for all concepts"
    return f"{values['deviations']:g} deviations above each concept's background"
