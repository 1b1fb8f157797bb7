"""embedcache quickstart"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import Json, Output


def quickstart(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder for the cache, the run, the index and the report.")
    ] = Path("embedcache-quickstart"),
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Run the whole system on packaged images.

    Extract OpenMoji with two packaged encoders, train projectors, evaluate, index, search and write an HTML report.

    Example: embedcache quickstart
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.provenance import read_json
    from embedcache.quickstart.quickstart import quickstart as run
    from embedcache.reports.retrieval import retrieval_table

    report = run(folder, progress=open_progress())

    def show() -> None:
        title = "Held-out retrieval, strict split, mean of 3 seeds [95% interval]"
        print_table(*retrieval_table(report.retrieval), title=title)
        print_line(f"metrics: {report.metrics_path}")
        print_line(f"open {report.page_path} in a browser")

    publish(show, lambda: read_json(report.metrics_path), as_json=as_json, output=output)
