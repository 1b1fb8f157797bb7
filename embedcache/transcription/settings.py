"""Settings of transcription. Nothing heavy is imported here, so that the command line starts quickly."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from embedcache.errors import SettingError
from embedcache.networks.settings import DecodingSettings
from embedcache.settings import check_settings, group, setting

Mouth: TypeAlias = tuple[float, float, float, float] | Literal["all"]
"""Where the mouth is in every frame: x0, y0, x1, y1 as fractions of width and height, or `all` of the frame."""
STREAMS = ("audio", "video")
WINDOW_S = 20.0
"""Longest window by default, in seconds."""
TRAINED_FRACTION = 0.6
"""Longest window by default, as a fraction of the longest training utterance.

Few utterances are nearly as long as the longest, so that a network knows little of such windows: one that was trained
on utterances of 2 s, the longest of 5.1 s, made twice as many word errors in windows of 5.1 s as in ones of 3 s.
"""
MOUTH_FORM = "X0,Y0,X1,Y1 in fractions of the frame's width and height, such as 0.3,0.55,0.7,0.85, or all"


@dataclass(frozen=True, kw_only=True)
class TranscribeSettings:
    """Settings of the transcription of speech."""

    streams: tuple[str, ...] = setting(
        (),
        "Stream to use, audio or video. May be repeated.",
        metavar="NAME",
        default_text="those that both the run and the input have",
    )
    window_s: float | None = setting(
        None,
        "Cut longer recordings at quiet places into windows of at most this length.",
        ge=2,
        le=600,
        metavar="SECONDS",
        default_text=f"{WINDOW_S:g}, or {TRAINED_FRACTION:g} of the longest training utterance if that is less",
    )

    decoding: DecodingSettings = group(DecodingSettings)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in self.streams:
            if name not in STREAMS:
                raise SettingError(f"streams: expected audio or video, got {name!r}")


def parse_mouth(text: str) -> Mouth:
    """Parse the region of the mouth: `all`, or `0.3,0.55,0.7,0.85`.

    Raises:
        SettingError: it is neither.
    """
    if text.strip() == "all":
        return "all"
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingError(f"mouth: expected {MOUTH_FORM}, got {text!r}") from None
    return check_mouth((x0, y0, x1, y1))


def check_mouth(mouth: Mouth) -> Mouth:
    """Return a region of the mouth if it lies in the frame, else raise a `SettingError`."""
    is_box = isinstance(mouth, tuple) and len(mouth) == 4 and all(isinstance(n, int | float) for n in mouth)
    if mouth == "all" or (is_box and 0 <= mouth[0] < mouth[2] <= 1 and 0 <= mouth[1] < mouth[3] <= 1):
        return mouth
    text = ",".join(f"{n:g}" for n in mouth) if is_box else repr(mouth)
    raise SettingError(f"mouth: expected {MOUTH_FORM}, with X0 < X1 and Y0 < Y1 from 0 to 1, got {text}")
