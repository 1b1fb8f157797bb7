"""Settings of the commands that maintain a cache. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from embedcache.settings import check_settings, setting


@dataclass(frozen=True, kw_only=True)
class RemoveSettings:
    """Settings of a removal: where else the samples are."""

    indexes: tuple[Path, ...] = setting(
        (), "Index of the cache to remove the samples from. May be repeated.", flat_name="index", metavar="INDEX"
    )
    selections: tuple[Path, ...] = setting(
        (),
        "Selection, or list of keys, to remove the samples from. May be repeated.",
        flat_name="selection",
        metavar="FILE",
    )
    exports: tuple[Path, ...] = setting(
        (),
        "Export that may name the samples: the command fails until it does not. May be repeated.",
        flat_name="export",
        metavar="OUT",
    )
    runs: tuple[Path, ...] = setting(
        (),
        "Run or study whose split and selection name the samples. May be repeated.",
        flat_name="run",
        metavar="RUN",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Settings of pruning: what is deleted."""

    features: tuple[str, ...] = setting(
        (),
        "Feature to delete, as encoder/feature, or encoder or encoder@view for all of its features. May be repeated.",
        flat_name="feature",
        metavar="NAME",
    )
    modality: str | None = setting(
        None, "Modality of the features.", default_text="the only one that has them", metavar="MODALITY"
    )

    def __post_init__(self) -> None:
        check_settings(self)
