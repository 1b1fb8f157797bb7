"""A path on this machine, or a URL (`s3://bucket/folder`, `gs://`, `https://`) that answers like one."""

import re
from pathlib import Path
from typing import cast

from embedcache.errors import PathError
from embedcache.registry import require

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_path(location: str | Path) -> Path:
    """Turn what a user typed into a path.

    A URL becomes an object with the methods of `Path` (of the package universal-pathlib, which reads and writes
    through fsspec); credentials, regions and endpoints come from the environment as that service's own tools take them.

    Raises:
        MissingExtraError: a URL, and the packages that read it are not installed.
        PathError: a URL of a kind that fsspec does not know.
    """
    if isinstance(location, Path) or not is_url(str(location)):
        return Path(location)
    upath = require("upath", extra="remote")
    try:
        path = upath.UPath(str(location))
        path.fs  # noqa: B018  # imports what reads such URLs
    except ValueError as error:
        raise PathError(f"{location} is a URL of a kind that cannot be read: {error}") from None
    except ImportError as error:
        raise PathError(f"{location} needs a package that is not installed: {error}") from None
    return cast(Path, path)


def is_url(location: str) -> bool:
    """Say whether a text is a URL rather than a path on this machine."""
    return _URL.match(location) is not None


def is_remote(path: Path) -> bool:
    """Say whether a path from `open_path` is elsewhere: no locks, no renames, no memory maps."""
    return not isinstance(path, Path)
