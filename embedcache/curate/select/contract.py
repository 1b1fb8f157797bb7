"""What a method of selection is to the rest of the package."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from embedcache.cache.selection import Selection
from embedcache.curate.select.pool import Pool
from embedcache.errors import SettingError
from embedcache.registry import Registry

SELECTORS = Registry(
    "method of selection",
    {
        "clip-score": "embedcache.curate.select.clip_score:ClipScore",
        "hierarchical": "embedcache.curate.select.hierarchical:Hierarchical",
        "image-based": "embedcache.curate.select.image_based:ImageBased",
        "k-centre": "embedcache.curate.select.k_centre:KCentre",
        "metaclip": "embedcache.curate.select.metaclip:Metaclip",
        "random": "embedcache.curate.select.random_choice:RandomChoice",
        "rare-first": "embedcache.curate.select.rare_first:RareFirst",
        "top-score": "embedcache.curate.select.top_score:TopScore",
    },
)


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """How much to select, and how. A method refuses what it does not look at.

    Args:
        budget: samples to select; None where another setting decides.
        per_concept: samples of each concept, at most.
        threshold: cosine from which on a caption fits its image (`clip-score`) or an item a concept (`metaclip`).
        head: `metaclip`'s t: concepts with more samples are cut to about so many.
        clusters: centroids, finest level first; None is worked out from the number of samples.
        drawn: samples that `k-centre` looks at; None is 20,000, or twice the budget where that is more.
        seed: of all that is drawn.
    """

    budget: int | None = None
    per_concept: int | None = None
    threshold: float | None = None
    head: float | None = None
    clusters: tuple[int, ...] | None = None
    drawn: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "per_concept", "head", "drawn"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise SettingError(f"{name.replace('_', ' ')} is {value}; it must be at least 1")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise SettingError(f"threshold is {self.threshold}; a cosine lies between -1 and 1")
        if self.clusters is not None and (not self.clusters or min(self.clusters) < 1):
            raise SettingError(f"clusters are {self.clusters}; give at least one number, each at least 1")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed is {self.seed}; it must be at least 0 and below 2^32")

    @property
    def given(self) -> list[str]:
        """Names of the settings that were said, without `seed`."""
        names = ("budget", "per_concept", "threshold", "head", "clusters", "drawn")
        return [name for name in names if getattr(self, name) is not None]


class Selector(Protocol):
    """One method.

    Attributes:
        takes: settings that it looks at; `seed` is always allowed.
        needs_one_of: settings of which exactly one must be given.
        modality: `image` or `text`: what it looks at unless told otherwise; None: neither, or both.
        needs: `concepts`, `target` and `run`: what the pool must have.
        draws: whether the seed decides anything.
    """

    takes: ClassVar[tuple[str, ...]]
    needs_one_of: ClassVar[tuple[str, ...]]
    modality: ClassVar[str | None]
    needs: ClassVar[tuple[str, ...]]
    draws: ClassVar[bool]

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select some samples of a pool, each once.

        Raises:
            DataError: nothing passes.
        """
        ...


def check_settings(method: str, selector: Selector, settings: SelectSettings) -> None:
    """Refuse settings that a method does not look at, and ask for those that it needs.

    Raises:
        SettingError: names the options.
    """
    others = [name for name in settings.given if name not in selector.takes]
    if others:
        takes = f"it takes {_options(selector.takes)}" if selector.takes else "it takes none"
        raise SettingError(f"--method {method} does not look at {_options(others)}; {takes}")
    found = [name for name in selector.needs_one_of if name in settings.given]
    if selector.needs_one_of and len(found) != 1:
        got = _options(found) if found else "none"
        raise SettingError(f"--method {method} needs one of {_options(selector.needs_one_of)}, and got {got}")


def _options(names: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
