"""Progress reporting: bars in notebooks and terminals, lines in logs, or an object of yours."""

import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable
from weakref import WeakSet

from embedcache.errors import SettingError, visible

_SECONDS_BETWEEN_LINES = 10.0


@runtime_checkable
class Progress(Protocol):
    """Receives the progress of a function. Any object with these methods can show it.

    Example:
        >>> class Names(NullProgress):
        ...     def start(self, what, total, unit):
        ...         print(what, total, unit)
        >>> for block in watch([[1, 2], [3]], Names(), "reading", 3, "rows"):
        ...     pass
        reading 3 rows
    """

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a step of `total` units and end the previous one. A total that is 0 or exceeded is unknown."""

    def advance(self, count: int) -> None:
        """Add `count` finished units of the step. Ignored between two steps."""

    def describe(self, state: str) -> None:
        """Set the text shown next to the count, such as the epoch and the last loss."""

    def finish(self) -> None:
        """End the step."""

    def note(self, line: str) -> None:
        """Report one line for the user."""

    def part(self, name: str = "") -> "Progress":
        """Return the progress of one of several concurrent jobs. Its steps are shown after the name."""


AnyProgress: TypeAlias = Progress | bool | None
"""How progress is shown. An object receives it. True shows bars in notebooks and terminals, and lines elsewhere. False
shows nothing. None shows bars in notebooks and terminals only."""


def to_progress(progress: AnyProgress) -> Progress:
    """Return the object that shows progress as requested.

    Example:
        >>> type(to_progress(False)).__name__
        'NullProgress'
    """
    if not isinstance(progress, bool | None):
        if not isinstance(progress, Progress):
            methods = "start, advance, describe, finish, note and part"
            raise SettingError(f"progress: expected true, false or an object with {methods}, got {progress!r}")
        return progress

    # Logs get no bars, as a bar is redrawn in place.
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
    """Progress as bars of tqdm, in a notebook or a terminal. The bars of parts are below each other."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._bar: Any = None

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a bar. Without a total it only counts."""
        self.finish()
        name = visible(join_names(self._name, what))
        self._bar = _import_tqdm()(total=total or None, desc=name, unit=f" {unit}", **self._options())
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
        _import_tqdm().write(visible(line), file=sys.stdout if _is_notebook() else sys.stderr)

    def part(self, name: str = "") -> "BarProgress":
        """Return the progress of a part, whose bars are on the same screen."""
        return type(self)(join_names(self._name, name))

    def _options(self) -> dict[str, Any]:
        # tqdm draws nothing in a terminal that does not know its size.
        size = shutil.get_terminal_size()
        return {} if _is_notebook() else {"ncols": size.columns, "nrows": size.lines}


_OPEN: WeakSet[BarProgress] = WeakSet()


def close_bars() -> None:
    """Stop all bars and leave them where they are, so that the last line of a program is below them."""
    for progress in list(_OPEN):
        BarProgress.finish(progress)


def _import_tqdm() -> Any:
    """Import the class of bars."""
    # Without ipywidgets a notebook draws bars of letters, which needs no warning in red.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


class PlainProgress(BarProgress):
    """Progress as a line every ten seconds and one when a step ends, for logs. Lines of parts begin with their name."""

    def finish(self) -> None:
        """Write the last count and the total time."""
        if self._bar is not None and self._bar.n:
            self._bar.refresh()
        super().finish()

    def note(self, line: str) -> None:
        """Write a line."""
        sys.stderr.write(f"{visible(line)}\n")
        sys.stderr.flush()

    def _options(self) -> dict[str, Any]:
        # Lines have no bar, and there is none before the first count, nor a second one at the end.
        look = {"ncols": 0, "leave": False, "delay": 1e-9, "smoothing": 0}
        return {**look, "mininterval": _SECONDS_BETWEEN_LINES, "miniters": 1, "file": _Lines()}


class _Lines:
    """A file for tqdm that writes each state of a bar to standard error, in a new line."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


Part = TypeVar("Part", bound=Sized | slice)


def watch(parts: Iterable[Part], progress: Progress, what: str, total: int, unit: str) -> Iterator[Part]:
    """Iterate over arrays, tables or slices as one step of `progress`. It advances by the rows of each part used."""
    progress.start(what, total, unit)
    for part in parts:
        yield part

        # A part counts once its consumer asks for the next one.
        progress.advance(part.stop - part.start if isinstance(part, slice) else len(part))
    progress.finish()


def join_names(part: str, name: str) -> str:
    """Return a name after the name of its part. One of them may be empty.

    Example:
        >>> join_names("seed 2", "training"), join_names("", "training")
        ('seed 2: training', 'training')
    """
    return f"{part}: {name}" if part and name else part or name
