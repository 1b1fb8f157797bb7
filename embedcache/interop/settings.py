"""Settings of imports and exports of vectors. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.dataset.settings import SELECTION_HELP
from embedcache.devices import device_setting
from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, ModalityName
from embedcache.search.settings import RUN_HELP
from embedcache.settings import check_settings, setting
from embedcache.sources.settings import ITEM_COLUMNS

_FEATURE_DEFAULT = "the run's, or the only one in the cache"


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Settings of an import: how vectors that another tool computed become a cache."""

    model: str | None = setting(
        None, "Description of the model that computed the vectors, for the record.", metavar="TEXT"
    )
    key_column: str | None = setting(
        None, "Table column that holds the keys of samples.", default_text="key, id or uid", metavar="COLUMN"
    )
    caption_columns: tuple[str, ...] = setting(
        (),
        "Table column that holds captions. May be repeated.",
        flat_name="caption_column",
        default_text="caption, text or sentence",
        metavar="COLUMN",
    )
    image_column: str | None = setting(**ITEM_COLUMNS["image"])
    audio_column: str | None = setting(**ITEM_COLUMNS["audio"])
    video_column: str | None = setting(**ITEM_COLUMNS["video"])
    points_column: str | None = setting(**ITEM_COLUMNS["points"])
    chunk_size: int | None = setting(
        None, "Items per chunk of a new cache.", ge=1, le=2**24, default_text="2048", affects_result=False
    )

    def __post_init__(self) -> None:
        check_settings(self)


_IMAGE_FEATURE: dict[str, Any] = {
    "default": None,
    "help": "Image feature, as encoder/feature.",
    "default_text": _FEATURE_DEFAULT,
    "metavar": "NAME",
}
_TEXT_FEATURE = {**_IMAGE_FEATURE, "help": "Text feature, as encoder/feature."}
_MODALITY: dict[str, Any] = {"default": None, "help": "Modality of the vectors to export."}
_RUN: dict[str, Any] = {
    "default": None,
    "help": RUN_HELP,
    "metavar": "RUN",
}


@dataclass(frozen=True, kw_only=True)
class VectorExportSettings:
    """Settings of an export of vectors: which ones, and of which samples."""

    image_feature: str | None = setting(**_IMAGE_FEATURE)
    text_feature: str | None = setting(**_TEXT_FEATURE)
    features: tuple[str, ...] = setting(
        (),
        "Feature of any modality, such as audio=tiny.en/mean. May be repeated.",
        flat_name="feature",
        metavar="MODALITY=NAME",
        default_text=_FEATURE_DEFAULT,
    )
    modality: ModalityName | None = setting(**_MODALITY, default_text="all that have features, or the run's two")
    run: Path | None = setting(**_RUN)
    selection: Path | None = setting(None, SELECTION_HELP, metavar="FILE")
    language: str | None = setting(None, "Use only captions of this language.", metavar="CODE")
    device: str = device_setting()

    def __post_init__(self) -> None:
        check_settings(self)
        _check_modality(self)

    @property
    def named_features(self) -> dict[str, str]:
        """Modality -> the feature that is named for it."""
        both = {"image": self.image_feature, "text": self.text_feature}
        named = {modality: name for modality, name in both.items() if name is not None}
        for word in self.features:
            modality, _, name = word.partition("=")
            if modality not in MODALITIES or not name or modality in named:
                raise SettingError(
                    f"feature: expected MODALITY=NAME, such as audio=tiny.en/mean, once for each modality of "
                    f"{', '.join(MODALITIES)}, got {word!r}"
                )
            named[modality] = name
        return named


def _check_modality(settings: VectorExportSettings) -> None:
    for modality, feature in settings.named_features.items():
        if settings.modality not in (None, modality):
            raise SettingError(
                f"modality: expected {modality} with the feature {feature}, got {settings.modality}; omit one of them"
            )
