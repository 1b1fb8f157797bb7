"""What a user may say about how a source is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from embedcache.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How to read a source. What is left out is worked out from the usual names.

    Args:
        image_column: the column of a table that holds images or paths to them.
        caption_columns: the columns of a table that hold captions, in the order to keep.
        key_column: the column of a table that names its rows.
        languages: the languages to keep where a source has several; none given: all of them.
    """

    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    key_column: str | None = None
    languages: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """Give only what the user said, as JSON; `from_json` takes it back."""
        said = {name: value for name, value in asdict(self).items() if value}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in said.items()}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "SourceSettings":
        """Take back what `given` gave.

        Raises:
            SettingError: there is no setting of that name.
        """
        known = [setting.name for setting in fields(cls)]
        for name in given:
            if name not in known:
                raise SettingError(f"unknown source setting {name!r}; known: {', '.join(known)}")
        settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        return cls(**settings)

    def allow_only(self, kind: str, *names: str) -> None:
        """Refuse a setting that a source of this kind would not look at.

        Raises:
            SettingError: names the setting and those the kind takes.
        """
        for name in self.given():
            if name not in names:
                takes = f"it takes {', '.join(names)}" if names else "it takes none"
                raise SettingError(f"a {kind} source has no setting {name!r}; {takes}")
