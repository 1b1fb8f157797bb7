"""Progress reporting. The library reports nothing unless it is given an object with these methods."""

from typing import Protocol


class Progress(Protocol):
    """Receives progress; the command line draws it."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Start a step of `total` units, which ends the step before; a total of 0 is unknown."""
        ...

    def advance(self, count: int) -> None:
        """Add `count` finished units."""
        ...

    def finish(self) -> None:
        """End the step."""
        ...

    def note(self, line: str) -> None:
        """Report one line for the user."""
        ...


class NullProgress:
    """Discards all progress."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def note(self, line: str) -> None:
        """Do nothing."""
