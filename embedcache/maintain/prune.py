"""Deleting features and views."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import PathError, SettingError, UnknownNameError, pluralize
from embedcache.files import (
    AnyPath,
    folder_bytes,
    is_remote,
    open_path,
    remove_folder,
    remove_partials,
)
from embedcache.locks import Leases, locked
from embedcache.maintain.settings import PruneSettings
from embedcache.registry import unknown_name
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.writer import withdraw
from embedcache.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class PrunedEntry:
    """Something to delete: its name, what it is, `encoder` or `feature`, its path and its bytes."""

    name: str
    kind: str
    path: Path
    num_bytes: int

    @property
    def encoder_path(self) -> Path:
        """Folder of the encoder that is deleted, or one of whose features is."""
        return self.path if self.kind == "encoder" else self.path.parent

    def line(self) -> str:
        """Return the entry as one line."""
        return f"{self.kind} {self.name}: {format_bytes(self.num_bytes)}"


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


def plan_prune(cache: AnyPath, settings: PruneSettings | None = None, **options: Any) -> PrunePlan:
    """Return what `prune_cache` would delete; the arguments and errors are its own.

    What a killed command had begun to delete is not listed: it does not exist for any reader.
    """
    settings = merge_settings(PruneSettings, settings, options)
    if not settings.features:
        raise SettingError("expected something to delete, got nothing; name it with --feature")
    cache = Cache(open_path(cache))
    entries: list[PrunedEntry] = []
    was_interrupted = False
    for name in settings.features:
        found, was_left = _find_feature(cache, name, settings.modality)
        entries += found
        was_interrupted |= was_left
    return PrunePlan(entries=_without_repeats(entries), was_interrupted=was_interrupted)


def prune_cache(cache: AnyPath, settings: PruneSettings | None = None, **options: Any) -> PrunePlan:
    """Delete features and views, and return what was deleted.

    A feature is withdrawn from the commits of its chunks before its files are deleted, and a folder gets another name
    first, so that none is ever half there; the same call finishes one that was killed.

    Args:
        cache: path or URL of the cache.
        settings: what to delete.
        options: settings by name, such as `feature="open_toy/cls"`, which take precedence.

    Raises:
        SettingError: nothing is named.
        UnknownNameError: there is no feature of a name, or there are several.
        PathError: another process extracts, derives, imports or repairs features of that encoder; nothing is deleted.
    """
    plan = plan_prune(cache, settings, **options)
    opened = Cache(open_path(cache))
    remove_partials(opened.path)
    with ExitStack() as stack:
        for entry in plan.entries:
            if not stack.enter_context(Leases(entry.encoder_path / "chunks").without_others()):
                raise PathError(
                    f"{entry.encoder_path}: another process computes features in this folder; wait until it has ended, "
                    "then delete them; nothing was deleted"
                )
        for entry in plan.entries:
            if entry.kind == "feature":
                _delete_feature(opened, entry)
            else:
                remove_folder(entry.path)
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
    )
    return [entry], False


def _without_repeats(entries: Sequence[PrunedEntry]) -> list[PrunedEntry]:
    """Return each entry once, without the features of an encoder that is deleted as a whole."""
    by_path = {entry.path: entry for entry in entries}
    return [entry for path, entry in by_path.items() if path.parent not in by_path]


def _left(path: Path) -> bool:
    return any(path.parent.glob(f".{path.name}.*.partial"))


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
