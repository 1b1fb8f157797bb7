"""Settings of imports and exports of vectors. Nothing heavy is imported here."""

from collections.abc import Mapping
from pathlib import Path

from embedcache.dataset.settings import SELECTION_HELP, WHERE
from embedcache.modalities import ModalityName
from embedcache.processes import device_setting
from embedcache.search.settings import RUN_HELP
from embedcache.settings import Settings, setting
from embedcache.sources.open import ITEM_COLUMNS

_FEATURE_DEFAULT = "the run's, or the only one in the cache"


class ImportSettings(Settings):
    """Settings of an import: how vectors that another tool computed become a cache.

    Example:
        >>> from embedcache import ImportSettings
        >>> settings = ImportSettings(model="clip-vit-base-patch32", key_column="uid")
        >>> settings.key_column, settings.chunk_size
        ('uid', None)
    """

    model: str | None = setting(None, "Model that computed the vectors, for the record.", metavar="TEXT")
    key_column: str | None = setting(
        None, "Table column with the keys of samples.", default_text="key, id or uid", metavar="COLUMN"
    )
    caption_columns: tuple[str, ...] = setting(
        (),
        "Table column with captions. May be repeated.",
        flat_name="caption_column",
        default_text="caption, text or sentence",
        metavar="COLUMN",
    )
    item_columns: Mapping[str, str] = setting(**ITEM_COLUMNS)
    chunk_size: int | None = setting(
        None,
        "Items per chunk of a new cache.",
        ge=1,
        le=2**24,
        default_text="2048 to 16384, depending on the number of items",
        affects_result=False,
    )


class VectorExportSettings(Settings):
    """Settings of an export of vectors: which vectors, and of which samples.

    Example:
        >>> from embedcache import VectorExportSettings
        >>> VectorExportSettings(modality="text", language="en").modality
        'text'
    """

    features: tuple[str, ...] = setting(
        (),
        "Feature, as encoder/feature. May be repeated for other modalities.",
        flat_name="feature",
        metavar="[MODALITY=]NAME",
        default_text=_FEATURE_DEFAULT,
    )
    modality: ModalityName | None = setting(
        None, "Modality of the vectors to export.", default_text="all that have features, or the run's two"
    )
    run: Path | None = setting(None, RUN_HELP, metavar="RUN")
    selection: Path | None = setting(None, SELECTION_HELP, metavar="FILE")
    where: str | None = setting(**WHERE)
    language: str | None = setting(None, "Use only captions of this language.", metavar="CODE")
    device: str = device_setting()
