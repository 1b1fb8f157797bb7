"""A process's share of an extraction: its open encoders, and the chunks it works on.

Who has the cores when: models on the CPU, or the threads that decode.

Which chunks this process works on: none that another works on at the same time.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import SourceError
from embedcache.extract.job import Done, Job, merge_done
from embedcache.extract.loop import encode_images, encode_texts
from embedcache.extract.outputs import Target, Turns, Work, check_features, claim_free, claim_one, open_target
from embedcache.extract.settings import ExtractSettings
from embedcache.extract.views import open_view
from embedcache.processes import num_cores
from embedcache.progress import NullProgress, Progress
from embedcache.sources import Source, reopen_source
from embedcache.store.cache import Cache


class Worker:
    """Holds the encoders of a job on one device and encodes chunks.

    Args:
        job: what to extract.
        source: the job's source where this process has it open; None opens it.
        device: a torch device.

    Raises:
        SourceError: the source lacks a modality.
        UnknownNameError: an encoder, feature or view is unknown.
        FingerprintError: the cache holds features of another encoder of that name.
    """

    def __init__(self, job: Job, *, source: Source | None = None, device: str = "cpu") -> None:
        self.cache = Cache(job.cache)
        self.source = reopen_source(job.source) if source is None else source
        self._job = job
        self.targets = _open_targets(self.cache, job, device)

    def missing(self, modality: Modality) -> list[int]:
        """Give the chunks of this worker's share that miss a feature."""
        chunks = filter(self._job.settings.takes, range(self.cache.info.num_chunks(modality)))
        return [chunk for chunk in chunks if any(target.missing(chunk) for target in self.targets[modality])]

    def count_items(self, modality: Modality, chunks: Iterable[int]) -> int:
        """Count the items of some chunks."""
        rows = [self.cache.info.chunk_rows(modality, chunk) for chunk in chunks]
        return sum(row.stop - row.start for row in rows)

    def run(self, progress: Progress | None = None) -> list[Done]:
        """Encode all that is missing, and give what was done."""
        progress = progress or NullProgress()
        parts = [self.done({})]
        for modality in self.targets:
            chunks = self.missing(modality)
            if chunks:
                progress.start(f"encoding {modality}s", self.count_items(modality, chunks), f"{modality}s")
                parts.append(self.encode(modality, chunks, progress))
                progress.finish()
        return merge_done(parts)

    def encode(self, modality: Modality, chunks: Sequence[int], progress: Progress) -> list[Done]:
        """Encode chunks: first those that no other process works on, then what those leave undone."""
        targets, encoded = self.targets[modality], defaultdict[str, set[int]](set)
        self._encode(modality, _noted(claim_free(targets, chunks), encoded), progress)
        for chunk in chunks:
            for target in targets:
                if target.missing(chunk):
                    self._encode(modality, _noted([claim_one(target, chunk)], encoded), progress)
        return [done for done in self.done(encoded) if done.modality == modality]

    def done(self, encoded: Mapping[str, Collection[int]]) -> list[Done]:
        """Say what was done for each target, given its folder -> the chunks encoded."""
        return [
            Done(
                modality=modality,
                encoder=target.group.name,
                features=tuple(target.features),
                chunks=frozenset(encoded.get(target.group.name, ())),
            )
            for modality, targets in self.targets.items()
            for target in targets
        ]

    def _encode(self, modality: Modality, works: Iterable[Work], progress: Progress) -> None:
        encode_chunks(self.cache, self.source, modality, works, progress, threads=self._job.settings.threads)


def encode_chunks(
    cache: Cache,
    source: Source,
    modality: str,
    works: Iterable[Work],
    progress: Progress,
    *,
    threads: int | None = None,
) -> None:
    """Encode claimed chunks, loading on threads: one a core where their number is not given."""
    with ThreadPoolExecutor(threads or num_cores()) as executor:
        if modality == "image":
            encode_images(cache, source, works, executor, progress)
        else:
            encode_texts(cache, works, executor, progress)


def _noted(works: Iterable[Work], encoded: Mapping[str, set[int]]) -> Iterator[Work]:
    """Pass work on, and note its chunks under each encoder's folder."""
    for work in works:
        for target in work.targets:
            encoded[target.group.name].add(work.chunk)
        if work.targets:
            yield work


def _open_targets(cache: Cache, job: Job, device: str) -> dict[Modality, list[Target]]:
    specs: Mapping[Modality, Sequence[EncoderSpec]] = {
        "image": [EncoderSpec.parse(spec) for spec in job.image],
        "text": [EncoderSpec.parse(spec) for spec in job.text],
    }
    _check_modalities(cache, specs)
    settings = replace(job.settings.encoder, device=device, features=job.settings.features)
    encoders: dict[Modality, list[Encoder]] = {
        modality: [open_encoder(spec, modality=modality, settings=settings) for spec in asked]
        for modality, asked in specs.items()
        if asked
    }
    check_features([encoder for some in encoders.values() for encoder in some], job.settings.features)
    turns = Turns(device)
    return {
        modality: [
            target
            for spec, encoder in zip(specs[modality], some, strict=True)
            for target in _views(cache, spec, encoder, job.settings, turns)
        ]
        for modality, some in encoders.items()
    }


def _views(cache: Cache, spec: EncoderSpec, encoder: Encoder, settings: ExtractSettings, turns: Turns) -> list[Target]:
    """Open the targets of one encoder: the plain one, and one a view."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=spec.folder)
    views = [None, *(view for view in map(open_view, settings.views) if view.modality == encoder.modality)]
    return [
        open_target(cache, spec, encoder, settings.features, settings.dtype, view=view, executor=executor, turns=turns)
        for view in views
    ]


def _check_modalities(cache: Cache, specs: Mapping[Modality, Sequence[EncoderSpec]]) -> None:
    for modality, asked in specs.items():
        if asked and not cache.info.num_items.get(modality):
            raise SourceError(
                f"cache {cache.path} has no {modality} items; leave --{modality}-encoder out, or check the source"
            )
