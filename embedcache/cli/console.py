"""What the command line prints: progress and log messages on standard error, results on standard output."""

import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from embedcache.devices import announce
from embedcache.errors import DataError, PathError, pluralize, visible
from embedcache.files import read_text, split_lines
from embedcache.progress import Progress, to_progress

log = logging.getLogger("embedcache")

_PLAIN_WIDTH = 10_000
"""Letters of a line of a table in a file or pipe, where nothing needs to be wrapped."""
_JSON_CONTROLS = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set what is printed beside results while a command runs."""
    level, started = log.level, time.monotonic()
    handler = logging.StreamHandler()
    devices, device_lines = logging.getLogger("embedcache.devices"), logging.StreamHandler()
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    warnings.setFormatter(_VisibleFormatter("warning: %(message)s"))
    handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    announce.cache_clear()  # a test runs several commands in one process
    if verbose and not quiet:
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    else:
        log.addHandler(warnings)
    if quiet:
        log.setLevel(logging.WARNING)
    elif not verbose:
        devices.addHandler(device_lines)
        devices.setLevel(logging.INFO)
    try:
        yield
    finally:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        log.info("run time %.1f s, peak memory %.0f MB", time.monotonic() - started, peak_mb)
        log.removeHandler(handler)
        log.removeHandler(warnings)
        log.setLevel(level)
        devices.removeHandler(device_lines)
        devices.setLevel(logging.NOTSET)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the message with control characters as escapes."""
        return visible(super().format(record))


def open_progress() -> Progress:
    """Return bars on a terminal, plain lines elsewhere, and nothing with `--quiet`."""
    return to_progress(log.level != logging.WARNING)  # as `verbosity` sets it


def print_line(line: str) -> None:
    """Print one line of a result."""
    print(visible(line), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of a result."""
    for line in lines:
        print_line(line)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title and visible(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(visible(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False, emoji=False).print(table)


def print_json(record: Any) -> None:
    """Print JSON on standard output."""
    text = json.dumps(record, indent=1, ensure_ascii=False)  # which escapes all controls but the following
    print(_JSON_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def publish(
    show: Callable[[], None],
    record: Callable[[], Any],
    *,
    as_json: bool,
    output: Path | None = None,
    write_output: Callable[[Path], None] | None = None,
    html: Path | None = None,
    write_page: Callable[[Path], None] | None = None,
) -> None:
    """Write the requested files, and print a report as text or as JSON.

    Args:
        show: prints the report as text.
        record: returns the report as JSON values.
        as_json: print the JSON values instead.
        output: JSON file to write.
        write_output: writes it; None: the JSON values in one file.
        html: page to write.
        write_page: writes the page.
    """
    from embedcache.outputs import write_report_json

    try:  # before printing, which ends the command where `head` reads no further
        if output is not None and write_output is not None:
            write_output(output)
        elif output is not None:
            write_report_json(output, record())
        if html is not None and write_page is not None:
            write_page(html)
    finally:  # what may have taken hours is printed also if it cannot be written
        if as_json:
            print_json(record())
        else:
            show()
    for path in filter(None, (output, html)):
        print(visible(f"wrote {path}"), file=sys.stderr if as_json else sys.stdout, flush=True)


def publish_size(path: Path, num_samples: int, *, as_json: bool, output: Path | None) -> None:
    """Publish how many samples a command has written to a file."""
    publish(
        lambda: print_line(f"{path}: {pluralize(num_samples, 'sample')}"),
        lambda: {"path": str(path), "num_samples": num_samples},
        as_json=as_json,
        output=output,
    )


def to_plain(value: Any) -> Any:
    """Return a report as JSON values: dataclasses become objects, arrays and sequences lists, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): to_plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(element) for element in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


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
