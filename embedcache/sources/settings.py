"""Settings of sources: which columns of a table to read, and which languages. Nothing heavy is imported here."""

from collections.abc import Mapping
from typing import Any

from embedcache.errors import SettingError
from embedcache.settings import Settings, setting

ITEM_COLUMNS: dict[str, Any] = {
    "default": {},
    "help": "Table column that holds the images, recordings, videos or point clouds, or their paths or URLs. May be "
    "repeated.",
    "flat_name": "item_column",
    "metavar": "MODALITY=COLUMN",
    "default_text": "a usual name such as image, file_name, audio_path or mp4, if present",
    "commas": "keep",
}
_NO_DELIMITERS = ' "\r\n'


class SourceSettings(Settings):
    """Settings of a source: how it is read."""

    item_columns: Mapping[str, str] = setting(**ITEM_COLUMNS)
    caption_columns: tuple[str, ...] = setting(
        (),
        "Table column that holds captions. May be repeated.",
        flat_name="caption_column",
        metavar="COLUMN",
        default_text="caption, text, sentence, … if present",
    )
    key_column: str | None = setting(
        None,
        "Table column that holds the keys of samples.",
        metavar="COLUMN",
        default_text="key, id, uid if present, else file and row",
    )
    omit_columns: tuple[str, ...] = setting(
        (),
        "Table column to leave out, such as a number per caption. May be repeated.",
        flat_name="omit_column",
        metavar="COLUMN",
    )
    language_column: str | None = setting(
        None,
        "Table column that holds the language of a row's captions.",
        metavar="COLUMN",
        default_text="language, lang if present",
    )
    languages: tuple[str, ...] = setting(
        (),
        "Use only captions of this language. May be repeated.",
        flat_name="language",
        metavar="CODE",
        default_text="all languages of the source",
    )
    root: str | None = setting(
        None,
        "Folder or URL that paths in a table or in COCO's JSON are relative to.",
        metavar="FOLDER",
        default_text="the table's folder; COCO: beside that of the JSON file",
    )
    delimiter: str | None = setting(
        None,
        r"Character between the cells of a text table, such as '|'; spaces after it are skipped.",
        metavar="CHARACTER",
        default_text="comma; tab in .tsv",
    )

    def model_post_init(self, _context: object) -> None:
        if "text" in self.item_columns:
            raise SettingError(f"item_column: expected no text, got {self.item_columns['text']}; give --caption-column")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in _NO_DELIMITERS):
            raise SettingError(f"delimiter: expected one character, such as '|' or $'\\t', got {self.delimiter!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the values that were given, as JSON."""
        return {name: value for name, value in super().to_json().items() if value}

    def check_supported(self, kind: str, *names: str, hint: str = "") -> None:
        """Check that only settings are given that a source of this kind uses; else raise SettingError, with a hint."""
        for name in self.to_json():
            if name not in names:
                supported = f"it supports {', '.join(names)}" if names else "it has no settings"
                raise SettingError(f"a source of type {kind} does not support the setting {name!r}; {supported}{hint}")
