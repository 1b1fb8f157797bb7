"""A page in HTML, and the same in Markdown with its figures as files, for the documentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from embedcache.files import write_atomic
from embedcache.reports.base import Section, Table, svg, write_report
from pipelines.common import markdown_table, save_figure


class Part(NamedTuple):
    """A section of the page: paragraphs, then a table or a figure, whose file has the name."""

    title: str
    notes: Sequence[str]
    table: Table | None = None
    figure: Figure | None = None
    name: str = ""


def write_pages(
    path: Path, title: str, parts: Sequence[Part], *, notes: Sequence[str], summary: str, credit: str = ""
) -> None:
    """Write a page as HTML and as Markdown.

    Args:
        path: both files without their suffix; a figure is `PATH-NAME` with one.
        title: title of the page.
        parts: sections.
        notes: what is compared, and how.
        summary: what was found, in a few sentences.
        credit: who made what is shown.
    """
    write_report(
        path.with_suffix(".html"),
        title=title,
        summary=summary,
        sections=[
            Section(title="What is compared", notes=_plain(notes)),
            *(
                Section(
                    title=part.title,
                    notes=_plain(part.notes),
                    table=part.table,
                    figures=[] if part.figure is None else [svg(part.figure)],
                )
                for part in parts
            ),
        ],
        credit=credit,
    )
    blocks = [f"# {title}", *notes, summary]
    for part in parts:
        blocks += [f"## {part.title}", *part.notes]
        blocks += [] if part.table is None else [markdown_table(*part.table)]
        if part.figure is not None:
            figure_name = save_figure(path.with_name(f"{path.name}-{part.name}"), part.figure)
            blocks.append(f"![{part.title}]({figure_name})")
    write_atomic(path.with_suffix(".md"), ("\n\n".join(filter(None, [*blocks, credit])) + "\n").encode())


def _plain(notes: Sequence[str]) -> list[str]:
    """Return notes without the backticks of Markdown."""
    return [note.replace("`", "") for note in notes]
