"""What the command line prints: progress and log messages on standard error, results on standard output."""

import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import typer

from embedcache.errors import DataError, PathError, visible
from embedcache.files import read_limited
from embedcache.progress import NullProgress, Progress, join_names

log = logging.getLogger("embedcache")

_SECONDS_BETWEEN_LINES = 10.0
_PLAIN_WIDTH = 160
_INTERRUPTED = 130
_JSON_CONTROLS = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@contextmanager
def verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set what is printed beside results while a command runs."""
    level, started = log.level, time.monotonic()
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if quiet:
        log.setLevel(logging.ERROR)
    elif verbose:
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        log.info("run time %.1f s, peak memory %.0f MB", time.monotonic() - started, peak_mb)
        log.removeHandler(handler)
        log.setLevel(level)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the message with control characters as escapes."""
        return visible(super().format(record))


def open_progress() -> Progress:
    """Return bars on a terminal, plain lines elsewhere, and nothing with `--quiet`."""
    if log.level == logging.ERROR:
        return NullProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


@contextmanager
def resumable() -> Iterator[None]:
    """Explain on Ctrl-C that the same command resumes the work, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. Finished work is kept; rerun the same command to resume.", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


def print_line(line: str) -> None:
    """Print one line of a result."""
    print(visible(line), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title and visible(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False).print(table)


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
    """Print a report as text or as JSON, and write the requested files.

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

    if as_json:
        print_json(record())
    else:
        show()
    if output is not None and write_output is not None:
        write_output(output)
    elif output is not None:
        write_report_json(output, record())
    if html is not None and write_page is not None:
        write_page(html)
    for path in filter(None, (output, html)):
        print(visible(f"wrote {path}"), file=sys.stderr if as_json else sys.stdout, flush=True)


def to_plain(value: Any) -> Any:
    """Return a report as JSON values: dataclasses become objects, arrays and sequences lists, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
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
        return [line for line in read_limited(path).decode("utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise PathError(f"expected a file with one text per line, got {path}, which does not exist") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got other bytes: {error}") from error


class TerminalProgress:
    """Progress as a bar with the rate, the state and the time left; the bars of parts are below each other."""

    def __init__(self, name: str = "", bars: "_Bars | None" = None) -> None:
        self._name, self._bars = name, bars or _Bars()
        self._task: Any = None

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a bar; without a total it only counts."""
        self.finish()
        self._rate, self._total, self._state = _Rate(unit), total, ""
        self._task = self._bars.add(visible(join_names(self._name, what)), total)

    def advance(self, count: int) -> None:
        """Advance the bar."""
        self._rate.add(count)
        if self._task is not None:
            done = f"{self._rate.done:,}{_of(self._total)} · {self._rate.text()}"
            self._bars.update(self._task, count, visible(f"{done} · {self._state}" if self._state else done))

    def describe(self, state: str) -> None:
        """Show the state from the next count on."""
        self._state = state

    def finish(self) -> None:
        """Stop the bar and leave it on the screen."""
        if self._task is not None:
            self._bars.end(self._task)
            self._task = None

    def note(self, line: str) -> None:
        """Print a line above all bars."""
        self._bars.console.print(visible(line), highlight=False, markup=False, soft_wrap=True)

    def part(self, name: str = "") -> "TerminalProgress":
        """Return the progress of a part, whose bars are on the same screen."""
        return TerminalProgress(join_names(self._name, name), self._bars)


class _Bars:
    """The bars of steps that are not finished, at the bottom of the screen."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}")
        self._bars = Bars(*columns, TimeRemainingColumn(), console=self.console, transient=True)

    def add(self, description: str, total: int) -> Any:
        self._bars.start()
        return self._bars.add_task(description, total=total or None, done="")

    def update(self, task: Any, count: int, done: str) -> None:
        self._bars.update(task, advance=count, done=done)

    def end(self, task: Any) -> None:
        """Print the bar a last time, above those that go on."""
        row = self._bars.make_tasks_table([item for item in self._bars.tasks if item.id == task])
        self._bars.remove_task(task)
        if not self._bars.tasks:
            self._bars.stop()
        self.console.print(row)


class PlainProgress:
    """Progress as a line every ten seconds, for logs."""

    def __init__(self, name: str = "") -> None:
        self._name, self._what, self._unit, self._state = name, "", "", ""
        self._total, self._rate = 0, _Rate("")

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a piece of work."""
        self._what, self._total, self._unit = join_names(self._name, what), total, unit
        self._rate, self._state = _Rate(unit), ""
        self._last = time.monotonic()

    def advance(self, count: int) -> None:
        """Write the count, the rate, the time left and the state, at most every ten seconds."""
        self._rate.add(count)
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            done = f"{self._rate.done:,}{_of(self._total)} {self._unit}"
            state = f"; {self._state}" if self._state else ""
            self.note(f"{self._what}: {done}, {self._rate.text()}{self._left()}{state}")

    def describe(self, state: str) -> None:
        """Write the state with the next count."""
        self._state = state

    def finish(self) -> None:
        """Write the total time."""
        if self._rate.done:
            done = f"{self._rate.done:,} {self._unit} in {self._rate.seconds:.1f} s"
            self.note(f"{self._what}: {done}, {self._rate.text()}")
        self._rate = _Rate(self._unit)

    def note(self, line: str) -> None:
        """Write a line."""
        print(visible(line), file=sys.stderr, flush=True)

    def part(self, name: str = "") -> "PlainProgress":
        """Return the progress of a part, whose lines have its name."""
        return PlainProgress(join_names(self._name, name))

    def _left(self) -> str:
        if not (self._total and self._rate.done):
            return ""
        return f", {self._rate.seconds * (self._total - self._rate.done) / self._rate.done:.0f} s left"


class _Rate:
    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._started = time.monotonic()
        self.done = 0

    def add(self, count: int) -> None:
        self.done += count

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def text(self) -> str:
        return f"{self.done / self.seconds:,.0f} {self._unit}/s"


def _of(total: int) -> str:
    return f"/{total:,}" if total else ""
