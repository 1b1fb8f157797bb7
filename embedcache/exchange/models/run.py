"""The run that is exported, and what a tower of it must be for any format to hold it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from embedcache.encoders.contract import Modality
from embedcache.errors import SettingError
from embedcache.model import OpenSide, open_side
from embedcache.projectors.contract import PROJECTORS, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, Side, load_pair

MODALITIES: tuple[Modality, Modality] = ("image", "text")


@dataclass(frozen=True)
class Run:
    """A trained pair with its config; its encoders are opened when first asked for.

    Args:
        path: the run's folder.
        pair: the projectors, on the CPU.
        config: of the run.
    """

    path: Path
    pair: AlignedPair
    config: PairConfig

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Load a run.

        Raises:
            PathError: the folder is no finished run.
            CorruptError: its weights are not those that its config was written for.
        """
        return cls(path, *load_pair(path))

    @cached_property
    def image(self) -> OpenSide:
        """The image side, from pictures to the shared space."""
        return open_side("image", self.config.image, self.pair.image, "cpu")

    @cached_property
    def text(self) -> OpenSide:
        """The text side, from texts to the shared space."""
        return open_side("text", self.config.text, self.pair.text, "cpu")

    def projector(self, modality: Modality) -> str:
        """Name one side's projector."""
        return dict(zip(MODALITIES, split_names(self.config.projector), strict=True))[modality]

    def projector_class(self, modality: Modality) -> type:
        """Get the class of one side's projector."""
        kind: type = PROJECTORS.load(self.projector(modality))
        return kind


def check_plain(side: Side, form: str) -> None:
    """Refuse a feature that no model gives by itself: of a view, or rounded on its way.

    Raises:
        SettingError: says which.
    """
    if side.fingerprint.get("view") is not None:
        raise refusal(form, f"the feature {side.feature} is of the view {side.fingerprint['view']['name']!r}, which is "
                            "no part of an encoder")  # fmt: skip
    if side.fingerprint["precision"] != "float32":
        raise refusal(form, f"the feature {side.feature} was made in {side.fingerprint['precision']}, and others would "
                            "compute it in float32")  # fmt: skip


def refusal(form: str, reason: str, next_step: str = "") -> SettingError:
    """Make the error for what a format cannot hold."""
    next_step = next_step or "embedcache export safetensors holds the projectors of any run"
    return SettingError(f"{form} can't hold this run: {reason}; {next_step}")
