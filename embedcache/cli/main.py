"""The command `embedcache`. Commands import what they need when they run, so that `--help` is quick."""

import errno
import os
import sys
import traceback
from functools import cache as cache_calls
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from embedcache.cli import cache, curate, evaluate, export, import_
from embedcache.cli.commands import CommandGroup, add_command
from embedcache.cli.derive import derive
from embedcache.cli.extract import extract
from embedcache.cli.inspect import inspect, verify
from embedcache.cli.quickstart import quickstart
from embedcache.cli.search import search
from embedcache.cli.serve import serve
from embedcache.cli.sweep import sweep
from embedcache.cli.train import train
from embedcache.cli.transcribe import transcribe
from embedcache.errors import EmbedcacheError, PathError, show_faults, visible
from embedcache.files import disk_full_message, io_reason, is_io_error
from embedcache.registry import search_plugins_in

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BUG = 70
_NEXT_STEPS = {
    errno.EMFILE: "raise the limit of open files with ulimit -n, or use fewer --threads",
    errno.EFBIG: "raise the limit of file sizes with ulimit -f, or use a file system with larger files",
    errno.EIO: "check the disk, and rerun the same command: finished work is kept",
    errno.ESTALE: "check the file system, and rerun the same command: finished work is kept",
    errno.ENAMETOOLONG: "use shorter names",
}
"""Error of the operating system -> what to do, where its own text does not say it."""


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


add_command(app, "quickstart", quickstart, runs_named_code=False)
add_command(app, "extract", extract, plugins=("encoders", "sources", "views"))
add_command(app, "derive", derive, plugins=("rules",))
add_command(app, "inspect", inspect)
add_command(app, "verify", verify)
add_command(app, "train", train, plugins=("projectors", "losses", "trackers"))
add_command(app, "sweep", sweep, plugins=("projectors", "losses", "trackers"))
app.add_typer(evaluate.app, name="evaluate")
add_command(app, "search", search)
add_command(app, "serve", serve)
add_command(app, "transcribe", transcribe)
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

    Exit codes: 0 success; 1 a user's error, printed as one line, or findings of `verify`; 2 wrong usage; 70 a bug, with
    its traceback; 130 interrupted. EMBEDCACHE_DEBUG=1 prints the traceback of a user's error too.
    """
    show_faults()
    try:
        _check_arguments()
        search_plugins_in(str(_working_folder()))  # so that module:attribute finds a plug-in beside the data
        root_command()(prog_name="embedcache")
    except EmbedcacheError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"out of memory: {error}; use smaller settings, or give this process more memory")
    except BrokenPipeError:  # whoever read the output has ended, as in `embedcache … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes its standard output when it exits
        sys.exit(1)
    except OSError as error:
        _fail(_os_error_line(error))
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            _report_bug()
        _fail("can't start new thread; raise the limit of processes with ulimit -u, or use fewer --threads")
    except Exception as error:  # noqa: BLE001
        if not is_io_error(error):
            _report_bug()
        _fail(f"a remote service failed: {io_reason(error)}; check the address and the network")


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise PathError("the working folder does not exist any more; change to another one") from None


def _check_arguments() -> None:
    """Check that names can be stored and printed; a name of other bytes has them as lone surrogates."""
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise PathError(f"expected arguments in UTF-8, got {word!r}; rename the file") from None


def _os_error_line(error: OSError) -> str:
    """Return the file, the reason of the operating system, and the next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = disk_full_message()
    else:
        step = _NEXT_STEPS.get(error.errno or 0)
        reason = f"{io_reason(error)}; {step}" if step else io_reason(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _fail(message: str) -> NoReturn:
    if os.environ.get("EMBEDCACHE_DEBUG", "0") != "0":
        traceback.print_exc()
    print(f"error: {visible(message)}", file=sys.stderr)
    sys.exit(1)


def _report_bug() -> NoReturn:
    traceback.print_exc()
    print("This is a bug in embedcache, not an error of yours: please report it with the text above.", file=sys.stderr)
    sys.exit(_BUG)
