"""Progress that records its calls."""

from collections import Counter


class RecordedProgress:
    """Records the steps, the counts and the notes."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, str]] = []
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []

    def start(self, what: str, total: int, unit: str) -> None:
        self.started.append((what, total, unit))

    def advance(self, count: int) -> None:
        self.counts[self.started[-1][0]] += count

    def finish(self) -> None:
        pass

    def note(self, line: str) -> None:
        self.notes.append(line)
