"""The presentation of a report, and the page, the text and the JSON values that are made from it.

Numbers are written one way everywhere: fractions and cosines with three decimals (`0.066`), estimates with their 95%
interval (`0.066 [0.046, 0.101]`), percentages with one decimal (`12.3%`), counts with thousands separators (`12,345`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic import BaseModel

from embedcache.errors import summary
from embedcache.files import write_atomic
from embedcache.metrics import Estimate
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample

Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column names, and rows of text."""

MODEL = "embedcache"
"""Name of our models in results, and of their type among CLIP_benchmark's model types."""

_BEGINS_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?(%|$| [\[(])")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a report.

    Args:
        title: title of the section, and of its table in the terminal.
        notes: paragraphs of the page.
        table: table of the page, and of the terminal.
        num_printed: rows of the table that the terminal shows, all if None.
        code: command to copy from the page.
        figures: returns SVG elements; called for a page only.
        items: returns items to show side by side; called for a page only.
        examples: returns examples with items; called for a page only.
    """

    title: str
    notes: Sequence[str] = ()
    table: Table | None = None
    num_printed: int | None = None
    code: str = ""
    figures: Callable[[], Sequence[str]] = tuple
    items: Callable[[], Sequence[PageItem]] = tuple
    examples: Callable[[], Sequence[QueryExample]] = tuple


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """A report as a command shows it: in the terminal, as JSON, and as a page.

    Args:
        lines: results in one line each.
        record: returns the report as JSON values.
        title: title of the page.
        warnings: reasons to doubt the numbers.
        tiles: main numbers of the page, each with its description.
        sections: sections in order.
        notes: last lines in the terminal, such as the next step.
        renderers: renderers of the items in examples, which know what could not be shown.
        finish: called after the report was printed and written, for example to raise an error about its content.
    """

    lines: Sequence[str]
    record: Callable[[], Any]
    title: str = ""
    warnings: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()
    renderers: Sequence[ItemRenderer] = ()
    finish: Callable[[], object] = tuple


def present(
    report: Any,
    *,
    lines: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    finish: Callable[[], object] = tuple,
) -> Presentation:
    """Return the presentation of a report that is a few lines, or of a list of such reports.

    Args:
        report: a report. Its JSON values are the result of its `to_json`, or else its fields.
        lines: lines to print. If None, the lines that `line` or `lines` of the report returns.
        notes: last lines in the terminal.
        finish: called after the report was printed and written.
    """
    if lines is None:
        lines = []
        for each in report if isinstance(report, list | tuple) else [report]:
            lines += summary(each).split("\n")
    record = report.to_json if hasattr(report, "to_json") else partial(to_plain, report)
    return Presentation(lines=lines, record=record, notes=notes, finish=finish)


def to_plain(value: Any) -> Any:
    """Return a report as JSON values: dataclasses become objects, arrays and sequences lists, paths strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): to_plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return list(map(to_plain, value))

    # Arrays and numbers of NumPy.
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def to_html(report: Presentation) -> str:
    """Return a report as one page that loads nothing from elsewhere. Text is escaped, figures are not."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("embedcache.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    # Examples are made before the warnings are read: only then the renderers know which items they could not show.
    sections = []
    for section in report.sections:
        is_number = _find_numbers(section.table)
        sections.append((section, is_number, section.figures(), section.items(), section.examples()))

    warnings = list(report.warnings)
    credits: list[str] = []
    for renderer in report.renderers:
        warnings += renderer.warnings()
        credits += filter(None, [renderer.credit])

    # Renderers of one cache have the same warnings and credits, which are shown once.
    page = environment.get_template("page.html.j2")
    return page.render(
        report=report,
        sections=sections,
        warnings=dict.fromkeys(warnings),
        credits=dict.fromkeys(credits),
    )


def write_page(path: Path, report: Presentation) -> None:
    """Write a report as a page, in place of an earlier one."""
    write_atomic(path, to_html(report).encode())


def _find_numbers(table: Table | None) -> list[bool]:
    """Return which columns of a table contain numbers, which are aligned to the right."""
    columns, rows = table or ((), ())
    is_number = [False] * len(columns)
    for row in rows:
        # The first column names the rows, also by numbers.
        for position, cell in enumerate(row[1:], start=1):
            is_number[position] |= _BEGINS_NUMBER.match(cell) is not None
    return is_number


def format_fraction(value: float | None) -> str:
    """Return a fraction, cosine or score as text, such as `0.066`; empty for None and NaN."""
    # The format "z" writes a negative value that rounds to zero without its sign.
    return "" if value is None or np.isnan(value) else f"{value:z.3f}"


def format_percent(fraction: float) -> str:
    """Return a fraction as a percentage, such as `12.3%`; empty for NaN."""
    return "" if np.isnan(fraction) else f"{fraction:.1%}"


def format_count(count: float) -> str:
    """Return a count as text, such as `12,345`."""
    return f"{count:,.0f}"


def format_part(count: int, total: int) -> str:
    """Return a count and its percentage of a total, such as `12 (3.4%)`."""
    return f"{count:,} ({format_percent(count / total)})" if total else f"{count:,}"


def round_json(value: float | None) -> float | None:
    """Return a number as a JSON value with five decimals; None for None and NaN."""
    # JSON has no NaN.
    return None if value is None or np.isnan(value) else round(float(value), 5)


def estimates_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return estimates as JSON values: each by its name, and `intervals` with the 95% interval of each."""
    values: dict[str, Any] = {}
    intervals = {}
    for name, estimate in estimates.items():
        values[name] = round_json(estimate.value)
        intervals[name] = interval_json(estimate)
    return {**values, "intervals": intervals}


def interval_json(estimate: Estimate) -> list[float | None]:
    """Return the 95% interval of an estimate as a JSON value."""
    return [round_json(estimate.low), round_json(estimate.high)]


def clip_benchmark_json(
    task: str,
    metrics: Mapping[str, float | None],
    details: Mapping[str, Any],
    *,
    dataset: str,
    pretrained: str,
    model: str = MODEL,
    language: str | None = None,
) -> dict[str, Any]:
    """Return a result with the keys of CLIP_benchmark's files, from which its `build` makes one table.

    Args:
        task: CLIP_benchmark's name of the task.
        metrics: CLIP_benchmark's name of a metric -> a fraction.
        details: our own JSON values.
        dataset: name of the cache.
        pretrained: the run, or the seeds that were averaged.
        model: name of the encoder, for a result without a run.
        language: language of the captions or prompts, or None for all.
    """
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": dict(metrics),
        "language": language,
        "details": dict(details),
    }


def one_or_list(results: Sequence[Any]) -> Any:
    """Return the only result, or the list of several."""
    return results[0] if len(results) == 1 else list(results)
