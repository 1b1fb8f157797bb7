"""embedcache sweep"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import (
    Features,
    ImageFeature,
    Json,
    Output,
    TextFeature,
    features_by_modality,
    with_settings,
)
from embedcache.sweep.settings import SweepSettings


@with_settings(settings=SweepSettings)
def sweep(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="TOML file with the tables fixed and space.")],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder to write the study to.")],
    image_feature: ImageFeature = None,
    text_feature: TextFeature = None,
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
        image_feature=image_feature,
        text_feature=text_feature,
        feature=features_by_modality(feature),
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
