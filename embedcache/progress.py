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

    def describe(self, state: str) -> None:
        """Set what is shown of the step beside the count, such as the epoch and the last loss."""
        ...

    def finish(self) -> None:
        """End the step."""
        ...

    def note(self, line: str) -> None:
        """Report one line for the user."""
        ...

    def part(self, name: str = "") -> "Progress":
        """Return the progress of one of several things that are done at once; its steps are shown after the name."""
        ...


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


def join_names(part: str, name: str) -> str:
    """Return a name after that of the part it belongs to: `part: name`, or the one that is not empty."""
    return f"{part}: {name}" if part and name else part or name
