"""A report as one page of sections: tables, figures, and examples to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedcache.pages.write import write_page

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The names of the columns, and rows of text."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture or a text among a query's answers.

    Args:
        text: shown below the picture, or alone.
        picture: a `data:` URL.
        is_right: marked where true.
    """

    text: str = ""
    picture: str | None = None
    is_right: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A query, what was ranked first for it, and what would have been right.

    Args:
        query: what was asked.
        said: how it went, in a few words.
        is_right: whether it went well.
        shown: what was ranked first, best first.
        answer: what is right, where it is not among those.
    """

    query: Shown
    said: str
    is_right: bool
    shown: Sequence[Shown]
    answer: Shown | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page, in this order: title, notes, table, figures, cases."""

    title: str
    notes: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[str] = ()
    cases: Sequence[Case] = ()


def write_sections(
    path: Path,
    *,
    title: str,
    lead: str,
    warnings: Sequence[str] = (),
    sections: Sequence[Section],
    credit: str = "",
) -> None:
    """Write the page. It asks for nothing from outside.

    Args:
        path: of the page.
        title: of the page.
        lead: what was measured, in a sentence.
        warnings: what makes its figures doubtful, shown at the top.
        sections: in order.
        credit: whose the pictures are.
    """
    write_page(path, "pages", title=title, lead=lead, warnings=warnings, sections=sections, credit=credit)
