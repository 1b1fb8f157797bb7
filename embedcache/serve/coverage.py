"""Coverage for the page, read from a report or measured when the server starts, and answers that settle concepts."""

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.curate.coverage import (
    COUNTED,
    Scale,
    answers_path,
    measure_coverage,
    read_answers,
    settle,
    write_answers,
)
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import DataError, FingerprintError, PathError, UnknownNameError, quoted
from embedcache.modalities import noun
from embedcache.progress import Progress
from embedcache.provenance import construct, read_report_json
from embedcache.reports.coverage import coverage_json
from embedcache.search.search import OpenIndex
from embedcache.settings import replace_flat

_NUM_ITEMS = 24


class ServedCoverage:
    """Coverage of concepts by the indexed items. Answers change it and are saved immediately. It is thread-safe.

    Args:
        values: a report of `coverage_json`.
        index: index of the same items; items removed from its cache are neither shown nor asked about.
        path: file of the answers, read in place of the answers of the report if it exists.

    Raises:
        FingerprintError: the report or the answers are about other samples than the index.
        DataError: they are about items of another modality.
    """

    def __init__(self, values: Mapping[str, Any], index: OpenIndex, path: Path) -> None:
        self._index = index
        self._path = path
        self._lock = threading.Lock()
        self._is_removed = index.cache.removed_items(index.card.modality)
        self._min_count = int(values["min_count"])
        self._weights = np.array(values["strip_weights"], np.float64)

        # Answers change the concepts, but not the caller's report.
        self._concepts: list[dict[str, Any]] = copy.deepcopy(values["concepts"])
        medians, spreads, reaches = np.array([concept["scale"] for concept in self._concepts], np.float64).T
        self._scale = Scale(medians=medians, spreads=spreads, reaches=reaches)
        self._nums_items = [int(part["items"]) for part in values["parts"]]
        self.summary = self._summarize(values)

        if path.is_file():
            self._answers = read_answers(path, index.cache, index.card.modality)
        else:
            self._answers = {}
            for concept in self._concepts:
                # The keys of a JSON object are strings.
                answers = {int(row): bool(shows) for row, shows in concept["answers"].items()}
                self._answers[str(concept["name"])] = answers
        for number in range(len(self._concepts)):
            self._settle(number)

    def _summarize(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `CoverageOut` except the concepts."""
        warnings = list(values["warnings"])
        if not all(self._is_there(hit["row"]) for concept in self._concepts for hit in concept["nearest"]):
            warnings.append(
                "measured before samples were removed from the cache: the counts include them, the items shown do not; "
                "measure it again"
            )

        parts = []
        for part in values["parts"]:
            fields = {name: part[name] for name in ("name", "items", "covered", "gini")}
            parts.append({**fields, "gaps": len(part["gaps"])})
        return {
            "texts": list(map(str, values["concepts_from"].get("texts", [])[:2])),
            "min_count": self._min_count,
            "warnings": warnings,
            "parts": parts,
        }

    def concepts(self) -> list[dict[str, Any]]:
        """Return the fields of `ConceptOut` of each concept."""
        return list(map(self._describe, range(len(self._concepts))))

    def concept(self, number: int) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """Return the fields of `ConceptOut` of a concept, its most similar items, and the items to ask about.

        An item is a row and its cosine, and in the last list also its answer, if any. Raises an `UnknownNameError`.
        """
        if not 0 <= number < len(self._concepts):
            raise UnknownNameError(f"unknown concept {number}; GET /api/coverage lists the known ones")
        concept = self._concepts[number]
        answers = self._answers.get(concept["name"], {})

        # Samples may have been removed since the report was written.
        nearest = [hit for hit in concept["nearest"] if self._is_there(hit["row"])]
        strip = []
        for hit in concept["strip"]:
            if self._is_there(hit["row"]):
                strip.append({**hit, "shows": answers.get(hit["row"])})
        return self._describe(number), nearest, strip

    def answer(self, number: int, row: int, *, shows: bool | None) -> None:
        """Save whether an item shows a concept, or forget the answer if `shows` is None, and settle the concept.

        Raises an `UnknownNameError` if the page does not ask about the item.
        """
        _, _, strip = self.concept(number)
        if row not in {hit["row"] for hit in strip}:
            raise UnknownNameError(f"unknown item {row}; GET /api/coverage/{number} lists the items to ask about")

        with self._lock:
            name = self._concepts[number]["name"]
            answers = dict(self._answers.get(name, {}))
            if shows is None:
                answers.pop(row, None)
            else:
                answers[row] = shows

            # Readers take no lock, so the answers are replaced as a whole, and only once they are on disk.
            changed = {**self._answers, name: answers}
            write_answers(self._path, changed, self._index.cache, self._index.card.modality)
            self._answers = changed
            self._settle(number)

    def _is_there(self, row: int) -> bool:
        return 0 <= row < len(self._is_removed) and not self._is_removed[row]

    def _describe(self, number: int) -> dict[str, Any]:
        """Return the fields of `ConceptOut` of a concept."""
        concept = self._concepts[number]
        counts = []
        for part in _parts(concept):
            counts.append({name: part[name] for name in ("count", "low", "high", "best", "certain")})

        # The last part is the selection, if there is one: its gaps are of interest.
        high = counts[-1]["high"]
        return {
            "number": number,
            "name": str(concept["name"]),
            "counts": counts,
            "threshold": float(concept["threshold"]),
            "is_gap": high is not None and high < self._min_count,
            "num_answers": len(self._answers.get(concept["name"], {})),
        }

    def _settle(self, number: int) -> None:
        """Set the counts and the threshold of a concept by its answers, or as measured if it has none."""
        concept = self._concepts[number]
        answers = self._answers.get(concept["name"], {})
        cosines = {hit["row"]: hit["cosine"] for hit in concept["strip"]}
        answered_rows = [row for row in answers if row in cosines]
        if not answered_rows:
            concept["threshold"] = float(self._scale.cosines(COUNTED)[number])
            for part in _parts(concept):
                # Without a gap between background and best items, the scores cannot tell a number.
                counts = map(round, part["prior"]) if self._scale.separates[number] else (None, None, None)
                part |= dict(zip(("count", "low", "high"), counts, strict=True))
            return

        settled = settle(
            concept["prior"],
            self._scale.scores(number, np.array(list(cosines.values()))),
            self._weights,
            self._scale.scores(number, np.array(list(map(cosines.__getitem__, answered_rows)))),
            list(map(answers.__getitem__, answered_rows)),
        )

        # The most similar item always counts.
        concept["threshold"] = min(float(self._scale.cosines(settled.cut)[number]), concept["nearest"][0]["cosine"])
        for part, num_items in zip(_parts(concept), self._nums_items, strict=True):
            # Answers are about the pool; the counts of a selection change in proportion.
            ratio = part["prior"][0] / concept["prior"][0]
            for name in ("count", "low", "high"):
                part[name] = min(round(ratio * getattr(settled, name)), num_items)


def _parts(concept: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the counts of a concept in the pool, and in the selection if there is one."""
    return [concept, *([concept["selection"]] if "selection" in concept else [])]


def read_coverage(path: Path, index: OpenIndex) -> ServedCoverage:
    """Read a report of `embedcache curate coverage --output`, with the answers that are saved next to it.

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
    index_digest = construct(path, lambda: str(values["pool"]["index_digest"]))
    modality = construct(path, lambda: str(values["pool"]["modality"]))
    if not index.cache.info.has_rows_of(index_digest):
        raise FingerprintError(f"{path}: expected samples of {index.cache.path}, got other samples; measure it again")
    if modality != index.card.modality:
        raise DataError(
            f"{path}: expected coverage by {noun(index.card.modality)} as in the index, got {noun(modality)}"
        )
    return construct(path, lambda: ServedCoverage(values, index, answers_path(path)))


def measure_served_coverage(
    concepts_path: Path | str, index: OpenIndex, progress: Progress, *, settings: CoverageSettings | None = None
) -> ServedCoverage:
    """Measure coverage in the index's space; see `measure_coverage`. Answers are saved next to the index."""
    settings = settings or CoverageSettings(k=min(_NUM_ITEMS, index.card.num_vectors), label=index.label)
    space = {"modality": index.card.modality, "feature": index.card.feature, "run": index.run_path}
    report = measure_coverage(index.cache.path, concepts_path, replace_flat(settings, space), progress=progress)
    return ServedCoverage(coverage_json(report), index, answers_path(index.path))
