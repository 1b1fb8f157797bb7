"""Which chunks this process works on: none that another works on at the same time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from embedcache.extract.target import Target


@dataclass(frozen=True, eq=False)
class Work:
    """A chunk, and the targets that miss it and whose claim on it this process holds."""

    chunk: int
    targets: Sequence[Target]

    def give_back(self) -> None:
        """Let others have it."""
        for target in self.targets:
            target.claims.give_back(self.chunk)


def claim_free(targets: Sequence[Target], chunks: Iterable[int]) -> Iterator[Work]:
    """Take chunks that nobody works on, each when it is asked for."""
    for chunk in chunks:
        taken = [target for target in targets if target.missing(chunk) and target.claims.take(chunk)]
        work = _still_missing(chunk, taken)
        if work.targets:
            yield work


def claim_one(target: Target, chunk: int) -> Work:
    """Wait until nobody else works on a chunk. Only for a process that holds no other claim: two could wait in turn."""
    target.claims.take(chunk, waits=True)
    return _still_missing(chunk, [target])


def _still_missing(chunk: int, taken: Sequence[Target]) -> Work:
    """Keep the targets that miss the chunk now: another process may have committed it just before we took it."""
    missing = [target for target in taken if target.missing(chunk)]
    Work(chunk, [target for target in taken if target not in missing]).give_back()
    return Work(chunk, missing)
