"""The folder of a study: settings that decide its trials, the split that they share, and the paths of their runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from embedcache.dataset.pairs import choose_language
from embedcache.dataset.splits import check_split, write_split
from embedcache.locks import LOCK, locked
from embedcache.progress import Progress
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    Manifest,
    check_same,
    construct,
    digest_file,
    prepare_folder,
    read_study,
    write_record,
)
from embedcache.settings import replace_fields
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space
from embedcache.train.data import TrainData, failed_digests

_FILES = (
    LOCK,
    ".claims",
    "best",
    "report.html",
    "report.json",
    "split.parquet",
    "study.db",
    "study.db-journal",
    "study.json",
    "trials",
    "winner",
)


class Study(Manifest):
    """The content of `study.json`: everything that decides the trials of a study.

    Args:
        space: fixed and swept settings, by name.
        sides: modality -> `feature` and its `fingerprint`, in the order of `order_pair`.
        digests: SHA-256 of the rows that lack a feature, by `failed MODALITY`.
        storage: URL of the storage without its password; None is the file `study.db` in the folder.
        name: name of the study in the storage.
        split_digest: SHA-256 of `split.parquet`.
    """

    format: int = FORMAT
    space: Mapping[str, Any]
    index_digest: str
    sides: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str] = {}
    sampler: str
    pruner: str
    seed: int
    storage: str | None
    name: str = "sweep"
    split_digest: str = ""


def open_study(
    path: Path, data: TrainData, space: Space, settings: SweepSettings, *, progress: Progress | None = None
) -> Study:
    """Create a study in a folder, or open the existing one; processes that start together wait for each other.

    The split is made once and written, because all trials are compared on it and `strict` compares all pairs of items.

    Raises:
        FingerprintError: the folder's study has another space, other features, another sampler, pruner or storage, or
            samples were appended to the cache since.
        PathError: the folder contains other files.
    """
    requested = Study(
        space=space.to_json(),
        index_digest=data.index_digest,
        sides={
            modality: {"feature": feature.name, "fingerprint": feature.fingerprint}
            for modality, feature in data.features.items()
        },
        digests=failed_digests(data),
        sampler=settings.sampler,
        pruner=settings.pruner,
        seed=settings.seed,
        storage=None if settings.storage is None else without_password(settings.storage),
        name="sweep" if settings.storage is None else f"sweep-{uuid4().hex[:12]}",
    )
    if not (path / LOCK).is_file():  # before a lock file is written into a folder that is not a study
        _check_folder(path)
    with locked(path):
        _check_folder(path)
        if manifest_path(path).is_file():
            return _reopen_study(path, requested)
        fixed = space.settings({})
        language = choose_language(data.caches, data.sides, fixed.language, progress)
        pairs = data.pairs(language, progress=progress)
        split = data.split(pairs, fixed.split, progress=progress)
        split_path(path).unlink(missing_ok=True)  # of a process that was killed before it wrote the manifest
        write_split(split_path(path), data.caches, split)
        made = replace_fields(requested, split_digest=digest_file(split_path(path)))
        write_record(manifest_path(path), made.to_json())
    return made


def _reopen_study(path: Path, requested: Study) -> Study:
    """Read the study in a folder, and compare it with what is requested."""
    values = read_study(path)
    values.pop(DIGEST, None)
    stored = construct(manifest_path(path), lambda: Study.model_validate(values))
    expected = replace_fields(requested, name=stored.name, split_digest=stored.split_digest)
    next_step = "use a new folder, or request the same"
    modalities = [{"modalities": list(study.sides)} for study in (stored, expected)]
    check_same(f"study {path}", *modalities, next_step=next_step)  # else every field of their features differs
    check_same(f"study {path}", stored.to_json(), expected.to_json(), next_step=next_step)
    check_split(split_path(path))
    return stored


def manifest_path(path: Path) -> Path:
    """Return the path of the file whose presence marks a study as begun."""
    return path / "study.json"


def split_path(path: Path) -> Path:
    """Return the path of the split that all trials of a study share."""
    return path / "split.parquet"


def trial_path(path: Path, number: int) -> Path:
    """Return the path of a trial's run."""
    return path / "trials" / f"{number:05d}"


def retrained_path(path: Path, number: int, seed: int) -> Path:
    """Return the path of the run that retrains a trial's configuration with a seed."""
    return path / "best" / f"{number:05d}" / f"seed-{seed}"


def without_password(url: str) -> str:
    """Return a URL with its password replaced by stars."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _check_folder(path: Path) -> None:
    prepare_folder(path, kind="a study", marker=LOCK, allowed=_FILES)
