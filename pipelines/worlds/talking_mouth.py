"""Draw a talking mouth: phones with times -> targets of the lips -> gray frames of 48 × 32 pixels.

    phones = [Phone("B", 0.10, 0.18), Phone("IY", 0.18, 0.40)]
    face = draw_face(np.random.default_rng(7))
    frames_THW = draw_clip(phones, num_frames=15, face=face, rng=np.random.default_rng(8))

Phones are those of CMU's dictionary (`PHONES`) for all voices. `espeak_phones` translates the names of espeak-ng, and
`cmu_phone` the names of flite and pocketsphinx. A phone sets one or two of sixteen mouth shapes (visemes). The lips
move linearly between them and are smoothed, which is the only coarticulation. Sounds that lips do not show share a
shape: P, B and M; F and V; S and Z.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.errors import DataError

WIDTH = 48
HEIGHT = 32
VIDEO_RATE_HZ = 25

PARAMETERS = ("width", "height", "rounding", "teeth", "tongue", "press")
"""Columns of a viseme target: width of the lips (1: at rest), height of the opening, rounding, the visible part of the
teeth and of the tongue, and the pressure of the lips. All but the width are from 0 to 1."""
VISEMES: Mapping[str, tuple[float, float, float, float, float, float]] = {
    "silence": (1.00, 0.00, 0.0, 0.0, 0.0, 0.0),
    "P": (0.98, 0.00, 0.1, 0.0, 0.0, 0.6),
    "F": (1.00, 0.12, 0.0, 1.0, 0.0, 0.9),
    "TH": (1.00, 0.26, 0.0, 0.5, 1.0, 0.0),
    "T": (1.02, 0.24, 0.0, 0.7, 0.5, 0.0),
    "S": (1.10, 0.14, 0.0, 1.0, 0.0, 0.0),
    "SH": (0.80, 0.26, 0.6, 0.9, 0.0, 0.0),
    "K": (1.00, 0.34, 0.0, 0.3, 0.2, 0.0),
    "R": (0.84, 0.26, 0.4, 0.3, 0.2, 0.0),
    "W": (0.58, 0.10, 1.0, 0.0, 0.0, 0.0),
    "U": (0.66, 0.24, 0.9, 0.0, 0.1, 0.0),
    "I": (1.16, 0.30, 0.0, 0.7, 0.2, 0.0),
    "E": (1.08, 0.52, 0.0, 0.5, 0.3, 0.0),
    "A": (1.00, 1.00, 0.0, 0.4, 0.4, 0.0),
    "O": (0.78, 0.68, 0.6, 0.1, 0.2, 0.0),
    "schwa": (0.97, 0.40, 0.0, 0.3, 0.3, 0.0),
}
PHONES: Mapping[str, tuple[str, ...]] = {
    "SIL": ("silence",),
    **dict.fromkeys(("P", "B", "M"), ("P",)),
    **dict.fromkeys(("F", "V"), ("F",)),
    **dict.fromkeys(("TH", "DH"), ("TH",)),
    **dict.fromkeys(("T", "D", "N", "L"), ("T",)),
    **dict.fromkeys(("S", "Z"), ("S",)),
    **dict.fromkeys(("SH", "ZH", "CH", "JH"), ("SH",)),
    **dict.fromkeys(("K", "G", "NG", "HH"), ("K",)),
    **dict.fromkeys(("R", "ER"), ("R",)),
    "W": ("W",),
    **dict.fromkeys(("UW", "UH"), ("U",)),
    **dict.fromkeys(("IY", "IH", "Y"), ("I",)),
    "EH": ("E",),
    **dict.fromkeys(("AA", "AE"), ("A",)),
    "AO": ("O",),
    **dict.fromkeys(("AX", "AH"), ("schwa",)),
    "EY": ("E", "I"),
    "AY": ("A", "I"),
    "AW": ("A", "U"),
    "OW": ("O", "U"),
    "OY": ("O", "I"),
}
"""Phone of CMU's dictionary -> its mouth shapes; diphthongs have two."""
_ESPEAK_NAMES = """
_=SIL _:=SIL __=SIL ?=SIL ;=Y h=HH j=Y t#=T t2=T *=T r-=R r/=R n-=AX+N m-=AX+M dZ=JH tS=CH D=DH T=TH S=SH
Z=ZH N=NG a=AE a#=AX @=AX @2=AX @5=AX @-=AX V=AH A:=AA A=AA 0=AA A#=AA A@=AA+R @L=AX+L E=EH e=EH E#=EH
e@=EH+R 3=ER 3:=ER I#=IH I=IH I2=IH i=IY i:=IY i@=IH+AX i@3=IH+R O=AO O:=AO O2=AO o@=AO+R O@=AO+R o:=AO u=UW
u:=UW U=UH U@=UH+R eI=EY aI=AY aU=AW oU=OW OI=OY aI@=AY+AX aI3=AY+ER aU@=AW+AX l/=L
"""
_ESPEAK: Mapping[str, tuple[str, ...]] = {
    **{name: (name.upper(),) for name in "bdfgklmnprstvwz"},
    **{name: tuple(phones.split("+")) for name, phones in (entry.split("=") for entry in _ESPEAK_NAMES.split())},
}
_SILENCES = frozenset({"pau", "SIL", "+SPN+", "+NSN+", "<sil>"})
_STRESS = "',%=|!"

_GRID_HZ = 200
_SPREAD_S = 0.06
"""Width of the smoothing of the lips' movement."""
_PLATEAU = (0.3, 0.7)
"""Start and end of the mouth shape within a phone. A diphthong reaches its first and its second shape there."""


class Phone(NamedTuple):
    """A phone of CMU's dictionary, or SIL, and its interval in seconds."""

    name: str
    start_s: float
    stop_s: float


@dataclass(frozen=True, kw_only=True)
class Face:
    """The look and articulation of one person. Lengths are pixels of a frame of 48 × 32, tones 0 (black) to 255.

    Args:
        center: place of the mouth, x and y.
        size: half of the width of the lips at rest.
        tilt: rotation in radians.
        skin, lip, teeth, opening: tones.
        light: change of the skin's tone from the middle of the frame to its right edge and to its lower edge.
        lips: thickness of the upper and the lower lip.
        articulation: factor of all openings.
        offsets_P6: offsets of this person to each viseme, rows as `VISEMES` and columns as `PARAMETERS`.
        softness: width of edges; above 1 the image is out of focus.
        noise: standard deviation of the pixels.
        motion: amplitude of the head's slow movement.
    """

    center: tuple[float, float] = (24.0, 15.0)
    size: float = 13.0
    tilt: float = 0.0
    skin: float = 170.0
    lip: float = 115.0
    teeth: float = 225.0
    opening: float = 30.0
    light: tuple[float, float] = (0.0, 0.0)
    lips: tuple[float, float] = (2.6, 3.2)
    articulation: float = 1.0
    offsets_P6: Floats = field(default_factory=lambda: np.zeros((len(VISEMES), len(PARAMETERS)), np.float32))
    softness: float = 1.0
    noise: float = 0.0
    motion: float = 0.0


def espeak_phones(name: str) -> tuple[str, ...]:
    """Return the phones of CMU's dictionary for a phone of espeak-ng, such as `'i@`, or raise a `DataError`."""
    phones = _ESPEAK.get(name.strip(_STRESS))
    if phones is None:
        raise DataError(f"expected a phone of espeak-ng's American voice, got {name!r}; add it to the table")
    return phones


def cmu_phone(name: str) -> str:
    """Return a phone of CMU's dictionary for its spelling by flite or pocketsphinx, such as `pau` or `iy1`."""
    phone = "SIL" if name in _SILENCES else name.rstrip("012").upper()
    if phone not in PHONES:
        raise DataError(f"expected a phone of CMU's dictionary, got {name!r}; add it to the table")
    return phone


def draw_face(rng: np.random.Generator) -> Face:
    """Return a random face."""
    skin = rng.uniform(95, 215)
    scale = np.array([0.03, 0.05, 0.08, 0.1, 0.1, 0.08])
    offsets_P6 = rng.standard_normal((len(VISEMES), len(PARAMETERS))) * scale

    offsets_P6[:2, 1] = 0  # everyone closes the lips
    lip = skin - rng.uniform(22, 65)
    return Face(
        center=(24 + rng.uniform(-1.5, 1.5), 15 + rng.uniform(-1.2, 1.2)),
        size=rng.uniform(12.5, 15.5),
        tilt=rng.normal(0, 0.06),
        skin=skin,
        lip=lip,
        teeth=rng.uniform(190, 245),
        opening=min(rng.uniform(15, 50), lip - 20),
        light=(rng.normal(0, 14), rng.normal(0, 10)),
        lips=(rng.uniform(1.8, 3.2), rng.uniform(2.4, 4.0)),
        articulation=rng.uniform(0.75, 1.1),
        offsets_P6=offsets_P6.astype(np.float32),
        softness=rng.uniform(0.8, 1.4),
        noise=rng.uniform(1, 4),
        motion=rng.uniform(0.1, 0.5),
    )


def draw_clip(
    phones: Sequence[Phone],
    *,
    num_frames: int,
    face: Face,
    rng: np.random.Generator,
    width: int = WIDTH,
) -> Array:
    """Draw a face that says `phones`: (T, H, W) uint8 at 25 frames per second, H = 2/3 W.

    The same arguments and generator state give the same frames. Frames of another width show the same face.
    """
    targets_T6 = mouth_track(phones, num_frames=num_frames, face=face)
    return draw_mouths(targets_T6, face=face, rng=rng, width=width)


def mouth_track(phones: Sequence[Phone], *, num_frames: int, face: Face | None = None) -> Floats:
    """Return the shape of the mouth in each frame: (T, 6), columns as `PARAMETERS`.

    A frame shows the middle of its interval of 40 ms. Before the first phone and after the last, the mouth is at rest.
    """
    rows = {name: row for row, name in enumerate(VISEMES)}
    table_P6 = np.array(list(VISEMES.values())) + (0 if face is None else face.offsets_P6)
    table_P6[:, 1] *= 1 if face is None else face.articulation

    times: list[float] = []
    shapes: list[int] = []
    for phone in phones:
        visemes = PHONES[phone.name]
        for place, viseme in zip(_PLATEAU, (visemes[0], visemes[-1]), strict=True):
            times.append(phone.start_s + place * (phone.stop_s - phone.start_s))
            shapes.append(rows[viseme])

    first_s = phones[0].start_s if phones else 0.0
    last_s = phones[-1].stop_s if phones else 0.0
    times = [first_s - _SPREAD_S, *times, last_s + _SPREAD_S]
    shapes = [rows["silence"], *shapes, rows["silence"]]

    # Smooth on a fine grid, as a frame of 40 ms is as long as some phones.
    grid_s = np.arange(-_GRID_HZ // 10, _GRID_HZ * (num_frames + 3) // VIDEO_RATE_HZ) / _GRID_HZ
    window = np.hanning(round(_SPREAD_S * 2 * _GRID_HZ) + 1)

    track_T6 = np.empty((num_frames, len(PARAMETERS)), np.float32)
    middles_s = (np.arange(num_frames) + 0.5) / VIDEO_RATE_HZ
    for column in range(len(PARAMETERS)):
        values = np.interp(grid_s, times, table_P6[shapes, column])
        smooth = np.convolve(np.pad(values, len(window) // 2, mode="edge"), window / window.sum(), mode="valid")
        track_T6[:, column] = np.interp(middles_s, grid_s, smooth)

    track_T6[:, 1:] = np.clip(track_T6[:, 1:], 0, 1.2)
    return track_T6


def draw_mouths(targets_T6: Floats, *, face: Face, rng: np.random.Generator, width: int = WIDTH) -> Array:
    """Draw one frame per row of `targets_T6`: (T, H, W) uint8."""
    pixels = width / WIDTH
    height = round(HEIGHT * pixels)
    # Two draws: the head sways independently in both directions, and one draw would change every face.
    across_T11 = _head(len(targets_T6), face, rng)[:, 0, None, None]
    down_T11 = _head(len(targets_T6), face, rng)[:, 1, None, None]
    x_TW = (np.arange(width, dtype=np.float32)[None] + 0.5) / pixels - across_T11[:, 0]
    y_TH = (np.arange(height, dtype=np.float32)[None] + 0.5) / pixels - down_T11[:, 0]

    light_HW = face.light[0] * (np.linspace(-1, 1, width)) + face.light[1] * np.linspace(-1, 1, height)[:, None]
    cos = np.float32(np.cos(face.tilt))
    sin = np.float32(np.sin(face.tilt))
    x_THW = cos * x_TW[:, None, :] + sin * y_TH[:, :, None]
    y_THW = cos * y_TH[:, :, None] - sin * x_TW[:, None, :]

    soft = np.float32(face.softness)
    wide, open_, rounding, teeth, tongue, press = (targets_T6[:, column, None, None] for column in range(6))

    half = face.size * wide
    gap = open_ * 0.62 * face.size
    upper = face.lips[0] * (1 - 0.75 * press) * (1 + 0.25 * rounding)
    lower = face.lips[1] * (1 - 0.75 * press) * (1 + 0.25 * rounding)
    y_THW -= 0.25 * gap - 0.5 * open_  # the jaw falls, the upper lip stays

    is_above = y_THW < 0
    lips = _inside(x_THW, y_THW, half, np.where(is_above, gap / 2 + upper, gap / 2 + lower), soft)
    mouth_half = half * (0.86 - 0.16 * rounding)
    hole = lips * _inside(x_THW, y_THW, mouth_half, np.maximum(gap / 2, 0.22), soft)

    upper_edge = -gap / 2
    teeth_seen = np.clip((upper_edge + teeth * np.minimum(0.3 * face.size, 0.75 * gap) - y_THW) / soft + 0.5, 0, 1)
    teeth_seen *= np.clip(gap, 0, 1)
    tongue_seen = _inside(x_THW, y_THW - gap / 2, 0.6 * mouth_half, np.maximum(tongue * 0.8 * gap, 0.05), soft)
    tongue_seen *= np.clip(2 * tongue, 0, 1)
    chin = _inside(x_THW, y_THW - gap / 2 - lower - 1.5, 0.6 * half, np.float32(1.6), 2 * soft)

    # Layers from back to front: skin, lips, and the open mouth with teeth and tongue.
    frames: Any = np.float32(face.skin) + light_HW.astype(np.float32)[None] - 10 * chin
    frames += lips * (face.lip - face.skin)
    inner = face.opening + teeth_seen * (face.teeth - face.opening)
    inner += tongue_seen * (0.55 * face.lip + 0.45 * face.opening + 20 - inner)
    frames += hole * (inner - frames)
    frames += rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(face.noise)
    frames_THW: Array = np.clip(np.round(frames), 0, 255).astype(np.uint8)
    return frames_THW


def _head(num_frames: int, face: Face, rng: np.random.Generator) -> Floats:
    """Return the middle of the mouth in each frame, (T, 2), x and y. Heads sway slowly."""
    times_s = np.arange(num_frames) / VIDEO_RATE_HZ
    place_T2 = np.tile(np.array(face.center), (num_frames, 1))
    for hertz, phase in zip(rng.uniform(0.2, 1.2, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2)), strict=True):
        place_T2 += face.motion * np.sin(2 * np.pi * hertz * times_s[:, None] + phase)
    return place_T2.astype(np.float32)


def _inside(x_THW: Any, y_THW: Any, half_width: Any, half_height: Any, soft: Any) -> Any:
    """Return the fraction of each pixel that an ellipse covers, with edges `soft` pixels wide."""
    radius = np.sqrt((x_THW / half_width) ** 2 + (y_THW / half_height) ** 2)
    return np.clip((1 - radius) * np.minimum(half_width, half_height) / soft + 0.5, 0, 1)
