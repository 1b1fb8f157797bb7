"""Feature writers: an open encoder, or a view of it, with its folder in the cache; the chunks they lack, and leases."""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from embedcache.arrays import Array
from embedcache.axis import Axis
from embedcache.devices import torch_device
from embedcache.encoders.base import Encoder, background_of
from embedcache.encoders.open import EncoderSpec, open_encoder, recorded_settings
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.views import View, reopen_view
from embedcache.locks import Leases
from embedcache.modalities import MODALITIES
from embedcache.processes import num_cores
from embedcache.provenance import check_same
from embedcache.registry import names_from, unknown_name
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, create_group
from embedcache.store.writer import add_feature, cast_item

_DERIVED_FEATURES = (
    "a model may also offer grid:K, K × K averages of its patches, kmeans:K, averages of K clusters of them, "
    "and layerN.NAME, computed from the state after block N"
)

_FEW_CORES = 4
"""With more cores a model leaves some of them idle, and decoding uses those."""


class CpuGate:
    """Makes decoding wait while a model computes, where both would need all cores.

    On 2 cores, an EfficientNet and decoding at the same time took 6% longer than in sequence, because they
    evict each other's data from the CPU caches. Reading files never waits. The gate of another device stays open, and
    that of a model with fewer threads than cores, as `OMP_NUM_THREADS` may set: decoding uses the others.

    Args:
        cores: number of cores that this process may use; None for all.
    """

    def __init__(self, device: str, *, cores: int | None = None) -> None:
        import torch  # takes seconds, and has been imported where an encoder is open

        uses_all = torch.get_num_threads() >= (cores or num_cores())
        self._is_needed = device == "cpu" and num_cores() <= _FEW_CORES and uses_all
        self._guard = threading.Lock()
        self._num_running = 0
        self._open = threading.Event()
        self._open.set()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Keep the gate closed while a model runs."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def wait(self) -> None:
        """Wait until no model runs."""
        self._open.wait()

    def _count(self, change: int) -> None:
        with self._guard:
            self._num_running += change
            if self._num_running and self._is_needed:
                self._open.clear()
            else:
                self._open.set()


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureWriter:
    """An open encoder, or one view of it, and its folder in the cache.

    Args:
        dtypes: feature -> dtype on disk.
        view: alters items before they are encoded; None encodes them unchanged.
        executor: the one thread on which the encoder runs.
        gate: decides when decoding waits for the encoder; one gate for all writers of a process.
    """

    encoder: Encoder
    group: EncoderGroup
    features: Sequence[str]
    dtypes: Mapping[str, str]
    view: View | None
    executor: Executor
    gate: CpuGate
    _missing: dict[int, Sequence[str]] = field(default_factory=dict, init=False)
    _begun: set[int] = field(default_factory=set, init=False)  # chunks that had a commit when `missing` read it

    @cached_property
    def leases(self) -> Leases:
        """The leases of the folder's chunks, which processes work on one at a time."""
        return Leases(self.group.path / "chunks")

    @cached_property
    def background(self) -> str:
        """Color onto which transparent images are composited before they are encoded."""
        return background_of(self.encoder.fingerprint.preprocessing)

    def missing(self, chunk: int, *, refresh: bool = False) -> Sequence[str]:
        """Return the features that a chunk lacks; `refresh` reads the commit of an incomplete chunk again."""
        if chunk not in self._missing or (refresh and self._missing[chunk]):
            commit = self.group.commit(chunk)
            self._missing[chunk] = [name for name in self.features if not self.group.has(commit, name)]
            if commit is not None:
                self._begun.add(chunk)
        return self._missing[chunk]

    def stored_commit(self, chunk: int) -> Commit | None:
        """Return the commit of a chunk; None if there was none when `missing` read it."""
        return self.group.commit(chunk) if chunk in self._begun else None

    def mark_complete(self, chunk: int) -> None:
        """Record that this process has committed all features of a chunk."""
        self._missing[chunk] = []

    def encode(self, batch: Sequence[Array], features: Sequence[str]) -> dict[str, list[Array]]:
        """Run the encoder on prepared items; the tokens of one with `encode_cast` have the dtype on disk."""
        encode_cast = getattr(self.encoder, "encode_cast", None)
        with self.gate.inference():
            if encode_cast is None:
                return self.encoder.encode(batch, features)
            encoded: dict[str, list[Array]] = encode_cast(batch, features, self.cast)
            return encoded

    def cast(self, feature: str, item: Array) -> Array:
        """Check the encoder's output for one item and convert it to the dtype on disk."""
        name = f"{self.group.name}/{feature}"
        return cast_item(item, self.encoder.features[feature], self.dtypes[feature], name)

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert raw items, or their view, to model inputs."""
        return self.encoder.prepare([item if self.view is None else self.view.apply(item) for item in items])


def choose_features(encoder: Encoder, requested: Sequence[str]) -> list[str]:
    """Return the requested features that an encoder has, or else its first feature, or those it names as defaults."""
    defaults = getattr(encoder, "defaults", None) or [next(iter(encoder.features))]
    return [name for name in dict.fromkeys(requested) if name in encoder.features] or list(defaults)


def check_features(encoders: Collection[Encoder], requested: Sequence[str]) -> None:
    """Check that at least one encoder has each requested feature, or raise an `UnknownNameError`."""
    known = {name for encoder in encoders for name in encoder.features}
    for name in requested:
        if name not in known:
            raise unknown_name("feature", name, known, hint=_DERIVED_FEATURES)


def create_writer(
    cache: Cache,
    spec: EncoderSpec,
    encoder: Encoder,
    features: Sequence[str],
    dtype: str,
    *,
    view: View | None,
    executor: Executor,
    gate: CpuGate,
) -> FeatureWriter:
    """Create an encoder's folder in a cache, or open it; a folder of another encoder raises a `FingerprintError`."""
    group = create_group(
        cache.path,
        encoder.modality,
        spec.folder + ("" if view is None else view.suffix),
        cache.info,
        spec=spec.absolute.text,
        fingerprint=view_fingerprint(encoder, view),
        view="" if view is None else view.location,
    )
    dtypes = {name: getattr(encoder, "dtypes", {}).get(name, dtype) for name in features}
    for name in features:
        axis: Axis | None = getattr(encoder, "axes", {}).get(name)
        if axis is not None and view is not None:  # a crop or a flip: the grid no longer covers the stored box
            axis = axis.without_box
        add_feature(group, name, encoder.features[name], dtypes[name], axis=axis)
    return FeatureWriter(
        encoder=encoder,
        group=group,
        features=features,
        dtypes=dtypes,
        view=view,
        executor=executor,
        gate=gate,
    )


def reopen_writer(group: EncoderGroup, features: Sequence[str], *, device: str) -> FeatureWriter:
    """Open the encoder and the view of an existing folder, with the precision and backend recorded there."""
    fingerprint = group.fingerprint
    settings = EncoderSettings(**recorded_settings(fingerprint, device), features=tuple(features))
    with names_from(group.path):
        encoder = open_encoder(group.spec, modality=MODALITIES[group.modality].name, settings=settings)
    return FeatureWriter(
        encoder=encoder,
        group=group,
        features=features,
        dtypes={name: Feature(group, name).dtype for name in features},
        view=reopen_view(fingerprint["view"], group.view) if "view" in fingerprint else None,
        executor=ThreadPoolExecutor(1),
        gate=CpuGate(str(torch_device(settings.device))),
    )


def view_fingerprint(encoder: Encoder, view: View | None) -> Mapping[str, Any]:
    """Return everything that decides an encoder's output for a view."""
    fingerprint = encoder.fingerprint.to_json()
    return fingerprint if view is None else {**fingerprint, "view": dict(view.fingerprint)}


def check_unchanged(writer: FeatureWriter) -> None:
    """Check that an encoder is still the one that filled its folder, or raise a `FingerprintError`."""
    check_same(
        f"encoder {writer.group.path}",
        writer.group.fingerprint,
        view_fingerprint(writer.encoder, writer.view),
        next_step="restore the versions and files it was written with, or extract into a new folder",
    )


@dataclass(frozen=True, eq=False)
class ChunkTask:
    """A chunk, and for each writer the features that it lacks; this process holds the lease of each writer.

    Args:
        rows: rows that are encoded, counted from its start; others are stored already.
        allows_changes: whether a file may have another length than when it was indexed.
    """

    chunk: int
    missing: Mapping[FeatureWriter, Sequence[str]]
    rows: Collection[int] = ()
    allows_changes: bool = False

    def release(self) -> None:
        """Release the leases of all writers."""
        for writer in self.missing:
            writer.leases.release(self.chunk)


def lease_free_chunks(writers: Sequence[FeatureWriter], chunks: Iterable[int]) -> Iterator[ChunkTask]:
    """Iterate over the chunks that no other process works on; each is leased when it is requested."""
    for chunk in chunks:
        leased = [writer for writer in writers if writer.missing(chunk) and writer.leases.acquire(chunk)]
        task = _open_task(chunk, leased)
        if task.missing:
            yield task


def lease_chunk(writer: FeatureWriter, chunk: int) -> ChunkTask:
    """Lease a chunk, waiting until no other process works on it.

    Only for a process that holds no other lease: two of them could wait for each other.
    """
    writer.leases.acquire(chunk, wait=True)
    return _open_task(chunk, [writer])


def _open_task(chunk: int, leased: Sequence[FeatureWriter]) -> ChunkTask:
    """Create the task, without the writers whose chunk another process committed just before the lease was taken."""
    missing = {writer: writer.missing(chunk, refresh=True) for writer in leased}
    ChunkTask(chunk, {writer: names for writer, names in missing.items() if not names}).release()
    missing = {writer: names for writer, names in missing.items() if names}
    num_rows = [writer.group.info.count_items(writer.group.modality, [chunk]) for writer in missing]
    return ChunkTask(chunk, missing, range(_count_stored(chunk, missing), max(num_rows, default=0)))


def _count_stored(chunk: int, missing: Mapping[FeatureWriter, Sequence[str]]) -> int:
    """Count the rows at the start of a chunk that all writers have stored before; only those after them are encoded.

    A chunk that is not full when it is committed gets more rows with samples that are appended; see
    `embedcache.store.commits`.
    """
    num_stored = []
    for writer, names in missing.items():
        commit = writer.stored_commit(chunk)
        if commit is None:
            return 0
        for name in names:
            if name not in commit.features or not writer.group.has_files(commit, name):
                return 0
            num_stored.append(commit.count_tried(name))
    return min(num_stored, default=0)
