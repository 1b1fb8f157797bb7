"""The prompts of a cache that `extract prompts:…` made: a sample is a class, its captions are its prompts."""

from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.inputs import InputFeature
from embedcache.errors import DataError
from embedcache.store.cache import Cache

CLASS = "class"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The cached prompts of some classes.

    Args:
        side: the text feature.
        names: of the classes, in the order of their numbers.
        rows: (T,) rows of the text items that were encoded.
        classes: (T,) the class of each.
    """

    side: InputFeature
    names: list[str]
    rows: Ints
    classes: Ints

    @property
    def counts(self) -> Ints:
        """Prompts of each class: (C,)."""
        counts: Ints = np.bincount(self.classes, minlength=len(self.names))
        return counts


def has_prompts(cache: Cache) -> bool:
    """Say whether a cache is a set of prompts."""
    return CLASS in cache.columns


def require_prompts(cache: Cache, spec: str) -> None:
    """Refuse a cache that is no set of prompts.

    Args:
        cache: the cache.
        spec: of the text encoder to name in the message.

    Raises:
        DataError: it has no column `class`.
    """
    if not has_prompts(cache):
        raise DataError(
            f"{cache.path} is no set of prompts: it has no column {CLASS!r}; make one: embedcache extract "
            f"prompts:CLASSES+TEMPLATES {cache.path.name}-prompts --text-encoder {spec}"
        )


def read_prompts(cache: Cache, side: InputFeature) -> Prompts:
    """Find the encoded prompts of each class.

    Args:
        cache: a set of prompts.
        side: a text feature of it.

    Raises:
        DataError: a class has no prompt that was encoded.
        UnfinishedError: the feature has missing chunks.
    """
    side.require_complete()
    names: list[str] = cache.samples[CLASS].to_pylist()
    rows = np.flatnonzero(side.valid)
    prompts = Prompts(side=side, names=names, rows=rows, classes=cache.items("text")["sample"].to_numpy()[rows])
    without = [name for name, count in zip(names, prompts.counts, strict=True) if not count]
    if without:
        raise DataError(
            f"{len(without)} of {len(names)} classes of {cache.path} have no prompt that was encoded, first "
            f"{without[0]!r}; give each class a prompt"
        )
    return prompts
