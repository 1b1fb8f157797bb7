"""embedcache evaluate pairs"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.dataset.settings import SplitSettings


def pairs(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    image: Annotated[
        list[str] | None, typer.Option(help="encoder/feature; again for several. [default: all finished]")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="encoder/feature; again for several.")] = None,
    language: Annotated[str | None, typer.Option(help="Captions of this language only.")] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to draw, at most.")] = 5000,
    k: Annotated[int, typer.Option(help="Neighbors of mutual kNN.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the drawing and of the split.")] = 0,
    split: Annotated[
        str, typer.Option(help="strict (by the first image and text feature), key, column, or a run's split.parquet.")
    ] = SplitSettings.kind,
    val_fraction: Annotated[float, typer.Option(help="Share of the samples that the probe is ranked on.")] = 0.25,
    image_cosine: Annotated[
        float, typer.Option(help="strict: images above this cosine are near-duplicates.")
    ] = SplitSettings.image_cosine,
    text_cosine: Annotated[
        float, typer.Option(help="strict: captions above this cosine are near-duplicates.")
    ] = SplitSettings.text_cosine,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a page with heat maps here.")] = None,
) -> None:
    """Which encoders go together: CKA, mutual kNN and a closed-form probe of every pair, before any training."""
    from embedcache.cli.console import open_progress, say, show_table
    from embedcache.evaluate.encoder_pairs import evaluate_pairs
    from embedcache.provenance import write_json
    from embedcache.reports.encoder_pairs import encoder_pairs_json, encoder_pairs_table, write_encoder_pairs_page

    settings = SplitSettings(
        kind=split, val_fraction=val_fraction, image_cosine=image_cosine, text_cosine=text_cosine, seed=seed
    )
    report = evaluate_pairs(
        cache,
        images=image,
        texts=text,
        language=language,
        num_samples=num_samples,
        k=k,
        seed=seed,
        split=settings,
        progress=open_progress(),
    )
    say(report.line())
    columns, rows = encoder_pairs_table(report)
    show_table(columns, rows)
    if json_path is not None:
        write_json(json_path, {"pairs": encoder_pairs_json(report)})
    if html_path is not None:
        write_encoder_pairs_page(html_path, report)
        say(f"{html_path}: a heat map for each metric")
