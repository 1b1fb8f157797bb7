"""Requests and responses of the API."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from embedcache.modalities import MODALITIES
from embedcache.search.settings import Match

_DEFAULT_HITS = 60
MAX_HITS = 500
MAX_COLLECTED = 1_000_000
_MAX_TEXT_LENGTH = 2000
_MAX_VALUES = 100

MapState = Literal["computing", "ready", "unavailable"]
_Values = Annotated[list[Annotated[str, Field(max_length=_MAX_TEXT_LENGTH)]], Field(max_length=_MAX_VALUES)]
_PATH = (
    "File of the item as its source names it, or only its name if it is outside of the source. Null for a text, or if "
    "the source names none."
)
_Count = Annotated[int, Field(ge=1, le=MAX_HITS)]


class SearchOptions(BaseModel):
    """Number of hits, and filters that all hits must pass."""

    model_config = ConfigDict(extra="forbid")

    k: _Count = Field(_DEFAULT_HITS, description="Number of hits; fewer if the filters leave fewer.")
    labels: _Values = Field([], description="Keep items with one of these labels.")
    splits: _Values = Field([], description="Keep items of one of these splits.")
    languages: _Values = Field([], description="Keep captions in one of these languages; others are not shown.")
    where: str | None = Field(
        None,
        max_length=_MAX_TEXT_LENGTH,
        description="Keep items whose columns meet this condition, such as year > 2020 and license = 'MIT'.",
    )
    selection: str | None = Field(None, description="Keep items of this selection, which the server offers.")


class SearchRequest(SearchOptions):
    """A query: a text, a row or a key."""

    text: str | None = Field(None, max_length=_MAX_TEXT_LENGTH, description="Text query.")
    match: Match = Field("vectors", description="What to compare with a text: vectors, words of captions, or both.")
    row: int | None = Field(None, ge=0, le=10**12, description="Find items similar to the item in this row.")
    key: str | None = Field(
        None,
        max_length=_MAX_TEXT_LENGTH,
        description="Find items similar to the first item of the sample with this key.",
    )


class PlayerOut(BaseModel):
    """A recording or a video to play."""

    modality: Literal["audio", "video"]
    row: int = Field(description="Row of the recording or video in the item table of its modality.")
    start_s: float | None = Field(description="Start of the interval in the file, in seconds; null for its beginning.")
    stop_s: float | None = Field(description="End of the interval; null for its end.")


_PLAYER = "What to play: the item, or the first video or recording of its sample; null if there is none."


class HitOut(BaseModel):
    """One hit."""

    score: float | None = Field(
        description="Score of the query: a cosine, estimated if the index stores codes; null without a query."
    )
    row: int = Field(description="Row of the item in the item table of its modality.")
    key: str = Field(description="Key of the sample.")
    path: str | None = Field(description=_PATH)
    name: str = Field(description="What to call the item without a caption: its key, or its file if they differ.")
    captions: list[str] = Field(description="Captions of the sample in one language, at most three.")
    languages: list[str | None] = Field(description="Languages of its captions, the shown one first; null is unknown.")
    label: str | None = Field(description="Label of the sample, if the cache has labels.")
    image: int | None = Field(description="Row of the image to show: the item, or the first image of its sample.")
    player: PlayerOut | None = Field(description=_PLAYER)


class SearchResponse(BaseModel):
    """Hits, best first, and times of the batch in which the query was processed."""

    hits: list[HitOut]
    encode_ms: float = Field(description="Time of the encoders, or of reading vectors.")
    search_ms: float = Field(description="Time of the search, and of looking up the hits.")


class CaptionOut(BaseModel):
    """A caption and its language, if known."""

    text: str
    language: str | None


class ItemOut(BaseModel):
    """All data of an item in the cache."""

    row: int
    key: str
    path: str | None = Field(description=_PATH)
    image: int | None = Field(description="Row of the image to show.")
    player: PlayerOut | None = Field(description=_PLAYER)
    captions: list[CaptionOut]
    columns: dict[str, str | int | float | bool | None] = Field(description="Other columns of the sample.")


class ServerInfo(BaseModel):
    """Content and capabilities of this server."""

    name: str = Field(description="Name of the index.")
    run: str | None = Field(description="Name of the run that projected it; null for a plain feature.")
    feature: str
    version: str = Field(description="Version of the rows; changes with the cache.")
    modality: str = Field(description=f"Modality of the hits: one of {', '.join(MODALITIES)}.")
    num_items: int
    accepted_queries: list[str] = Field(alias="takes", description="Modalities of accepted queries, besides rows.")
    rejected_queries: dict[str, str] = Field(alias="rejects", description="Modality -> why it is not accepted.")
    has_images: bool
    has_players: bool = Field(description="Whether hits may have recordings or videos to play.")
    missing_images: str | None = Field(description="Why images, recordings or videos are missing, if they could exist.")
    credit: str = Field(description="Attribution that must be shown with the images.")
    matches: list[Match] = Field(description="What a text can be compared with, the default first.")
    columns: list[str] = Field(description="Columns of samples, which a condition may name.")
    filters: dict[str, dict[str, int]] = Field(description="label, split or language -> value -> number of items.")
    selections: list[str]
    has_coverage: bool
    max_upload_bytes: int
    most_hits: int
    most_collected: int = Field(description="Largest number of items of a selection.")
    collect: str | None = Field(description="Name of the file that PUT /api/selection writes; null if there is none.")


class SavedOut(BaseModel):
    """A selection that was written to the file of --collect."""

    name: str = Field(description="Name of the file.")
    num_samples: int


class ConceptCountOut(BaseModel):
    """How many items of a part show a concept: an estimate with its interval, null if the scores cannot tell."""

    count: int | None
    low: int | None
    high: int | None
    best: int = Field(description="Items for which it is the most similar concept.")
    certain: int = Field(description="Those of them that are about as near as its typical best items.")


class ConceptOut(BaseModel):
    """A concept, and how many items show it."""

    number: int
    name: str
    counts: list[ConceptCountOut] = Field(description="One per part.")
    threshold: float
    is_gap: bool
    num_answers: int


class PartOut(BaseModel):
    """Counted items: all, or a selection."""

    name: str
    items: int
    covered: int = Field(description="Items that count for at least one concept.")
    gini: float | None
    gaps: int


class CoverageOut(BaseModel):
    """Coverage of the concepts by the items."""

    texts: list[str] = Field(description="Texts of the first concept; empty if concepts are examples.")
    min_count: int = Field(description="A concept is a gap if even its upper bound is lower.")
    warnings: list[str]
    parts: list[PartOut]
    concepts: list[ConceptOut]


class AskedHit(HitOut):
    """An item that a person can answer for."""

    shows: bool | None = Field(description="Whether it shows the concept; null without an answer.")


class ConceptHits(ConceptOut):
    """A concept with its most similar items, and items of all ranks that a person can answer for, best first."""

    hits: list[HitOut]
    strip: list[AskedHit]


class ConceptAnswer(BaseModel):
    """Whether an item shows a concept; null takes an answer back."""

    row: int
    shows: bool | None


class OpeningOut(BaseModel):
    """What the page opens on: a sample of the index from as many different clusters as there are, and questions."""

    state: MapState
    reason: str = Field(description="Why there is none, if the state is unavailable.")
    hits: list[HitOut]
    questions: list[str] = Field(description="Texts to search for; empty if the index does not accept texts.")


class ClusterOut(BaseModel):
    """A cluster of the map."""

    name: str
    size: int
    x: float = Field(description="Median position, from 0 to 1.")
    y: float


class MapOut(BaseModel):
    """The map of the index: its items on a plane, in clusters."""

    state: MapState
    reason: str = Field(description="Why there is none, if the state is unavailable.")
    projection: str = Field(description="umap or pca.")
    num_points: int = Field(description="Number of items on the map: all, or a random sample.")
    clusters: list[ClusterOut] = Field(description="Clusters, largest first.")


class ClusterHits(BaseModel):
    """The items nearest to the center of a cluster, nearest first."""

    name: str
    hits: list[HitOut]


class CardOut(BaseModel):
    """A table of names and values."""

    title: str
    rows: list[tuple[str, str]]
