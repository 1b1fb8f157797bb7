"""What the tokens of a feature are: moments, cells of a grid, points or words; stored in the feature's metadata."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from embedcache.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Axis:
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
    rate_hz: float | None = None
    start_s: float | None = None
    rows: int | None = None
    columns: int | None = None
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("time", "grid", "points", "words"):
            raise DataError(f"axis: expected the kind time, grid, points or words, got {self.kind!r}")
        if self.kind == "time" and not (self.rate_hz is not None and self.rate_hz > 0):
            raise DataError(f"axis of kind time: expected rate_hz above 0, got {self.rate_hz}")
        if self.kind == "grid" and not (self.rows and self.columns and min(self.rows, self.columns) > 0):
            raise DataError(f"axis of kind grid: expected rows and columns, got {self.rows} and {self.columns}")
        if self.box is not None and not (
            len(self.box) == 4 and self.box[0] < self.box[2] and self.box[1] < self.box[3]
        ):
            raise DataError(f"axis of kind grid: expected a box x0, y0, x1, y1, got {self.box}")

    @property
    def without_box(self) -> "Axis":
        """The same axis for items that were altered, so that it is unknown what part of them the grid covers."""
        return replace(self, box=None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values; `from_json` is the inverse."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Axis":
        """Build an axis from JSON values.

        Raises:
            DataError: it is no object, or a field is unknown or missing.
        """
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
            }
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise DataError(f"expected the axis of a feature, got {record!r}: {error}") from None
