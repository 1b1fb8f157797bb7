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

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedcache.sources.font_tables import FIRST_PRIVATE, characters, ligatures, numbered

PICTURE_PX = 256
_FONT_SHARE = 0.74  # font size by picture size: all pictures but one fit whole
_THUMBNAIL_PX = 16
_ALIKE = 4.0  # grey levels, root mean square; thumbnails of equal pictures differ by less than 0.4
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
