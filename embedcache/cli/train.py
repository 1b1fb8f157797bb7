"""embedcache train"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedcache.train.settings import ModelSettings, OptimizerSettings, SplitSettings, TrainSettings


def train(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    run: Annotated[Path, typer.Argument(help="A folder for the run.")],
    image: Annotated[str | None, typer.Option(help="encoder/feature. [default: the only one]")] = None,
    text: Annotated[str | None, typer.Option(help="encoder/feature. [default: the only one]")] = None,
    projector: Annotated[str, typer.Option(help="linear, mlp, glu, fusemix …; IMAGE+TEXT.")] = ModelSettings.projector,
    shared_width: Annotated[int, typer.Option(help="Width of the shared space.")] = ModelSettings.shared_width,
    loss: Annotated[
        str, typer.Option(help="multi_positive, info_nce, siglip, sail, or module:attribute.")
    ] = TrainSettings.loss,
    start: Annotated[
        Literal["cca", "procrustes", "ridge", "random"] | None,
        typer.Option(help="The closed form that training starts from. [default: cca where the projectors can]"),
    ] = None,
    shrinkage: Annotated[float, typer.Option(help="Of the closed form.")] = ModelSettings.shrinkage,
    dropout: Annotated[float, typer.Option(help="Of the input; more for fewer pairs.")] = ModelSettings.dropout,
    epochs: Annotated[int, typer.Option(help="0 keeps the closed form as it is.")] = OptimizerSettings.epochs,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = OptimizerSettings.batch_size,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = OptimizerSettings.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = OptimizerSettings.weight_decay,
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
    shuffle_pairs: Annotated[bool, typer.Option("--shuffle-pairs", help="Train on wrong pairs, as a control.")] = False,
    seed: Annotated[int, typer.Option(help="Of order, drawing and initialisation.")] = TrainSettings.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = TrainSettings.device,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="bfloat16: autocast.")
    ] = TrainSettings.precision,
    threads: Annotated[int | None, typer.Option(help="On the CPU. [default: one for small steps, else all]")] = None,
    memory_gb: Annotated[float, typer.Option(help="Larger features are mapped, not read.")] = TrainSettings.memory_gb,
) -> None:
    """Train a pair of projectors on two cached features."""
    from embedcache.cli.console import open_progress, say
    from embedcache.train.train import train as run_training

    settings = TrainSettings(
        model=ModelSettings(
            projector=projector,
            shared_width=shared_width,
            start=start,
            shrinkage=shrinkage,
            dropout=dropout,
        ),
        optimizer=OptimizerSettings(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        ),
        split=SplitSettings(
            kind=split,
            val_share=val_share,
            test_share=test_share,
            image_cosine=image_cosine,
            text_cosine=text_cosine,
            seed=seed if split_seed is None else split_seed,
        ),
        loss=loss,
        language=language,
        shuffle_pairs=shuffle_pairs,
        seed=seed,
        device=device,
        precision=precision,
        threads=threads,
        memory_gb=memory_gb,
    )
    report = run_training(cache, run, image=image, text=text, settings=settings, progress=open_progress())
    say(report.line(run))
