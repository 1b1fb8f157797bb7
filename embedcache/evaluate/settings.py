"""Settings of evaluations. Nothing heavy is imported here, so that the command line starts quickly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from embedcache.dataset.settings import LANGUAGE_DEFAULT, SELECTION_HELP, SplitSettings, with_split_seed
from embedcache.errors import SettingError
from embedcache.modalities import ModalityName
from embedcache.processes import device_setting
from embedcache.search.settings import FEATURE_HELP, LABEL
from embedcache.settings import Settings, from_flat, group, setting

_PART_HELP = "Part of the run's split, or of the column split, to read."
_PART_DEFAULT = "test, or all without a split"
_TRAINED_ON_HELP = "Where a training cache is now, if it has moved. May be repeated."
_OVERLAP_HELP = "Check whether evaluated items were seen in training."


class RetrievalSettings(Settings):
    """Settings of retrieval between two modalities.

    Example:
        >>> RetrievalSettings(part="val", widths=(32, 64)).max_samples
        50000
    """

    part: Literal["train", "val", "test", "all"] | None = setting(None, _PART_HELP, default_text=_PART_DEFAULT)
    language: tuple[str, ...] = setting(
        (),
        "Use only captions of this language; any uses all. May be repeated.",
        metavar="CODE",
        default_text="the language of the training run",
    )
    trained_on: tuple[str, ...] = setting((), _TRAINED_ON_HELP, metavar="CACHE", commas="keep")
    check_overlap: bool = setting(True, _OVERLAP_HELP)
    widths: tuple[PositiveInt, ...] = setting(
        (),
        "Also rank by the first components of the shared space, for each of these widths, such as 32,64.",
        metavar="N,...",
        default_text="the --widths that the run was trained with",
    )
    max_samples: int = setting(
        50_000, "Rank at most this many samples, drawn at random from a larger part; 0 ranks all.", ge=0
    )
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if len(set(self.language)) < len(self.language):
            raise SettingError(f"language: expected each once, got {', '.join(self.language)}")


class ZeroShotSettings(Settings):
    """Settings of zero-shot classification.

    Example:
        >>> ZeroShotSettings(label="species").check_overlap
        True
    """

    label: str = setting(**LABEL)
    part: Literal["train", "val", "test", "all"] | None = setting(None, _PART_HELP, default_text=_PART_DEFAULT)
    trained_on: tuple[str, ...] = setting((), _TRAINED_ON_HELP, metavar="CACHE", commas="keep")
    check_overlap: bool = setting(True, _OVERLAP_HELP)
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    device: str = device_setting()


class AdapterEvalSettings(Settings):
    """Settings of the evaluation of an adapter.

    Example:
        >>> AdapterEvalSettings(part="all").num_queries
        2000
    """

    part: Literal["train", "val", "test", "all"] | None = setting(None, _PART_HELP, default_text=_PART_DEFAULT)
    num_queries: int = setting(2_000, "Most queries, drawn at random from a larger part.", ge=1)
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    device: str = device_setting()


class ProbeSettings(Settings):
    """Settings of classifiers on a frozen feature.

    Example:
        >>> ProbeSettings(classifiers=("knn",), shots=(1, 2, 4)).draws
        5
    """

    modality: ModalityName = setting("image", "Modality of the items to classify.")
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text="the only one")
    label: str = setting(**LABEL)
    classifiers: tuple[str, ...] = setting(
        ("knn", "logistic", "ridge"),
        "Classifier: knn, logistic, ridge or module:attribute. May be repeated.",
        flat_name="classifier",
        metavar="NAME",
        default_text="knn, logistic and ridge",
    )
    part: Literal["test", "val"] = setting("test", "Part of the split to measure on.")
    shots: tuple[PositiveInt, ...] = setting(
        (), "Training items per class, such as 1,2,4,8,16, for a few-shot curve.", metavar="N,..."
    )
    draws: int = setting(5, "Number of few-shot draws, or of label shuffles for the control.", ge=1)
    control: bool = setting(False, "Also fit on shuffled labels, as a control that must stay at chance.")
    check_overlap: bool = setting(True, _OVERLAP_HELP)
    seed: int = setting(0, "Random seed of the draws and the shuffles.", ge=0, lt=2**32)
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    device: str = device_setting()
    split: SplitSettings = group(SplitSettings)

    def model_post_init(self, _context: object) -> None:
        if not self.classifiers:
            raise SettingError("classifier: expected at least one classifier such as knn, got none; add --classifier")


def probe_settings(options: Mapping[str, Any]) -> ProbeSettings:
    """Build settings from flat names; `split_seed` defaults to `seed`."""
    return from_flat(ProbeSettings, with_split_seed(options))


class _ProbeSplitSettings(SplitSettings):
    """Settings of the split of a probe, which needs many samples to be measured on."""

    val_fraction: float = setting(0.25, "Fraction of the samples for validation.", gt=0, lt=1)


class PairsSettings(Settings):
    """Settings of the comparison of encoder pairs.

    Example:
        >>> PairsSettings(num_samples=2_000).split.val_fraction
        0.25
    """

    language: str | None = setting(
        None, "Use only captions of this language; any uses all.", metavar="CODE", default_text=LANGUAGE_DEFAULT
    )
    num_samples: int = setting(5000, "Draw at most this many samples.", ge=20)
    k: int = setting(10, "Neighbors of mutual kNN.", ge=1)
    seed: int = setting(0, "Random seed of the draw.", ge=0, lt=2**32)
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    device: str = device_setting()
    split: SplitSettings = group(_ProbeSplitSettings)


def pairs_settings(options: Mapping[str, Any]) -> PairsSettings:
    """Build settings from flat names; `split_seed` defaults to `seed`."""
    return from_flat(PairsSettings, with_split_seed(options))
