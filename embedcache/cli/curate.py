"""embedcache curate"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from embedcache.cli.commands import (
    SCORES_OUT,
    CacheArgument,
    Features,
    IndexArgument,
    SelectionArgument,
    SelectionOutput,
    check_new_file,
    command,
    new_group,
    output_argument,
)
from embedcache.curate.settings import (
    CoverageSettings,
    DedupSettings,
    LeakSettings,
    MapSettings,
    NegativesSettings,
    OutlierSettings,
    ScoreSettings,
    SelectSettings,
)
from embedcache.dataset.settings import SELECTION_FORMAT
from embedcache.errors import pluralize
from embedcache.modalities import count_items
from embedcache.search.settings import IndexSettings

app = new_group("Index a cache, measure coverage and select samples.")


@command(app, "index", settings=IndexSettings)
def index(
    cache: CacheArgument,
    out: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder to write the index to.")],
    *,
    settings: IndexSettings,
) -> Any:
    """Build a FAISS index and measure its recall.

    Run the same command again to resume an interrupted build, or to add new items.

    Example: embedcache curate index cache/ index/ --run run/ --memory 4GB
    """
    from embedcache.cli.console import open_progress
    from embedcache.reports.render import Presentation
    from embedcache.reports.summary import describe_index
    from embedcache.search.faiss_index import read_card
    from embedcache.search.index import build_index

    # An index that grows keeps its trained lists, so its recall may fall: both cards are shown.
    old_card = read_card(out) if (out / "card.json").is_file() else None
    card = build_index(cache, out, settings, progress=open_progress())
    lines = describe_index(out, card)
    if old_card is not None and old_card != card:
        vectors = count_items(old_card.num_vectors, card.modality)
        lines.append(f"before: {vectors}, recall@10 {old_card.recall_at_10:.3f}; not trained again")
    return Presentation(lines=lines, record=card.to_json)


@command(app, "map", settings=MapSettings)
def map_index(index: IndexArgument, *, settings: MapSettings) -> Any:
    """Compute the map of an index that serve shows.

    The map is stored in the folder of the index. Without one, serve computes one with PCA when it starts.

    Example: embedcache curate map index/ --projection umap
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.map import FILE, build_map
    from embedcache.reports.render import Presentation, Section, to_plain

    computed = build_map(index, settings, progress=open_progress())
    rows = [[cluster.name, f"{cluster.size:,}", cluster.question] for cluster in computed.clusters]
    return Presentation(
        lines=[f"wrote {index / FILE}: {pluralize(len(computed.rows), 'item')} by {computed.projection}"],
        sections=[Section(title="clusters", table=(["cluster", "items", "caption"], rows))],
        record=lambda: {
            "projection": computed.projection,
            "num_items": len(computed.rows),
            "clusters": to_plain(computed.clusters),
        },
    )


@command(app, "coverage", settings=CoverageSettings, has_page=True, reads_items=True)
def coverage(
    cache: CacheArgument,
    concepts: Annotated[
        str,
        typer.Argument(metavar="CONCEPTS", help="A .txt with one name per line, or a cache of prompts or examples."),
    ],
    *,
    settings: CoverageSettings,
) -> Any:
    """Estimate how many items of a cache show each concept.

    Each estimate has a 95% interval; the largest and smallest concepts and the gaps are listed.

    Example: embedcache curate coverage cache/ names.txt --run run/ --html coverage.html
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.coverage import measure_coverage_by_modality
    from embedcache.reports.coverage import present_coverage

    return present_coverage(measure_coverage_by_modality(cache, concepts, settings, progress=open_progress()))


@command(app, "dedup", settings=DedupSettings, has_page=True, reads_items=True)
def dedup(
    cache: CacheArgument,
    out: Annotated[Path | None, output_argument("Selection of kept samples: a new .parquet file.")] = None,
    *,
    settings: DedupSettings,
) -> Any:
    """Find copies and near-duplicates.

    Without OUT, report how many samples each cosine would remove; then choose one.

    Example: embedcache curate dedup cache/ kept.parquet --cosine 0.95
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.dedup import analyze
    from embedcache.curate.dedup import dedup as remove_duplicates
    from embedcache.reports.dedup import present_dedup, present_thresholds

    if out is None:
        return present_thresholds(analyze(cache, settings, progress=open_progress()))
    return present_dedup(remove_duplicates(cache, out, settings, progress=open_progress()))


@command(app, "leaks", settings=LeakSettings, has_page=True, reads_items=True)
def leaks(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training cache: a folder or a URL.")],
    test: Annotated[str, typer.Argument(metavar="TEST", help="Test cache: a folder or a URL.")],
    out: Annotated[
        Path | None, output_argument("Selection of training samples without leaks: a new .parquet file.")
    ] = None,
    feature: Features = None,
    *,
    settings: LeakSettings,
) -> Any:
    """Find test samples that are in a training cache.

    These are exact copies, and near-duplicates by cosine similarity, as a strict split and the overlap check of
    evaluate retrieval define them.

    Example: embedcache curate leaks train/ test/ clean.parquet --html leaks.html
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.leaks import find_leaks
    from embedcache.provenance import check_table_output
    from embedcache.reports.leaks import present_leaks

    # A wrong name of the output fails before the search, which may last hours.
    if out is not None:
        check_table_output("selection", out)
    return present_leaks(find_leaks(train, test, settings, feature=feature, progress=open_progress()), out)


@command(
    app,
    "select",
    settings=SelectSettings,
    plugins=("selectors",),
    common=(
        "method",
        "budget",
        "run",
        "modality",
        "feature",
        "concepts",
        "label",
        "scores",
        "selection",
        "where",
        "seed",
        "device",
        "config",
    ),
)
def select(
    cache: CacheArgument,
    out: SelectionOutput,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[:PARAMETER=VALUE,…]",
            help="Method: random, top-score, clip-score, rare-first (the paper's), metaclip, image-based (DataComp's), "
            "hierarchical, k-center, score (of a table), or module:attribute. Parameters follow a colon, as in "
            "metaclip:head=100,threshold=0.3.",
        ),
    ],
    *,
    settings: SelectSettings,
) -> Any:
    """Select samples to train on, with what each was selected for.

    Example: embedcache curate select cache/ selection.parquet --method clip-score --run run/ --budget 25%
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.select.select import select as run_select

    return run_select(cache, out, method, settings, progress=open_progress())


@command(app, "combine")
def combine(
    cache: CacheArgument,
    first: Annotated[Path, typer.Argument(metavar="FIRST", help=f"Selection: {SELECTION_FORMAT}.")],
    operation: Annotated[
        Literal["and", "minus"],
        typer.Argument(metavar="and|minus", help="Keep the samples in both, or those not in the second."),
    ],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Second selection.")],
    out: SelectionOutput,
) -> Any:
    """Intersect two selections, or subtract one from another.

    Example: embedcache curate combine cache/ first.parquet and second.parquet both.parquet
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.select.select import combine_selections

    num_samples = combine_selections(cache, out, first, operation, second, progress=open_progress())
    return _present_size(out, num_samples)


def _present_size(path: Path, num_samples: int) -> Any:
    """Return the presentation of the number of samples that a command has written to a file."""
    from embedcache.reports.render import Presentation

    return Presentation(
        lines=[f"{path}: {pluralize(num_samples, 'sample')}"],
        record=lambda: {"path": str(path), "num_samples": num_samples},
    )


def _check_export(context: typer.Context, path: Path) -> Path | None:
    """Check an output as `check_new_file` does. A folder is checked by the format, which is not known yet."""
    return path if path.is_dir() else check_new_file(context, path)


@command(app, "export", reads_items=True)
def export(
    cache: CacheArgument,
    selection: SelectionArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="New file; for webdataset a new folder.", callback=_check_export),
    ],
    form: Annotated[
        Literal["datacomp", "keys", "webdataset"],
        typer.Option(
            "--format",
            metavar="datacomp|keys|webdataset",
            help="DataComp's uids (.npy), one key per line, or tars with the samples.",
        ),
    ] = "keys",
) -> Any:
    """Write a selection for other tools.

    Example: embedcache curate export cache/ selection.parquet tars/ --format webdataset
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.select.export import export_selection

    return _present_size(out, export_selection(cache, selection, out, form, progress=open_progress()))


@command(app, "negatives", settings=NegativesSettings)
def negatives(
    cache: CacheArgument,
    out: Annotated[Path, output_argument("Table of hard negatives: a new .parquet file.")],
    feature: Features = None,
    *,
    settings: NegativesSettings,
) -> Any:
    """Find hard negatives of each sample.

    These are the nearest samples that do not belong to it; its copies and near-duplicates are left out. Train with
    them by train --negatives OUT.

    Example: embedcache curate negatives cache/ negatives.parquet --run run/ --relative-margin 0.05
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.negatives import mine_negatives

    return mine_negatives(cache, out, settings, feature=feature, progress=open_progress())


@command(app, "outliers", settings=OutlierSettings, has_page=True, reads_items=True)
def outliers(cache: CacheArgument, out: Annotated[Path | None, SCORES_OUT] = None, *, settings: OutlierSettings) -> Any:
    """Find odd samples, likely mislabels and wrong captions.

    Each item is compared with its nearest neighbors, and with --run also with the other item of its pair, as an image
    with its caption. OUT is a table of scores for curate select --method score.

    Example: embedcache curate outliers cache/ odd.parquet --html odd.html
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.outliers import find_outliers
    from embedcache.reports.scores import present_outliers

    return present_outliers(find_outliers(cache, out, settings, progress=open_progress()), out)


@command(app, "score", settings=ScoreSettings, has_page=True, reads_items=True)
def score(cache: CacheArgument, out: Annotated[Path, SCORES_OUT], *, settings: ScoreSettings) -> Any:
    """Score the samples by a linear head or by texts.

    A head is, for example, LAION's aesthetic predictor on CLIP vectors. OUT is a table of scores for curate select
    --method score.

    Example: embedcache curate score cache/ sharp.parquet --run run/ --prompt "a sharp photo" --negative "a blur"
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.score import score as score_samples
    from embedcache.reports.scores import present_scores

    return present_scores(score_samples(cache, out, settings, progress=open_progress()))
