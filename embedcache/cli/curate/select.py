"""embedcache curate select"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def select(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    out: Annotated[Path, typer.Argument(help="The selection: a .parquet.")],
    method: Annotated[
        str,
        typer.Option(
            help="random, top-score, clip-score, rare-first (the paper's), metaclip, image-based (DataComp's), "
            "hierarchical, k-center, or module:attribute."
        ),
    ],
    budget: Annotated[str | None, typer.Option(help="Samples to select: 1000, or 10% of the pool.")] = None,
    per_concept: Annotated[int | None, typer.Option(help="rare-first: samples of each concept, at most.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="clip-score, metaclip: cosine from which on something fits.")
    ] = None,
    head: Annotated[float | None, typer.Option(help="metaclip: t, to which frequent concepts are cut.")] = None,
    clusters: Annotated[
        str | None, typer.Option(help="image-based, hierarchical: centroids; levels as 1000,100, finest first.")
    ] = None,
    drawn: Annotated[int | None, typer.Option(help="k-center: samples it looks at. [default: 20,000]")] = None,
    concepts: Annotated[str | None, typer.Option(help="A cache of prompts: what is looked for.")] = None,
    join_names: Annotated[bool, typer.Option("--join-names", help="Concepts of one name are one.")] = False,
    target: Annotated[str | None, typer.Option(help="image-based: a cache of what is wanted.")] = None,
    projected: Annotated[Path | None, typer.Option(help="Project the feature with this run.")] = None,
    feature: Annotated[str | None, typer.Option(help="encoder/feature. [default: the run's, or the only one]")] = None,
    modality: Annotated[
        Literal["image", "text"] | None, typer.Option(help="What to look at. [default: the method's]")
    ] = None,
    within: Annotated[Path | None, typer.Option(help="Select only from this selection, or list of keys.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Select samples to train on, with a reason for each."""
    from embedcache.cli.console import open_progress, say
    from embedcache.curate.select.select import SelectSettings
    from embedcache.curate.select.select import select as run_select
    from embedcache.units import parse_count_or_fraction, parse_counts

    amount = None if budget is None else parse_count_or_fraction(budget)
    report = run_select(
        cache,
        out,
        method,
        settings=SelectSettings(
            budget=amount if isinstance(amount, int) else None,
            per_concept=per_concept,
            threshold=threshold,
            head=head,
            clusters=None if clusters is None else parse_counts(clusters),
            drawn=drawn,
            seed=seed,
        ),
        share=amount if isinstance(amount, float) else None,
        modality=modality,
        feature=feature,
        run_path=projected,
        concepts_path=concepts,
        joins_names=join_names,
        target_path=target,
        within=within,
        progress=open_progress(),
    )
    say(report.line())
