"""How a split is to be made. Nothing heavy is imported here, so that the command line can name its defaults."""

from dataclasses import dataclass
from pathlib import Path

from embedcache.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How samples are cut into train, val and test.

    Args:
        kind: `strict` keeps near-duplicates on one side; `key` cuts by a hash of each key; `column` takes the
            source's `split` column; anything else is the path of another run's split.parquet, where `{seed}` stands for
            the seed.
        val_share: share of the samples for validation.
        test_share: share of the samples for test.
        image_cosine: `strict`: images above this cosine are near-duplicates.
        text_cosine: `strict`: captions above this cosine are near-duplicates.
        seed: which of the possible cuts.
    """

    kind: str = "strict"
    val_share: float = 0.1
    test_share: float = 0.25
    image_cosine: float = 0.9
    text_cosine: float = 0.7
    seed: int = 0

    @property
    def path(self) -> Path:
        """The file that `kind` names, where it is no kind."""
        return Path(self.kind.replace("{seed}", str(self.seed)))

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.val_share + self.test_share >= 1:
            raise SettingError(
                f"val_share {self.val_share} and test_share {self.test_share} leave nothing for training"
            )
