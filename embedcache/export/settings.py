"""Settings of an export. Nothing heavy is imported here, so that the command line starts quickly."""

import re
from dataclasses import dataclass
from pathlib import Path

from embedcache.errors import SettingError
from embedcache.settings import check_settings, setting

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Options of an export of a trained run; `towers` is an option of the onnx format only."""

    metrics: Path | None = setting(None, "JSON report of evaluate --output, for the model card.", metavar="FILE")
    push_to_hub: str | None = setting(
        None,
        "Upload the export to this repository of the Hugging Face Hub.",
        metavar="OWNER/NAME",
        affects_result=False,
    )
    public: bool = setting(
        False, "Make a new repository on the hub public; it is private otherwise.", affects_result=False
    )
    towers: bool = setting(False, "Include the encoders in the graphs, not the projectors alone.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.push_to_hub is not None and not _REPOSITORY.fullmatch(self.push_to_hub):
            raise SettingError(
                f"push_to_hub: expected OWNER/NAME of letters, digits, - _ and ., got {self.push_to_hub!r}"
            )
