"""The shards that a WebDataset location means: a tar, a folder of tars, a pattern, or several of these."""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embedcache.errors import PathError
from embedcache.paths import is_remote, open_path
from embedcache.sources.files import TAR_SUFFIXES, has_suffix, walk_files
from embedcache.sources.reading import file_size, is_folder

BETWEEN = "::"
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_AT_ONCE = 32  # shards that a service is asked about at the same time


def is_pattern(location: str) -> bool:
    """Say whether a location names tars by braces or as a list."""
    return BETWEEN in location or ("{" in location and has_suffix(location, TAR_SUFFIXES))


def absolute(location: str) -> str:
    """Make each part of a location absolute, so that it means the same in another folder."""
    return BETWEEN.join(str(open_path(part).absolute()) for part in location.split(BETWEEN))


def find_shards(location: str) -> list[Path]:
    """List the shards that a location means, in order.

    Raises:
        PathError: there is none, or one of a pattern is missing.
    """
    return [shard for part in location.split(BETWEEN) for shard in _shards_of(part)]


def expand_braces(pattern: str) -> list[str]:
    """Write out ranges and lists: `{08..10}` -> `08`, `09`, `10`; `{a,b}` -> `a`, `b`. A plain path stays as it is."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    values = listed.split(",") if listed else _range(first, last)
    tails = expand_braces(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{value}{tail}" for value in values for tail in tails]


def root_of(location: str) -> Path:
    """Give the folder that item paths are relative to: the one before the first brace or the tar of the first part."""
    part = location.split(BETWEEN)[0]
    if is_folder(open_path(part), TAR_SUFFIXES):
        return open_path(part)
    return open_path(_BRACES.split(part, maxsplit=1)[0] + "_").parent


def _shards_of(part: str) -> list[Path]:
    folder = open_path(part)
    if is_folder(folder, TAR_SUFFIXES):
        shards = [folder / name for name, _ in walk_files(folder) if has_suffix(name, TAR_SUFFIXES)]
        if not shards:
            raise PathError(f"no .tar file below {part}")
        return shards
    shards = [open_path(path) for path in expand_braces(part)]
    missing = [shard for shard, size in zip(shards, _sizes(shards), strict=True) if size is None]
    if missing:
        raise PathError(f"no such shard: {missing[0]} ({len(missing)} of {len(shards)} are missing)")
    return shards


def _sizes(shards: list[Path]) -> Iterable[int | None]:
    if not is_remote(shards[0]):
        return map(file_size, shards)
    with ThreadPoolExecutor(_AT_ONCE) as executor:
        return list(executor.map(file_size, shards))


def _range(first: str, last: str) -> Iterator[str]:
    """Count up or down, with zeros in front where one of both has them, as a shell does."""
    has_zeros = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if has_zeros else 0
    step = 1 if int(first) <= int(last) else -1
    return (str(number).zfill(width) for number in range(int(first), int(last) + step, step))
