"""embedcache train and sweep"""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.cli.commands import CacheArgument, Features, command, new_group
from embedcache.sweep.settings import SweepSettings
from embedcache.train.settings import AdapterSettings, TrainSettings, adapter_settings, train_settings

app = new_group()


@command(
    app,
    "train",
    settings=TrainSettings,
    plugins=("projectors", "losses"),
    common=(
        "feature",
        "recipe",
        "projector",
        "dropout",
        "loss",
        "epochs",
        "batch_size",
        "lr",
        "split",
        "language",
        "selection",
        "seed",
        "config",
    ),
    build={"settings": train_settings},
    config_help="Read options from this TOML file, or from a run's run.json; the command line takes precedence.",
)
def train(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder to write the run to.")],
    feature: Features = None,
    *,
    settings: TrainSettings,
) -> Any:
    """Train projectors that align the features of two modalities.

    Run the same command again to resume an interrupted run. Under torchrun, training uses all processes.

    Example: embedcache train cache/ run/ --projector mlp --lr 0.001
    """
    from embedcache.cli.console import open_progress
    from embedcache.progress import NullProgress
    from embedcache.reports.render import present
    from embedcache.train.distributed import is_first_process
    from embedcache.train.train import train as run_training

    is_first = is_first_process()
    progress = open_progress() if is_first else NullProgress()
    report = run_training(caches, run, feature=feature, settings=settings, progress=progress)
    return present(report, lines=[report.line(run)]) if is_first else None


@command(app, "adapt", settings=AdapterSettings, build={"settings": adapter_settings})
def adapt(
    cache: CacheArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder to write the adapter to, a run.")],
    feature: Annotated[
        str, typer.Option(metavar="[MODALITY=]NAME", help="Feature of the new encoder, as encoder/feature.")
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME|RUN", help="Feature of the old encoder, or run that was trained on it, to map vectors onto."
        ),
    ],
    *,
    settings: AdapterSettings,
) -> Any:
    """Map a new encoder's vectors into the space of an old one.

    A sample encoded with both is enough: search an old index with a new encoder, or give an encoder without texts the
    text tower of a run.

    Example: embedcache adapt cache/ adapter/ --feature new-encoder/cls --target old-encoder/cls
    """
    from embedcache.cli.console import open_progress
    from embedcache.reports.render import present
    from embedcache.train.adapter import fit_adapter

    report = fit_adapter(cache, adapter, feature=feature, target=target, settings=settings, progress=open_progress())
    return present(report, lines=[report.line(adapter)])


@command(app, "sweep", settings=SweepSettings, plugins=("projectors", "losses"))
def sweep(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="TOML file with the tables fixed and space.")],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder to write the study to.")],
    feature: Features = None,
    *,
    settings: SweepSettings,
) -> Any:
    """Search training settings, and report the best.

    SPACE.toml fixes some settings of train in its table fixed, and gives ranges or choices of others in its table
    space, such as lr = {low = 1e-4, high = 1e-2, log = true}. Run the same command again to resume an interrupted
    study, or with more --trials to extend it.

    Example: embedcache sweep cache/ space.toml study/ --trials 50
    """
    from embedcache.cli.console import open_progress
    from embedcache.sweep.report import present_sweep
    from embedcache.sweep.sweep import sweep as run

    report = run(caches, study, space, feature=feature, settings=settings, progress=open_progress())
    return present_sweep(report)
