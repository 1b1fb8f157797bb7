"""embedcache train and sweep"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import (
    Features,
    Json,
    Output,
    with_settings,
)
from embedcache.sweep.settings import SweepSettings
from embedcache.train.settings import TrainSettings, train_settings


@with_settings(
    settings=TrainSettings,
    build={"settings": train_settings},
    config_help="Read options from this TOML file, or from a run's run.json; the command line takes precedence.",
)
def train(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder to write the run to.")],
    feature: Features = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: TrainSettings,
) -> None:
    """Train projectors that align the features of two modalities.

    Run the same command again to resume an interrupted run. Under torchrun, training uses all processes.

    Example: embedcache train cache/ run/ --projector mlp --lr 0.001
    """
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.progress import NullProgress
    from embedcache.train.distributed import is_first_process
    from embedcache.train.train import train as run_training

    is_first = is_first_process()
    report = run_training(
        caches,
        run,
        feature=feature,
        settings=settings,
        progress=open_progress() if is_first else NullProgress(),
    )
    if is_first:

        def show() -> None:
            print_line(report.line(run))

        publish(show, lambda: to_plain(report), as_json=as_json, output=output)


@with_settings(settings=SweepSettings)
def sweep(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="TOML file with the tables fixed and space.")],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder to write the study to.")],
    feature: Features = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: SweepSettings,
) -> None:
    """Search training settings, and report the best.

    SPACE.toml fixes some settings of train in its table fixed, and gives ranges or choices of others in its table
    space, such as lr = {low = 1e-4, high = 1e-2, log = true}. Run the same command again to resume an interrupted
    study, or with more --trials to extend it.

    Example: embedcache sweep cache/ space.toml study/ --trials 50
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.provenance import read_json
    from embedcache.reports.sweep import best_table, test_tables
    from embedcache.sweep.sweep import sweep as run

    report = run(
        caches,
        study,
        space,
        feature=feature,
        settings=settings,
        progress=open_progress(),
    )

    def show() -> None:
        print_table(*best_table(report.best), title="Best on validation, each trained with several seeds")
        for cache, table in test_tables(report.best).items():
            print_table(*table, title=f"{cache}: held-out retrieval [95% interval]")
        if report.findings.warning:
            print_line(f"WARNING: {report.findings.warning}")
        print_line(f"best run: {report.findings.winner.run_paths[0]}")
        print_line(f"to train it again: {report.findings.command}")
        print_line(f"results: {report.json_path}")
        print_line(f"open {report.page_path} in a browser")

    publish(show, lambda: read_json(report.json_path), as_json=as_json, output=output)
