"""embedcache curate leaks"""

from pathlib import Path
from typing import Annotated

import typer


def leaks(
    train: Annotated[str, typer.Argument(help="The cache that is trained on, or its URL.")],
    test: Annotated[str, typer.Argument(help="The cache that is tested on, or its URL.")],
    image_cosine: Annotated[float, typer.Option(help="Images from this cosine on are near-duplicates.")] = 0.95,
    text_cosine: Annotated[float, typer.Option(help="Texts from this cosine on are near-duplicates.")] = 0.95,
    image: Annotated[
        str | None, typer.Option(help="encoder/feature of both caches. [default: the only one that both have]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="encoder/feature of both caches.")] = None,
    selection_out: Annotated[
        Path | None, typer.Option(help="A .parquet file for a selection of TRAIN without what leaks.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures side by side.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Find what of a test cache is in a training cache: copies, and near-duplicates by cosine."""
    from embedcache.cli.console import open_progress, say, show_table
    from embedcache.curate.leaks import find_leaks, write_clean_selection
    from embedcache.provenance import write_json
    from embedcache.reports.leaks import (
        closest_pairs,
        leak_line,
        leak_notes,
        leak_table,
        leaked_pair_table,
        write_leak_page,
    )

    found = find_leaks(
        train,
        test,
        cosines={"image": image_cosine, "text": text_cosine},
        features={"image": image, "text": text},
        progress=open_progress(),
    )
    say(leak_line(found))
    for note in leak_notes(found):
        say(note)
    show_table(*leak_table(found))
    for leak in filter(lambda leak: leak.is_leaked.any(), found.leaks):
        show_table(*leaked_pair_table(closest_pairs(found, leak, 10)), title=f"the {leak.modality}s that leak most")
    if selection_out is not None:
        write_clean_selection(selection_out, found)
        say(f"wrote {selection_out}: {len(found.clean().rows):,} of {found.train.info.num_samples:,} samples stay")
    if json_path is not None:
        write_json(json_path, found.to_json())
    if html is not None:
        write_leak_page(html, found)
        say(f"wrote {html}")
