"""embedcache sweep"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedcache.cli.options import ImageFeature, Json, Output, Seed, TextFeature


def sweep(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="TOML file with the tables fixed and space.")],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder to write the study to.")],
    image_feature: ImageFeature = None,
    text_feature: TextFeature = None,
    trials: Annotated[int, typer.Option(metavar="N", help="Trials of the study, by all workers together.")] = 50,
    sampler: Annotated[
        Literal["tpe", "random", "grid"],
        typer.Option(metavar="tpe|random|grid", help="How settings are chosen; tpe learns from earlier trials."),
    ] = "tpe",
    pruner: Annotated[
        Literal["none", "median", "hyperband"],
        typer.Option(metavar="none|median|hyperband", help="Stop underperforming trials early."),
    ] = "none",
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(metavar="N", help="Worker processes on this machine.")] = 1,
    seeds: Annotated[int, typer.Option(metavar="N", help="Seeds used to retrain each top configuration.")] = 3,
    top: Annotated[int, typer.Option(metavar="N", help="Number of top configurations to retrain.")] = 3,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Storage of Optuna.", show_default="SQLite in the folder of the study"),
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Search training settings, and report the best.

    SPACE.toml fixes some settings of train and names ranges or choices of others, such as
    lr = {low = 1e-4, high = 1e-2, log = true} and projector = {choices: linear, mlp}. Run the same command again to
    resume an interrupted study, or with more --trials to extend it.

    Example: embedcache sweep cache/ space.toml study/ --trials 50
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish, resumable
    from embedcache.provenance import read_json
    from embedcache.reports.sweep import best_rows, test_tables
    from embedcache.sweep.settings import SweepSettings
    from embedcache.sweep.sweep import sweep as run

    settings = SweepSettings(
        num_trials=trials,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        num_workers=workers,
        num_seeds=seeds,
        top=top,
        storage=storage,
    )
    with resumable():
        report = run(
            caches,
            study,
            space,
            image=image_feature,
            text=text_feature,
            settings=settings,
            progress=open_progress(),
        )

    def show() -> None:
        print_table(*best_rows(report.best), title="Best on validation, each trained with several seeds")
        for cache, table in test_tables(report.best).items():
            print_table(*table, title=f"{cache}: held-out retrieval [95 % interval]")
        print_line(f"to train the best again: {report.findings.command}")
        print_line(f"figures: {report.figures_path}")
        print_line(f"open {report.page_path} in a browser")

    publish(show, lambda: read_json(report.figures_path), as_json=as_json, output=output)
