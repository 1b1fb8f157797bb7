"""What a format says of an export that it wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Written:
    """For the model card.

    Args:
        library: the card's `library_name`.
        task: the card's `pipeline_tag`; None: none fits.
        code: Python that loads the export from the folder above it; `{folder}` stands for its name.
        needs: the packages that the code needs.
        differences: what was compared -> the largest difference from the run.
        notes: what a user must know.
        sides: which encoders are inside.
    """

    library: str
    task: str | None
    code: str
    needs: Sequence[str]
    differences: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sides: Sequence[str] = ("image", "text")
