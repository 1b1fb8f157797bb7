"""Items on pages: the one place where an image, a text, an audio or a video of a cache becomes part of a page."""

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

_PLAYER_BYTES = 2**18
_PAGE_BYTES = 2**22


@dataclass(frozen=True, kw_only=True)
class PageItem:
    """An item on a page: a text, or an image with its caption below.

    Args:
        text: the text or caption.
        image_url: the image as a `data:` URL, or the spectrogram of an audio, or the middle frame of a video.
        player_url: the audio or video as a `data:` URL, if it is short enough for a page.
        modality: modality of the item.
        is_correct: whether the item is a correct result.
    """

    text: str = ""
    image_url: str | None = None
    player_url: str | None = None
    modality: str = "text"
    is_correct: bool = False


@dataclass(frozen=True, kw_only=True)
class QueryExample:
    """A query with its top results, best first.

    Args:
        query: item of the query.
        outcome: one line on how good the results are.
        is_correct: whether the outcome is good.
        results: top results.
        answer: a correct item, if none is among the results.
    """

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
    positions: list[int] = []
    for outcome_N in (is_correct_N, ~is_correct_N):
        positions += rng.permutation(np.flatnonzero(outcome_N))[:num_each].tolist()
    return positions


class ItemRenderer:
    """Renderer of items of one modality for a page.

    An item has the key of its sample, and the name of its file if the key does not give it. An item that cannot be read
    has only these. Short audio and videos have a player, as long as all players together need at most 4 MiB.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self._cache = cache
        self._modality = modality
        self._items = RowReader(cache, modality, ["text"] if modality == "text" else ["sample", "path"])
        self._reason: str | None = None
        # Sets, because a page may show an item several times and counts it once.
        self._unpictured_rows: set[int] = set()
        self._silent_rows: set[int] = set()
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

        # A file that is gone or damaged costs its picture, not the page.
        image_url = None
        player_url = None
        try:
            if self._thumbnails is not None:
                image_url = self._thumbnails.data_url(row)
                player_url = self._player_url(self._thumbnails, row)
        except EmbedcacheError as error:
            self._reason = str(error)
        # Without a reason the modality has no pictures.
        if image_url is None and self._reason is not None:
            self._unpictured_rows.add(row)

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
            self._silent_rows.add(row)
            return None

        # Players are parts of the page, which a browser loads as a whole.
        self._bytes_left -= len(played.data)
        return data_url(played.data, played.media_type) + thumbnails.interval_fragment(row)

    def warnings(self) -> list[str]:
        """Return how many items are missing from the page, or have no player there, if any, and why."""
        lines = []
        if self._unpictured_rows:
            reason = (self._reason or "").removeprefix(not_shown(self._modality))
            lines.append(f"{self._count(self._unpictured_rows, 'is', 'are')} not shown: {reason}")
        if self._silent_rows:
            limits = f"{format_bytes(_PLAYER_BYTES)} each, {format_bytes(_PAGE_BYTES)} in total"
            lines.append(f"{self._count(self._silent_rows, 'has', 'have')} no player: a page holds {limits}")
        return lines

    def _count(self, rows: set[int], one: str, several: str) -> str:
        return pluralize(len(rows), f"{one_noun(self._modality)} {one}", f"{noun(self._modality)} {several}")
