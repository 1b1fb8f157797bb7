"""Progress reporting: bars in notebooks and terminals, lines in logs, or an object of yours."""

import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable
from weakref import WeakSet

from embedcache.errors import SettingError, visible

_SECONDS_BETWEEN_LINES = 10.0


@runtime_checkable
class Progress(Protocol):
    """Receives the progress of a function. Any object with these methods can show it."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a step of `total` units, which ends the step before; a total that is 0 or exceeded is unknown."""

    def advance(self, count: int) -> None:
        """Add `count` finished units of the step; ignored between two steps."""

    def describe(self, state: str) -> None:
        """Set what is shown of the step beside the count, such as the epoch and the last loss."""

    def finish(self) -> None:
        """End the step."""

    def note(self, line: str) -> None:
        """Report one line for the user."""

    def part(self, name: str = "") -> "Progress":
        """Return the progress of one of several things that are done at once; its steps are shown after the name."""


AnyProgress: TypeAlias = Progress | bool | None
"""How progress is shown: by an object of yours; True: as bars in notebooks and terminals, and as lines elsewhere;
False: not at all; None: as bars in notebooks and terminals only."""


def to_progress(progress: AnyProgress) -> Progress:
    """Return the object that shows progress as requested."""
    if not isinstance(progress, bool | None):
        if not isinstance(progress, Progress):
            methods = "start, advance, describe, finish, note and part"
            raise SettingError(f"progress: expected true, false or an object with {methods}, got {progress!r}")
        return progress
    if progress is not False and (_is_notebook() or sys.stderr.isatty()):
        return BarProgress()
    return PlainProgress() if progress else NullProgress()


def _is_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


class NullProgress:
    """Discards all progress."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""

    def describe(self, state: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def note(self, line: str) -> None:
        """Do nothing."""

    def part(self, name: str = "") -> "NullProgress":  # noqa: ARG002 - as in `Progress`
        """Return this."""
        return self


class BarProgress:
    """Progress as bars of tqdm, in a notebook or a terminal; the bars of parts are below each other."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._tqdm = _import_tqdm()
        self._bar: Any = None

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a bar; without a total it only counts."""
        self.finish()
        name = visible(join_names(self._name, what))
        # tqdm draws nothing in a terminal that does not know its size
        size: Any = {} if _is_notebook() else dict(zip(("ncols", "nrows"), shutil.get_terminal_size(), strict=True))
        self._bar = self._tqdm(total=total or None, desc=name, unit=f" {unit}", **size)
        _OPEN.add(self)

    def advance(self, count: int) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(count)

    def describe(self, state: str) -> None:
        """Show the state from the next count on."""
        if self._bar is not None:
            self._bar.set_postfix_str(visible(state), refresh=False)

    def finish(self) -> None:
        """Stop the bar and leave it where it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        _OPEN.discard(self)

    def note(self, line: str) -> None:
        """Print a line above all bars."""
        self._tqdm.write(visible(line), file=sys.stdout if _is_notebook() else sys.stderr)

    def part(self, name: str = "") -> "BarProgress":
        """Return the progress of a part, whose bars are on the same screen."""
        return BarProgress(join_names(self._name, name))


_OPEN: WeakSet[BarProgress] = WeakSet()


def close_bars() -> None:
    """Stop all bars and leave them where they are, so that the last line of a program is below them."""
    for progress in list(_OPEN):
        progress.finish()


def _import_tqdm() -> Any:
    """Import the class of bars; in a notebook without ipywidgets it draws letters, which needs no warning in red."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


class PlainProgress:
    """Progress as a line every ten seconds, for logs."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._what, self._unit, self._state = "", "", ""
        self._count, self._total = 0, 0
        self._started_s: float | None = None  # None between two steps

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a step."""
        self._what, self._unit, self._state = join_names(self._name, what), unit, ""
        self._count, self._total = 0, total
        self._started_s = self._written_s = time.monotonic()

    def advance(self, count: int) -> None:
        """Write the count, the time left, the rate and the state, at most every ten seconds."""
        if self._started_s is None:
            return
        self._count += count
        if time.monotonic() - self._written_s >= _SECONDS_BETWEEN_LINES:
            self._write(self._started_s)

    def describe(self, state: str) -> None:
        """Write the state with the next count."""
        self._state = state

    def finish(self) -> None:
        """Write the last count and the total time."""
        if self._started_s is not None and self._count:
            self._write(self._started_s)
        self._started_s = None

    def note(self, line: str) -> None:
        """Write a line."""
        sys.stderr.write(f"{visible(line)}\n")
        sys.stderr.flush()

    def part(self, name: str = "") -> "PlainProgress":
        """Return the progress of a part, whose lines have its name."""
        return PlainProgress(join_names(self._name, name))

    def _write(self, started_s: float) -> None:
        """Write a line in the format of bars, such as `training: 10/40 pairs [00:10<00:30, 1.00 pairs/s, loss 0.5]`."""
        self._written_s = time.monotonic()
        line = _import_tqdm().format_meter(
            self._count,
            self._total if self._count <= self._total else None,
            self._written_s - started_s,
            ncols=0,  # no bar
            prefix=self._what,
            unit=f" {self._unit}",
            postfix=self._state,
        )
        self.note(line)


Part = TypeVar("Part", bound=Sized | slice)


def watch(parts: Iterable[Part], progress: Progress, what: str, total: int, unit: str) -> Iterator[Part]:
    """Iterate over arrays, tables or slices as one step of `progress`, which advances by the rows of each part used."""
    progress.start(what, total, unit)
    for part in parts:
        yield part
        progress.advance(part.stop - part.start if isinstance(part, slice) else len(part))
    progress.finish()


def join_names(part: str, name: str) -> str:
    """Return a name after that of the part it belongs to: `part: name`, or the one that is not empty."""
    return f"{part}: {name}" if part and name else part or name
