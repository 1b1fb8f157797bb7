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
    """One thing to delete.

    Args:
        name: name of the feature, or of the encoder whose features are all deleted.
        kind: `feature` or `encoder`.
        path: its folder.
        num_bytes: its bytes on disk.
    """

    name: str
    kind: str
    path: Path
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Features and encoders that pruning deletes."""

    entries: Sequence[PrunedEntry]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all entries."""
        return sum(entry.num_bytes for entry in self.entries)

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the plan as lines."""
        lines = []
        for entry in self.entries:
            lines.append(f"{entry.kind} {entry.name}: {format_bytes(entry.num_bytes)}")
        lines.append(f"{pluralize(len(self.entries), 'entry', 'entries')}, {format_bytes(self.num_bytes)}")
        return lines


def plan_prune(cache: AnyPath, settings: PruneSettings | None = None, **options: Unpack["PruneOptions"]) -> PrunePlan:
    """Return the plan of what `prune_cache` would delete. Arguments and errors are the same.

    Folders that a killed command had begun to delete are not listed, because no reader sees them.

    Example:
        >>> plan = embedcache.plan_prune("cache", feature="open_toy/cls", modality="image")
        >>> [(entry.kind, entry.name) for entry in plan.entries]
        [('feature', 'image/open_toy/cls')]
    """
    plan, _ = _plan(Cache(open_path(cache)), merge_settings(PruneSettings, settings, options))
    return plan


def prune_cache(cache: AnyPath, settings: PruneSettings | None = None, **options: Unpack["PruneOptions"]) -> PrunePlan:
    """Delete features and views, and return a list of them.

    A feature is withdrawn from the commits of its chunks before its files are deleted. A folder is renamed first, so
    that no reader sees half of it. The same call finishes one that was killed.

    Args:
        cache: path or URL of the cache.
        settings: features to delete.
        options: settings by name, such as `feature="open_toy/cls"`, which take precedence.

    Raises:
        SettingError: nothing is named.
        UnknownNameError: there is no feature of a name, or there are several.
        PathError: another process extracts, derives, imports or repairs features of that encoder; nothing is deleted.

    Example:
        >>> plan = embedcache.prune_cache("cache", feature="open_toy/patches", modality="image")
        >>> [entry.name for entry in plan.entries]
        ['image/open_toy/patches']
    """
    opened = Cache(open_path(cache))
    plan, targets = _plan(opened, merge_settings(PruneSettings, settings, options))
    remove_partials(opened.path)
    with ExitStack() as stack:
        # All folders are leased before the first is touched: a conflict then leaves every feature.
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

            # Once no commit names the feature, no reader opens its files.
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

    # A feature cannot be withdrawn from a folder that is gone.
    paths = sorted(entries, key=lambda path: not targets[path][1])
    return PrunePlan(entries=list(map(entries.__getitem__, paths))), list(map(targets.__getitem__, paths))


def _find(cache: Cache, name: str, modality: str | None) -> list[_Target]:
    """Return the features of a name. There are none if a killed command has begun to delete them."""
    folder, _, feature = name.partition("/")
    modalities = [modality] if modality else list(cache.info.num_items)

    groups: list[EncoderGroup] = []
    for each in modalities:
        groups += cache.encoders(each)

    matches = [group for group in groups if group.name == folder and (not feature or feature in group.features)]
    if len(matches) > 1:
        choices = " and ".join(group.modality for group in matches)
        raise UnknownNameError(
            f"feature {name!r} of {cache.path} is one of {choices}; name one of them with --modality"
        )
    if matches:
        [group] = matches

        # An encoder without features would be left, so the folder of its only feature goes whole.
        is_whole = group.features == [feature]
        return [(group, "" if is_whole else feature)]

    for each in modalities:
        path = cache.path / each / name.rstrip("/")
        if list(path.parent.glob(f".{path.name}.*.partial")):
            return []

    # Encoders of two modalities may have the same name; it is suggested once.
    choosable: dict[str, None] = {}
    for group in groups:
        choosable[group.name] = None
        choosable.update(dict.fromkeys(f"{group.name}/{each}" for each in group.features))
    raise unknown_name("feature", name, choosable, where=f"of {cache.path}")
