"""embedcache train"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedcache.cache.split_settings import SplitSettings
from embedcache.train.settings import (
    LossSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)


def train(
    paths: Annotated[list[str], typer.Argument(metavar="CACHE … RUN", help="One cache or several; a run's folder.")],
    image: Annotated[
        str | None, typer.Option(help="encoder/feature, or vector+tokens. [default: the only one]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="encoder/feature. [default: the only one]")] = None,
    projector: Annotated[
        str, typer.Option(help="linear, mlp, glu, fusemix, token, asif …; IMAGE+TEXT.")
    ] = ModelSettings.projector,
    shared_width: Annotated[int, typer.Option(help="Width of the shared space.")] = ModelSettings.shared_width,
    loss: Annotated[
        str, typer.Option(help="multi_positive, info_nce, siglip, sail, or module:attribute.")
    ] = LossSettings.name,
    mixup: Annotated[float, typer.Option(help="a of FuseMix's Beta(a, a); 0: none.")] = LossSettings.mixup,
    structure: Annotated[float, typer.Option(help="Weight of the STRUCTURE regulariser.")] = LossSettings.structure,
    start: Annotated[
        Literal["cca", "csa", "procrustes", "ridge", "random"] | None,
        typer.Option(help="The closed form that training starts from. [default: cca where the projectors can]"),
    ] = None,
    shrinkage: Annotated[float, typer.Option(help="Of the closed form.")] = ModelSettings.shrinkage,
    dropout: Annotated[float, typer.Option(help="Of the input; more for fewer pairs.")] = ModelSettings.dropout,
    epochs: Annotated[int, typer.Option(help="0 keeps the closed form as it is.")] = OptimizerSettings.epochs,
    patience: Annotated[int | None, typer.Option(help="Epochs without a better recall, then stop.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a batch. [default: 1024, or all]")] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = OptimizerSettings.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = OptimizerSettings.weight_decay,
    warmup_share: Annotated[float, typer.Option(help="Of all steps.")] = OptimizerSettings.warmup_share,
    gradient_norm: Annotated[float, typer.Option(help="Longer gradients are cut.")] = OptimizerSettings.gradient_norm,
    split: Annotated[
        str,
        typer.Option(help="strict (near-duplicates stay together), key, column, or another run's split.parquet."),
    ] = SplitSettings.kind,
    val_share: Annotated[float, typer.Option(help="Share of the samples for validation.")] = SplitSettings.val_share,
    test_share: Annotated[float, typer.Option(help="Share of the samples for test.")] = SplitSettings.test_share,
    image_cosine: Annotated[
        float, typer.Option(help="strict: images above this cosine are near-duplicates.")
    ] = SplitSettings.image_cosine,
    text_cosine: Annotated[
        float, typer.Option(help="strict: captions above this cosine are near-duplicates.")
    ] = SplitSettings.text_cosine,
    split_seed: Annotated[int | None, typer.Option(help="Which cut. [default: the seed]")] = None,
    language: Annotated[str | None, typer.Option(help="Captions of this language only.")] = None,
    captions: Annotated[
        Literal["draw", "all"], typer.Option(help="Of several: draw one each epoch, or all are positives.")
    ] = TrainSettings.captions,
    selection: Annotated[str | None, typer.Option(help="Train on these keys only: Parquet, or text.")] = None,
    shuffle_pairs: Annotated[bool, typer.Option("--shuffle-pairs", help="Train on wrong pairs, as a control.")] = False,
    block_rows: Annotated[
        int | None, typer.Option(help="Samples shuffled as one. [default: 1, or 64 where features are mapped]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of order, drawing and initialisation.")] = TrainSettings.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = MachineSettings.device,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="bfloat16: autocast.")
    ] = MachineSettings.precision,
    threads: Annotated[int | None, typer.Option(help="On the CPU. [default: one for small steps, else all]")] = None,
    memory_gb: Annotated[float, typer.Option(help="Larger features are mapped, not read.")] = MachineSettings.memory_gb,
    checkpoint_s: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = MachineSettings.checkpoint_s,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write its event files as well.")] = False,
) -> None:
    """Train a pair of projectors on two cached features of a cache, or of several. Under torchrun: on all processes.

    A run that was stopped goes on where it was, given the same command.
    """
    options = dict(locals())  # the very names of the settings
    from embedcache.cli.console import going_on_later, open_progress, say
    from embedcache.errors import SettingError
    from embedcache.progress import Silent
    from embedcache.train.distributed import is_first_process
    from embedcache.train.options import settings_of
    from embedcache.train.train import train as run_training

    *caches, run = options.pop("paths")
    if not caches:
        raise SettingError(f"one path, {run}, was given; give a cache, or several, and then a folder for the run")
    settings = settings_of({name: value for name, value in options.items() if name not in ("image", "text")})
    progress = open_progress() if is_first_process() else Silent()
    with going_on_later():
        report = run_training(caches, run, image=image, text=text, settings=settings, progress=progress)
    if is_first_process():
        say(report.line(Path(run)))
