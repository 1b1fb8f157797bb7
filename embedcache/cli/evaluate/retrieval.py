"""embedcache evaluate retrieval"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def retrieval(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL; one with the encoders of the runs.")],
    run: Annotated[list[Path], typer.Argument(help="Runs; seeds of one recipe are averaged.")],
    part: Annotated[
        Literal["test", "val", "train", "all"] | None,
        typer.Option(help="Of the run's split, or of the column split. [default: test, or all]"),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Captions of this language; again for others. [default: the run's]")
    ] = None,
    control: Annotated[
        list[Path] | None, typer.Option(help="Runs trained with --shuffle-pairs, shown beside them.")
    ] = None,
    trained_on: Annotated[
        list[str] | None, typer.Option(help="Where the caches of the training lie now, to look for leaks.")
    ] = None,
    leaks: Annotated[bool, typer.Option(help="Compare with what was seen in training.")] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures as CLIP_benchmark does: a .json file, or a folder.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with curves and examples.")] = None,
) -> None:
    """Image-text retrieval both ways, with intervals and chance."""
    from embedcache.cli.console import say, show_table
    from embedcache.evaluate.retrieval import evaluate_retrieval, rank
    from embedcache.evaluate.runs import load_runs, named_recipes
    from embedcache.reports.results import retrieval_result, write_results
    from embedcache.reports.retrieval import rank_table, retrieval_table, write_retrieval_page
    from embedcache.store.cache import Cache

    reports, results = {}, {}
    for name, paths, is_control in named_recipes(run, control or []):
        for code in language or [""]:
            title = f"{name}, {code}" if code else name
            reports[title] = evaluate_retrieval(
                cache,
                paths,
                part=part,
                language=code or None,
                is_control=is_control,
                trained_on=trained_on or [],
                compares=leaks,
            )
            results[title] = retrieval_result(reports[title], cache=cache, runs=paths)
    for name, report in reports.items():
        say(f"{name}: {report.line()}")
        if report.overlap:
            say(f"  {report.overlap.line()}")
    show_table(*retrieval_table(reports))
    show_table(*rank_table(reports))
    if json_path is not None:
        write_results(json_path, results)
    if html is not None:
        opened = Cache(cache)
        ranking = rank(opened, load_runs(run[:1])[0], part=part, language=language[0] if language else None)
        write_retrieval_page(html, opened, reports, ranking)
        say(f"wrote {html}")
