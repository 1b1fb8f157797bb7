"""Settings of decoding. Nothing heavy is imported here, so that the command line starts quickly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from embedcache.settings import check_settings, setting

Decoder: TypeAlias = Literal["hybrid", "ctc", "attention"]
Judge: TypeAlias = Callable[[str, str], bool]
"""Whether a caption is right, given the key of its sample and the caption."""


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How transcripts are decoded."""

    decoder: Decoder = setting(
        "hybrid", "Decoder: a beam search over CTC and attention, the best path of CTC, or greedy attention."
    )
    beam: int = setting(5, "Number of hypotheses that the hybrid decoder keeps.", ge=1, le=1000)
    ctc_weight: float = setting(0.1, "Weight of CTC in the hybrid decoder; attention has the rest.", ge=0, le=1)

    def __post_init__(self) -> None:
        check_settings(self)

    def line(self) -> str:
        """Describe the decoder in a few words."""
        if self.decoder == "hybrid":
            return f"hybrid beam search, beam {self.beam}, {self.ctc_weight:g} CTC"
        return {"ctc": "best path of CTC", "attention": "greedy attention"}[self.decoder]


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """How captions are written, and judged.

    Args:
        judge: whether a caption is right; None: if it is a caption of the item in the examples.
    """

    beam: int = setting(5, "Hypotheses that are kept per caption.", ge=1, le=1000, panel="caption")
    max_length: int = setting(20, "Most words of a caption.", ge=1, panel="caption")
    length_power: float = setting(
        0.0,
        "Exponent of the length that divides the log-probability of a caption; 1 compares means over words.",
        ge=0,
        panel="caption",
    )
    judge: Judge | None = None

    def __post_init__(self) -> None:
        check_settings(self)
