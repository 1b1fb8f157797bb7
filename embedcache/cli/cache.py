"""embedcache inspect, verify and cache"""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.cli.commands import (
    CacheArgument,
    SelectionArgument,
    command,
    exit_with_findings,
    new_group,
    split_at_commas,
)
from embedcache.errors import SettingError
from embedcache.extract.settings import VerifySettings
from embedcache.maintain.settings import PruneSettings, RemoveSettings

top = new_group()
app = new_group("Prune, cut and merge caches, and remove samples from them.")

Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this option, only print what would be done.")]
NewCache = Annotated[
    str, typer.Argument(metavar="OUT", help="New folder, or one in which the same command was interrupted.")
]
CopiedFeatures = Annotated[
    list[str] | None,
    typer.Option(
        "--feature",
        metavar="NAME",
        help="Feature to copy, as encoder/feature, or encoder for all of its features. May be repeated.",
        show_default="all",
    ),
]


@command(top, "inspect")
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Cache, run, index, study or selection: a path or a URL.")
    ],
) -> Any:
    """Describe a cache, run, index, study or selection.

    For a cache, list its features, their shapes, how complete they are, and why items failed.

    Example: embedcache inspect cache/
    """
    from embedcache.reports.summary import summarize

    return summarize(path)


@command(top, "verify", settings=VerifySettings, reads_items=True)
def verify(
    cache: Annotated[str, typer.Argument(metavar="PATH", help="Cache, or index: a folder or a URL.")],
    *,
    settings: VerifySettings,
) -> Any:
    """Check every chunk of a cache, or all bytes of an index.

    The exit code is 1 if something is damaged, if encoding items again yields other vectors, or if a chunk is still
    missing after --repair.

    Example: embedcache verify cache/ --reencode 0.1%
    """
    from embedcache.cli.console import open_progress
    from embedcache.reports.render import Presentation, present

    # Only an index has a card.
    if (Path(cache) / "card.json").is_file():
        from embedcache.search.faiss_index import read_card, verify_index

        if settings.repair or settings.reencode is not None:
            raise SettingError(f"--repair, --reencode: expected a cache, got {cache}, an index; leave the option out")
        card = read_card(Path(cache))
        verify_index(Path(cache), card, progress=open_progress())
        return Presentation(
            lines=[f"{cache}: all bytes equal their checksums"],
            record=lambda: {"index": cache, "compared": sorted(card.files)},
        )

    from embedcache.extract.repair import verify_cache

    report = verify_cache(cache, settings, progress=open_progress())
    return present(report, finish=tuple if report.is_sound else exit_with_findings)


@command(app, "prune", settings=PruneSettings)
def prune(cache: CacheArgument, yes: Yes = False, *, settings: PruneSettings) -> Any:
    """Delete features and views.

    Without --yes, print what would be deleted, and delete nothing.

    Example: embedcache cache prune cache/ --feature dinov2-large/patches --yes
    """
    from embedcache.maintain.prune import plan_prune, prune_cache
    from embedcache.reports.render import Presentation, to_plain

    plan = prune_cache(cache, settings) if yes else plan_prune(cache, settings)
    return Presentation(
        lines=plan.lines(),
        notes=["deleted" if yes else "nothing is deleted; add --yes to delete this"],
        record=lambda: {"is_done": yes, **to_plain(plan), "num_bytes": plan.num_bytes},
    )


@command(app, "remove", settings=RemoveSettings)
def remove(
    cache: CacheArgument,
    keys: Annotated[
        Path,
        typer.Argument(
            metavar="KEYS", help="Samples to remove: a selection (Parquet), or a text file with one key per line."
        ),
    ],
    yes: Yes = False,
    *,
    settings: RemoveSettings,
) -> Any:
    """Remove samples from a cache and its indexes.

    Nothing of their keys, captions, columns and vectors is left in these files; the rows of all other samples stay.
    Selections, runs and exports that name the samples are listed, with exit code 1.
    Without --yes, print what would be done. Run the same command again to finish an interrupted removal.

    Example: embedcache cache remove cache/ keys.txt --index index/ --check run/ --yes
    """
    from embedcache.cli.console import open_progress
    from embedcache.dataset.selections import read_selected_keys
    from embedcache.maintain.remove import plan_removal, remove_samples
    from embedcache.reports.render import Presentation, to_plain

    names = read_selected_keys(keys).to_pylist()
    if yes:
        report = remove_samples(cache, names, settings, progress=open_progress())
        note = f"removed; {keys} still names the samples, as do backups, snapshots and copies of these files"
    else:
        report = plan_removal(cache, names, settings)
        note = "nothing is removed; add --yes to remove this"

    # A file that still names removed samples is a finding, so that a script notices it.
    return Presentation(
        lines=report.lines(),
        notes=[note],
        record=lambda: {"is_done": yes, **to_plain(report)},
        finish=exit_with_findings if yes and report.named else tuple,
    )


@command(app, "cut")
def cut(cache: CacheArgument, selection: SelectionArgument, out: NewCache, feature: CopiedFeatures = None) -> Any:
    """Write the samples of a selection into a cache of their own.

    Nothing is encoded. Run the same command again to finish an interrupted one.

    Example: embedcache cache cut cache/ selection.parquet small/
    """
    from embedcache.cli.console import open_progress
    from embedcache.maintain.copy import cut_cache

    return cut_cache(cache, selection, out, features=split_at_commas(feature), progress=open_progress())


@command(app, "merge")
def merge(
    caches: Annotated[
        list[str], typer.Argument(metavar="CACHE", help="Two caches or more of the same encoders: folders or URLs.")
    ],
    out: NewCache,
    prefix_keys: Annotated[
        bool,
        typer.Option("--prefix-keys", help="Begin each key with the name of its cache's folder and a slash."),
    ] = False,
    feature: CopiedFeatures = None,
) -> Any:
    """Merge caches of the same encoders into a new one.

    Nothing is encoded. Run the same command again to finish an interrupted one.

    Example: embedcache cache merge first/ second/ both/
    """
    from embedcache.cli.console import open_progress
    from embedcache.maintain.copy import merge_caches

    if len(caches) < 2:
        raise SettingError(f"expected two caches or more, then a new folder, got {caches[0]} and {out}")
    return merge_caches(
        caches, out, prefix_keys=prefix_keys, features=split_at_commas(feature), progress=open_progress()
    )
