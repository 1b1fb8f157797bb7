"""Settings of selection. Nothing heavy is imported here."""

from pathlib import Path

from embedcache.dataset.settings import SELECTION_HELP
from embedcache.devices import device_setting
from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, ModalityName, order_pair
from embedcache.search.settings import FEATURE_DEFAULT, FEATURE_HELP, LABEL, RUN_HELP
from embedcache.settings import Settings, setting
from embedcache.units import parse_count_or_fraction


class SelectSettings(Settings):
    """Settings of selection: how much, by what, from which samples. A method refuses inputs that it does not use."""

    budget: int | float | None = setting(
        None,
        "Number of samples to select, or a fraction of them: 1000 or 10%.",
        gt=0,
        parse=parse_count_or_fraction,
        metavar="COUNT",
    )
    scores: Path | str | None = setting(
        None,
        "score: Parquet with a column key and numbers, such as curate score writes.",
        metavar="FILE",
        panel="method",
    )
    score: str | None = setting(
        None,
        "score: column of the scores.",
        metavar="COLUMN",
        default_text="the only one that holds numbers",
        panel="method",
    )
    concepts: str | Path | None = setting(
        None, "Cache of prompts, one sample per concept.", metavar="CACHE", panel="method"
    )
    join_names: bool = setting(False, "Merge concepts of the same name.", panel="method")
    label: str = setting(**LABEL, panel="method")
    target: str | Path | None = setting(
        None, "image-based: cache of the items to resemble.", metavar="CACHE", panel="method"
    )
    run: Path | str | None = setting(None, RUN_HELP, metavar="RUN")
    modality: ModalityName | None = setting(
        None,
        "Modality of the items that the method compares.",
        default_text=f"text with --concepts, else the first of {', '.join(order_pair(MODALITIES))}",
    )
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    seed: int = setting(0, "Random seed.", ge=0, lt=2**32)
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if isinstance(self.budget, float) and self.budget > 1:
            raise SettingError(f"budget: expected a whole number or a fraction of at most 1 (100%), got {self.budget}")
