"""The run that is exported, and what a tower of it must be for any format to hold it.

What a format says of an export that it wrote.

Is what the other library computes what we compute? Asked of every export before it takes its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Floats
from embedcache.encoders.base import Modality
from embedcache.errors import ArtifactError, SettingError
from embedcache.inference import ProjectedEncoder, open_projected_encoder
from embedcache.projectors.base import PROJECTORS, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, TowerInput, load_pair

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
    def image(self) -> ProjectedEncoder:
        """The image side, from pictures to the shared space."""
        return open_projected_encoder("image", self.config.image, self.pair.image, "cpu")

    @cached_property
    def text(self) -> ProjectedEncoder:
        """The text side, from texts to the shared space."""
        return open_projected_encoder("text", self.config.text, self.pair.text, "cpu")

    def projector(self, modality: Modality) -> str:
        """Name one side's projector."""
        return dict(zip(MODALITIES, split_names(self.config.projector), strict=True))[modality]

    def projector_class(self, modality: Modality) -> type:
        """Get the class of one side's projector."""
        kind: type = PROJECTORS.load(self.projector(modality))
        return kind


def check_plain(side: TowerInput, form: str) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Written:
    """For the model card.

    Args:
        library: the card's `library_name`.
        task: the card's `pipeline_tag`; None: none fits.
        code: Python that loads the export from the folder above it; `{folder}` stands for its name.
        needs: the packages that the code needs.
        differences: what was compared -> the largest difference from the run.
        notes: what a user must know.
        sides: which encoders are inside.
    """

    library: str
    task: str | None
    code: str
    needs: Sequence[str]
    differences: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sides: Sequence[str] = ("image", "text")


TOLERANCE = 1e-4
"""The largest difference in one number of a vector of length 1; sums in another order give some 1e-6."""

TEXTS = ("a red cat", "two small dogs on the green hill, and a cat.", "x", "Zwei kleine Hunde " * 200)


def pictures() -> list[Image.Image]:
    """Make pictures of noise, wide, tall and small, and one of a single color."""
    random = np.random.default_rng(0)
    sizes = ((320, 200), (200, 320), (37, 41))
    noise = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return [*noise, Image.new("RGB", (120, 90), (200, 30, 60))]


def expected(run: Run, modality: str) -> Floats:
    """Embed the example pictures or texts with the run: (N, P) float32, rows of length 1."""
    side = run.image if modality == "image" else run.text
    items: Sequence[Any] = pictures() if modality == "image" else TEXTS
    return side.embed(side.prepare(items))


def check_parity(what: str, found: Any, wanted: Floats) -> float:
    """Compare vectors of length 1, and give the largest difference.

    Raises:
        ArtifactError: it is above the tolerance, or no number.
    """
    difference = float(np.abs(np.asarray(found, np.float32) - wanted).max(initial=0))
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"{what} gives vectors that differ by {difference:.1e} from the run's, and {TOLERANCE:.0e} is allowed; "
            "nothing was written"
        )
    return difference
