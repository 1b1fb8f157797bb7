"""Making damaged chunks again, and nothing else.

Trying items again that failed, and nothing else.

Encoding a sample of a cache again: does the same still come out?
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Floats, Ints, normalize
from embedcache.errors import CorruptError, SettingError
from embedcache.extract.engines import all_devices
from embedcache.extract.extract import open_job, record
from embedcache.extract.loop import Loaded, Outputs, image_items, load_image, load_texts
from embedcache.extract.outputs import Target, check_unchanged, claim_one, reopen_target, view_fingerprint
from embedcache.extract.settings import ExtractSettings
from embedcache.extract.worker import Worker, encode_chunks
from embedcache.processes import num_cores
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import name_differences
from embedcache.sources import ImageItem, reopen_source
from embedcache.sources.base import Source
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import NOT_YET, EncoderGroup, open_group
from embedcache.store.verify import Finding
from embedcache.store.writer import commit_chunk, withdraw


def repair(
    cache: Cache, findings: Sequence[Finding], *, device: str = "cpu", progress: Progress | None = None
) -> list[str]:
    """Withdraw the damaged features of each chunk, and encode those chunks again with what made them.

    Args:
        cache: the cache; its source and encoders must be there still.
        findings: from `verify`; those that are no damage, or cannot be mended so, are left alone.
        device: a torch device.
        progress: told about items.

    Returns:
        One line an encoder.

    Raises:
        FingerprintError: an encoder is not the same any more; nothing of it is touched.
        CorruptError: a table is damaged, so that nobody knows which rows the chunks hold; nothing is touched.
    """
    tables = [finding for finding in findings if finding.is_damage and not finding.encoder]
    if tables:
        raise CorruptError(f"nothing is repaired while {tables[0].line()}")
    progress = progress or NullProgress()
    source = reopen_source(cache.info.source)
    damaged: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.is_damage and finding.can_repair:
            damaged[finding.modality, finding.encoder].append(finding)
    lines = []
    for (modality, encoder), some in damaged.items():
        group = open_group(cache.path, modality, encoder, cache.info)
        target = reopen_target(group, sorted({finding.name for finding in some}), device=device)
        check_unchanged(target)
        for finding in some:
            withdraw(group, finding.chunk, [finding.name])
        chunks = sorted({finding.chunk for finding in some})
        rows = [cache.info.chunk_rows(modality, chunk) for chunk in chunks]
        progress.start(f"repairing {encoder}", sum(row.stop - row.start for row in rows), f"{modality}s")
        works = (work for chunk in chunks if (work := claim_one(target, chunk)).targets)
        encode_chunks(cache, source, modality, works, progress)
        progress.finish()
        lines.append(f"{encoder} ({', '.join(target.features)}): made {len(chunks):,} chunks again")
    return lines


@dataclass(kw_only=True)
class Retried:
    """What a second try gave for one encoder.

    Args:
        encoder: name of its folder in the cache.
        num_tried: items that had failed.
        num_mended: items that have features now.
        reasons: kind of reason -> number of items that failed again.
    """

    encoder: str
    num_tried: int = 0
    num_mended: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Say it in one line."""
        failed = "; ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return (
            f"{self.encoder}: tried {self.num_tried:,} failed images again, {self.num_mended:,} have features now, "
            f"{self.num_tried - self.num_mended:,} failed again" + (f": {failed}" if failed else "")
        )


def retry_failed(
    source: Source,
    cache_path: Path | str,
    *,
    image: Sequence[str] = (),
    text: Sequence[str] = (),
    settings: ExtractSettings | None = None,
    progress: Progress | None = None,
) -> list[Retried]:
    """Try images that failed again: a file that was mended, a network that is back. All other rows stay as they are.

    Captions that failed are blank, and stay so: captions are part of the numbering. The arguments and errors are those
    of `extract`.
    """
    progress = progress or NullProgress()
    job = open_job(source, cache_path, image=image, text=text, settings=settings, mends=True, progress=progress)
    device = (job.settings.devices or all_devices())[0]
    worker = Worker(job, source=source, device=device)
    targets = worker.targets.get("image", [])
    reports = [Retried(encoder=target.group.name) for target in targets]
    with record(worker.cache, job, "retry") as outcome, ThreadPoolExecutor(job.settings.threads) as executor:
        num_chunks = worker.cache.info.num_chunks("image")
        progress.start("looking for failed images", num_chunks, "chunks")
        for chunk in range(num_chunks):
            _retry_chunk(worker, targets, reports, chunk, executor)
            progress.advance(1)
        progress.finish()
        outcome["encoders"] = [{**vars(report), "reasons": dict(report.reasons)} for report in reports]
    return reports


def _retry_chunk(
    worker: Worker, targets: Sequence[Target], reports: Sequence[Retried], chunk: int, executor: ThreadPoolExecutor
) -> None:
    failed = [_failed_rows(target, chunk) for target in targets]
    rows = sorted(set().union(*failed))
    if not rows:
        return
    items = list(image_items(worker.cache, chunk))
    loaded = dict(
        zip(rows, executor.map(lambda row: load_image(worker.source, items[row], targets), rows), strict=True)
    )
    for number, (target, report) in enumerate(zip(targets, reports, strict=True)):
        target.claims.take(chunk, waits=True)
        again = {row: loaded[row] for row in rows if row in _failed_rows(target, chunk)}
        report.num_tried += len(again)
        report.num_mended += sum(item.failure is None for item in again.values())
        report.reasons.update(item.failure.partition(":")[0] for item in again.values() if item.failure is not None)
        if any(item.failure is None for item in again.values()):
            _mend(target, chunk, again, number)
        target.claims.give_back(chunk)


def _failed_rows(target: Target, chunk: int) -> set[int]:
    """Give the rows of a chunk, counted from its start, that were tried and have no feature."""
    commit = target.group.commit(chunk)
    if commit is None:
        return set()
    reasons = [commit.failures[name] for name in target.features if target.group.has(commit, name)]
    return {row for failures in reasons for row, reason in enumerate(failures) if reason not in (None, NOT_YET)}


def _mend(target: Target, chunk: int, again: Mapping[int, Loaded], number: int) -> None:
    """Write a chunk again with the rows that have features now."""
    commit = target.group.commit(chunk)
    assert commit is not None  # some of its rows failed
    features = [name for name in target.features if target.group.has(commit, name)]
    output = Outputs(target, features, len(commit.hashes))
    for row, item in again.items():
        if item.failure is None:
            output.add(row, item.inputs[number])
    output.flush()
    rows = range(len(commit.hashes))
    hashes = [again[row].hash if row in again else None for row in rows]
    failures = [again[row].failure if row in again else NOT_YET for row in rows]
    commit_chunk(target.group, chunk, output.features, hashes, dict.fromkeys(features, failures), overwrite_failed=True)


MIN_COSINE = 0.999
"""Below it something changed: float16 at rest costs 1e-6, and another library's order of sums about as much."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far a feature that is encoded again lies from what is stored.

    Args:
        feature: `encoder/feature`.
        rows: (n,) int64, the items that could be read.
        cosines: (n,) float32, one an item; of token features over all tokens together.
        num_gone: items that cannot be read any more.
        num_changed: items whose bytes are others now.
        differences: fields of the encoder's fingerprint that are others now.
    """

    feature: str
    rows: Ints
    cosines: Floats
    num_gone: int
    num_changed: int
    differences: Sequence[str]

    @property
    def is_bad(self) -> bool:
        """Whether something else comes out, or goes in."""
        return bool(self.num_gone or self.num_changed or (self.cosines < MIN_COSINE).any())

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{self.feature}: {len(self.cosines):,} items encoded again"]
        if len(self.cosines):
            parts.append(f"cosine to what is stored: mean {self.cosines.mean():.6f}, least {self.cosines.min():.6f}")
            parts += [f"in row {self.rows[self.cosines.argmin()]:,}"] * bool(self.cosines.min() < MIN_COSINE)
        parts += [f"{self.num_gone:,} items cannot be read any more"] * bool(self.num_gone)
        parts += [f"{self.num_changed:,} items have other bytes now"] * bool(self.num_changed)
        parts += [f"the encoder is another: {'; '.join(self.differences)}"] * bool(self.differences)
        return ("DRIFT " if self.is_bad else "") + ", ".join(parts)


def measure_drift(
    cache: Cache, share: float, *, device: str = "cpu", seed: int = 0, progress: Progress | None = None
) -> list[Drift]:
    """Encode a random share of the items of every feature again and compare.

    A changed library, preprocessing, weight or source shows.

    Args:
        cache: the cache; its source and encoders must be there still.
        share: of the items of each modality, above 0 and at most 1; at least one item is taken.
        device: a torch device.
        seed: of the choice.
        progress: told about encoders.

    Raises:
        SettingError: a share of nothing.
    """
    check_share(share)
    progress = progress or NullProgress()
    source = reopen_source(cache.info.source)
    groups = [group for modality in cache.info.num_items for group in cache.encoders(modality)]
    progress.start("encoding a sample again", len(groups), "encoders")
    found = []
    for group in groups:
        found += list(_drift(cache, source, group, share, device, np.random.default_rng(seed)))
        progress.advance(1)
    progress.finish()
    return found


def check_share(share: float) -> None:
    """Refuse a share of nothing, or of more than there is.

    Raises:
        SettingError: says what is allowed.
    """
    if not 0 < share <= 1:
        raise SettingError(f"the share to encode again is {share:g}; it must be above 0 and at most 1, as 0.1%")


def _drift(
    cache: Cache, source: Source, group: EncoderGroup, share: float, device: str, rng: np.random.Generator
) -> Iterator[Drift]:
    features = [feature for feature in (Feature(group, name) for name in group.features) if feature.valid.any()]
    if not features:
        return
    rows_there = np.flatnonzero(np.logical_and.reduce([feature.valid for feature in features]))
    if not len(rows_there):
        return
    rows = np.sort(rng.choice(rows_there, max(1, round(share * len(rows_there))), replace=False))
    target = reopen_target(group, [feature.feature for feature in features], device=device)
    hashes, loaded = _load(cache, source, target, rows)
    output = Outputs(target, target.features, len(rows))
    for position, item in enumerate(loaded):
        if item.failure is None:
            output.add(position, item.inputs[0])
    output.flush()
    differences = name_differences(group.fingerprint, view_fingerprint(target.encoder, target.view))
    is_read = np.array([item.failure is None for item in loaded])
    for feature in features:
        again = [item for item in output.features[feature.feature] if item is not None]
        stored = feature.gather_tokens(rows[is_read]) if feature.is_ragged else list(feature.gather(rows[is_read]))
        yield Drift(
            feature=feature.name,
            rows=rows[is_read],
            cosines=np.array([_cosine(*pair) for pair in zip(stored, again, strict=True)], np.float32),
            num_gone=int((~is_read).sum()),
            num_changed=sum(
                item.hash is not None and item.hash != then for item, then in zip(loaded, hashes, strict=True)
            ),
            differences=differences,
        )


def _load(cache: Cache, source: Source, target: Target, rows: Ints) -> tuple[list[bytes | None], list[Loaded]]:
    """Load items of any rows, chunk by chunk; give the hashes they had, and what they are now."""
    hashes: list[bytes | None] = []
    loaded: list[Loaded] = []
    size, modality = cache.info.chunk_size, target.encoder.modality
    with ThreadPoolExecutor(num_cores()) as executor:
        for chunk in np.unique(rows // size).tolist():
            offsets = (rows[rows // size == chunk] - chunk * size).tolist()
            commit = target.group.commit(chunk)
            assert commit is not None  # its rows are valid
            hashes += [commit.hashes[offset] for offset in offsets]
            table = cache.items(modality, chunk=chunk).take(offsets)
            if modality == "text":
                loaded += load_texts(table["text"].to_pylist(), [target])
            else:
                items = [ImageItem(**row) for row in table.drop_columns("sample").to_pylist()]
                loaded += executor.map(lambda item: load_image(source, item, [target]), items)
    return hashes, loaded


def _cosine(stored: Array, again: Array) -> float:
    if stored.shape != again.shape:
        return -1.0
    if np.array_equal(stored, again.astype(stored.dtype)):  # of zeros, too
        return 1.0
    one, other = (normalize(array.astype(np.float32).reshape(1, -1)) for array in (stored, again))
    return float((one * other).sum())
