"""What holds for every report: it prints, its JSON values round-trip, and its page has all of it and loads nothing."""

import contextlib
import html
import io
import json
import re

from embedcache.cli.console import print_report
from embedcache.reports.render import Presentation, to_html


def check_report(report: Presentation) -> str:
    """Check the contract of reports; return the page, on which a test may check what this report has of its own."""
    assert report.lines or report.sections
    record = report.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_report(report)
    assert all(line in printed.getvalue() for line in (*report.lines, *report.warnings, *report.notes))

    page = to_html(report)
    shown = html.unescape(page)
    for section in report.sections:
        columns, rows = section.table or ((), ())
        assert all(len(row) == len(columns) for row in rows)
        assert all(text in shown for text in (section.title, *section.notes, *columns, *(rows[0] if rows else ())))
    assert all(text in shown for text in (report.title, *report.lines, *report.warnings))
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search("<script|<link", page)
    return page
