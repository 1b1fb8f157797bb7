"""The table of modalities, samples with items of any of them, and the protocol of their sources.

All differences between modalities at extraction follow from the table.
"""

from collections import Counter
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
        kind: content of its item table: the locations of files, or texts.
        has_interval: whether an item may be an interval of a recording. Its table then has `start_s` and `stop_s`.
        decoder: `module:function` from the bytes of an item to the input of an encoder. It is empty for texts.
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
    """Return one or several strings as a tuple.

    Args:
        texts: a string, or a sequence, an array or an iterator of strings.
        name: their name in the message.

    Raises:
        DataError: they are not strings, or one is not valid Unicode.

    Example:
        >>> list_texts("a red box"), list_texts(["a red box", "a boat"])
        (('a red box',), ('a red box', 'a boat'))
    """
    if isinstance(texts, str):
        _check_unicode(texts, name)
        return (texts,)

    # An array without dimensions has the methods of an iterable, but cannot be iterated over.
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
        raise DataError(f"{name}: expected a text or several, got {texts!r}; pass one text or a list")

    listed = tuple(texts)
    for position, text in enumerate(listed):
        if not isinstance(text, str):
            raise DataError(f"{name}: expected texts, got {text!r} at position {position}; leave it out")
        _check_unicode(text, f"{name}: position {position}")
    return listed


def _check_unicode(text: str, name: str) -> None:
    """Check that a string has no half of a surrogate pair. JSON may contain one, but no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name}: expected valid Unicode, got {text!r}; replace its surrogates") from None


def list_distinct(texts: Any, name: str, what: str) -> tuple[str, ...]:
    """Return distinct strings as a tuple.

    Args:
        texts: as in `list_texts`, at least one.
        name: their name in the message.
        what: noun that describes them in the message.

    Raises:
        DataError: there are none, or one is there twice. It also raises the errors of `list_texts`.
    """
    listed = list_texts(texts, name)
    if not listed:
        raise DataError(f"{name}: expected distinct {what}, got none")

    text, count = Counter(listed).most_common(1)[0]
    if count > 1:
        raise DataError(f"{name}: expected distinct {what}, got {text!r} twice")
    return listed


def order_pair(modalities: Iterable[str]) -> tuple[str, ...]:
    """Return modalities in the order in which a pair names them: as in the table, but `text` last.

    Example:
        >>> order_pair(["text", "audio"])
        ('audio', 'text')
    """
    return tuple(sorted(modalities, key=lambda name: (name == "text", list(MODALITIES).index(name))))


def directions(modalities: Sequence[str]) -> tuple[str, str]:
    """Return the names of both directions of retrieval between two modalities.

    Example:
        >>> directions(["image", "text"])
        ('i2t', 't2i')
    """
    first, second = modalities
    return f"{first[0]}2{second[0]}", f"{second[0]}2{first[0]}"


def pair_nouns(modalities: Sequence[str]) -> tuple[str, str]:
    """Return the plurals of the items of a pair. Texts that describe other items are captions.

    Example:
        >>> pair_nouns(["image", "text"])
        ('images', 'captions')
    """
    first, second = modalities
    return _pair_noun(first), _pair_noun(second)


def _pair_noun(modality: str) -> str:
    return "captions" if modality == "text" else noun(modality)


def name_pair(modalities: Sequence[str], conjunction: str = "and") -> str:
    """Return the items of a pair as words of a sentence.

    Example:
        >>> name_pair(["image", "text"])
        'an image and a caption'
    """
    names = []
    for plural in pair_nouns(modalities):
        article = "an" if plural[0] in "aeiou" else "a"
        names.append(f"{article} {plural.removesuffix('s')}")
    return f" {conjunction} ".join(names)


def noun(modality: str) -> str:
    """Return the plural of a modality's items, such as `images`."""
    return MODALITIES[modality].noun


def one_noun(modality: str) -> str:
    """Return the singular of a modality's items, such as `image`."""
    return noun(modality).removesuffix("s")


def split_modality(word: str) -> tuple[str | None, str]:
    """Return the modality and the value of `[MODALITY=]VALUE`. It is None and the word if there is no modality.

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
    """Return a number of items of a modality as text.

    Example:
        >>> count_items(1, "image"), count_items(2000, "audio")
        ('1 image', '2,000 recordings')
    """
    return pluralize(number, one_noun(modality), noun(modality))


@dataclass(frozen=True, kw_only=True, slots=True)
class FileItem:
    """Location of the bytes of one item: an image, a recording, a video or a point cloud.

    Args:
        path: file or shard, relative to the root of the source if it lies below it. If a table stores the bytes
            itself, `#` and the column follow the path of the table.
        offset: first byte within the file. If a table stores the bytes, it is the row.
        length: number of bytes. It is 0 if unknown or if a table stores the bytes.
        start_s: start of an interval of a recording or video, in seconds. If None, its beginning.
        stop_s: end of the interval, in seconds. If None, its end.

    Example:
        >>> item = FileItem(path="talks/0001.wav", start_s=1.5, stop_s=4.0)
        >>> item.stop_s - item.start_s
        2.5
    """

    path: str
    offset: int = 0
    length: int = 0
    start_s: float | None = None
    stop_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextItem:
    """One caption and its language (ISO 639-1 code), if known.

    Example:
        >>> TextItem(text="ein roter Kasten", language="de").language
        'de'
    """

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

    Example:
        >>> sample = Sample(key="0001", images=(FileItem(path="0001.png"),), texts=(TextItem(text="a red box"),))
        >>> len(sample.items_in_files("image")), sample.items_in_files("audio")
        (1, ())
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
    """The origin of raw samples.

    A plug-in is a class called with a location and `SourceSettings`. It may have these attributes:

    - `credit`, of the class: the attribution that every page showing its images must carry;
    - `items_are_files`, of the class: whether the path of an item is the path of a file, absolute or relative to the
      location (to its folder if it is a file), so that exports name the whole path;
    - `skipped`: a count per kind of file that the last pass over the samples left out, reported after indexing.

    Example:
        >>> class OneSample:
        ...     def describe(self):
        ...         return {"type": "my_package:OneSample", "path": "/photos", "settings": {}}
        ...     def samples(self):
        ...         yield Sample(key="0001", texts=(TextItem(text="a red box"),))
        ...     def read(self, item):
        ...         raise NotImplementedError
        >>> isinstance(OneSample(), Source)
        True
    """

    def describe(self) -> Mapping[str, Any]:
        """Return the description that reopens the source: `type` and `path`, which are strings, and `settings`.

        The cache records it. Paths are absolute, as a cache may be opened from any folder.
        """

    def samples(self) -> Iterator[Sample]:
        """Iterate over all samples, in an order that never changes, without reading their files.

        Raises:
            SourceError: the samples cannot be listed. The message names the file and the row.
        """

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one file, the whole file also for an interval. Thread-safe.

        Raises:
            ItemError: it cannot be read. The message is the reason.
        """


IMPORTED_SOURCE = "imported"
"""Type of the source that a cache of imported vectors records. It has no samples."""

MERGED = "merged"
"""Type of the source that a cache records if it was merged from caches of several sources. It has no samples."""

PARTS = "parts"
"""Key in the description of a merged source: the descriptions of its parts."""
