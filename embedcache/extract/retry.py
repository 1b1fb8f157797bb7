"""Trying items again that failed, and nothing else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from embedcache.cache.commit import NOT_YET
from embedcache.cache.writing import commit_chunk
from embedcache.extract.engines.local import all_devices
from embedcache.extract.extract import open_job, record
from embedcache.extract.load import Loaded, load_image
from embedcache.extract.loop import Outputs, image_items
from embedcache.extract.settings import ExtractSettings
from embedcache.extract.target import Target
from embedcache.extract.worker import Worker
from embedcache.progress import Progress, Silent
from embedcache.sources.contract import Source


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
    progress = progress or Silent()
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
    commit_chunk(target.group, chunk, output.features, hashes, dict.fromkeys(features, failures), mends=True)
