"""Coverage as rows to print and as JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Ints
from embedcache.curate.coverage.background import QUANTILES
from embedcache.curate.coverage.coverage import Counts, CoverageReport

Table = tuple[list[str], list[list[str]]]

_SHARES = (0.01, 0.1)


def summary_rows(report: CoverageReport) -> Table:
    """Lay the pool and its selection out side by side, a figure a row."""
    least = report.settings.min_count
    num = len(report.concepts.names)
    rows = [
        ["items", *(f"{part.num_items:,}" for part in report.parts)],
        ["above any threshold", *(_of(part.num_covered, part.num_items) for part in report.parts)],
        [f"concepts with at least {least:,}", *(_of(num - len(part.gaps(least)), num) for part in report.parts)],
        [f"gaps: concepts with fewer than {least:,}", *(f"{len(part.gaps(least)):,}" for part in report.parts)],
        ["concepts with none", *(f"{(part.counts == 0).sum():,}" for part in report.parts)],
        ["items of a concept, median", *(f"{np.median(part.counts):,.0f}" for part in report.parts)],
        ["Gini", *(f"{part.gini:.3f}" for part in report.parts)],
        *(
            [f"matches of the largest {share:.0%} of concepts", *(_percent(part, share) for part in report.parts)]
            for share in _SHARES
        ),
    ]
    if report.by_chance is not None:
        rows.append(["above a threshold by chance", f"{report.by_chance:,.2g}", *([""] if report.selected else [])])
    return ["", *(part.name for part in report.parts)], rows


def concept_rows(report: CoverageReport, numbers: Ints | Sequence[int]) -> Table:
    """List some concepts: how many items, by the pool and the selection, and how similar the best of them are."""
    columns = ["concept", *(part.name for part in report.parts)]
    columns += ["most similar to it", "threshold", "median", "highest", "nearest concept"]
    return columns, [_concept_row(report, int(number)) for number in numbers]


def overlap_rows(report: CoverageReport, *, most: int = 20) -> Table:
    """List the concepts that share most items."""
    names = report.concepts.names
    rows = [
        [names[one.one], names[one.other], f"{one.num:,}", f"{one.jaccard:.3f}", f"{one.cosine:.3f}"]
        for one in report.overlaps[:most]
    ]
    return ["concept", "and", "items of both", "of the items of either", "cosine of the concepts"], rows


def side_line(images: CoverageReport, texts: CoverageReport) -> str:
    """Say how many concepts are gaps by images, by captions and by both."""
    least = images.settings.min_count
    by_images, by_texts = (set(report.parts[-1].gaps(least).tolist()) for report in (images, texts))
    return (
        f"of {len(images.concepts.names):,} concepts fewer than {least:,} items: {len(by_images):,} by images, "
        f"{len(by_texts):,} by captions, {len(by_images & by_texts):,} by both"
    )


def side_rows(images: CoverageReport, texts: CoverageReport, *, most: int) -> Table:
    """List the concepts whose share of the images and share of the captions differ most."""
    shares = [part.counts / max(1, part.num_items) for part in (images.whole, texts.whole)]
    order = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")[:most]
    rows = [
        [images.concepts.names[number], f"{images.whole.counts[number]:,}", f"{texts.whole.counts[number]:,}"]
        for number in order
    ]
    return ["concept", "images", "captions"], rows


def coverage_json(report: CoverageReport) -> dict[str, Any]:
    """Give all figures as JSON values: what was measured, a summary of each part, each concept, and the overlaps."""
    pool, background = report.pool, report.background
    return {
        "pool": {
            "cache": str(pool.cache.path),
            "spine": pool.cache.info.spine,
            "modality": pool.modality,
            "feature": pool.side.name,
            "fingerprint": dict(pool.side.fingerprint),
            "run": None if pool.run_path is None else str(pool.run_path),
            "run_weights": None if pool.config is None else pool.config.weights,
        },
        "concepts_from": report.concepts.about,
        "threshold": report.settings.threshold,
        "deviations": report.settings.deviations if report.settings.threshold is None else None,
        "min_count": report.settings.min_count,
        "num_sampled": background.num_items,
        "index": None
        if report.index is None
        else {"factory": report.index.factory, "recall_at_10": report.index.recall_at_10},
        "by_chance": report.by_chance,
        "warnings": report.warnings(),
        "parts": [_part_json(report, part) for part in report.parts],
        "concepts": _concepts_json(report),
        "overlaps": [
            {
                "concepts": [report.concepts.names[one.one], report.concepts.names[one.other]],
                "items": one.num,
                "jaccard": round(one.jaccard, 5),
                "cosine": round(one.cosine, 5),
            }
            for one in report.overlaps
        ],
    }


def keys_of(report: CoverageReport, rows: Array) -> list[str]:
    """Get the sample's key of each of some items."""
    cache = report.pool.cache
    samples = cache.items(report.pool.modality)["sample"].to_numpy()[rows]
    keys: list[str] = cache.samples["key"].take(pa.array(samples)).to_pylist()
    return keys


def _concept_row(report: CoverageReport, number: int) -> list[str]:
    near = int(report.near[number])
    return [
        report.concepts.names[number],
        *(f"{part.counts[number]:,}" for part in report.parts),
        f"{report.whole.assigned[number]:,}",
        f"{report.thresholds[number]:.3f}",
        f"{report.background.quantiles[number, 0]:.3f}",
        f"{report.scores[number, 0]:.3f}",
        report.concepts.names[near] if near >= 0 else "",
    ]


def _part_json(report: CoverageReport, part: Counts) -> dict[str, Any]:
    gaps = part.gaps(report.settings.min_count)
    return {
        "name": part.name,
        "items": part.num_items,
        "covered": part.num_covered,
        "gaps": [report.concepts.names[number] for number in gaps],
        "gini": _finite(part.gini),
        **{f"share_of_largest_{share:g}": _finite(part.top_share(share)) for share in _SHARES},
    }


def _concepts_json(report: CoverageReport) -> list[dict[str, Any]]:
    keys = np.array(keys_of(report, report.rows.ravel()), object).reshape(report.rows.shape)
    return [
        {
            "name": name,
            report.concepts.about["of"]: int(report.concepts.counts[number]),
            "counts": [int(part.counts[number]) for part in report.parts],
            "assigned": [int(part.assigned[number]) for part in report.parts],
            "threshold": round(float(report.thresholds[number]), 5),
            "quantiles": {
                f"{quantile:g}": round(float(value), 5)
                for quantile, value in zip(QUANTILES, report.background.quantiles[number], strict=True)
            },
            "best": [
                {"row": int(row), "key": key, "cosine": round(float(score), 5)}
                for row, key, score in zip(report.rows[number], keys[number], report.scores[number], strict=True)
            ],
        }
        for number, name in enumerate(report.concepts.names)
    ]


def _of(num: int, total: int) -> str:
    return f"{num:,} ({num / total:.1%})" if total else "0"


def _percent(part: Counts, share: float) -> str:
    found = part.top_share(share)
    return "-" if np.isnan(found) else f"{found:.1%}"


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 5)
