"""What the command line prints, and how it ends.

Progress and log messages are printed on standard error, results on standard output. A user's error is one line, a bug
has its traceback.
"""

import errno
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from embedcache.errors import DataError, EmbedcacheError, PathError, is_out_of_memory, one_line, show_faults, visible
from embedcache.files import disk_full_message, io_reason, is_io_error, read_text, split_lines
from embedcache.processes import announce
from embedcache.progress import Progress, close_bars, to_progress
from embedcache.registry import used_plugins

if TYPE_CHECKING:
    from embedcache.reports.render import Presentation

log = logging.getLogger("embedcache")

_PLAIN_WIDTH = 10_000
"""Letters of a line of a table in a file or pipe, where nothing needs to be wrapped."""
_JSON_CONTROLS = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_BUG = 70
_INTERRUPTED = 130
_NEXT_STEPS = {
    errno.EMFILE: "raise the limit of open files with ulimit -n, or use fewer --threads",
    errno.EFBIG: "raise the limit of file sizes with ulimit -f, or use a file system with larger files",
    errno.EIO: "check the disk, and rerun the same command",
    errno.ESTALE: "check the file system, and rerun the same command",
    errno.ENAMETOOLONG: "use shorter names",
}
"""Error of the operating system -> what to do, where its own text does not say it."""


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set the log messages that are printed in addition to results while a command runs."""
    level = log.level
    started = time.monotonic()
    verbose = verbose and not quiet
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else None))
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else level)
    devices = logging.getLogger("embedcache.processes")
    devices.setLevel(logging.WARNING if quiet else logging.INFO)

    # Each device is announced once per command, and a test runs several commands in one process.
    announce.cache_clear()
    try:
        yield
    finally:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        log.info("run time %.1f s, peak memory %.0f MB", time.monotonic() - started, peak_mb)
        log.removeHandler(handler)
        log.setLevel(level)
        devices.setLevel(logging.NOTSET)


class _Formatter(logging.Formatter):
    """Formatter of log lines with control characters as escapes. Without a format, a warning is named as one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        is_short = self._fmt == "%(message)s"
        prefix = "warning: " if is_short and record.levelno >= logging.WARNING else ""
        return visible(f"{prefix}{super().format(record)}")


def open_progress() -> Progress:
    """Return bars on a terminal, plain lines elsewhere, and nothing with `--quiet`."""
    # The level as `verbosity` sets it.
    return to_progress(log.level != logging.WARNING)


def print_line(line: str) -> None:
    """Print one line of a result."""
    print(visible(line), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of a result."""
    for line in lines:
        print_line(line)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table. The first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title and visible(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(visible(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))

    # In a file or a pipe, no row is wrapped, so that a script can read it.
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False, emoji=False).print(table)


def print_json(record: Any) -> None:
    """Print JSON on standard output."""
    # JSON escapes all other control characters itself.
    text = json.dumps(record, indent=1, ensure_ascii=False)
    print(_JSON_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def publish(report: Any, *, as_json: bool, output: Path | None = None, html: Path | None = None) -> None:
    """Write the requested files, and print a report as text or as JSON.

    Args:
        report: a `Presentation`, or a report that `present` accepts.
        as_json: print the JSON values.
        output: JSON file to write.
        html: page to write.
    """
    from embedcache.provenance import write_output, write_report_json
    from embedcache.reports.render import Presentation, present, to_html

    shown = report if isinstance(report, Presentation) else present(report)
    try:
        # Files come before printing, which ends the command if `head` reads no further.
        if output is not None:
            write_report_json(output, shown.record())
        if html is not None:
            write_output(html, to_html(shown).encode())
    finally:
        # Results of hours are printed even if a file cannot be written.
        if as_json:
            print_json(shown.record())
        else:
            print_report(shown)

    # Standard output must stay JSON only.
    for path in filter(None, (output, html)):
        print(visible(f"wrote {path}"), file=sys.stderr if as_json else sys.stdout, flush=True)
    shown.finish()


def print_report(report: "Presentation") -> None:
    """Print a report as lines and tables."""
    print_lines([*report.lines, *(f"WARNING: {warning}" for warning in report.warnings)])
    for section in report.sections:
        if section.table is not None and section.num_printed != 0:
            columns, rows = section.table
            print_table(columns, rows[: section.num_printed], title=section.title)
    print_lines(report.notes)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty.

    Raises:
        PathError: the file does not exist.
        DataError: it is not UTF-8.
    """
    try:
        return [line for line in split_lines(read_text(path, DataError)) if line.strip()]
    except FileNotFoundError as error:
        raise PathError(f"expected a file with one text per line, got {path}, which does not exist") from error


def run_program(run: Callable[[], object]) -> None:
    """Run a program: the command line, or a pipeline.

    Exit codes: 0 success; 1 a user's error, printed as one line; 70 a bug, in embedcache or a plug-in,
    with its traceback; 130 interrupted.
    EMBEDCACHE_DEBUG=1 also prints the traceback of a user's error.
    """
    _open_closed_streams()
    show_faults()
    warnings.filterwarnings("ignore", "UPath '.*' filesystem not explicitly implemented", UserWarning)
    try:
        _check_arguments()
        run()
    except KeyboardInterrupt:
        end_interrupted()
    except EmbedcacheError as error:
        _fail(str(error), error)
    except BrokenPipeError:
        # The reader has ended, as in `embedcache … | head`. Python flushes standard output when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        _fail(_os_error_line(error), error)
    except Exception as error:  # noqa: BLE001
        if is_out_of_memory(error):
            # The words before it name a line of torch's source.
            reason = one_line(error).rpartition("DefaultCPUAllocator: ")[2]
            _fail(f"out of memory: {reason}; use smaller settings, or give this process more memory")
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            _fail("can't start new thread; raise the limit of processes with ulimit -u, or use fewer --threads")
        if not is_io_error(error):
            _report_bug()
        _fail(f"a remote service failed: {io_reason(error)}; check the address and the network")
    finally:
        _end_on_interrupt()


def _open_closed_streams() -> None:
    """Open streams that are closed, as by `>&-`."""
    # A file of a cache would otherwise get the number of the stream, and with it the output of C code.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: PTH123, SIM115


def end_interrupted() -> NoReturn:
    """End the process after Ctrl-C. Outputs are whole or absent, and the same command goes on from finished work."""
    _end_on_interrupt()
    close_bars()
    print("Interrupted. Run the same command again.", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _end_on_interrupt() -> None:
    """Let Ctrl-C end the process immediately from now on. While it exits, Python would print a traceback."""
    is_main = threading.current_thread() is threading.main_thread()

    # A background job ignores the signal, and goes on ignoring it.
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _check_arguments() -> None:
    """Check that names can be stored and printed."""
    # Bytes that are not UTF-8 are lone surrogates in Python's strings.
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


def _fail(message: str, error: Exception | None = None) -> NoReturn:
    close_bars()
    message = "; ".join([message, *getattr(error, "__notes__", ())])
    if os.environ.get("EMBEDCACHE_DEBUG", "0") != "0":
        traceback.print_exc()
    # A name may contain a line break, but an error is one line.
    print("error:", visible(message).replace("\n", r"\n"), file=sys.stderr)
    sys.exit(1)


def _report_bug() -> NoReturn:
    close_bars()
    traceback.print_exc()
    used = sorted(used_plugins() - {"embedcache"})
    line = "This is a bug in embedcache, not an error of yours: please report it with the text above."
    if used:
        line = (
            f"This is a bug, maybe of a plug-in: run the contract test of {' and '.join(used)}, see "
            "embedcache.testing; if it passes, please report the text above."
        )
    print(line, file=sys.stderr)
    sys.exit(_BUG)
