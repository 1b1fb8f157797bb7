"""What the tokens of a feature are: moments, cells of a grid, points or words; stored in the feature's metadata."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from embedcache.errors import DataError
from embedcache.provenance import Manifest
from embedcache.settings import explain


class Axis(Manifest):
    """The axis of the tokens of one feature, in their order.

    Args:
        kind: `time`, frames at a fixed rate; `grid`, cells row by row; `points`, the item's points in its own order;
            `words`, the tokens of a text.
        rate_hz: frames per second, of `time`.
        start_s: time at which the first frame begins, from the start of the item, of `time`.
        rows: cells from top to bottom, of `grid`.
        columns: cells from left to right, of `grid`.
        box: x0, y0, x1, y1 of the part of the image that a grid covers, as fractions of its width and height; None if
            it differs between images, as after a center crop.
    """

    kind: Literal["time", "grid", "points", "words"]
    rate_hz: float | None = Field(default=None, gt=0)
    start_s: float | None = None
    rows: int | None = Field(default=None, gt=0)
    columns: int | None = Field(default=None, gt=0)
    box: tuple[float, float, float, float] | None = Field(default=None, strict=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise DataError(f"axis of a feature: {explain(error)}") from None

    def model_post_init(self, _context: object) -> None:
        if self.kind == "time" and self.rate_hz is None:
            raise ValueError("expected rate_hz of the kind time, got none")
        if self.kind == "grid" and None in (self.rows, self.columns):
            raise ValueError(f"expected rows and columns of the kind grid, got {self.rows} and {self.columns}")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"expected a box x0, y0, x1, y1, got {self.box}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        return self.model_dump(mode="json", exclude_none=True)
