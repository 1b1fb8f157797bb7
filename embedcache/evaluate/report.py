"""Retrieval figures as rows to print and as JSON."""

from collections.abc import Mapping
from typing import Any

from embedcache.evaluate.retrieval import KS, WAYS, RetrievalReport
from embedcache.metrics.intervals import Estimate

Figures = Mapping[str, Mapping[str, Estimate]]


def retrieval_rows(reports: Mapping[str, RetrievalReport]) -> tuple[list[str], list[list[str]]]:
    """Lay reports out as a table: one row each, and a last row of what chance gives on the first one's items.

    Returns:
        The column names, and the rows of text: `value [low, high]`.
    """
    columns = ["", *(f"{way} R@{k}" for way in WAYS for k in KS)]
    rows = [[name, *_cells(report.recalls)] for name, report in reports.items()]
    chance = next(iter(reports.values())).chance
    return columns, [*rows, ["chance", *_cells(chance)]]


def _cells(figures: Figures) -> list[str]:
    return [format_estimate(figures[way][f"r@{k}"]) for way in WAYS for k in KS]


def order_rows(reports: Mapping[str, RetrievalReport]) -> tuple[list[str], list[list[str]]]:
    """Lay mean average precisions and median ranks out as a table, a row a report."""
    columns = ["", *(f"{way} {name}" for way in WAYS for name in ("mAP", "median rank"))]
    return columns, [[name, *_order_cells(report)] for name, report in reports.items()]


def _order_cells(report: RetrievalReport) -> list[str]:
    orders = [report.orders[way] for way in WAYS]
    return [text for one in orders for text in (format_estimate(one["map"]), _format_rank(one["median_rank"]))]


def _format_rank(estimate: Estimate) -> str:
    return f"{estimate.value:,.0f} [{estimate.low:,.0f}, {estimate.high:,.0f}]"


def format_estimate(estimate: Estimate) -> str:
    """Write a share with its interval: `.123 [.101, .145]`."""
    return f"{format_share(estimate.value)} [{format_share(estimate.low)}, {format_share(estimate.high)}]"


def format_share(share: float) -> str:
    """Write a share: `.123`."""
    return f"{share:.3f}".replace("0.", ".", 1)


def retrieval_json(report: RetrievalReport, **others: RetrievalReport | None) -> dict[str, Any]:
    """Give the figures as JSON values: `i2t`, `t2i`, `chance`, one entry for each of `others`, counts and seeds.

    Each way holds `r@1`, `r@5`, `r@10`, the report's own also `map` and `median_rank`, and `intervals` with the 95 %
    interval of each.
    """
    return {
        **_json({way: {**report.recalls[way], **report.orders[way]} for way in WAYS}),
        "chance": _json(report.chance),
        **{name: _json(other.recalls) for name, other in others.items() if other is not None},
        "num_images": report.num_images[0],
        "num_texts": report.num_texts[0],
        "seeds": report.seeds,
        "recall_by_seed": [round(recall, 5) for recall in report.by_seed],
        "part": report.part,
        "language": report.language,
        "overlap": report.overlap.to_json() if report.overlap else None,
    }


def _json(figures: Figures) -> dict[str, Any]:
    return {
        way: {
            **{name: round(estimate.value, 5) for name, estimate in figures[way].items()},
            "intervals": {
                name: [round(estimate.low, 5), round(estimate.high, 5)] for name, estimate in figures[way].items()
            },
        }
        for way in figures
    }
