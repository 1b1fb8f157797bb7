"""Errors that a caller may catch. Each is also a built-in error.

EmbedcacheError
├── UnknownNameError      LookupError   there is no encoder, feature, source, projector … of that name
│   └── AmbiguousNameError              several features have that name, or none was named
├── SettingError          ValueError    a setting out of its range, or contradictory settings
├── MissingExtraError     ImportError   an optional package is not installed
├── PathError             OSError       a path that is missing or is not what was expected
├── DiskFullError         OSError       no space is left where a stage writes
├── SourceError           ValueError    raw samples that cannot be indexed
├── ItemError             ValueError    a raw item that cannot be read; becomes a row with a reason
├── DataError             ValueError    arrays of an unexpected shape, dtype or value
└── ArtifactError         ValueError    an artifact on disk that does not fit the request
    ├── FingerprintError                made by another encoder, source or run than requested
    ├── UnfinishedError                 chunks are missing
    └── CorruptError                    bytes that differ from their checksum

Example:
    >>> issubclass(UnfinishedError, ArtifactError), issubclass(UnfinishedError, ValueError)
    (True, True)
"""

import faulthandler
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

V = TypeVar("V")


class EmbedcacheError(Exception):
    """An error that a user can cause. The command line prints its message and exits with 1.

    Example:
        >>> try:
        ...     raise SettingError("epochs: expected a number of at least 1, got 0")
        ... except EmbedcacheError as error:
        ...     print(type(error).__name__, "-", error)
        SettingError - epochs: expected a number of at least 1, got 0
    """


class UnknownNameError(EmbedcacheError, LookupError):
    """An unknown name. The message lists the known ones.

    Example:
        >>> embedcache.Cache("cache").feature("image", "dinov2/cls")
        Traceback (most recent call last):
        embedcache.errors.UnknownNameError: unknown image feature 'dinov2/cls' of cache; known: open_example/vector
    """


class AmbiguousNameError(UnknownNameError):
    """A name of several features of `modality`, or no name although there are several.

    Example:
        >>> embedcache.Cache("views-cache").feature("image")
        Traceback (most recent call last):
        embedcache.errors.AmbiguousNameError: ...name one of these features: open_example/vector, ...
    """

    modality = ""


class SettingError(EmbedcacheError, ValueError):
    """A setting out of its range, or contradictory settings.

    Example:
        >>> embedcache.train_projectors("cache", "run", epochs=-1)
        Traceback (most recent call last):
        embedcache.errors.SettingError: epochs: expected a number greater than or equal to 0, got -1
    """


class MissingExtraError(EmbedcacheError, ImportError):
    """An optional package is not installed. The message has the command that installs it.

    Example:
        >>> from embedcache.registry import require
        >>> require("a_missing_package", extra="sweep")
        Traceback (most recent call last):
        embedcache.errors.MissingExtraError: ...run: python -m pip install 'embedcache[sweep]'
    """


class PathError(EmbedcacheError, OSError):
    """A path that is missing or leads to something else than expected.

    Example:
        >>> embedcache.Cache("missing")
        Traceback (most recent call last):
        embedcache.errors.PathError: missing does not exist; make one with: embedcache extract SOURCE missing
    """


class DiskFullError(EmbedcacheError, OSError):
    """No space is left where a stage writes. What was committed stays valid, so the same call resumes.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> plan = embedcache.plan_extraction("photos", "planned-cache", image_encoder=encoder)
        >>> from dataclasses import replace
        >>> replace(plan, free_bytes=0).check_space()  # as on a full disk
        Traceback (most recent call last):
        embedcache.errors.DiskFullError: planned-cache: expected ... of free disk space, got 0.00 MB; ...
    """


class SourceError(EmbedcacheError, ValueError):
    """Raw samples that cannot be indexed.

    Example:
        >>> embedcache.open_source("empty")
        Traceback (most recent call last):
        embedcache.errors.SourceError: empty contains no image, recording, video, point cloud, .tar or table; ...
    """


class ItemError(EmbedcacheError, ValueError):
    """A raw item that cannot be read. Its message is the reason stored with the row.

    Failures are counted by their kind, the part before the first colon. It has no paths or numbers.

    Example:
        >>> from embedcache.sources.images import decode_image
        >>> decode_image(b"not an image")
        Traceback (most recent call last):
        embedcache.errors.ItemError: not an image (JPEG, PNG, WEBP, GIF, BMP, TIFF)
    """


class DataError(EmbedcacheError, ValueError):
    """Arrays or other data of an unexpected shape, dtype or value.

    Example:
        >>> embedcache.Cache("cache").feature("image").gather([99])
        Traceback (most recent call last):
        embedcache.errors.DataError: feature open_example/vector: expected rows from 0 to 11, got 99
    """


class ArtifactError(EmbedcacheError, ValueError):
    """An artifact on disk that does not fit the request, such as a cache, a run or an index.

    Example:
        >>> try:
        ...     embedcache.Cache("half-cache").feature("image").load()
        ... except ArtifactError as error:
        ...     print(type(error).__name__)
        UnfinishedError
    """


class FingerprintError(ArtifactError):
    """An artifact made by another encoder, source or run than requested.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> embedcache.extract_features("other-photos", "cache", image_encoder=encoder)
        Traceback (most recent call last):
        embedcache.errors.FingerprintError: cache cache has other samples than this source has now: ...
    """


class UnfinishedError(ArtifactError):
    """Chunks are missing, such as after an extraction that was interrupted.

    Example:
        >>> embedcache.Cache("half-cache").feature("image").load()
        Traceback (most recent call last):
        embedcache.errors.UnfinishedError: feature open_example/vector is not finished: 1 of 3 chunks is missing; ...
    """


class CorruptError(ArtifactError):
    """Bytes that differ from their checksum.

    Example:
        >>> embedcache.Cache("damaged-cache").feature("image").load()
        Traceback (most recent call last):
        embedcache.errors.CorruptError: ...; repair it with: embedcache verify CACHE --repair
    """


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return a text for a terminal, with control characters as escapes.

    Captions and names of files may contain any character, and a control character can change the state of a terminal.
    Line breaks and tabs stay.

    Example:
        >>> print(visible("a \x1b[31mred box"))
        a \x1b[31mred box
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(error: BaseException, max_length: int = 200) -> str:
    r"""Return an error's message on one line, to quote it in another message. Without a message, return its class.

    Example:
        >>> one_line(ValueError("not a number\n  in row 3"))
        'not a number in row 3'
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:max_length]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a machine or a device has too little memory."""
    # torch raises a RuntimeError: a subclass for GPUs, and a message for the CPU.
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError)


def first_few(values: Sequence[V], num_shown: int = 3, *, show: Callable[[V], str] = str, separator: str = ", ") -> str:
    """List the first values in a message and count the others.

    Example:
        >>> first_few(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(values) - num_shown:,} more" if len(values) > num_shown else ""
    return separator.join(map(show, values[:num_shown])) + more


def quoted(path: str | os.PathLike[str]) -> str:
    """Return a path as a word of the shell command that a message names."""
    return shlex.quote(str(path))


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """Return a number followed by its noun or phrase.

    Args:
        number: the number.
        one: noun or phrase after 1.
        many: noun or phrase after any other number. If None, `one` with an `s`.

    Example:
        >>> pluralize(1, "sample has", "samples have"), pluralize(2000, "sample")
        ('1 sample has', '2,000 samples')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def summary(report: Any) -> str:
    """Return the lines of a report, from its method `lines` or else `line`. It is the `__repr__` of all reports.

    Example:
        >>> class Report:
        ...     __repr__ = summary
        ...     def line(self):
        ...         return "12 samples"
        >>> Report()
        12 samples
    """
    return "\n".join(report.lines() if hasattr(report, "lines") else [report.line()])


def show_faults() -> None:
    """Print a traceback if a fault ends this process, such as SIGBUS if a disk fails below a mapped chunk."""
    # Standard error may not be a file, as in some notebooks.
    if sys.stderr is not None and not faulthandler.is_enabled():
        with suppress(OSError):
            faulthandler.enable()
