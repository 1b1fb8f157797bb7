"""Settings of selection. Nothing heavy is imported here."""

from pathlib import Path
from typing import Any

from embedcache.dataset.settings import SELECTION_HELP
from embedcache.devices import device_setting
from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, ModalityName, order_pair
from embedcache.search.settings import FEATURE_DEFAULT, FEATURE_HELP, LABEL, RUN_HELP
from embedcache.settings import Settings, flat_settings, setting
from embedcache.units import parse_count_or_fraction, parse_counts

METHOD_SETTINGS = (
    "budget",
    "per_concept",
    "threshold",
    "head",
    "clusters",
    "candidates",
    "score",
    "at_least",
    "at_most",
)
"""Settings that only some methods use: one that is set, and that the method does not accept, is refused."""


class SelectSettings(Settings):
    """Settings of selection: how much, by what, from which samples. A method refuses settings that it does not use."""

    budget: int | float | None = setting(
        None,
        "Number of samples to select, or a fraction of them: 1000 or 10%.",
        gt=0,
        parse=parse_count_or_fraction,
        metavar="COUNT",
    )
    per_concept: int | None = setting(None, "rare-first: at most this many samples per concept.", ge=1, panel="method")
    threshold: float | None = setting(
        None, "clip-score, metaclip: cosine similarity from which an item matches.", ge=-1, le=1, panel="method"
    )
    head: float | None = setting(
        None, "metaclip: cut concepts with more matches than this to about this many samples.", ge=1, panel="method"
    )
    clusters: tuple[int, ...] | None = setting(
        None,
        "image-based, hierarchical: number of clusters, one per level, finest first, such as 1000,100.",
        parse=parse_counts,
        metavar="N,...",
        default_text="one per 40 samples",
        panel="method",
    )
    candidates: int | None = setting(
        None,
        "k-center: number of randomly drawn samples to choose from.",
        ge=1,
        default_text="20,000, or twice the budget if that is more",
        panel="method",
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
    at_least: float | None = setting(None, "score: select samples of this score or a higher one.", panel="method")
    at_most: float | None = setting(None, "score: select samples of this score or a lower one.", panel="method")
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
        if self.at_least is not None and self.at_most is not None and self.at_most < self.at_least:
            raise SettingError(f"at_most: expected at least at_least, {self.at_least:g}, got {self.at_most:g}")
        if self.clusters is not None and (not self.clusters or min(self.clusters) < 1):
            raise SettingError(f"clusters: expected whole numbers of at least 1, got {self.clusters}")

    @property
    def method_settings(self) -> list[str]:
        """Names of the settings of `METHOD_SETTINGS` that are set."""
        return [name for name in METHOD_SETTINGS if getattr(self, name) is not None]

    def inputs(self) -> dict[str, str]:
        """Return the inputs that are set among `scores`, `concepts`, `target` and `run`, as text."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("scores", "concepts", "target", "run")}
        return {name: str(value) for name, value in values.items() if value is not None}

    def method_json(self) -> dict[str, Any]:
        """Return the settings of `METHOD_SETTINGS` and the seed as the metadata of a selection stores them."""
        names = {item.name for item in flat_settings(type(self)) if item.name in (*METHOD_SETTINGS, "seed")}
        return {name: value for name, value in self.to_json().items() if name in names}
