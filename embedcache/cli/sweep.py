"""embedcache sweep"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def sweep(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="CACHE … STUDY SPACE.toml", help="One cache or several; a study's folder; its space."),
    ],
    image: Annotated[str | None, typer.Option(help="encoder/feature. [default: the only one]")] = None,
    text: Annotated[str | None, typer.Option(help="encoder/feature. [default: the only one]")] = None,
    trials: Annotated[int, typer.Option(help="Of the study, by all workers together.")] = 50,
    sampler: Annotated[
        Literal["tpe", "random", "grid"], typer.Option(help="tpe learns from the trials before; grid tries all.")
    ] = "tpe",
    pruner: Annotated[
        Literal["none", "median", "hyperband"], typer.Option(help="Ends trials that lie behind.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes of this machine.")] = 1,
    seeds: Annotated[int, typer.Option(help="That the best are trained with again.")] = 3,
    top: Annotated[int, typer.Option(help="How many are the best.")] = 3,
    storage: Annotated[
        str | None, typer.Option(help="Of Optuna, by URL. [default: SQLite in the study's folder]")
    ] = None,
) -> None:
    """Train on a cache with many settings, and report which are best and what matters.

    SPACE.toml: [fixed] epochs = 20 … [space] lr = {low = 1e-4, high = 1e-2, log = true}, projector =
    ["linear", "mlp"] … A study that was stopped goes on, given the same command; more --trials make it longer.
    """
    from embedcache.cli.console import going_on_later, open_progress, say, show_table
    from embedcache.errors import SettingError
    from embedcache.reports.sweep import best_rows, test_tables
    from embedcache.sweep.settings import SweepSettings
    from embedcache.sweep.sweep import sweep as run

    if len(paths) < 3:
        raise SettingError(
            f"{len(paths)} paths were given, {' '.join(paths)}; give a cache, or several, then a folder for the study, "
            "then the TOML file of the space"
        )
    *caches, study, space = paths
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
    with going_on_later():
        report = run(caches, Path(study), space, image=image, text=text, settings=settings, progress=open_progress())
    show_table(*best_rows(report.best), title="Best on validation, each trained with several seeds")
    for cache, table in test_tables(report.best).items():
        show_table(*table, title=f"{cache}: held-out retrieval [95 % interval]")
    say(f"train the best again: {report.findings.command}")
    say(f"figures: {report.figures_path}")
    say(f"open {report.page_path} in a browser")
