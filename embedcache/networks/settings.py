"""Settings of decoding. Nothing heavy is imported here, so that the command line starts quickly."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from embedcache.settings import check_settings, setting

Decoder: TypeAlias = Literal["hybrid", "ctc", "attention"]


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
