"""Deleting features, views, old records and unused ONNX graphs."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedcache.errors import CorruptError, PathError, SettingError, UnknownNameError, pluralize
from embedcache.files import (
    AnyPath,
    find_files,
    folder_bytes,
    is_remote,
    open_path,
    remove_file,
    remove_folder,
    remove_partials,
    user_folder,
)
from embedcache.locks import Leases, locked
from embedcache.maintain.settings import PruneSettings
from embedcache.records import read_stage
from embedcache.registry import unknown_name
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.group import EncoderGroup
from embedcache.store.writer import withdraw
from embedcache.units import format_bytes

_DAY_S = 86_400
_KINDS = {".onnx": "ONNX graph", ".sha256": "digest of a graph", ".json": "description of an encoder"}
_KEPT_RECORDS = "remove-"
"""How the names of records begin that are never old: what was removed, and when."""


@dataclass(frozen=True, kw_only=True)
class PrunedEntry:
    """Something to delete: its name, what it is, its path, its bytes, and the derived features that depend on it."""

    name: str
    kind: str
    path: Path
    num_bytes: int
    dependents: Sequence[str] = ()

    @property
    def encoder_path(self) -> Path | None:
        """Folder of the encoder that is deleted, or one of whose features is; None for anything else."""
        return {"encoder": self.path, "feature": self.path.parent}.get(self.kind)

    def line(self) -> str:
        """Return the entry as one line."""
        needed = f"; {', '.join(self.dependents)} could not be computed again" if self.dependents else ""
        return f"{self.kind} {self.name}: {format_bytes(self.num_bytes)}{needed}"


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """What pruning deletes; `was_interrupted`: whether it resumes one that was killed."""

    entries: Sequence[PrunedEntry]
    was_interrupted: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of everything."""
        return sum(entry.num_bytes for entry in self.entries)

    def lines(self) -> list[str]:
        """Return the plan as lines."""
        total = f"{pluralize(len(self.entries), 'entry', 'entries')}, {format_bytes(self.num_bytes)}"
        left = ["what an interrupted command had begun to delete is gone"] if self.was_interrupted else []
        return [*left, *(entry.line() for entry in self.entries), total]


def plan_prune(cache: AnyPath | None, settings: PruneSettings | None = None, **options: Any) -> PrunePlan:
    """Return what `prune_cache` would delete; the arguments and errors are its own.

    What a killed command had begun to delete is not listed: it does not exist for any reader.
    """
    settings = merge_settings(PruneSettings, settings, options)
    if settings == PruneSettings():
        raise SettingError("expected something to delete, got nothing; name it with --feature, --records or --onnx")
    entries: list[PrunedEntry] = []
    was_interrupted = False
    if settings.features or settings.records is not None:
        if cache is None:
            raise SettingError("expected a cache whose features or records to delete, got none; name it")
        cache = Cache(open_path(cache))
        for name in settings.features:
            found, was_left = _find_feature(cache, name, settings.modality)
            entries += found
            was_interrupted |= was_left
        if settings.records is not None:
            entries += _find_records(cache.path, settings.records)
    if settings.onnx is not None:
        entries += _find_graphs(settings.onnx)
    return PrunePlan(entries=_without_repeats(entries), was_interrupted=was_interrupted)


def prune_cache(cache: AnyPath | None, settings: PruneSettings | None = None, **options: Any) -> PrunePlan:
    """Delete features, views, old records and ONNX graphs, and return what was deleted.

    A feature is withdrawn from the commits of its chunks before its files are deleted, and a folder gets another name
    first, so that none is ever half there; the same call finishes one that was killed.

    Args:
        cache: path or URL of the cache; None for ONNX graphs only.
        settings: what to delete.
        options: settings by name, such as `feature="open_toy/cls"`, which take precedence.

    Raises:
        SettingError: nothing is named, or no cache.
        UnknownNameError: there is no feature of a name, or there are several.
        PathError: another process extracts, derives, imports or repairs features of that encoder; nothing is deleted.
    """
    plan = plan_prune(cache, settings, **options)
    if cache is not None:
        opened = Cache(open_path(cache))
        remove_partials(opened.path)
    with ExitStack() as stack:
        for entry in plan.entries:
            if entry.encoder_path and not stack.enter_context(Leases(entry.encoder_path / "chunks").without_others()):
                raise PathError(
                    f"{entry.encoder_path}: another process computes features in this folder; wait until it has ended, "
                    "then delete them; nothing was deleted"
                )
        for entry in plan.entries:
            if entry.kind == "feature":
                _delete_feature(opened, entry)
            elif entry.kind == "encoder":
                remove_folder(entry.path)
            else:
                remove_file(entry.path, missing_ok=True)
    return plan


def _find_feature(cache: Cache, name: str, modality: str | None) -> tuple[list[PrunedEntry], bool]:
    """Return the folder of an encoder or of one of its features, and whether a killed command began to delete it."""
    folder, _, feature = name.partition("/")
    modalities = [modality] if modality else list(cache.info.num_items)
    groups = [group for each in modalities for group in cache.encoders(each)]
    named = [group for group in groups if group.name == folder and (not feature or feature in group.features)]
    if len(named) > 1:
        found = " and ".join(group.modality for group in named)
        raise UnknownNameError(f"feature {name!r} of {cache.path} is one of {found}; name one of them with --modality")
    if not named:
        place = f"{folder}/{feature}" if feature else folder
        if any(_left(cache.path / each / place) for each in modalities) and not is_remote(cache.path):
            return [], True
        known = [each for group in groups for each in (group.name, *(f"{group.name}/{f}" for f in group.features))]
        raise unknown_name("feature", name, list(dict.fromkeys(known)), where=f"of {cache.path}")
    [group] = named
    is_whole = not feature or group.features == [feature]
    path = group.path if is_whole else group.path / feature
    entry = PrunedEntry(
        name=f"{group.modality}/{group.name}" if is_whole else f"{group.modality}/{name}",
        kind="encoder" if is_whole else "feature",
        path=path,
        num_bytes=folder_bytes(path),
        dependents=_dependents(groups, group, None if is_whole else feature),
    )
    return [entry], False


def _without_repeats(entries: Sequence[PrunedEntry]) -> list[PrunedEntry]:
    """Return each entry once, without the features of an encoder that is deleted as a whole."""
    by_path = {entry.path: entry for entry in entries}
    return [entry for path, entry in by_path.items() if path.parent not in by_path]


def _left(path: Path) -> bool:
    return any(path.parent.glob(f".{path.name}.*.partial"))


def _dependents(groups: Sequence[EncoderGroup], pruned: EncoderGroup, feature: str | None) -> list[str]:
    """Return the derived features that read a feature, or any of an encoder."""
    names = {f"{pruned.name}/{name}" for name in pruned.features if feature in (None, name)}
    return [
        group.name
        for group in groups
        if group.name != pruned.name
        and any(modality == pruned.modality and name in names for modality, name in group.inputs)
    ]


def _delete_feature(cache: Cache, entry: PrunedEntry) -> None:
    [group] = [
        group
        for modality in cache.info.num_items
        for group in cache.encoders(modality)
        if group.path == entry.path.parent
    ]
    for chunk in range(cache.info.num_chunks(group.modality)):
        withdraw(group, chunk, [entry.path.name])
    with locked(cache.path):
        remove_folder(entry.path)
    group.compact()


def _find_records(cache_path: Path, days: int) -> list[PrunedEntry]:
    """Return the records of stages that started before some days, but for those of removals."""
    limit = datetime.now(UTC).timestamp() - days * _DAY_S
    return [
        PrunedEntry(name=path.name, kind="record", path=path, num_bytes=path.stat().st_size)
        for path in sorted(find_files(cache_path, "records/*.json"))
        if not path.name.startswith(_KEPT_RECORDS) and _started(path) <= limit
    ]


def _started(record: Path) -> float:
    """Return when a stage started, in seconds since 1970; CorruptError if its record does not say it."""
    text = str(read_stage(record).get("started"))
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise CorruptError(
            f"{record}: expected a time as started, got {text!r:.60}; delete this record, or restore it"
        ) from error


def _find_graphs(days: int) -> list[PrunedEntry]:
    """Return the graphs, and the descriptions of encoders that run them, which nothing has opened for some days."""
    limit = time.time() - days * _DAY_S
    return [
        PrunedEntry(name=path.name, kind=_KINDS[path.suffix], path=path, num_bytes=path.stat().st_size)
        for path in sorted((user_folder() / "onnx").glob("*"))
        if path.suffix in _KINDS and path.stat().st_mtime <= limit
    ]
