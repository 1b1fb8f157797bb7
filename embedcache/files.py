"""Local paths and URLs (`s3://bucket/folder`, `gs://`, `https://`), atomic writes, and locks between processes.

Errors of the file system become one line.
"""

import errno
import fcntl
import glob
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import threading
import traceback
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast
from uuid import uuid4

from embedcache.errors import CorruptError, DiskFullError, EmbedcacheError, ItemError, PathError, one_line
from embedcache.registry import has_trust, require

AnyPath: TypeAlias = Path | str | os.PathLike[str]
"""A path or URL, or an object that knows where it is stored: a `Cache`, a `Model` or an `OpenIndex`."""

TEXT_ENCODING = "utf-8-sig"
"""Encoding of all text files that users write, whatever the locale: UTF-8, with or without a byte order mark."""

_MAX_TEXT_BYTES = 2**28
URL_PATTERN = r"(?:[A-Za-z][A-Za-z0-9+-]*::)*[A-Za-z][A-Za-z0-9+.-]*://"
"""Regular expression of how a URL begins, see `is_url`."""

_URL = re.compile(URL_PATTERN)
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
"""Protocols of services that have no folders: an object appears with its whole path."""
_PARTIAL = re.compile(r"\..+\.(?P<node>[^.]*)\.(?P<process>\d+)\.[0-9a-f]{8}\.partial")
"""Name of an unfinished file or folder, see `partial_path`: the final name, then the machine and the process."""
_NODE = platform.node().replace(".", "-")
_SERVICES = frozenset(
    {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs", "upath", "yarl"}
    | {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2"}
)
_UNCLASSIFIED = (ValueError, NotImplementedError)
"""Other errors of file systems, for a URL that they cannot parse, an unexpected answer or a read-only server."""
_HUB_REASONS = {
    "GatedRepoError": "its access is restricted: accept its terms on its page, and run: hf auth login",
    "RepositoryNotFoundError": "no such repository, or a private one: check the name, or run: hf auth login",
    "RevisionNotFoundError": "no such revision",
    "EntryNotFoundError": "no such file",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
}
"""Class of the Hub's library, the more special ones first -> reason. Their messages are paragraphs."""
_LONGEST_REASON = 300
_ARROW_REASON = re.compile(r".* Detail: \[errno \d+\] ", re.DOTALL)
"""Prefix that Arrow adds to the reason of the operating system. It says which step failed on which file."""

_FORMATS = frozenset({"pyarrow", "safetensors_rust", "tarfile", "zipfile", "zlib"})
"""Libraries that define separate errors for the content of a damaged file."""

_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE)  # too many open files
_NOT_FOUND = 404
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # the only way to read it
MANIFESTS = {"cache.json": "cache", "run.json": "run", "card.json": "index", "study.json": "study"}
"""Files that mark a folder as an artifact -> the kind of artifact."""

LOCK = ".lock"
"""File in a folder on which its locks are taken."""

SKIP_LOCKS = "EMBEDCACHE_SKIP_LOCKS"
"""Environment variable. With 1, a file system without record locks is used, and only one process may write."""

_LEASES = ".claims"
"""File in a folder on which its leases are taken: piece n is byte n."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS; Lustre without the option flock
_IN_THIS_PROCESS: dict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)


def one_or_many(paths: AnyPath | Iterable[AnyPath]) -> list[AnyPath]:
    """Return a list of paths, given one or several."""
    is_one = isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable)
    return [paths] if is_one else list(paths)  # type: ignore[list-item, arg-type]


def open_path(location: AnyPath) -> Path:
    """Return a path for a local path or URL.

    A URL becomes a `UPath` of universal-pathlib, which has the methods of `Path` and reads and writes through fsspec.
    `file:///folder` becomes the local path `/folder`, so that both are known to be one folder. Credentials, regions and
    endpoints come from the environment, as for the service's own tools.

    Raises:
        PathError: fsspec does not know the protocol, the server does not answer, or the location is a chain of URLs
            joined by `::`.
    """
    if isinstance(location, os.PathLike):
        location = os.fspath(location)
    if not is_url(str(location)):
        return Path(location)

    location = str(location)
    if "::" in location:
        raise PathError(f"expected one URL, got several chained by a double colon: {location}; name the file itself")
    if location.startswith("file:///"):
        return Path(location.removeprefix("file://"))

    upath = require("upath", extra="remote")
    try:
        # With concurrent parts, s3fs would ask for the size of each file that it reads.
        options = {"max_concurrency": 1} if location.startswith(("s3:", "s3a:")) else {}

        # Listings are not cached, as other processes write there too.
        path = upath.UPath(location, use_listings_cache=False, **options)

        # Some file systems are imported or connect only when they are used. `data://` has no files.
        path.fs  # noqa: B018
        path / "file"
    except (OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        raise PathError(f"cannot open {location}: {io_reason(error)}; check the protocol and the address") from None
    return cast(Path, path)


def is_url(location: str) -> bool:
    """Return whether a string is a URL, or one of fsspec's chains such as `simplecache::https://host/file`.

    Example:
        >>> is_url("s3://bucket/photos"), is_url("photos/one.png")
        (True, False)
    """
    # The cheap test comes first, as every row of a table is asked.
    return "://" in location and _URL.match(location) is not None


def is_remote(path: Path) -> bool:
    """Return whether a path is behind a URL, where there are no locks, renames or memory maps."""
    return not isinstance(path, Path)


def relative_location(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, so that both can move together. A URL stays as it is."""
    return str(path) if is_remote(path) else os.path.relpath(path.resolve(), folder.resolve())


def find_named(name: str, folder: Path, option: str) -> AnyPath:
    """Return the path or URL of an artifact that another artifact names; see `relative_location`.

    Args:
        name: path relative to the folder, or a URL.
        folder: folder of the artifact that names it.
        option: its option on the command line, for errors.

    Raises:
        PathError: it does not exist, or it is a URL and files are not trusted.
    """
    # A stranger who wrote the artifact may have chosen the URL.
    if is_url(name) and has_trust():
        return name
    if is_url(name):
        raise PathError(f"{option} {name}, which {folder} names, is a URL: give --{option}, or --trust to open it")

    path = folder / name
    if not any((path / manifest).is_file() for manifest in MANIFESTS):
        raise PathError(f"{option} {path}, which {folder} names, does not exist; if it has moved, give --{option}")
    return path.resolve()


def check_regular(path: Path) -> None:
    """Check that a path does not lead to a pipe, device or socket, as reading one may never end. Links are followed.

    Raises:
        OSError: it leads to one, or there is no such file.
    """
    if is_remote(path):
        return
    mode = path.stat().st_mode

    # Opening a folder is an error in any case.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "expected a regular file, got a pipe or a device", str(path))


def read_file(path: Path) -> bytes:
    """Read a whole file. Behind a URL this is one request, while `Path.read_bytes` asks for the size first.

    A file that does not exist raises `FileNotFoundError` after that request, without a listing. Pipes and devices are
    rejected by `check_regular`.
    """
    if is_remote(path):
        return bytes(path.fs.cat_file(path.path))  # type: ignore[attr-defined]
    check_regular(path)
    return path.read_bytes()


def read_limited(path: Path) -> bytes:
    """Read a file that people or embedcache write, such as JSON or TOML. PathError if it is above 256 MiB."""
    if is_remote(path):
        data = read_file(path)
    else:
        check_regular(path)
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)

    if len(data) > _MAX_TEXT_BYTES:
        raise PathError(f"{path}: expected a file of at most {_MAX_TEXT_BYTES:,} bytes, got more")
    return data


def read_text(path: Path, error_class: type[EmbedcacheError] = PathError) -> str:
    """Read a text file that a user wrote. It raises the errors of `read_limited` and `decode_text`."""
    return decode_text(read_limited(path), path, error_class)


def decode_text(content: bytes, name: Path | str, error_class: type[EmbedcacheError] = PathError) -> str:
    """Decode the content of a text file that a user wrote in UTF-8. A byte order mark is removed.

    Args:
        content: the whole file.
        name: name of the file, for the message.
        error_class: class of the error that is raised if the content is not UTF-8.

    Example:
        >>> decode_text(b"\\xef\\xbb\\xbfred box", "prompts.txt")
        'red box'
    """
    try:
        return content.decode(TEXT_ENCODING)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is {content[error.start]:#04x}"
        raise error_class(f"{name} is not UTF-8 ({reason}); save it as UTF-8") from None


def split_lines(text: str) -> list[str]:
    r"""Split a text at line feeds and carriage returns only. U+2028 and other separators may stand in a caption.

    Example:
        >>> split_lines("a red box\r\na boat\u2028at sea")
        ['a red box', 'a boat\u2028at sea']
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that a crash leaves either the old or the new file. A full disk leaves no partial file.

    Args:
        path: the file.
        data: its content, or blocks of it that are written one after the other. Memory: one block.

    Example:
        >>> write_atomic(Path("notes.txt"), b"a red box")
        >>> Path("notes.txt").read_text()
        'a red box'
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Create a temporary local path whose file replaces `path`, flushed, after the block."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            put_file(temporary, path)
        return

    # A sibling of the file is on the same disk, so that renaming it is one step.
    make_folder(path.parent)
    temporary = partial_path(path)
    try:
        with writing(path):
            yield temporary
            _share(temporary)
            put_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that becomes `folder` after the block. After an error, nothing is left.

    Raises:
        PathError: `folder` is a file or not empty, perhaps as another process wrote it meanwhile. It stays as it is.
    """
    if _is_taken(folder):
        kind = "a file" if folder.is_file() else "one that is not empty"
        raise PathError(f"{folder}: expected a new or empty folder, got {kind}; name another one")

    make_folder(folder.parent)
    remove_leftovers(folder)
    scratch = partial_path(folder)
    temporary = scratch / folder.name
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            yield temporary

            # The content is on disk before its name is, or a crash could leave a folder of empty files.
            for path in (*temporary.rglob("*"), temporary):
                _share(path)
                flush(path)

            # The system rejects the renaming if the folder is taken after this check.
            if _is_taken(folder):
                raise PathError(
                    f"{folder}: expected a new folder, but another process wrote it meanwhile; run the same command "
                    "again, or give the path of a new folder"
                )
            temporary.rename(folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_taken(folder: Path) -> bool:
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def _share(path: Path) -> None:
    """Set the mode of a file to the mode of new files. safetensors creates files that only their owner can read."""
    if path.is_file():
        path.chmod(0o666 & ~_UMASK)


def put_file(file: Path, path: Path) -> None:
    """Move a local file to `path`, flushed. Behind a URL the whole object appears in one step."""
    if is_remote(path):
        with writing(path):
            make_folder(path.parent)
            path.fs.put_file(str(file), path.path)  # type: ignore[attr-defined]
        return

    # The bytes are on disk before the name is, or a crash could leave an empty file.
    flush(file)
    make_folder(path.parent)
    file.replace(path)
    flush(path.parent)


def find_files(folder: Path, pattern: str) -> Iterator[Path]:
    """Iterate over the files below a folder that match a pattern such as `*/zarr.json`. There may be no such folder.

    Folders that `remove_folder` is deleting are left out.
    """
    if not is_remote(folder):
        # `Path.glob` treats a folder without read permission as empty, so it is opened once to raise PermissionError.
        if folder.is_dir():
            os.scandir(folder).close()
        for path in folder.glob(pattern):
            if not any(map(_PARTIAL.fullmatch, path.relative_to(folder).parts)):
                yield path
        return

    # Behind a URL, `Path.glob` would read a bracket, `?` or `*` in the URL as part of the pattern.
    patterns = pattern.split("/")
    while "*" not in patterns[0]:
        folder = folder / patterns.pop(0)
    for name in folder.fs.find(folder.path, maxdepth=len(patterns)):  # type: ignore[attr-defined]
        parts = name.removeprefix(folder.path).removeprefix("/").split("/")  # type: ignore[attr-defined]
        if len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns)):
            yield folder.joinpath(*parts)


def expand_home(path: str | Path) -> Path:
    """Return a path with a `~` or `~name` at its start replaced by that home. It stays as it is if there is none."""
    # `Path.expanduser` raises a RuntimeError for a user without a home.
    return Path(os.path.expanduser(path))  # noqa: PTH111


def user_folder() -> Path:
    """Return the folder for a user's files: `EMBEDCACHE_HOME`, or `embedcache` in the user's cache folder."""
    home = os.environ.get("EMBEDCACHE_HOME")
    path = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or expand_home("~/.cache")) / "embedcache"

    # A user without a home keeps the `~`, which would become a folder of that name here.
    if path.parts[0] == "~":
        raise PathError("this user has no home folder; set EMBEDCACHE_HOME to a folder for exported ONNX graphs")
    return path


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder. It is 0 if there is no folder."""
    if is_remote(folder):
        system: Any = folder.fs  # type: ignore[attr-defined]
        sizes: list[int | None] = system.sizes(system.find(folder.path))  # type: ignore[attr-defined]
        return sum(filter(None, sizes))

    # No `Path` per file, as a feature may have tens of thousands of chunks.
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            num_bytes += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118
    return num_bytes


def partial_path(path: Path) -> Path:
    """Return a hidden sibling of `path` that `remove_partials` removes once this process has died."""
    return path.with_name(f".{path.name}.{_NODE}.{os.getpid()}.{uuid4().hex[:8]}.partial")


def remove_partials(folder: Path) -> None:
    """Remove partial files below a folder that dead processes of this machine left."""
    if is_remote(folder):
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _remove_if_abandoned(Path(parent, name))


def remove_leftovers(path: Path) -> None:
    """Remove partial files of `path` that dead processes of this machine left next to it."""
    if not is_remote(path):
        for partial in path.parent.glob(f".{path.name}.*.partial"):
            _remove_if_abandoned(partial)


def _remove_if_abandoned(path: Path) -> None:
    """Remove a partial file or folder if the process in its name is dead."""
    writer = _PARTIAL.fullmatch(path.name)
    if writer is None or writer["node"] != _NODE:
        return

    # Signal 0 only asks whether the process exists. PermissionError means a living process of another user.
    try:
        os.kill(int(writer["process"]), 0)
    except PermissionError:
        return
    except ProcessLookupError:
        with suppress(OSError):  # it stays in a folder that cannot be written
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def flush(path: Path) -> None:
    """Flush the bytes of a file or the entries of a folder to disk. Behind a URL this does nothing."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, flushed. PathError if a file or permissions are in the way."""
    if is_remote(path):
        protocols: str | tuple[str, ...] = path.fs.protocol  # type: ignore[attr-defined]
        if _OBJECT_STORES.isdisjoint({protocols} if isinstance(protocols, str) else protocols):
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
        return

    check_no_link(path)
    new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)

        # The entry of a new folder is in its parent, which a crash could otherwise lose.
        for folder in new_folders:
            flush(folder.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise PathError(f"{path} is a file, or lies below one; give the path of a folder") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PathError(f"{path}: no permission to make this folder; give the path of one elsewhere") from error


def check_no_link(folder: Path) -> None:
    """Check that a folder that is written or deleted is not reached through a link inside a cache or another artifact.

    A stranger's artifact may have links to any folder. Links to an artifact, and above it, are followed.

    Raises:
        PathError: the folder, or one above it, is such a link.
    """
    for link in (folder, *folder.parents):
        if link.is_symlink() and any(map(_is_artifact, link.parents)):
            raise PathError(f"{link}: expected a folder inside an artifact, got a link; put the folder there itself")


def _is_artifact(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MANIFESTS)


def remove_file(path: Path, *, missing_ok: bool = False) -> None:
    """Remove a file."""
    if not is_remote(path):
        check_no_link(path.parent)
        path.unlink(missing_ok=missing_ok)

    # `UPath.unlink` would remove all files that match the URL as a pattern.
    elif not (missing_ok and not path.exists()):
        path.fs.rm(glob.escape(path.path))  # type: ignore[attr-defined]


def remove_folder(path: Path) -> None:
    """Remove a folder and its content. A local folder disappears in one step."""
    if is_remote(path):
        path.fs.rm(glob.escape(path.path), recursive=True)  # type: ignore[attr-defined]
        return

    # It is renamed first, so that no reader sees half of it.
    check_no_link(path)
    shutil.rmtree(path.replace(partial_path(path)))


# Errors of disks and services. The classes of services have no common base class. They are recognized by the library
# that defined or raised them, so that none of these libraries has to be imported.


@contextmanager
def reading(
    path: Path | str,
    next_step: str = "",
    *,
    error_class: type[EmbedcacheError] = PathError,
    damage_class: type[EmbedcacheError] = CorruptError,
) -> Iterator[None]:
    """Raise errors of reading as errors of this package, with the path and the reason in one line.

    The error of too many open files is raised unchanged, as no file is at fault.

    Args:
        path: the file, or its name.
        next_step: what to do about a damaged file. If empty, only errors of disks and services are translated.
        error_class: class of the error of a disk or a service.
        damage_class: class of the error of a damaged file.
    """
    try:
        yield
    except (PathError, ItemError) as error:
        if isinstance(error, error_class):
            raise
        raise error_class(str(error)) from None
    except EmbedcacheError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_PROCESS:
            raise
        if next_step and _is_damage(error):
            raise damage_class(f"{path} cannot be read: {one_line(error)}; {next_step}") from error
        if not is_io_error(error):
            raise
        if is_missing(error):
            raise error_class(f"no such file: {path}") from None

        # The reason of an item begins with its kind and a colon, by which failures are counted.
        problem = "cannot be read:" if error_class is ItemError else "cannot read"
        raise error_class(f"{problem} {path}: {io_reason(error)}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise the error of a full disk as `DiskFullError`, and errors of a remote service as `PathError`.

    Other errors of the system get the path if they name no file.
    """
    try:
        yield
    except Exception as error:
        # Some libraries report a full disk only in a message.
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or "No space left on device" in str(error):
            raise DiskFullError(disk_full_message(f" of {path}")) from error
        if is_remote(path) and is_io_error(error) and not isinstance(error, EmbedcacheError):
            raise PathError(f"cannot write {path}: {io_reason(error)}; what is committed is kept") from error

        # Errors of a write or a flush name no file.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def hub_errors(action: str, next_step: str, *, error_class: type[EmbedcacheError] = PathError) -> Iterator[None]:
    """Raise errors of the Hugging Face Hub, its libraries and the network as errors of this package.

    Args:
        action: failed action, as it follows "cannot" in the message.
        next_step: advice at the end of the message.
        error_class: class of the errors.
    """
    try:
        yield
    except EmbedcacheError:
        raise
    except Exception as error:
        is_answer = isinstance(error, ValueError | LookupError | TypeError) or library_of(type(error)) == "datasets"
        if not (is_answer or is_io_error(error) or _is_from_service(error)):
            raise

        # Some messages end with paragraphs of examples.
        reason = io_reason(error) if is_io_error(error) else one_line(error)
        reason = reason.partition(" Example of usage")[0].rstrip(".")
        raise error_class(f"cannot {action}: {reason}; {next_step}") from error


def disk_full_message(disk: str = "") -> str:
    """Return the message for a full disk."""
    return f"no space left on the disk{disk}; free some space and rerun the same command"


def is_missing(error: BaseException) -> bool:
    """Return whether an error means a missing file."""
    # fsspec raises FileNotFoundError for any failed HTTP request, so its status decides.
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and library_of(type(cause)) == "aiohttp":
        return getattr(cause, "status", None) == _NOT_FOUND
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _is_damage(error: BaseException) -> bool:
    """Return whether a reader could not parse the content of a file."""
    # Arrow reports damage by an OSError without a number.
    if isinstance(error, OSError):
        return type(error) is OSError and error.errno is None and not _is_from_service(error)
    is_content = isinstance(error, ValueError | LookupError | EOFError) or library_of(type(error)) in _FORMATS
    return is_content and not is_io_error(error)


def is_io_error(error: BaseException) -> bool:
    """Return whether an error comes from a disk or a remote service."""
    is_service_error = not _SERVICES.isdisjoint(map(library_of, type(error).__mro__))
    if isinstance(error, OSError) or is_service_error:
        return True
    return isinstance(error, _UNCLASSIFIED) and _is_from_service(error)


def _is_from_service(error: BaseException) -> bool:
    """Return whether a library for remote services raised an error, or called a standard module that did."""
    is_service = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        library = str(frame.f_globals.get("__name__")).partition(".")[0]

        # Only the innermost frame outside the standard library decides.
        if library not in sys.stdlib_module_names:
            is_service = library in _SERVICES
    return is_service


def io_reason(error: BaseException) -> str:
    """Return the reason that a disk or service gives, in one line."""
    names = {kind.__name__ for kind in type(error).__mro__ if library_of(kind) == "huggingface_hub"}

    # The file is not on this machine, and the Hub could not be asked for it.
    if "LocalEntryNotFoundError" in names:
        return io_reason(error.__cause__) if error.__cause__ else "not downloaded yet, and HF_HUB_OFFLINE is set"

    for name, hub_reason in _HUB_REASONS.items():
        if name in names:
            return hub_reason

    # fsspec has the answer of a web server in the cause.
    if isinstance(error, FileNotFoundError) and error.__cause__:
        return _first_line(error.__cause__)
    if isinstance(error, NotImplementedError):
        return "not supported by URLs of this protocol"
    reason = (isinstance(error, OSError) and error.strerror) or _first_line(error)
    return _ARROW_REASON.sub("", reason)


def library_of(kind: type) -> str:
    """Return the name of the library that defines a class."""
    return kind.__module__.partition(".")[0]


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message. Messages of services continue with paragraphs of advice."""
    return (str(error).partition("\n")[0] or type(error).__name__)[:_LONGEST_REASON]


@contextmanager
def locked(folder: Path, number: int = 0) -> Iterator[None]:
    """Lock a numbered piece of a folder for one thread of one process. The lock of a killed process is released.

    There are no locks behind a URL, where the last writer wins.

    Raises:
        PathError: the file system has no record locks; see `SKIP_LOCKS`.
    """
    lock = Leases(folder, LOCK)
    with _IN_THIS_PROCESS[str(folder.absolute()), number]:
        lock.acquire(number, wait=True)
        try:
            yield
        finally:
            lock.release(number)


def has_locks(folder: Path) -> bool:
    """Return whether processes can exclude each other in a folder. It must be local, and locks must not be skipped."""
    return not (is_remote(folder) or _skips_locks())


class Leases:
    """Leases of this process on numbered pieces of work in a folder. The leases of a killed process are released.

    They are record locks on the file `name` in the folder. So they exclude other processes of the machine and, if the
    file system supports it, of a cluster. Behind a URL every lease is granted to every process.

    Example:
        >>> leases = Leases(Path("photos-cache"))
        >>> leases.acquire(3)
        True
        >>> leases.release(3)
    """

    def __init__(self, folder: Path, name: str = _LEASES) -> None:
        self._path = folder / name

    @cached_property
    def _descriptor(self) -> int | None:
        if is_remote(self._path):
            return None
        descriptor = _open_shared(self._path)
        weakref.finalize(self, _close_shared, self._path)
        return descriptor

    def acquire(self, number: int | None, *, wait: bool = False) -> bool:
        """Acquire a lease, or all if None, and return whether no other process has it. `wait` waits until it is free.

        Raises:
            PathError: the file system has no record locks; see `SKIP_LOCKS`.
        """
        if self._descriptor is None:
            return True
        return _lock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), number, self._path)

    def release(self, number: int | None) -> None:
        """Release a lease, or all if None."""
        if self._descriptor is not None:
            _lock(self._descriptor, fcntl.LOCK_UN, number, self._path)


def _lock(descriptor: int, kind: int, number: int | None, path: Path) -> bool:
    """Acquire or release the record lock on a byte of a file, or on all, and return whether no other process has it."""
    try:
        fcntl.lockf(descriptor, kind, int(number is not None), number or 0)  # a length of 0 locks the whole file
    except OSError as error:
        if kind & fcntl.LOCK_NB and error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _WITHOUT_LOCKS:
            raise
        if not _skips_locks():
            raise PathError(
                f"{path.parent}: its file system has no record locks ({io_reason(error)}); set {SKIP_LOCKS}=1 if no "
                "other process writes to this folder, or each extracts another --shard i/n"
            ) from error
    return True


def _skips_locks() -> bool:
    return os.environ.get(SKIP_LOCKS, "0") != "0"


_SHARED: dict[Path, int] = {}  # file -> its only descriptor in this process
_USERS: Counter[Path] = Counter()  # file -> locks and leases that use it
_SHARED_GUARD = threading.RLock()  # reentrant: garbage collection may finalize `Leases` in it


def _open_shared(path: Path) -> int:
    """Open a file for record locks, once per process, and count its users."""
    path = path.absolute()
    with _SHARED_GUARD:
        _USERS[path] += 1
        try:
            # One descriptor serves all users, as closing any descriptor of a file drops all of its locks.
            if path not in _SHARED:
                make_folder(path.parent)
                _SHARED[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except BaseException:
            _USERS[path] -= 1
            raise
        return _SHARED[path]


def _close_shared(path: Path) -> None:
    """Close the file once its last user has closed it."""
    path = path.absolute()
    with _SHARED_GUARD:
        _USERS[path] -= 1
        if not _USERS[path]:
            os.close(_SHARED.pop(path))
