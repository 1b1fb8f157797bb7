"""The command `embedcache`, with the quickstart.

Commands import what they need when they run, so that `--help` is quick.
"""

from functools import cache as cache_calls
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from embedcache.cli import cache, curate, evaluate, export, extract, import_, search, train
from embedcache.cli.commands import CommandGroup, command
from embedcache.cli.console import run_program
from embedcache.quickstart import IMAGE_ENCODER, TEXT_ENCODER
from embedcache.registry import search_plugins_in

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib import metadata

        print(f"embedcache {metadata.version('embedcache')}")
        raise typer.Exit


@app.callback()
def embedcache(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Encode once, align many times.

    Cache the embeddings of frozen encoders, train projectors on the cached features, evaluate, search and curate.

    Example: embedcache quickstart
    """


@command(app, "quickstart", runs_named_code=False)
def quickstart(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Folder, table or tar of images with captions.", show_default="OpenMoji"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="New folder for the results; may be given without DATA.")
    ] = None,
    image_encoder: Annotated[str, typer.Option(metavar="SPEC", help="Encoder of images.")] = IMAGE_ENCODER,
    text_encoder: Annotated[str, typer.Option(metavar="SPEC", help="Encoder of captions.")] = TEXT_ENCODER,
) -> Any:
    """Run the whole system on your images, or on packaged ones.

    Encode images and captions, train projectors, compare them with a control, build an index and search it, measure
    coverage, find duplicates, and write a page. Without DATA, the images are OpenMoji's.

    Example: embedcache quickstart photos/ mine/
    """
    from embedcache.cli.console import open_progress
    from embedcache.quickstart.quickstart import SOURCE, present_quickstart
    from embedcache.quickstart.quickstart import quickstart as run

    # The only path is the folder for results; the images are then the packaged ones.
    if folder is None:
        folder = Path(data or "embedcache-quickstart")
        data = SOURCE
    assert data is not None
    report = run(data, folder, image_encoder=image_encoder, text_encoder=text_encoder, progress=open_progress())
    return present_quickstart(report)


for group in (extract.app, cache.top, train.app, search.app):
    app.add_typer(group)
for name, group in (
    ("evaluate", evaluate.app),
    ("curate", curate.app),
    ("export", export.app),
    ("import", import_.app),
    ("cache", cache.app),
):
    app.add_typer(group, name=name)


@cache_calls
def root_command() -> TyperGroup:
    """Return the group of all commands. A process that runs several commands builds them once, in 45 ms."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def main() -> None:
    """Run the command line.

    Exit codes are the same as in `run_program`. Code 1 also means findings of `verify`, and code 2 wrong usage.
    """
    run_program(_run)


def _run() -> None:
    # A plug-in named module:attribute may lie next to the data.
    search_plugins_in(str(Path.cwd()))
    root_command()(prog_name="embedcache")
