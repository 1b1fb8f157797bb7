"""How long work tells how far it is. The library is silent unless it is given one of these."""

from typing import Protocol


class Progress(Protocol):
    """Gets told what is going on; the command line draws it."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin a piece of work of `total` units; ends the one before."""
        ...

    def advance(self, count: int) -> None:
        """Say that `count` more units are done."""
        ...

    def finish(self) -> None:
        """End the piece of work."""
        ...

    def note(self, line: str) -> None:
        """Say one line that a person should see."""
        ...


class NullProgress:
    """Says nothing."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Ignore it."""

    def advance(self, count: int) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""

    def note(self, line: str) -> None:
        """Ignore it."""
