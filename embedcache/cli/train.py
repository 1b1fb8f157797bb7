"""embedcache train"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import Features, ImageFeature, Json, Output, TextFeature, by_modality, with_settings
from embedcache.train.settings import TrainSettings, train_settings


@with_settings(
    settings=TrainSettings,
    build={"settings": train_settings},
    config_help="Read options from this TOML file, or from a run's config.json; the command line takes precedence.",
)
def train(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder to write the run to.")],
    image_feature: ImageFeature = None,
    text_feature: TextFeature = None,
    feature: Features = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: TrainSettings,
) -> None:
    """Train projectors between features of two modalities.

    Run the same command again to resume an interrupted run. Under torchrun, training uses all processes.

    Example: embedcache train cache/ run/ --projector mlp --lr 0.001
    """
    from embedcache.cli.console import open_progress, print_line, publish, resumable, to_plain
    from embedcache.progress import NullProgress
    from embedcache.train.distributed import is_first_process
    from embedcache.train.train import train as run_training

    named = by_modality("--feature", feature, "audio=tiny.en/mean")
    is_first = is_first_process()
    with resumable():
        report = run_training(
            caches,
            run,
            image_feature=image_feature,
            text_feature=text_feature,
            features=None if named is None else {modality: "+".join(names) for modality, names in named.items()},
            settings=settings,
            progress=open_progress() if is_first else NullProgress(),
        )
    if is_first:
        publish(lambda: print_line(report.line(run)), lambda: to_plain(report), as_json=as_json, output=output)
