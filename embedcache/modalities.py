"""The modalities, a line each, and samples with items of any of them, with the protocol of their sources.

Everything that differs between modalities at extraction follows from the table.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from embedcache.errors import DataError, pluralize

ModalityName: TypeAlias = Literal["image", "text", "audio", "video", "points"]
Scalar: TypeAlias = str | int | float | bool | None
"""A value that fits a column of the sample table."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of raw items.

    Args:
        name: name in code, on the command line and on disk.
        noun: plural of its items, for messages.
        kind: what its item table holds: where the bytes of each item are, or the texts themselves.
        has_interval: whether an item may be an interval of a recording; its table then has `start_s` and `stop_s`.
        decoder: `module:function` from the bytes of an item to what an encoder prepares; empty for texts.
        package: package of the extra `media` that the decoder needs, if any.
        num_ahead: decoded items that may wait for an encoder, so that memory stays bounded.
    """

    name: ModalityName
    noun: str
    kind: Literal["files", "texts"] = "files"
    has_interval: bool = False
    decoder: str = ""
    package: str = ""
    num_ahead: int = 256

    def load_decoder(self) -> Callable[..., Any]:
        """Import and return the decoder."""
        module, _, function = self.decoder.partition(":")
        decode: Callable[..., Any] = getattr(import_module(module), function)
        return decode


_ROOT = "embedcache.sources"
MODALITIES: Mapping[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality(name="image", noun="images", decoder=f"{_ROOT}.images:decode_image"),
        Modality(name="text", noun="texts", kind="texts"),
        Modality(
            name="audio",
            noun="recordings",
            has_interval=True,
            decoder=f"{_ROOT}.media:decode_audio",
            package="av",
            num_ahead=32,
        ),
        Modality(
            name="video",
            noun="videos",
            has_interval=True,
            decoder=f"{_ROOT}.media:decode_video",
            package="av",
            num_ahead=8,
        ),
        Modality(name="points", noun="point clouds", decoder=f"{_ROOT}.points:decode_points", num_ahead=32),
    )
}
FILE_MODALITIES = tuple(modality for modality in MODALITIES.values() if modality.kind == "files")


def list_texts(texts: Any, name: str = "texts") -> tuple[str, ...]:
    """Return texts, given one or several.

    Args:
        texts: a text, or a sequence, an array or an iterator of texts.
        name: what they are, for the message.

    Raises:
        DataError: they are no texts, or one is not valid Unicode.
    """
    if isinstance(texts, str):
        _check_unicode(texts, name)
        return (texts,)
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
        raise DataError(f"{name}: expected a text or several, got {texts!r}; pass one text or a list")
    listed = tuple(texts)
    for position, text in enumerate(listed):
        if not isinstance(text, str):
            raise DataError(f"{name}: expected texts, got {text!r} at position {position}; leave it out")
        _check_unicode(text, f"{name}: position {position}")
    return listed


def _check_unicode(text: str, name: str) -> None:
    """Check that a text has no half of a surrogate pair, which JSON may hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name}: expected valid Unicode, got {text!r}; replace its surrogates") from None


def list_distinct(texts: Any, name: str, what: str) -> tuple[str, ...]:
    """Return texts as `list_texts` does; `DataError` too if there are none, or one twice. `what` describes them."""
    listed = list_texts(texts, name)
    if not listed or len(set(listed)) < len(listed):
        twice = next((text for text in listed if listed.count(text) > 1), None)
        raise DataError(f"{name}: expected distinct {what}, got {'none' if twice is None else f'{twice!r} twice'}")
    return listed


def order_pair(modalities: Iterable[str]) -> tuple[str, ...]:
    """Return modalities in the order in which a pair names them: as in the table, but `text` last."""
    return tuple(sorted(modalities, key=lambda name: (name == "text", list(MODALITIES).index(name))))


def directions(modalities: Sequence[str]) -> tuple[str, str]:
    """Return the names of both directions of retrieval between two modalities: `i2t` and `t2i` of images and texts."""
    first, second = (modality[0] for modality in modalities)
    return f"{first}2{second}", f"{second}2{first}"


def pair_nouns(modalities: Sequence[str]) -> tuple[str, str]:
    """Return the plurals of the items of a pair; texts of other items are captions: `("images", "captions")`."""
    first, second = ("captions" if modality == "text" else noun(modality) for modality in modalities)
    return first, second


def name_pair(modalities: Sequence[str], conjunction: str = "and") -> str:
    """Return the items of a pair as in a sentence, such as `an image and a caption`."""
    singular = (plural.removesuffix("s") for plural in pair_nouns(modalities))
    return f" {conjunction} ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in singular)


def noun(modality: str) -> str:
    """Return the plural of a modality's items, such as `images`."""
    return MODALITIES[modality].noun


def one_noun(modality: str) -> str:
    """Return the singular of `noun`, such as `image`."""
    return noun(modality).removesuffix("s")


def split_modality(word: str) -> tuple[str | None, str]:
    """Return the modality and the value of `[MODALITY=]VALUE`; None and the word if it names no modality.

    Example:
        >>> split_modality("image=0.9"), split_modality("0.9")
        (('image', '0.9'), (None, '0.9'))
    """
    modality, is_named, value = word.partition("=")
    return (modality, value) if is_named and modality in MODALITIES else (None, word)


def encoder_option(modality: str) -> str:
    """Return the option that names an encoder of a modality.

    Example:
        >>> encoder_option("image"), encoder_option("audio")
        ('--image-encoder SPEC', '--encoder audio=SPEC')
    """
    return f"--{modality}-encoder SPEC" if modality in ("image", "text") else f"--encoder {modality}=SPEC"


def count_items(number: int, modality: str) -> str:
    """Return how many items of a modality there are, such as `1 image`."""
    return pluralize(number, one_noun(modality), noun(modality))


@dataclass(frozen=True, kw_only=True, slots=True)
class FileItem:
    """Location of the bytes of one item: an image, a recording, a video or a point cloud.

    Args:
        path: file or shard, relative to the root of the source if it lies below it; of a table that stores the bytes
            itself, followed by `#` and the column.
        offset: first byte within the file; the row if a table stores the bytes themselves.
        length: number of bytes; 0 if unknown or if a table stores the bytes themselves.
        start_s: start of an interval of a recording or video, in seconds; None for its beginning.
        stop_s: end of the interval; None for its end.
    """

    path: str
    offset: int = 0
    length: int = 0
    start_s: float | None = None
    stop_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextItem:
    """One caption and its language (ISO 639-1 code), if known."""

    text: str
    language: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row of a dataset.

    Args:
        key: unique within the source and the same every time the source is read.
        images: any number of images.
        texts: any number of captions, each describing all other items of the sample.
        columns: other columns of the source, such as `split` and `label`.
        files: items of the other modalities: `audio`, `video`, `points`.
    """

    key: str
    images: tuple[FileItem, ...] = ()
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)
    files: Mapping[str, tuple[FileItem, ...]] = field(default_factory=dict)

    def items_in_files(self, modality: str) -> tuple[FileItem, ...]:
        """Return the items of a modality other than `text`."""
        return self.images if modality == "image" else self.files.get(modality, ())


@runtime_checkable
class Source(Protocol):
    """Where raw samples come from.

    A plug-in is a class called with a location and `SourceSettings`. It may have these attributes:

    - `credit`, of the class: the attribution that every page showing its images must carry;
    - `items_are_files`, of the class: whether the path of an item is that of a file, absolute or relative to the
      location, or to its folder if it is a file; exports then name the whole path;
    - `skipped`: a count per kind of file that the last pass over the samples left out, reported after indexing.
    """

    def describe(self) -> Mapping[str, Any]:
        """Return what reopens the source: `type` and `path`, which are texts, and `settings`. The cache records it.

        Paths are absolute, as a cache may be opened from any folder.
        """

    def samples(self) -> Iterator[Sample]:
        """Iterate over all samples, in an order that never changes, without reading their files.

        Raises:
            SourceError: the samples cannot be listed; the message names the file and the row.
        """

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one file, the whole file also for an interval. Thread-safe.

        Raises:
            ItemError: it cannot be read; the message is the reason.
        """


IMPORTED_SOURCE = "imported"
"""Type of the source that a cache of imported vectors records. It has no samples."""

MERGED = "merged"
"""Type of the source that a cache records which was merged from caches of several sources. It has no samples."""

PARTS = "parts"
"""Key in the description of a merged source: the descriptions of its parts."""
