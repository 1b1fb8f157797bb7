"""embedcache quickstart"""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    workdir: Annotated[Path, typer.Argument(help="Where everything goes.")] = Path("embedcache-quickstart"),
) -> None:
    """Align two packaged encoders on OpenMoji: extract, train, evaluate, index, search, and a report to look at."""
    from embedcache.cli.console import open_progress, say, show_table
    from embedcache.quickstart.quickstart import quickstart as run
    from embedcache.reports.retrieval import retrieval_table

    report = run(workdir, progress=open_progress())
    columns, rows = retrieval_table(report.retrieval)
    show_table(columns, rows, title="Held-out retrieval, strict split, mean of 3 seeds [95 % interval]")
    say(f"figures: {report.metrics_path}")
    say(f"open {report.page_path} in a browser")
