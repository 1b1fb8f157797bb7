"""Settings of a split. Nothing heavy is imported here, so that the command line starts quickly."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, ModalityName
from embedcache.settings import Settings, setting

SELECTION_FORMAT = "Parquet, a text file with one key per line, or a .npy of DataComp's uids"
LANGUAGE_DEFAULT = "that of the first caption if every sample has one in it, else any"
WHERE: dict[str, Any] = {
    "default": None,
    "help": "Use only samples whose columns meet this condition, such as \"year > 2020 and license = 'MIT'\".",
    "metavar": "CONDITION",
}
SELECTION_HELP = f"Use only the samples of this selection: {SELECTION_FORMAT}."
Cosine: TypeAlias = Annotated[float, Field(ge=-1, le=1)]
NEAR_DUPLICATE_COSINES: Mapping[str, float] = {**dict.fromkeys(MODALITIES, 0.9), "text": 0.7}
"""Items of a modality above this cosine are near-duplicates in a strict split, and never hard negatives."""
KINDS = ("strict", "key", "column")
"""Ways to split; any other `kind` is the path of a split file."""


def with_split_seed(options: Mapping[str, Any], settings: Any = None) -> dict[str, Any]:
    """Return the flat names that are not None; `split_seed` defaults to `seed`.

    It does not if the settings in which they replace values have a split seed that differs from their seed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "seed" in given and (settings is None or settings.split.seed == settings.seed):
        with suppress(SettingError):  # raised for `seed`, the name that was given
            return {"split_seed": SplitSettings(seed=given["seed"]).seed, **given}
    return given


class SplitSettings(Settings):
    """Settings of a split: how samples are divided into training, validation and test parts.

    Example:
        >>> split = SplitSettings(kind="key", val_fraction=0.05, test_fraction=0.1)
        >>> round(1 - split.val_fraction - split.test_fraction, 2)  # for training
        0.85
    """

    kind: str = setting(
        "strict",
        "How to split: strict (near-duplicates stay in one part), key (hash of the key), column (the source's split "
        "column), or the split.parquet of another run, where {seed} stands for the seed.",
        flat_name="split",
        metavar="strict|key|column|FILE",
    )
    val_fraction: float = setting(0.1, "Fraction of the samples for validation.", gt=0, lt=1)
    test_fraction: float = setting(0.25, "Fraction of the samples for test.", gt=0, lt=1)
    max_val: int = setting(25_000, "Most samples for validation.", ge=1)
    max_test: int = setting(50_000, "Most samples for test.", ge=1)
    cosines: Mapping[str, Cosine] = setting(
        NEAR_DUPLICATE_COSINES,
        "Strict split: items above this cosine similarity are near-duplicates. May be repeated.",
        flat_name="cosine",
        metavar="[MODALITY=]C",
    )
    modalities: tuple[ModalityName, ...] = setting(
        (),
        "Strict split: compare only items of this modality. May be repeated.",
        flat_name="split_by",
        default_text="all that the samples have in the cache",
    )
    seed: int = setting(
        0,
        "Random seed of the split.",
        ge=0,
        lt=2**32,
        flat_name="split_seed",
        default_text="the value of --seed",
    )

    def model_post_init(self, _context: object) -> None:
        if self.val_fraction + self.test_fraction >= 1:
            raise SettingError(
                f"val_fraction + test_fraction: expected a sum below 1, got {self.val_fraction} + "
                f"{self.test_fraction}, which leaves no samples for training"
            )

    @property
    def path(self) -> Path | None:
        """Path of the split file; None if `kind` is one of `KINDS`, even if a file has that name."""
        return None if self.kind in KINDS else Path(self.kind.replace("{seed}", str(self.seed)))
