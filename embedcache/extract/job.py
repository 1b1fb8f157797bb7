"""What to extract, so that any process on any machine can take part; and what was done."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from embedcache.extract.settings import ExtractSettings


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to extract.

    Args:
        cache: path or URL of the cache, whose sample and item tables are written.
        source: what reopens the source.
        image: specs of the encoders of images.
        text: specs of the encoders of texts.
        settings: how features are made and stored.
    """

    cache: str
    source: Mapping[str, Any]
    image: tuple[str, ...]
    text: tuple[str, ...]
    settings: ExtractSettings

    def share(self, number: int, count: int) -> "Job":
        """Give one of `count` equal parts of this job."""
        return replace(self, settings=self.settings.share(number, count))


@dataclass(frozen=True, kw_only=True)
class Done:
    """What was done for one target.

    Args:
        modality: `image` or `text`.
        encoder: name of its folder in the cache.
        features: what is stored.
        chunks: those that were missing some of it and were worked on.
    """

    modality: str
    encoder: str
    features: tuple[str, ...]
    chunks: frozenset[int]


def merge_done(parts: Iterable[Iterable[Done]]) -> list[Done]:
    """Join what several processes did: one entry a target, in the order of the first."""
    joined: dict[tuple[str, str], Done] = {}
    for part in parts:
        for done in part:
            earlier = joined.get((done.modality, done.encoder))
            chunks = done.chunks | (earlier.chunks if earlier else frozenset())
            joined[done.modality, done.encoder] = Done(
                modality=done.modality, encoder=done.encoder, features=done.features, chunks=chunks
            )
    return list(joined.values())
