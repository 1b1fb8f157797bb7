"""Prompts in a cache of `extract prompts:…`, where each sample is a class and its captions are the prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embedcache.arrays import Floats, Ints, mean_directions
from embedcache.dataset.inputs import InputFeature
from embedcache.encoders.open import EncoderSpec, why_no_encoder
from embedcache.errors import DataError, quoted
from embedcache.projectors.base import project
from embedcache.provenance import IMPORTED
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.modeling.heads import AnyTower

CLASS = "class"
"""Column of the samples that names the class of their prompts."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The encoded prompts of some classes.

    Args:
        names: class names, in the order of their numbers.
        rows: (T,) rows of the encoded text items.
        classes: (T,) class number of each prompt.
    """

    feature: InputFeature
    names: list[str]
    rows: Ints
    classes: Ints

    @property
    def counts(self) -> Ints:
        """Number of prompts per class: (C,)."""
        counts: Ints = np.bincount(self.classes, minlength=len(self.names))
        return counts


def has_prompts(cache: Cache) -> bool:
    """Return whether a cache may hold prompts: texts, of samples with a column `class`."""
    return CLASS in cache.columns and "text" in cache.info.num_items


def check_prompts(cache: Cache, spec: str) -> None:
    """Check that a cache holds prompts; the error names the command that extracts them with this encoder."""
    if not has_prompts(cache):
        out = quoted(f"{cache.path.name}-prompts")
        command = f"embedcache extract prompts:CLASSES+TEMPLATES {out} --text-encoder {quoted(spec)}"
        instead = (
            f"import captions and prompts, with their {CLASS!r}, at once, and divide them with: embedcache cache cut"
        )
        encoder = EncoderSpec.parse(spec)
        reason = why_no_encoder(encoder, "text", next_step=instead if encoder.family == IMPORTED else None)
        missing = "texts" if CLASS in cache.columns else f"column {CLASS!r}"
        raise DataError(f"{cache.path} holds no prompts: it has no {missing}; {reason or f'create them: {command}'}")


def read_prompts(cache: Cache, feature: InputFeature) -> Prompts:
    """Read the encoded prompts of each class.

    Raises:
        DataError: a class has no encoded prompt.
        UnfinishedError: the feature has uncommitted chunks.
    """
    feature.require_complete()
    names: list[str] = cache.samples[CLASS].to_pylist()
    rows = np.flatnonzero(feature.valid)
    prompts = Prompts(
        feature=feature,
        names=names,
        rows=rows,
        classes=cache.items("text", columns=["sample"])["sample"].to_numpy()[rows],
    )
    missing = [name for name, count in zip(names, prompts.counts, strict=True) if not count]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} classes of {cache.path} have no encoded prompt, first "
            f"{missing[0]!r}; add one and extract again"
        )
    return prompts


def class_vectors(prompts: Prompts, tower: "AnyTower", *, device: str = "cpu") -> Floats:
    """Project the prompts and average those of each class: normalize, mean, normalize -> (C, P) float32."""
    projected_TP = project(tower, prompts.feature.read(prompts.rows), device=device)
    return mean_directions(projected_TP, prompts.classes, len(prompts.names))
