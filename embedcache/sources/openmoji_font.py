"""The pictures of OpenMoji's colour font, drawn with Pillow.

Most emoji are sequences that the font joins to one glyph. Pillow joins them only where the system has
the library FriBiDi, and draws the parts side by side elsewhere. So the font's own table of ligatures
is read here, and each glyph gets a code point of its own in a copy of the font held in memory:
the pictures are the same on every machine.
"""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedcache.registry import require

PICTURE_PX = 256
_GLYPH_SHARE = 0.78  # the size of a glyph by the side of its picture: the widest still fit
_THUMBNAIL_PX = 16
_ALIKE = 4.0  # grey levels, root mean square; thumbnails of equal pictures differ by less than 0.4
_FIRST_PRIVATE = 0xF0000
_VARIATION_SELECTOR = 0xFE0F


class EmojiFont:
    """Draws emoji. Safe from many threads: FreeType faces are not, so each thread has its own.

    Args:
        path: a TrueType font that joins sequences by ligatures.
    """

    def __init__(self, path: Path) -> None:
        font = _open(path)
        self._characters: dict[int, str] = font.getBestCmap()
        self._ligatures = _ligatures(font)
        glyphs = sorted({*self._characters.values(), *self._ligatures.values()})
        self._private = {glyph: _FIRST_PRIVATE + i for i, glyph in enumerate(glyphs)}
        self._bytes = _with_characters(font, self._private)
        self._faces = local()

    def glyph(self, emoji: str) -> str | None:
        """Name the one glyph for an emoji; None where the font has none or only its parts."""
        names = [self._characters.get(ord(character), "") for character in emoji]
        plain = [n for n, c in zip(names, emoji, strict=True) if ord(c) != _VARIATION_SELECTOR]
        if len(plain) == 1:
            return plain[0] or None
        return self._ligatures.get(tuple(names)) or self._ligatures.get(tuple(plain))

    def draw(self, glyph: str, size_px: int = PICTURE_PX) -> Image.Image:
        """Draw one glyph in the middle of a white square."""
        image = Image.new("RGB", (size_px, size_px), "white")
        ImageDraw.Draw(image).text(
            (size_px / 2, size_px / 2),
            chr(self._private[glyph]),
            fill="black",
            font=self._face(size_px),
            anchor="mm",
            embedded_color=True,
        )
        return image

    def same_pictures(self, glyphs: Sequence[str]) -> list[list[str]]:
        """Group glyphs whose pictures are equal in every pixel; groups and glyphs keep their order.

        Only glyphs whose thumbnails are alike are drawn in full, a tenth of them.
        """
        alike = _alike([self.draw(glyph, _THUMBNAIL_PX) for glyph in glyphs])
        groups: defaultdict[bytes, list[str]] = defaultdict(list)
        for glyph, has_twin in zip(glyphs, alike, strict=True):
            picture = self.draw(glyph).tobytes() if has_twin else glyph.encode()
            groups[picture].append(glyph)
        return list(groups.values())

    def _face(self, size_px: int) -> ImageFont.FreeTypeFont:
        faces: dict[int, ImageFont.FreeTypeFont] = self._faces.__dict__
        if size_px not in faces:
            faces[size_px] = ImageFont.truetype(
                io.BytesIO(self._bytes),
                round(size_px * _GLYPH_SHARE),
                layout_engine=ImageFont.Layout.BASIC,
            )
        return faces[size_px]


def _open(path: Path) -> Any:
    """Open a font with fontTools, which matplotlib brings, as it is: no table is recalculated."""
    library = require("fontTools.ttLib", extra="demo")
    return library.TTFont(path, lazy=True, recalcBBoxes=False, recalcTimestamp=False)


def _ligatures(font: Any) -> dict[tuple[str, ...], str]:
    """Read which glyphs a font joins to which."""
    joined: dict[tuple[str, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                joined |= {
                    (first, *ligature.Component): ligature.LigGlyph for ligature in ligatures
                }
    return joined


def _with_characters(font: Any, characters: dict[str, int]) -> bytes:
    """Give the bytes of the font with other characters: glyph name -> code point."""
    for table in font["cmap"].tables:
        if table.isUnicode() and table.format == 12:
            table.cmap = {character: glyph for glyph, character in characters.items()}
    out = io.BytesIO()
    font.save(out, reorderTables=None)
    return out.getvalue()


def _alike(thumbnails: list[Image.Image]) -> list[bool]:
    """Say of each thumbnail whether another is nearly the same (root mean square within `_ALIKE`)."""
    pixels_ND = np.array([np.asarray(image).ravel() for image in thumbnails], dtype=np.float32)
    squares_N = (pixels_ND**2).sum(axis=1)
    distances_NN = squares_N[:, None] + squares_N[None] - 2 * pixels_ND @ pixels_ND.T
    np.fill_diagonal(distances_NN, np.inf)
    nearest_N = distances_NN.min(axis=1) / pixels_ND.shape[1]
    return [bool(distance < _ALIKE**2) for distance in nearest_N]
