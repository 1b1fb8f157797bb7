"""embedcache curate combine and sample"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def combine(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    out: Annotated[Path, typer.Argument(help="The selection: a .parquet.")],
    first: Annotated[Path, typer.Argument(help="A selection, or a text with a key a line.")],
    operation: Annotated[Literal["and", "minus"], typer.Argument(help="What to keep of the first.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Keep what is in two selections (and), or in one and not in another (minus)."""
    from embedcache.cli.console import say
    from embedcache.curate.select.combine import combine_selections

    say(f"{out}: {combine_selections(cache, out, first, operation, second):,} samples")


def sample(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    out: Annotated[Path, typer.Argument(help="The selection: a .parquet.")],
    selection: Annotated[Path, typer.Argument(help="A selection, or a text with a key a line.")],
    size: Annotated[int, typer.Argument(help="Samples to draw.")],
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Draw some samples of a selection at random."""
    from embedcache.cli.console import say
    from embedcache.curate.select.combine import sample_selection

    say(f"{out}: {sample_selection(cache, out, selection, size, seed=seed):,} samples")
