"""embedcache evaluate zero-shot"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def zero_shot(
    cache: Annotated[str, typer.Argument(help="A cache with labels and the image encoder of the runs, or its URL.")],
    run: Annotated[list[Path], typer.Argument(help="Runs; seeds of one recipe are averaged.")],
    prompts: Annotated[str, typer.Option(help="A cache that embedcache extract prompts:… made.")],
    label: Annotated[str, typer.Option(help="Column of labels: class names, or numbers from 0.")] = "label",
    part: Annotated[
        Literal["test", "val", "train", "all"] | None,
        typer.Option(help="Of the run's split, or of the column split. [default: test, or all]"),
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
    html: Annotated[Path | None, typer.Option(help="Write a page with classes, confusions and examples.")] = None,
) -> None:
    """Zero-shot classification by cached prompts, with intervals and chance."""
    from embedcache.cli.console import say, show_table
    from embedcache.evaluate.runs import load_runs, named_recipes
    from embedcache.evaluate.zero_shot import classify, evaluate_zero_shot
    from embedcache.reports.results import write_results, zero_shot_result
    from embedcache.reports.zero_shot import write_zero_shot_page, zero_shot_table
    from embedcache.store.cache import Cache

    reports, results = {}, {}
    for name, paths, is_control in named_recipes(run, control or []):
        reports[name] = evaluate_zero_shot(
            cache,
            paths,
            prompts,
            label=label,
            part=part,
            is_control=is_control,
            trained_on=trained_on or [],
            compares=leaks,
        )
        results[name] = zero_shot_result(reports[name], cache=cache, prompts=prompts, runs=paths)
    for name, report in reports.items():
        say(f"{name}: {report.line()}")
        if report.overlap:
            say(f"  {report.overlap.line()}")
    show_table(*zero_shot_table(reports))
    if json_path is not None:
        write_results(json_path, results)
    if html is not None:
        opened = Cache(cache)
        shown = classify(opened, load_runs(run[:1])[0], Cache(prompts), label=label, part=part)
        write_zero_shot_page(html, opened, reports, shown)
        say(f"wrote {html}")
