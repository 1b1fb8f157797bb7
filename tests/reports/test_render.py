"""Numbers, examples and pages of all reports."""

import html
import re

import numpy as np
import pytest

from embedcache.metrics import Estimate
from embedcache.reports.figures import estimate_bars, histogram, legend_name, open_axes, svg
from embedcache.reports.items import PageItem, ranked_example
from embedcache.reports.render import (
    Presentation,
    Section,
    estimates_json,
    format_count,
    format_fraction,
    format_part,
    format_percent,
    round_json,
)
from tests.reports.contract import check_report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_fraction(0.0658), "0.066"),
        (format_fraction(-0.5), "-0.500"),
        (format_fraction(-0.0001), "0.000"),
        (format_fraction(None), ""),
        (format_fraction(float("nan")), ""),
        (format_percent(0.12345), "12.3%"),
        (format_count(np.int64(12345)), "12,345"),
        (format_part(12, 345), "12 (3.5%)"),
        (format_part(0, 0), "0"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


def test_numbers_as_json() -> None:
    assert round_json(np.float32("nan")) is None
    assert estimates_json({"r@1": Estimate(0.1234567, 0, 1)}) == {"r@1": 0.12346, "intervals": {"r@1": [0, 1]}}


def test_answer_is_shown_only_if_missing() -> None:
    right, wrong = PageItem(text="right", is_correct=True), PageItem(text="wrong")
    assert ranked_example(wrong, [wrong, right], rank=2, answer=right).answer is None
    example = ranked_example(wrong, [wrong], rank=1234, answer=right)
    assert (example.answer, example.outcome) == (right, "first correct result at rank 1,234")


@pytest.mark.slow
def test_page_escapes_text() -> None:
    """Check also that only columns of numbers are aligned to the right."""
    table = ["<u>", "sizes", "names"], [["<i>", "1,000", "<em>"], ["x", "", "y"]]
    section = Section(
        title="<s>", notes=["<q>"], table=table, figures=lambda: [histogram(np.arange(3.0), x="a", y="b")]
    )
    page = check_report(
        Presentation(
            lines=["<q>"], record=dict, title="<T>", warnings=["<W>"], tiles=[("0.5", "<tile>")], sections=[section]
        )
    )
    assert not re.search("<(u|i|em|s|q|T|W|tile)>", page)
    assert page.count("<svg") == 1
    assert [re.search(f'<th( class="number")?>{name}', page)[1] for name in ("sizes", "names")] == [
        ' class="number"',
        None,
    ]


def test_names_in_figures_are_no_formulas() -> None:
    r"""`$5 to $10` would be drawn as `5to10`, and `$x_{$` is an error; powers of ten on axes are plain numbers."""
    names = {name: Estimate(0.5, 0.4, 0.6) for name in ("$5 to $10", "$x_{$")}
    axes = open_axes(2.0)
    estimate_bars(axes, names, height=0.6)
    assert axes.yaxis_inverted()  # the first bar is at the top
    axes.plot([1, 100], [0, 1], label="US$ and A$")
    axes.set_title("$x_{$")
    axes.set_xscale("log")
    axes.legend()
    text = svg(axes.figure)
    assert {"$5 to $10", "$x_{$", "US$ and A$"} <= set(re.findall("<!-- (.*) -->", text))
    assert "Oblique" not in text  # the letters of formulas
    assert "<!-- 100 -->" in text


@pytest.mark.parametrize(("name", "is_text"), [("Hund & Кот", False), ("犬 & <b>$x_{$", True)])
def test_letters_that_the_font_lacks_are_text(name: str, is_text: bool, recwarn: pytest.WarningsRecorder) -> None:
    axes = open_axes(2.0)
    estimate_bars(axes, {name: Estimate(0.5, 0.4, 0.6)}, height=0.6)
    figure = svg(axes.figure)
    found = [html.unescape(text) for text in re.findall("<text .*>(.*)</text>", figure)]
    assert (name in found) == is_text == bool(found)
    assert "<b>" not in figure
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_legend_names_a_line_that_begins_with_an_underscore() -> None:
    assert legend_name("_run") == " _run"
