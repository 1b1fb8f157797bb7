"""What the command line shows: progress on standard error, results on standard output."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from embedcache.errors import DataError, PathError

_SECONDS_BETWEEN_LINES = 10.0
_PLAIN_WIDTH = 160
_INTERRUPTED = 130


class TerminalProgress:
    """Draws a bar with rate and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin a bar; without a total it only counts."""
        self.finish()
        self._rate = _Rate(unit)
        self._total = total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total or None, done="")

    def advance(self, count: int) -> None:
        """Move the bar."""
        self._rate.add(count)
        if self._bar is not None:
            done = f"{self._rate.done:,}{_of(self._total)} · {self._rate.text()}"
            self._bar.update(self._task, advance=count, done=done)

    def finish(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class PlainProgress:
    """Writes a line now and then, for logs."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin a piece of work."""
        self._what, self._total, self._unit = what, total, unit
        self._rate = _Rate(unit)
        self._last = time.monotonic()

    def advance(self, count: int) -> None:
        """Say how far it is, at most every ten seconds."""
        self._rate.add(count)
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.note(
                f"{self._what}: {self._rate.done:,}{_of(self._total)} {self._unit}, {self._rate.text()}{self._left()}"
            )

    def finish(self) -> None:
        """Say how long it took."""
        if self._rate.done:
            self.note(
                f"{self._what}: {self._rate.done:,} {self._unit} in {self._rate.seconds:.1f} s, {self._rate.text()}"
            )
        self._rate = _Rate(self._unit)

    def note(self, line: str) -> None:
        """Write a line."""
        print(line, file=sys.stderr, flush=True)

    def _left(self) -> str:
        if not (self._total and self._rate.done):
            return ""
        return f", {self._rate.seconds * (self._total - self._rate.done) / self._rate.done:.0f} s left"


def _of(total: int) -> str:
    return f"/{total:,}" if total else ""


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


def open_progress() -> TerminalProgress | PlainProgress:
    """Choose bars on a terminal and plain lines elsewhere."""
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


@contextmanager
def going_on_later() -> Iterator[None]:
    """Let Ctrl-C stop work that a later run goes on with."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; what is committed is kept: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


def say(line: str) -> None:
    """Print one result line."""
    print(line, flush=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False).print(table)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that hold something.

    Raises:
        PathError: it does not exist.
        DataError: it is not UTF-8.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise PathError(f"{path} does not exist; give a file with a text a line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
