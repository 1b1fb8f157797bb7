"""The command `embedcache`. Commands import what they need when they run, so that --help is quick."""

import errno
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli import curate, evaluate, exchange, export, extract, inspect, quickstart, sweep, train, verify
from embedcache.errors import EmbedcacheError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"embedcache {metadata.version('embedcache')}")
        raise typer.Exit


@app.callback()
def embedcache(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Encode once, align for ever: cache frozen encoders, train projectors on the features, search and curate."""


app.command(name="quickstart")(quickstart.quickstart)
app.command(name="extract")(extract.extract)
app.command(name="train")(train.train)
app.command(name="sweep")(sweep.sweep)
app.command(name="inspect")(inspect.inspect)
app.command(name="verify")(verify.verify)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(curate.app, name="curate")
app.add_typer(export.app, name="export")
app.add_typer(exchange.app, name="exchange")

_GO_ON = "what is committed is kept: free some space and run the same command again"
_USER_ERRNOS = {
    errno.ENOSPC: f"no space left on the disk; {_GO_ON}",
    errno.EDQUOT: f"the disk quota is used up; {_GO_ON}",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
}


def main() -> None:
    """Run the command line: a user's mistake is one line and exit 1, our bug is a traceback."""
    sys.path.append(str(Path.cwd()))  # so that module:attribute finds a plug-in that lies beside the data
    try:
        app()
    except EmbedcacheError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"not enough memory: {error}; ask for less, or give this process more")
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        _fail(f"{error.filename}: {_USER_ERRNOS[error.errno]}" if error.filename else _USER_ERRNOS[error.errno])


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
