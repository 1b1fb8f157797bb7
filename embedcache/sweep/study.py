"""A study's folder: what it asks, the split that all its trials share, and where each of them lies."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from embedcache.dataset.splits import make_split, write_split
from embedcache.files import LOCK, locked
from embedcache.provenance import check_same, claim_folder, fields_of, from_record, read_manifest, to_record, write_json
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space
from embedcache.train.data import TrainData

FORMAT_VERSION = 1
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


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of a study's `study.json`: all that decides its trials.

    Args:
        space: what is tried, and what is fixed.
        index_digest: identity of the caches' rows.
        image: feature and fingerprint of the image side.
        text: of the text side.
        sampler: by name.
        pruner: by name.
        seed: of the sampler.
        storage: its URL without the password; none is the file `study.db` of the folder.
        name: of the study in the storage.
        format: version of the format on disk.
    """

    space: Mapping[str, Any]
    index_digest: str
    image: Mapping[str, Any]
    text: Mapping[str, Any]
    sampler: str
    pruner: str
    seed: int
    storage: str | None
    name: str = "sweep"
    format: int = FORMAT_VERSION


def open_study(path: Path, data: TrainData, space: Space, settings: SweepSettings) -> Study:
    """Begin a study in a folder, or go on with the one that is there. Processes that come at once wait for each other.

    The split is made once and written down: all trials are compared on it, and `strict` compares all pairs of items.

    Raises:
        FingerprintError: the folder's study has another space, other features, another sampler, pruner or storage.
        PathError: the folder holds other things.
    """
    asked = _asked(data, space, settings)
    if not (path / LOCK).is_file():  # so that nothing is put into a folder of others
        _claim(path)
    with locked(path):
        _claim(path)
        if (path / "study.json").is_file():
            found = _read_study(path)
            next_step = "give the path of a new folder, or ask for the same"
            check_same(f"study {path}", asdict(found), asdict(replace(asked, name=found.name)), next_step=next_step)
            return found
        split = make_split(data, data.pairs(space.settings({}).language), space.settings({}).split)
        write_split(split_path(path), split)
        write_json(path / "study.json", to_record(asked))
    return asked


def split_path(path: Path) -> Path:
    """Get the split that all trials of a study share."""
    return path / "split.parquet"


def trial_path(path: Path, number: int) -> Path:
    """Get the run of a trial."""
    return path / "trials" / f"{number:05d}"


def best_path(path: Path, number: int, seed: int) -> Path:
    """Get the run of a trial's configuration, trained again with a seed."""
    return path / "best" / f"{number:05d}" / f"seed-{seed}"


def _claim(path: Path) -> None:
    claim_folder(path, kind="a study", sign=LOCK, ours=_FILES)


def _read_study(path: Path) -> Study:
    values = read_manifest(
        path / "study.json", kind="study", latest_format=FORMAT_VERSION, make="embedcache sweep CACHE STUDY SPACE.toml"
    )
    return fields_of(path / "study.json", lambda: Study(**from_record(values)))


def _asked(data: TrainData, space: Space, settings: SweepSettings) -> Study:
    return Study(
        space=space.to_json(),
        index_digest=data.index_digest,
        image={"feature": data.image.feature, "fingerprint": data.image.fingerprint},
        text={"feature": data.text.feature, "fingerprint": data.text.fingerprint},
        sampler=settings.sampler,
        pruner=settings.pruner,
        seed=settings.seed,
        storage=None if settings.storage is None else without_password(settings.storage),
        name="sweep" if settings.storage is None else f"sweep-{uuid4().hex[:12]}",
    )


def without_password(url: str) -> str:
    """Write a URL so that it can be shown."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))
