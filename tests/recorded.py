"""Progress that records its calls."""

from collections import Counter

from embedcache.progress import join_names


class RecordedProgress:
    """Records the steps, those that were finished, the counts, the last states, the notes and the parts."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.started: list[tuple[str, int, str]] = []
        self.finished: list[str] = []
        self.counts: Counter[str] = Counter()
        self.advances: list[int] = []
        self.states: dict[str, str] = {}
        self.notes: list[str] = []
        self.parts: list[RecordedProgress] = []

    def start(self, what: str, total: int, unit: str) -> None:
        self.started.append((join_names(self.name, what), total, unit))

    def advance(self, count: int) -> None:
        self.counts[self.started[-1][0]] += count
        self.advances.append(count)

    def describe(self, state: str) -> None:
        self.states[self.started[-1][0]] = state

    def finish(self) -> None:
        if self.started:
            self.finished.append(self.started[-1][0])

    def note(self, line: str) -> None:
        self.notes.append(line)

    def part(self, name: str = "") -> "RecordedProgress":
        self.parts.append(RecordedProgress(join_names(self.name, name)))
        return self.parts[-1]
