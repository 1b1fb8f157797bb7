"""Settings of an export. Nothing heavy is imported here, so that the command line starts quickly."""

import re
from pathlib import Path
from typing import Any

from embedcache.errors import SettingError
from embedcache.settings import Settings, setting

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PUBLIC: dict[str, Any] = {
    "default": False,
    "help": "Make a new repository on the Hub public; it is private otherwise.",
    "affects_result": False,
}


class ExportSettings(Settings):
    """Settings of `export_run`. Only the onnx format has the setting `towers`.

    Example:
        >>> settings = ExportSettings(push_to_hub="my-name/photos-captions")
        >>> settings.push_to_hub, settings.public  # a new repository is private
        ('my-name/photos-captions', False)
    """

    metrics: Path | None = setting(None, "JSON report of evaluate --output, for the model card.", metavar="FILE")
    push_to_hub: str | None = setting(
        None,
        "Upload the export to this repository of the Hugging Face Hub.",
        metavar="OWNER/NAME",
        affects_result=False,
    )
    public: bool = setting(**_PUBLIC)
    towers: bool = setting(False, "Include the encoders in the graphs, not the projectors alone.")

    def model_post_init(self, _context: object) -> None:
        if self.push_to_hub is not None:
            check_repository("push_to_hub", self.push_to_hub)


class HubSettings(Settings):
    """Options of the upload of a cache to a dataset of the Hugging Face Hub."""

    public: bool = setting(**_PUBLIC)
    license: str = setting("unknown", "License of the data, as the Hub names it, for a new card.")

    def model_post_init(self, _context: object) -> None:
        if not _LICENSE.fullmatch(self.license):
            raise SettingError(f"license: expected a name such as cc-by-4.0 or unknown, got {self.license!r}")


def check_repository(name: str, repository: str) -> None:
    """Check the name of a repository on the Hub, or raise a `SettingError` that begins with `name`."""
    if not _REPOSITORY.fullmatch(repository):
        raise SettingError(f"{name}: expected OWNER/NAME of letters, digits, - _ and ., got {repository!r}")
