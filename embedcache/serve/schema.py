"""Requests and responses of the API."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_DEFAULT_HITS = 60
MAX_HITS = 500
_MAX_TEXT_LENGTH = 2000
_MAX_VALUES = 100

_Values = Annotated[list[Annotated[str, Field(max_length=_MAX_TEXT_LENGTH)]], Field(max_length=_MAX_VALUES)]
_Count = Annotated[int, Field(ge=1, le=MAX_HITS)]


class SearchOptions(BaseModel):
    """Number of hits, and filters that all hits must pass."""

    model_config = ConfigDict(extra="forbid")

    k: _Count = Field(_DEFAULT_HITS, description="Number of hits; fewer if the filters leave fewer.")
    labels: _Values = Field([], description="Keep items with one of these labels.")
    splits: _Values = Field([], description="Keep items of one of these splits.")
    languages: _Values = Field([], description="Keep captions in one of these languages; others are not shown.")
    selection: str | None = Field(None, description="Keep items of this selection, which the server offers.")


class SearchRequest(SearchOptions):
    """A query: either a text or a row."""

    text: str | None = Field(None, max_length=_MAX_TEXT_LENGTH, description="Text query.")
    row: int | None = Field(None, ge=0, le=10**12, description="Find items similar to the item in this row.")


class HitOut(BaseModel):
    """One hit."""

    score: float = Field(description="Cosine to the query; estimated if the index stores codes.")
    row: int = Field(description="Row of the item in the item table of its modality.")
    key: str = Field(description="Key of the sample.")
    captions: list[str] = Field(description="Captions of the sample, at most three.")
    label: str | None = Field(description="Label of the sample, if the cache has labels.")
    image: int | None = Field(description="Row of the image to show; of a caption, the first image of its sample.")


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
    image: int | None = Field(description="Row of the image to show.")
    captions: list[CaptionOut]
    columns: dict[str, str | int | float | bool | None] = Field(description="Other columns of the sample.")


class ServerInfo(BaseModel):
    """Content and capabilities of this server."""

    name: str = Field(description="Name of the index.")
    version: str = Field(description="Version of the rows; changes with the cache.")
    modality: str = Field(description="Modality of the hits: image or text.")
    num_items: int
    accepted_queries: list[str] = Field(alias="takes", description="Accepted queries besides rows: text, image.")
    has_images: bool
    missing_images: str | None = Field(description="Why images are missing, if they could exist.")
    credit: str = Field(description="Attribution that must be shown with the images.")
    filters: dict[str, dict[str, int]] = Field(description="label, split or language -> value -> number of items.")
    selections: list[str]
    has_coverage: bool
    max_upload_bytes: int
    most_hits: int


class ConceptOut(BaseModel):
    """A concept, and the number of items above its threshold."""

    number: int
    name: str
    counts: list[int] = Field(description="One number per part.")
    assigned: int = Field(description="Items for which it is the most similar of the concepts that they count for.")
    threshold: float
    is_gap: bool


class PartOut(BaseModel):
    """Counted items: all, or a selection."""

    name: str
    items: int
    covered: int = Field(description="Items that count for at least one concept.")
    gini: float | None
    gaps: int


class OverlapOut(BaseModel):
    """Two concepts that share items."""

    concepts: list[str]
    items: int
    jaccard: float
    cosine: float


class CoverageOut(BaseModel):
    """Coverage of the concepts by the items."""

    rule: str
    min_count: int = Field(description="A concept with fewer items is a gap.")
    warnings: list[str]
    parts: list[PartOut]
    concepts: list[ConceptOut]
    overlaps: list[OverlapOut]


class ConceptHits(BaseModel):
    """The most similar items of a concept, best first."""

    name: str
    threshold: float
    hits: list[HitOut]


class CardOut(BaseModel):
    """A table of names and values."""

    title: str
    rows: list[tuple[str, str]]


class ErrorOut(BaseModel):
    """An error message of one line."""

    error: str
