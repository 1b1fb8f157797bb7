"""The command `embedcache`, with the quickstart.

Commands import what they need when they run, so that `--help` is quick.
"""

from functools import cache as cache_calls
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from embedcache.cli import cache, curate, evaluate, export, import_
from embedcache.cli.cache import inspect, verify
from embedcache.cli.commands import CommandGroup, add_command
from embedcache.cli.extract import derive, extract
from embedcache.cli.failures import run_program
from embedcache.cli.options import Json, Output
from embedcache.cli.search import search, serve
from embedcache.cli.train import sweep, train
from embedcache.errors import PathError
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
        bool, typer.Option("--version", metavar="", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Encode once, align many times.

    Cache the embeddings of frozen encoders, train projectors on the cached features, evaluate, search and curate.

    Example: embedcache quickstart
    """


def quickstart(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder for the cache, the run, the index and the report.")
    ] = Path("embedcache-quickstart"),
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Run the whole system on packaged images.

    Extract OpenMoji with two packaged encoders, train projectors, evaluate, index, search and write an HTML report.

    Example: embedcache quickstart
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.provenance import read_json
    from embedcache.quickstart.quickstart import quickstart as run
    from embedcache.reports.retrieval import retrieval_table

    report = run(folder, progress=open_progress())

    def show() -> None:
        title = "Held-out retrieval, strict split, mean of 3 seeds [95% interval]"
        print_table(*retrieval_table(report.retrieval), title=title)
        print_line(f"metrics: {report.metrics_path}")
        print_line(f"open {report.page_path} in a browser")

    publish(show, lambda: read_json(report.metrics_path), as_json=as_json, output=output)


add_command(app, "quickstart", quickstart, runs_named_code=False)
add_command(
    app,
    "extract",
    extract,
    reads_items=True,
    plugins=("encoders", "sources", "views"),
    common=(
        "image_encoder",
        "text_encoder",
        "encoder",
        "feature",
        "source_type",
        "caption_column",
        "limit",
        "extend",
        "retry_failed",
        "plan",
        "device",
        "batch_size",
        "config",
    ),
)
add_command(app, "derive", derive, plugins=("rules",))
add_command(app, "inspect", inspect)
add_command(app, "verify", verify, reads_items=True)
add_command(
    app,
    "train",
    train,
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
)
add_command(app, "sweep", sweep, plugins=("projectors", "losses"))
app.add_typer(evaluate.app, name="evaluate")
add_command(app, "search", search)
add_command(app, "serve", serve, reads_items=True)
app.add_typer(curate.app, name="curate")
app.add_typer(export.app, name="export")
app.add_typer(import_.app, name="import")
app.add_typer(cache.app, name="cache")


@cache_calls
def root_command() -> TyperGroup:
    """Return the group of all commands; a process that runs several builds them once, in 45 ms."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def main() -> None:
    """Run the command line.

    Exit codes: those of `run_program`; 1 also findings of `verify`; 2 wrong usage.
    """
    run_program(_run)


def _run() -> None:
    search_plugins_in(str(_working_folder()))  # so that module:attribute finds a plug-in beside the data
    root_command()(prog_name="embedcache")


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise PathError("the working folder does not exist any more; change to another one") from None
