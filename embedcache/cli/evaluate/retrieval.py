"""embedcache evaluate retrieval"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def retrieval(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    run: Annotated[list[Path], typer.Argument(help="One run, or several seeds of it to average.")],
    part: Annotated[Literal["test", "val", "train"], typer.Option(help="Part of the run's split.")] = "test",
    language: Annotated[str | None, typer.Option(help="Captions of this language. [default: the run's]")] = None,
    control: Annotated[
        list[Path] | None, typer.Option(help="Runs trained with --shuffle-pairs, shown beside it.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Image-text retrieval both ways, with intervals and chance."""
    from embedcache.artifact import write_json
    from embedcache.cli.console import say, show_table
    from embedcache.evaluate.report import retrieval_json, retrieval_rows
    from embedcache.evaluate.retrieval import evaluate_retrieval

    reports = {"run": evaluate_retrieval(cache, run, part=part, language=language)}
    if control:
        reports["shuffled pairs"] = evaluate_retrieval(cache, control, part=part, language=language, is_control=True)
    say(reports["run"].line())
    columns, rows = retrieval_rows(reports)
    show_table(columns, rows)
    if json_path is not None:
        write_json(
            json_path,
            {"retrieval": retrieval_json(reports["run"], shuffled=reports.get("shuffled pairs"))},
        )
