"""Items on pages: the one place where an image, a text, a recording or a video of a cache becomes part of a page."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from embedcache.arrays import Bools
from embedcache.dataset.thumbnails import PICTURED, PLAYED, Thumbnails, UnplayableError, credit, data_url, not_shown
from embedcache.errors import EmbedcacheError, pluralize
from embedcache.modalities import noun, one_noun
from embedcache.settings import format_bytes
from embedcache.sources.files import file_name_beside_key
from embedcache.store.cache import Cache, RowReader

_log = logging.getLogger(__name__)

_PLAYER_BYTES, _PAGE_BYTES = 2**18, 2**22


@dataclass(frozen=True, kw_only=True)
class PageItem:
    """An item on a page: a text, or an image with its caption below.

    Args:
        text: the text or caption.
        image_url: the image as a `data:` URL; of a recording its spectrogram, of a video its middle frame.
        player_url: the recording or video as a `data:` URL, if it is short enough for a page.
        modality: what it is.
    """

    text: str = ""
    image_url: str | None = None
    player_url: str | None = None
    modality: str = "text"
    is_correct: bool = False


@dataclass(frozen=True, kw_only=True)
class QueryExample:
    """A query with its top results, best first; how it went; and a correct item, if none is among the results."""

    query: PageItem
    outcome: str
    is_correct: bool
    results: Sequence[PageItem]
    answer: PageItem | None = None


def ranked_example(query: PageItem, results: Sequence[PageItem], *, rank: int, answer: PageItem) -> QueryExample:
    """Return the example of a query whose best correct item has `rank`; 1 is the top."""
    return QueryExample(
        query=query,
        outcome="correct at rank 1" if rank == 1 else f"first correct result at rank {rank:,}",
        is_correct=rank == 1,
        results=results,
        answer=None if any(result.is_correct for result in results) else answer,
    )


def sample_outcomes(is_correct_N: Bools, num_each: int) -> list[int]:
    """Sample the positions of `num_each` correct outcomes, then of as many wrong ones, or as many as there are."""
    rng = np.random.default_rng(0)
    return [
        int(position)
        for outcome_N in (is_correct_N, ~is_correct_N)
        for position in rng.permutation(np.flatnonzero(outcome_N))[:num_each]
    ]


class ItemRenderer:
    """Renderer of items of one modality for a page.

    An item has the key of its sample, and the name of its file if the key does not give it; one that cannot be read is
    represented by these alone. Short recordings and videos have a player, as long as all of them take at most 4 MiB.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self._cache, self._modality = cache, modality
        self._items = RowReader(cache, modality, ["text"] if modality == "text" else ["sample", "path"])
        self._reason: str | None = None
        self._left_out: set[int] = set()
        self._silent: set[int] = set()
        self._bytes_left = _PAGE_BYTES

    @property
    def credit(self) -> str:
        """Attribution that must be shown with the items; empty if none is required."""
        return credit(self._cache) if self._modality in PICTURED else ""

    @cached_property
    def _thumbnails(self) -> Thumbnails | None:
        """Thumbnails of the items, for which the source is opened; None if it cannot be."""
        if self._modality not in PICTURED:
            return None
        try:
            return Thumbnails(self._cache, self._modality)
        except EmbedcacheError as error:
            self._reason = str(error)
            _log.warning("%s", self._reason)
            return None

    def render(self, row: int, *, is_correct: bool = False) -> PageItem:
        """Return the item in a row as it is shown on a page."""
        item = self._items.take(np.array([row])).to_pylist()[0]
        if self._modality == "text":
            return PageItem(text=item["text"], is_correct=is_correct)
        image_url = player_url = None
        try:
            if self._thumbnails is not None:
                image_url = self._thumbnails.data_url(row)
                player_url = self._player_url(self._thumbnails, row)
        except EmbedcacheError as error:
            self._reason = str(error)
        if image_url is None and self._reason is not None:
            self._left_out.add(row)
        key = self._cache.key(item["sample"])
        return PageItem(
            text=" · ".join(filter(None, [key, file_name_beside_key(item["path"], key)])),
            image_url=image_url,
            player_url=player_url,
            modality=self._modality,
            is_correct=is_correct,
        )

    def _player_url(self, thumbnails: Thumbnails, row: int) -> str | None:
        if self._modality not in PLAYED:
            return None
        try:
            played = thumbnails.play(row, min(_PLAYER_BYTES, self._bytes_left))
        except UnplayableError:
            self._silent.add(row)
            return None
        self._bytes_left -= len(played.data)
        return data_url(played.data, played.media_type) + thumbnails.interval_fragment(row)

    def warnings(self) -> list[str]:
        """Return how many items are missing from the page, or have no player there, if any, and why."""
        reason = (self._reason or "").removeprefix(not_shown(self._modality))
        lines = [f"{self._count(self._left_out, 'is', 'are')} not shown: {reason}"] if self._left_out else []
        if self._silent:
            limits = f"{format_bytes(_PLAYER_BYTES)} each, {format_bytes(_PAGE_BYTES)} in total"
            lines.append(f"{self._count(self._silent, 'has', 'have')} no player: a page holds {limits}")
        return lines

    def _count(self, rows: set[int], one: str, several: str) -> str:
        return pluralize(len(rows), f"{one_noun(self._modality)} {one}", f"{noun(self._modality)} {several}")
