"""The errors a caller may catch. Each is also the built-in it refines.

EmbedcacheError
├── UnknownNameError      LookupError   no encoder, feature, source, projector … of that name
├── SettingError          ValueError    a setting out of its range, or two that contradict
├── MissingExtraError     ImportError   an optional package is not installed
├── PathError             OSError       a path that is missing, or is not what it should be
├── DiskFullError         OSError       no space left where a stage writes
├── SourceError           ValueError    raw samples that cannot be numbered
├── ItemError             ValueError    one raw item that cannot be read; becomes a row with a reason
├── DataError             ValueError    arrays whose shape, dtype or values do not fit
└── ArtifactError         ValueError    something on disk that does not fit what is asked of it
    ├── FingerprintError                made by another encoder, source or run than asked
    ├── UnfinishedError                 chunks are missing
    └── CorruptError                    bytes differ from the checksum written with them
"""


class EmbedcacheError(Exception):
    """Anything a user can cause; the command line prints its text and exits with 1."""


class UnknownNameError(EmbedcacheError, LookupError):
    """A name that stands for nothing here."""


class SettingError(EmbedcacheError, ValueError):
    """A setting out of its range."""


class MissingExtraError(EmbedcacheError, ImportError):
    """An optional package is not installed."""


class PathError(EmbedcacheError, OSError):
    """A path that is missing, or is not what it should be."""


class DiskFullError(EmbedcacheError, OSError):
    """No space left where a stage writes."""


class SourceError(EmbedcacheError, ValueError):
    """Raw samples that cannot be numbered."""


class ItemError(EmbedcacheError, ValueError):
    """One raw item that cannot be read. Its text is the reason written beside its row."""


class DataError(EmbedcacheError, ValueError):
    """Arrays whose shape, dtype or values do not fit."""


class ArtifactError(EmbedcacheError, ValueError):
    """Something on disk that does not fit what is asked of it."""


class FingerprintError(ArtifactError):
    """Made by another encoder, source or run than asked."""


class UnfinishedError(ArtifactError):
    """Chunks are missing."""


class CorruptError(ArtifactError):
    """Bytes differ from the checksum written with them."""
