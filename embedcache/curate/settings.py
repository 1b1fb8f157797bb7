"""Settings of curation. Nothing heavy is imported here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from embedcache.dataset.settings import NEAR_DUPLICATE_COSINES, SELECTION_FORMAT, SELECTION_HELP, WHERE, Cosine
from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, ModalityName, noun, order_pair
from embedcache.processes import address_setting, device_setting, engine_setting
from embedcache.search.settings import FEATURE_DEFAULT, FEATURE_HELP, LABEL, MOVED_CACHE, MOVED_RUN, RUN_HELP
from embedcache.settings import Settings, parse_count_or_fraction, setting

_COMPARED: dict[str, Any] = {
    "default": None,
    "help": "Modality of the items to compare.",
    "default_text": f"the first with features of {', '.join(order_pair(MODALITIES))}, or of a run's two",
}
_ALL_PAIRS: dict[str, Any] = {
    "default": None,
    "help": "Compare every pair instead of pairs within clusters.",
    "default_text": "up to 50,000 items",
}
_SCRATCH: dict[str, Any] = {
    "default": None,
    "help": "Folder for a temporary file of 2 to 4 bytes per number.",
    "affects_result": False,
    "metavar": "FOLDER",
    "default_text": "the system's",
}
_SEED: dict[str, Any] = {
    "default": 0,
    "help": "Random seed of clusters and of items drawn to measure recall.",
    "ge": 0,
    "lt": 2**32,
}


class CoverageSettings(Settings):
    """Settings of coverage, such as the items to count and the number of best items to keep.

    Example:
        >>> CoverageSettings(modality="text", k=5).min_count
        20
    """

    modality: Literal[ModalityName, "both"] = setting("image", "Modality of the items to count, or both.")
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    run: Path | str | None = setting(None, RUN_HELP, metavar="RUN")
    label: str = setting(**LABEL)
    language: str | None = setting(None, "Count only captions of this language.", metavar="CODE", default_text="all")
    answers: Path | str | None = setting(None, "Answers about some items, saved by the page of serve.", metavar="FILE")
    k: int = setting(10, "Most similar items to keep per concept.", ge=1)
    min_count: int = setting(20, "Report a concept as a gap if even its upper bound is lower.", ge=1)
    selection: Path | str | None = setting(
        None, f"Also count the samples of this selection: {SELECTION_FORMAT}.", metavar="FILE"
    )
    engine: Literal["local", "ray"] = engine_setting()
    address: str | None = address_setting()
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if self.modality == "both" and (self.feature or self.answers):
            raise SettingError("modality: expected one with a feature or answers, which are of one modality, got both")
        if self.language is not None and self.modality not in ("text", "both"):
            raise SettingError(f"language: expected modality text or both, got {noun(self.modality)}, which have none")


class DedupSettings(Settings):
    """Settings of deduplication: the limit of duplicates, the search for them, and the rule which of them stay.

    Example:
        >>> DedupSettings(cosine=0.95, keep="best:width").pixels
        True
    """

    cosine: float | None = setting(None, "Remove near-duplicates at or above this cosine similarity.", gt=0, le=1)
    copies_only: bool = setting(False, "Remove copies only: equal bytes or texts, or one image.", flat_name="copies")
    pixels: bool = setting(True, "Read similar images again to find resized and re-compressed copies.")
    modality: ModalityName | None = setting(**_COMPARED)
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    run: Path | str | None = setting(None, RUN_HELP, metavar="RUN")
    keep: str = setting("first", "Duplicate that stays: first, or best:COLUMN (largest number).", metavar="RULE")
    selection: Path | str | None = setting(
        None, f"Compare only the samples of this selection: {SELECTION_FORMAT}.", metavar="FILE"
    )
    all_pairs: bool | None = setting(**_ALL_PAIRS)
    scratch: Path | str | None = setting(**_SCRATCH)
    seed: int = setting(**_SEED)
    engine: Literal["local", "ray"] = engine_setting()
    address: str | None = address_setting()
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if self.cosine is not None and self.copies_only:
            raise SettingError("expected --cosine or --copies, got both; copies are removed with either")


class LeakSettings(Settings):
    """Settings of leak detection: the cosine at or above which a test item counts as leaked, and how to search.

    Example:
        >>> LeakSettings(cosines={"audio": 0.8}).cosines["audio"]
        0.8
    """

    cosines: Mapping[str, Annotated[float, Field(gt=0, le=1)]] = setting(
        NEAR_DUPLICATE_COSINES,
        "Items at or above this cosine similarity are near-duplicates. May be repeated.",
        flat_name="cosine",
        metavar="[MODALITY=]C",
    )
    all_pairs: bool | None = setting(**{**_ALL_PAIRS, "default_text": "if that takes about a minute"})
    scratch: Path | str | None = setting(**_SCRATCH)
    seed: int = setting(**_SEED)
    device: str = device_setting()


class NegativesSettings(Settings):
    """Settings of hard negatives: the compared items, the neighbors that count, and the limit of near-duplicates.

    Example:
        >>> NegativesSettings(num_negatives=5, range_min=10).last_rank
        60
    """

    run: Path | str | None = setting(None, "Run whose shared space compares the two modalities.", metavar="RUN")
    modality: str | None = setting(None, "Modality that looks for negatives: the first by default.", metavar="NAME")
    index: Path | str | None = setting(None, "Search this index of the candidates.", metavar="INDEX")
    num_negatives: int = setting(3, "Hard negatives per sample.", ge=1, le=1000)
    range_min: int = setting(0, "Skip this many of the nearest neighbors.", ge=0, le=2**20, panel="neighbor")
    range_max: int | None = setting(None, "Last rank to consider, 10 per negative.", ge=1, le=2**20, panel="neighbor")
    max_score: float | None = setting(None, "Skip neighbors above this cosine.", ge=-1, le=1, panel="neighbor")
    relative_margin: float | None = setting(
        None, "Skip neighbors less than this fraction below the own pair, such as 0.05.", ge=0, le=1, panel="neighbor"
    )
    sampling: Literal["top", "random"] = setting("top", "Take the nearest neighbors or random ones.", panel="neighbor")
    cosines: Mapping[str, Cosine] = setting(
        NEAR_DUPLICATE_COSINES,
        "Items above this cosine similarity are near-duplicates, never negatives. May be repeated.",
        flat_name="cosine",
        metavar="[MODALITY=]C",
        panel="near-duplicate",
    )
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE", default_text="training part, or all")
    seed: int = setting(0, "Random seed.", ge=0, lt=2**32)
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        minimum = self.range_min + self.num_negatives
        if self.range_max is not None and self.range_max < minimum:
            raise SettingError(
                f"range_max: expected at least range_min + num_negatives, {minimum}, got {self.range_max}"
            )
        if self.run is None and self.relative_margin is not None:
            raise SettingError("relative_margin: expected a run that compares the pair, got none; add --run")

    @property
    def last_rank(self) -> int:
        """Number of neighbors to consider, including the skipped ones."""
        return self.range_max or self.range_min + 10 * self.num_negatives


class OutlierSettings(Settings):
    """Settings of outliers: the compared items and the number of neighbors.

    Example:
        >>> OutlierSettings(modality="image", k=20).label_neighbors
        10
    """

    k: int = setting(50, "Nearest neighbors to which the mean cosine is the typicality.", ge=1, le=1000)
    label_neighbors: int = setting(10, "Nearest of these whose labels are compared; all if -k is less.", ge=1, le=1000)
    modality: ModalityName | None = setting(**_COMPARED)
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    run: Path | str | None = setting(None, "Run that projects features, and compares pairs.", metavar="RUN")
    label: str | None = setting(None, LABEL["help"], metavar="COLUMN", default_text="label, if it exists")
    all_pairs: bool | None = setting(**_ALL_PAIRS)
    scratch: Path | str | None = setting(**_SCRATCH)
    seed: int = setting(**_SEED)
    engine: Literal["local", "ray"] = engine_setting()
    address: str | None = address_setting()
    device: str = device_setting()


class ScoreSettings(Settings):
    """Settings of a score: a linear head or prompts, and the items to score.

    Example:
        >>> ScoreSettings(prompts=("a photo",), negative=("a drawing",)).column
        'score'
    """

    weights: Path | None = setting(None, "Linear head: .npy, .safetensors or .pth.", metavar="FILE")
    fold_layers: bool = setting(False, "Multiply layers without activations between them into one.")
    prompts: tuple[str, ...] = setting(
        (),
        "Score by the cosine with this text, or with the mean of several.",
        flat_name="prompt",
        metavar="TEXT",
        commas="keep",
    )
    negative: tuple[str, ...] = setting(
        (), "Subtract the cosine with this text, or with the mean of several.", metavar="TEXT", commas="keep"
    )
    column: str = setting("score", "Name of the score in the table.", metavar="NAME")
    modality: ModalityName = setting("image", "Modality of the items to score.")
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    run: Path | str | None = setting(None, RUN_HELP, metavar="RUN")
    normalize: bool = setting(True, "Scale vectors to length 1 before they are scored.")
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if (self.weights is None) == (not self.prompts):
            got = "neither" if self.weights is None else "both"
            raise SettingError(f"expected --weights FILE or --prompt TEXT, got {got}; give one of them")
        if any(not text.strip() for text in (*self.prompts, *self.negative)):
            raise SettingError("prompt: expected texts with at least one word, got an empty text")
        if self.weights is not None and self.negative:
            raise SettingError("negative: expected --prompt TEXT with it, got --weights; leave it out")
        if self.weights is None and self.fold_layers:
            raise SettingError("fold_layers: expected --weights FILE with it, got none; leave it out")
        if not self.normalize and (self.prompts or self.run):
            raise SettingError("normalize: expected a head on a plain feature, got prompts or a run; leave it out")
        if self.column in ("row", "key", ""):
            raise SettingError(f"column: expected a name other than row and key, got {self.column!r}")


class MapSettings(Settings):
    """Settings of the map of an index: the projection of its items, and the names of its clusters.

    Example:
        >>> MapSettings(projection="pca", max_items=5_000).seed
        0
    """

    projection: Literal["umap", "pca"] | None = setting(None, "Projection; umap if it is installed.")
    max_items: int = setting(100_000, "Most items on the map; of a larger index, a random sample.", ge=1, le=10**6)
    concepts: str | Path | None = setting(
        None, "Names for clusters: a .txt with one per line, or a cache of prompts.", metavar="CACHE|FILE"
    )
    run: Path | str | None = setting(**MOVED_RUN)
    cache: str | Path | None = setting(**MOVED_CACHE)
    seed: int = setting(0, "Random seed.", ge=0, lt=2**32)
    device: str = device_setting()


class SelectSettings(Settings):
    """Settings of selection: the budget, the inputs of the method, and the samples to choose from.

    A method rejects inputs that it does not use.

    Example:
        >>> SelectSettings(budget=0.1, where="width > 512").budget
        0.1
    """

    budget: int | float | None = setting(
        None,
        "Number of samples to select, or a fraction of them: 1000 or 10%.",
        gt=0,
        parse=parse_count_or_fraction,
        metavar="COUNT",
    )
    scores: Path | str | None = setting(None, "score: Parquet with keys and numbers.", metavar="FILE", panel="method")
    score: str | None = setting(None, "score: column of the scores.", metavar="COLUMN", panel="method")
    concepts: str | Path | None = setting(
        None, "Concepts: a .txt with one name per line, or a cache of prompts.", metavar="CACHE|FILE", panel="method"
    )
    join_names: bool = setting(False, "Merge concepts of the same name.", panel="method")
    label: str = setting(**LABEL, panel="method")
    target: str | Path | None = setting(None, "image-based: items to resemble.", metavar="CACHE", panel="method")
    run: Path | str | None = setting(None, RUN_HELP, metavar="RUN")
    modality: ModalityName | None = setting(
        None,
        "Modality of the items that the method compares.",
        default_text=f"text with --concepts, else the first of {', '.join(order_pair(MODALITIES))}",
    )
    feature: str | None = setting(None, FEATURE_HELP, metavar="NAME", default_text=FEATURE_DEFAULT)
    selection: Path | str | None = setting(None, SELECTION_HELP, metavar="FILE")
    where: str | None = setting(**WHERE)
    seed: int = setting(0, "Random seed.", ge=0, lt=2**32)
    device: str = device_setting()

    def model_post_init(self, _context: object) -> None:
        if isinstance(self.budget, float) and self.budget > 1:
            raise SettingError(f"budget: expected a whole number or a fraction of at most 1 (100%), got {self.budget}")
