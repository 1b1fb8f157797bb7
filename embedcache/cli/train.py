"""embedcache train"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import with_settings
from embedcache.train.settings import TrainSettings, train_settings


@with_settings(TrainSettings, build=train_settings)
def train(
    paths: Annotated[
        list[str], typer.Argument(metavar="CACHE... RUN", help="One or more caches, then the folder of the run.")
    ],
    image_feature: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Image feature, as encoder/feature or vector+tokens.", show_default="the only one"
        ),
    ] = None,
    text_feature: Annotated[
        str | None, typer.Option(metavar="NAME", help="Text feature, as encoder/feature.", show_default="the only one")
    ] = None,
    *,
    settings: TrainSettings,
) -> None:
    """Train projectors between two cached features.

    Run the same command again to resume an interrupted run. Under torchrun, training uses all processes.

    Example: embedcache train cache/ run/ --projector mlp --lr 0.001
    """
    from embedcache.cli.console import going_on_later, open_progress, say
    from embedcache.errors import SettingError
    from embedcache.progress import NullProgress
    from embedcache.train.distributed import is_first_process
    from embedcache.train.train import train as run_training

    *caches, run = paths
    if not caches:
        raise SettingError(f"expected one or more caches and then the folder of the run, got one path: {run}")
    progress = open_progress() if is_first_process() else NullProgress()
    with going_on_later():
        report = run_training(caches, run, image=image_feature, text=text_feature, settings=settings, progress=progress)
    if is_first_process():
        say(report.line(Path(run)))
