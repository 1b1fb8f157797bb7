"""Deleting features and views."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Unpack

from embedcache.errors import PathError, SettingError, UnknownNameError, pluralize, summary
from embedcache.files import AnyPath, Leases, folder_bytes, locked, open_path, remove_folder, remove_partials
from embedcache.maintain.settings import PruneSettings
from embedcache.registry import unknown_name
from embedcache.settings import format_bytes, merge_settings
from embedcache.store.cache import Cache
from embedcache.store.feature import EncoderGroup
from embedcache.store.writer import withdraw

if TYPE_CHECKING:
    from embedcache.options import PruneOptions

_Target: TypeAlias = tuple[EncoderGroup, str]
"""A feature to delete, or the whole folder of an encoder if the name is empty."""


@dataclass(frozen=True, kw_only=True)
class PrunedEntry:
    """Something to delete: its name, what it is, `encoder` or `feature`, its path and its bytes."""

    name: str
    kind: str
    path: Path
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """What pruning deletes."""

    entries: Sequence[PrunedEntry]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of everything."""
        return sum(entry.num_bytes for entry in self.entries)

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the plan as lines."""
        lines = [f"{entry.kind} {entry.name}: {format_bytes(entry.num_bytes)}" for entry in self.entries]
        return [*lines, f"{pluralize(len(self.entries), 'entry', 'entries')}, {format_bytes(self.num_bytes)}"]


def plan_prune(cache: AnyPath, settings: PruneSettings | None = None, **options: Unpack["PruneOptions"]) -> PrunePlan:
    """Return what `prune_cache` would delete; the arguments and errors are its own.

    What a killed command had begun to delete is not listed: it does not exist for any reader.
    """
    plan, _ = _plan(Cache(open_path(cache)), merge_settings(PruneSettings, settings, options))
    return plan


def prune_cache(cache: AnyPath, settings: PruneSettings | None = None, **options: Unpack["PruneOptions"]) -> PrunePlan:
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
    opened = Cache(open_path(cache))
    plan, targets = _plan(opened, merge_settings(PruneSettings, settings, options))
    remove_partials(opened.path)
    with ExitStack() as stack:
        for folder in {group.path for group, _ in targets}:
            leases = Leases(folder / "chunks")
            if not leases.acquire(None):
                raise PathError(
                    f"{folder}: another process computes features in this folder; wait until it has ended, then "
                    "delete them; nothing was deleted"
                )
            stack.callback(leases.release, None)

        for group, feature in targets:
            if not feature:
                remove_folder(group.path)
                continue
            for chunk in range(opened.info.num_chunks(group.modality)):
                withdraw(group, chunk, [feature])
            with locked(opened.path):
                remove_folder(group.path / feature)
    return plan


def _plan(cache: Cache, settings: PruneSettings) -> tuple[PrunePlan, list[_Target]]:
    """Return what is to be deleted, once each: features, then whole folders."""
    if not settings.features:
        raise SettingError("expected something to delete, got nothing; name it with --feature")

    entries = {}
    targets = {}
    for feature_name in settings.features:
        for group, feature in _find(cache, feature_name, settings.modality):
            path = group.path / feature
            kind = "feature" if feature else "encoder"
            name = f"{group.modality}/{group.name}{'/' * bool(feature)}{feature}"
            entries[path] = PrunedEntry(name=name, kind=kind, path=path, num_bytes=folder_bytes(path))
            targets[path] = group, feature
    paths = sorted(entries, key=lambda path: not targets[path][1])
    return PrunePlan(entries=[entries[path] for path in paths]), [targets[path] for path in paths]


def _find(cache: Cache, name: str, modality: str | None) -> list[_Target]:
    """Return what a name stands for; nothing if a killed command has begun to delete it."""
    folder, _, feature = name.partition("/")
    modalities = [modality] if modality else list(cache.info.num_items)
    groups = [group for each in modalities for group in cache.encoders(each)]
    named = [group for group in groups if group.name == folder and (not feature or feature in group.features)]
    if len(named) > 1:
        found = " and ".join(group.modality for group in named)
        raise UnknownNameError(f"feature {name!r} of {cache.path} is one of {found}; name one of them with --modality")
    if named:
        [group] = named
        is_whole = group.features == [feature]
        return [(group, "" if is_whole else feature)]

    places = [cache.path / each / name.rstrip("/") for each in modalities]
    if any(list(place.parent.glob(f".{place.name}.*.partial")) for place in places):
        return []
    known = [each for group in groups for each in (group.name, *(f"{group.name}/{f}" for f in group.features))]
    raise unknown_name("feature", name, list(dict.fromkeys(known)), where=f"of {cache.path}")
