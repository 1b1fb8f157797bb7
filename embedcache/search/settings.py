"""Settings of indexes and searches. Nothing heavy is imported here, so that the command line starts quickly."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

from embedcache.dataset.settings import SELECTION_HELP, WHERE
from embedcache.errors import SettingError
from embedcache.modalities import ModalityName
from embedcache.processes import device_setting
from embedcache.settings import Settings, group, parse_size, setting

FEATURE_HELP = "Feature, as encoder/feature."
FEATURE_DEFAULT = "the run's, or the only one of the modality"
RUN_HELP = "Run that projects the features into the shared space."
Match: TypeAlias = Literal["vectors", "words", "both"]
LABEL: dict[str, Any] = {"default": "label", "help": "Column of class labels.", "metavar": "COLUMN"}
MOVED_RUN: dict[str, Any] = {
    "default": None,
    "help": "Where the run of the index is, if it has moved.",
    "metavar": "RUN",
    "default_text": "where it was when the index was built",
}
MOVED_CACHE: dict[str, Any] = {
    "default": None,
    "help": "Where the cache of the index is, if it has moved.",
    "metavar": "CACHE",
    "default_text": "where it was when the index was built",
}


ADAPTER: dict[str, Any] = {
    "default": None,
    "help": "Encode queries with the new encoder of this adapter, written by embedcache adapt.",
    "metavar": "RUN",
}


class IndexSettings(Settings):
    """Settings of an index: the items and the feature to index, and the kind of the index.

    Example:
        >>> settings = IndexSettings(run="run", factory="Flat")
        >>> embedcache.build_index("cache", "exact-index", settings).recall_at_10
        1.0
    """

    modality: ModalityName = setting("image", "Modality of the items to index.")
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    run: Path | str | None = setting(None, RUN_HELP, metavar="RUN")
    width: int | None = setting(
        None,
        "Index the first components of each vector only, scaled to length 1 again; for runs trained with --widths, and "
        "encoders trained that way.",
        ge=1,
        default_text="the whole width",
    )
    factory: str | None = setting(
        None,
        "FAISS factory string, such as IVF4096,SQfp16.",
        default_text="the first kind that fits the memory and reaches the recall",
    )
    memory: int | None = setting(
        None,
        "Most memory that the index may take while it is searched, such as 500MB or 4GB.",
        gt=0,
        parse=parse_size,
        metavar="SIZE",
        default_text="any",
    )
    on_disk: bool = setting(False, "Leave the vectors on disk; --memory limits the rest.")
    min_recall: float = setting(
        0.95, "Reject an index that finds a smaller fraction of the true 10 nearest neighbors.", ge=0, le=1
    )
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if self.factory is not None and self.memory is not None:
            raise SettingError(
                f"expected factory or memory, got both: the factory string {self.factory!r} decides how much memory "
                "the index takes; leave one of them out"
            )


class Filter(Settings):
    """Filter of the items that a search may return. All conditions must hold.

    Example:
        >>> settings = SearchSettings(k=1, filter=Filter(where="key > '00000'"))
        >>> embedcache.search_index("index", "yellow bar right on black", settings)[0][0].key
        '00034'
    """

    where: str | None = setting(**WHERE)
    label_value: tuple[str, ...] = setting(
        (), "Return only samples with this label. May be repeated.", metavar="VALUE", commas="keep"
    )
    part: tuple[str, ...] = setting(
        (),
        "Return only samples of this part: a value of the column split, or of the run's split if there is no such "
        "column.",
        metavar="PART",
    )
    language: tuple[str, ...] = setting(
        (), "Return only items with captions in this language. May be repeated.", metavar="CODE"
    )
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")

    def __bool__(self) -> bool:
        return bool(self.where is not None or self.label_value or self.part or self.language or self.selection)


class SearchSettings(Settings):
    """Settings of a search: how many results it returns, which items they come from, and where encoders run.

    Example:
        >>> settings = SearchSettings(k=1, match="words")  # without any encoder
        >>> embedcache.search_index("index", "yellow bar right on black", settings)[0][0].captions
        ['yellow bar right on black']
    """

    k: int | None = setting(None, "Results per query.", ge=1, default_text="10, or all items if fewer")
    match: Match = setting(
        "vectors",
        "What to compare with a text: vectors, the words of captions (BM25), or both rankings fused by ranks.",
    )
    label: str = setting(**LABEL)
    filter: Filter = group(Filter)
    run: Path | str | None = setting(**MOVED_RUN)
    cache: str | Path | None = setting(**MOVED_CACHE)
    adapter: Path | str | None = setting(**ADAPTER)
    device: str = device_setting()
