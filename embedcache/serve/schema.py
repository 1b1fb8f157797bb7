"""What the API takes and gives."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

USUAL_HITS = 60
MOST_HITS = 500
_MOST_LETTERS = 2000
_MOST_VALUES = 100

Values = Annotated[list[Annotated[str, Field(max_length=_MOST_LETTERS)]], Field(max_length=_MOST_VALUES)]
Count = Annotated[int, Field(ge=1, le=MOST_HITS)]


class Wishes(BaseModel):
    """How many hits, and what may be found; all that is given must hold."""

    model_config = ConfigDict(extra="forbid")

    k: Count = Field(USUAL_HITS, description="Hits; fewer where the filters leave fewer.")
    labels: Values = Field([], description="One of these labels.")
    splits: Values = Field([], description="One of these splits.")
    languages: Values = Field([], description="Captions in one of these languages; others are not shown.")
    selection: str | None = Field(None, description="The name of a selection that the server was started with.")


class SearchRequest(Wishes):
    """A question: either words or a row."""

    text: str | None = Field(None, max_length=_MOST_LETTERS, description="What to look for, in words.")
    row: int | None = Field(None, ge=0, le=10**12, description="Find what is like the item in this row.")


class HitOut(BaseModel):
    """An item that was found."""

    score: float = Field(description="Cosine to the question; of an index of codes, its estimate.")
    row: int = Field(description="The item's row in its modality's table of the cache.")
    key: str = Field(description="The sample's key.")
    captions: list[str] = Field(description="At most three.")
    label: str | None = Field(description="The sample's label, where the cache has labels.")
    image: int | None = Field(description="Row of the picture to show; of a caption, of its sample's first.")


class SearchResponse(BaseModel):
    """What was found, best first, and how long it took, together with questions that came at the same time."""

    hits: list[HitOut]
    encode_ms: float = Field(description="Of the encoders, or of reading vectors.")
    search_ms: float = Field(description="Of the search, and of looking up what was found.")


class Caption(BaseModel):
    """A caption and its language, where known."""

    text: str
    language: str | None


class Item(BaseModel):
    """All that the cache says of an item."""

    row: int
    key: str
    image: int | None = Field(description="Row of the picture to show.")
    captions: list[Caption]
    columns: dict[str, str | int | float | bool | None] = Field(description="The sample's other columns.")


class Info(BaseModel):
    """What this server can do."""

    name: str = Field(description="Of the index.")
    version: str = Field(description="Of the rows: changes with the cache.")
    modality: str = Field(description="Of the items that are found: image or text.")
    num_items: int
    takes: list[str] = Field(description="What can be asked with besides rows: text, image.")
    has_pictures: bool
    pictures_are_missing: str | None = Field(description="Why, where they could be there.")
    credit: str = Field(description="Whose the pictures are, where it must be said.")
    filters: dict[str, dict[str, int]] = Field(description="label, split, language -> value -> items.")
    selections: list[str]
    has_coverage: bool
    max_upload_bytes: int
    most_hits: int


class Concept(BaseModel):
    """A concept, and how many items are above its threshold."""

    number: int
    name: str
    counts: list[int] = Field(description="One a part.")
    assigned: int = Field(description="Items that are most similar to it of all concepts that they count for.")
    threshold: float
    is_gap: bool


class Part(BaseModel):
    """What was counted: all items, or a selection."""

    name: str
    items: int
    covered: int = Field(description="Items that count for at least one concept.")
    gini: float | None
    gaps: int


class Overlap(BaseModel):
    """Two concepts that share items."""

    concepts: list[str]
    items: int
    jaccard: float
    cosine: float


class Coverage(BaseModel):
    """How well the items cover the concepts."""

    rule: str
    min_count: int = Field(description="A concept with fewer items is a gap.")
    warnings: list[str]
    parts: list[Part]
    concepts: list[Concept]
    overlaps: list[Overlap]


class ConceptHits(BaseModel):
    """The most similar items of a concept, best first."""

    name: str
    threshold: float
    hits: list[HitOut]


class CardOut(BaseModel):
    """Rows of a name and a text."""

    title: str
    rows: list[tuple[str, str]]


class ErrorOut(BaseModel):
    """What went wrong, in one line."""

    error: str
