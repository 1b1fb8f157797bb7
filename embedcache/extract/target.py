"""One encoder's share of an extraction: what it should store, and what is still missing."""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from embedcache.arrays import Array
from embedcache.cache.cache import Cache
from embedcache.cache.group import EncoderGroup, add_feature, create_group
from embedcache.cache.writing import fit_item
from embedcache.disk import Claims
from embedcache.encoders.contract import Encoder
from embedcache.encoders.open import EncoderSpec
from embedcache.extract.turns import Turns
from embedcache.extract.views import View
from embedcache.registry import unknown_name

_DERIVED = (
    "a model may also give grid:K, K × K averages of its patches, kmeans:K, averages of K clusters of them, "
    "and layerN.NAME, from the state after block N"
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An open encoder and its folder in the cache.

    Args:
        encoder: makes the features.
        group: where they go.
        features: which of its features to store.
        dtypes: feature -> dtype on disk.
        view: how it looks at items; None is as they are.
        claims: which of the folder's chunks this process works on.
        executor: the one thread on which the encoder runs, whatever else this process does meanwhile.
        turns: when it runs, and when others decode; one for all targets of a process.
    """

    encoder: Encoder
    group: EncoderGroup
    features: Sequence[str]
    dtypes: Mapping[str, str]
    view: View | None
    claims: Claims
    executor: Executor
    turns: Turns

    def missing(self, chunk: int) -> list[str]:
        """Name the features that a chunk does not have yet."""
        commit = self.group.commit(chunk)
        return [name for name in self.features if not self.group.has(commit, name)]

    def encode(self, batch: Sequence[Array], features: Sequence[str]) -> dict[str, list[Array]]:
        """Run the encoder on prepared items."""
        with self.turns.model():
            return self.encoder.encode(batch, features)

    def fit(self, feature: str, item: Array) -> Array:
        """Turn the encoder's output for one item into what is stored."""
        name = f"{self.group.name}/{feature}"
        return fit_item(item, self.encoder.features[feature], self.dtypes[feature], name)

    def look(self, item: Any) -> Any:
        """Give an item as this target wants to see it."""
        return item if self.view is None else self.view.look(item)


def choose_features(encoder: Encoder, asked: Sequence[str]) -> list[str]:
    """Choose what an encoder stores: those of the asked features that it has, else its first."""
    return [name for name in dict.fromkeys(asked) if name in encoder.features] or [next(iter(encoder.features))]


def check_features(encoders: Collection[Encoder], asked: Sequence[str]) -> None:
    """Refuse a feature that no encoder has.

    Raises:
        UnknownNameError: lists the features there are.
    """
    known = {name for encoder in encoders for name in encoder.features}
    for name in asked:
        if name not in known:
            raise unknown_name("feature", name, known, hint=_DERIVED)


def open_target(
    cache: Cache,
    spec: EncoderSpec,
    encoder: Encoder,
    asked: Sequence[str],
    dtype: str,
    *,
    view: View | None,
    executor: Executor,
    turns: Turns,
) -> Target:
    """Make an encoder's folder in a cache, or open it where the same encoder made it.

    Raises:
        FingerprintError: another encoder made it.
    """
    group = create_group(
        cache.path,
        encoder.modality,
        spec.folder + ("" if view is None else view.suffix),
        cache.info,
        spec=spec.absolute.text,
        fingerprint=view_fingerprint(encoder, view),
    )
    features = choose_features(encoder, asked)
    for name in features:
        add_feature(group, name, encoder.features[name], dtype)
    claims = Claims(group.path / "chunks")
    return Target(
        encoder=encoder,
        group=group,
        features=features,
        dtypes=dict.fromkeys(features, dtype),
        view=view,
        claims=claims,
        executor=executor,
        turns=turns,
    )


def view_fingerprint(encoder: Encoder, view: View | None) -> Mapping[str, Any]:
    """Get all that decides what an encoder gives for a view."""
    fingerprint = encoder.fingerprint.to_json()
    return fingerprint if view is None else {**fingerprint, "view": dict(view.about)}
