"""One encoder's share of an extraction: what it should store, and what is still missing.

Opening again what made a folder of features, from what the cache remembers of it.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.extract.views import View, open_view
from embedcache.files import Leases
from embedcache.processes import num_cores
from embedcache.provenance import check_same
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, add_feature, create_group
from embedcache.store.writer import fit_item

_DERIVED = (
    "a model may also give grid:K, K × K averages of its patches, kmeans:K, averages of K clusters of them, "
    "and layerN.NAME, from the state after block N"
)


_FEW_CORES = 4


class Turns:
    """Lets decoding wait while a model computes, where both need all cores.

    On 2 cores an EfficientNet and decoding that ran at once took 6 % more time together than one after the other: they
    push each other's data out of the caches. Reading files goes on all the time.

    Args:
        device: of the models; on one of its own nobody waits.
    """

    def __init__(self, device: str) -> None:
        self._takes_turns = device == "cpu" and num_cores() <= _FEW_CORES
        self._guard = threading.Lock()
        self._num_running = 0
        self._no_model = threading.Event()
        self._no_model.set()

    @contextmanager
    def model(self) -> Iterator[None]:
        """Be a model that computes."""
        if self._takes_turns:
            self._count(1)
        try:
            yield
        finally:
            if self._takes_turns:
                self._count(-1)

    def wait(self) -> None:
        """Wait until no model computes."""
        self._no_model.wait()

    def _count(self, change: int) -> None:
        with self._guard:
            self._num_running += change
            if self._num_running:
                self._no_model.clear()
            else:
                self._no_model.set()


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
    claims: Leases
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
    claims = Leases(group.path / "chunks")
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


def reopen_target(group: EncoderGroup, features: Sequence[str], *, device: str) -> Target:
    """Open the encoder and the view of a folder, with the precision and the backend it was made with."""
    fingerprint = group.fingerprint
    settings = EncoderSettings(
        device=device,
        precision=fingerprint["precision"],
        backend=fingerprint["backend"],
        features=tuple(features),
    )
    return Target(
        encoder=open_encoder(group.spec, modality="image" if group.modality == "image" else "text", settings=settings),
        group=group,
        features=features,
        dtypes={name: Feature(group, name).dtype for name in features},
        view=open_view(fingerprint["view"]["name"]) if "view" in fingerprint else None,
        claims=Leases(group.path / "chunks"),
        executor=ThreadPoolExecutor(1),
        turns=Turns(device),
    )


def check_unchanged(target: Target) -> None:
    """Refuse an encoder that is not the one that made the folder any more.

    Raises:
        FingerprintError: names each field that differs with both values.
    """
    check_same(
        f"encoder {target.group.path}",
        target.group.fingerprint,
        view_fingerprint(target.encoder, target.view),
        next_step="bring back the versions and files it was made with, or extract into a new folder",
    )


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


"""On more, a model leaves some of them idle, and decoding fills those."""
