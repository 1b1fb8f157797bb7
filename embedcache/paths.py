"""A path on this machine, or a URL (`s3://bucket/folder`, `gs://`, `https://`) that answers like one."""

import re
from pathlib import Path
from typing import cast

from embedcache.errors import PathError
from embedcache.registry import require

_SERVICES = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs"})
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
_LONGEST_REASON = 300
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_path(location: str | Path) -> Path:
    """Turn what a user typed into a path.

    A URL becomes an object with the methods of `Path` (of the package universal-pathlib, which reads and writes
    through fsspec); credentials, regions and endpoints come from the environment as that service's own tools take them.

    Raises:
        MissingExtraError: a URL, and the packages that read it are not installed.
        PathError: a URL of a kind that fsspec does not know, or of a server that does not answer.
    """
    if isinstance(location, Path) or not is_url(str(location)):
        return Path(location)
    upath = require("upath", extra="remote")
    try:
        path = upath.UPath(str(location), use_listings_cache=False)  # other processes write there too
        path.fs  # noqa: B018  # imports what reads such URLs
    except ValueError as error:
        raise PathError(f"{location} is a URL of a kind that cannot be read: {error}") from None
    except OSError as error:  # some file systems connect at once
        raise PathError(f"cannot reach {location}: {io_reason(error)}") from None
    except ImportError as error:
        raise PathError(f"{location} needs a package that is not installed: {error}") from None
    return cast(Path, path)


def is_url(location: str) -> bool:
    """Say whether a text is a URL rather than a path on this machine."""
    return _URL.match(location) is not None


def is_remote(path: Path) -> bool:
    """Say whether a path from `open_path` is elsewhere: no locks, no renames, no memory maps."""
    return not isinstance(path, Path)


def has_no_folders(path: Path) -> bool:
    """Say whether a remote path is in an object store, where a folder is but a part of a name, the first a bucket."""
    protocols: str | tuple[str, ...] = path.fs.protocol  # type: ignore[attr-defined]
    return not _OBJECT_STORES.isdisjoint({protocols} if isinstance(protocols, str) else protocols)


def is_io_error(error: BaseException) -> bool:
    """Say whether an error is a disk's or a service's, rather than a mistake of ours. The services' share no base."""
    gives_no_parts = isinstance(error, ValueError) and "range requests" in str(error)  # fsspec, of a web server
    return isinstance(error, OSError) or gives_no_parts or any(library_of(k) in _SERVICES for k in type(error).__mro__)


def io_reason(error: BaseException) -> str:
    """Give a disk's or a service's reason in one line; fsspec hides that of a web server in the cause."""
    if isinstance(error, FileNotFoundError) and error.__cause__:
        return _one_line(error.__cause__)
    return (isinstance(error, OSError) and error.strerror) or _one_line(error)


def library_of(kind: type) -> str:
    """Name the library that a class comes from."""
    return kind.__module__.partition(".")[0]


def _one_line(error: BaseException) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__)[:_LONGEST_REASON]
