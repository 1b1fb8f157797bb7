"""Parts that all export formats share: the notes for a model card, refusals, and the comparison with the run."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from embedcache.arrays import Floats
from embedcache.encoders.base import Modality
from embedcache.errors import ArtifactError, SettingError
from embedcache.inference import open_projected_encoder
from embedcache.modeling.images import rgb_image
from embedcache.projectors.base import split_names
from embedcache.provenance import DERIVED
from embedcache.runs import Run, RunInput
from embedcache.settings import replace_fields

MODALITIES: tuple[Modality, Modality] = ("image", "text")
"""Modalities of the formats that include encoders."""

TOLERANCE = 1e-4
"""Allowed difference in one component of a unit vector. Sums of float32 in another order differ by some 1e-6."""

TEXTS = ("a red cat", "two small dogs on the green hill, and a cat.", "x", "Zwei kleine Hunde " * 200)


@dataclass(frozen=True, kw_only=True)
class ExportNotes:
    """Facts about an export from its format, for the model card.

    Args:
        library: the card's `library_name`.
        task: the card's `pipeline_tag`, or None if no tag fits.
        requirements: packages that `pip install` needs to load it.
        differences: modality -> largest difference from the run in one component of a unit vector.
        encoders: modalities whose encoder is included.
        address: path or repository from which open_clip reads the text tower's config.
    """

    library: str
    task: str | None
    requirements: Sequence[str]
    differences: Mapping[str, float]
    encoders: Sequence[str] = MODALITIES
    address: str = ""


def projector_of(run: Run, modality: str) -> str:
    """Return the name of a modality's projector, with its parameters."""
    return dict(zip(run.modalities, split_names(run.projector), strict=True))[modality]


def check_modalities(run: Run, modalities: Sequence[Modality], format_name: str) -> None:
    """Check that a run has the modalities of a format, or raise a `SettingError`."""
    if not set(modalities) <= set(run.modalities):
        reason = f"expected a run of {' and '.join(modalities)}, got one of {' and '.join(run.modalities)}"
        raise unsupported(format_name, reason)


def check_plain(tower_input: RunInput, format_name: str) -> None:
    """Check that a feature is an encoder's plain output: not derived, and not of a view."""
    name = tower_input.feature
    fingerprint = tower_input.fingerprint

    if fingerprint["family"] == DERIVED:
        raise unsupported(format_name, f"the feature {name} is derived from other features, so no encoder computes it")

    view = fingerprint.get("view")
    if view is not None:
        raise unsupported(format_name, f"the feature {name} is built from the view {view['name']!r}, not the encoder")


def unsupported(format_name: str, reason: str, next_step: str = "") -> SettingError:
    """Return the error for a run that a format cannot represent.

    `next_step` may name another format only if that one supports the run, as far as it was checked.
    """
    next_step = next_step or "use embedcache export onnx for the projectors alone"
    return SettingError(f"the {format_name} format does not support this run: {reason}; {next_step}")


def compare_examples(run: Run, library: str, vectors: Mapping[Modality, Any]) -> dict[str, float]:
    """Compare the example vectors of a library with the run's, and return the largest difference per modality."""
    differences: dict[str, float] = {}
    for modality, actual in vectors.items():
        differences[modality] = check_parity(library, actual, embed_examples(run, modality))
    return differences


def embed_examples(run: Run, modality: Modality) -> Floats:
    """Embed the example images or texts with the run's encoder: (N, P) float32 unit vectors."""
    # Exported models compute in float32, whatever the precision of the stored features.
    inputs = dict(run.info.inputs)
    side = inputs[modality]
    inputs[modality] = replace_fields(side, fingerprint={**side.fingerprint, "precision": "float32"})
    encoder = open_projected_encoder(modality, replace(run, info=replace_fields(run.info, inputs=inputs)))

    items: Sequence[Any] = list(map(rgb_image, example_images())) if modality == "image" else TEXTS
    return encoder.embed(encoder.prepare(items))


def check_parity(library: str, actual: Any, expected: Floats) -> float:
    """Return the largest difference of a component of unit vectors. Raise `ArtifactError` if it is too large or NaN."""
    difference = float(np.abs(np.asarray(actual, np.float32) - expected).max(initial=0))
    # NaN is not above the tolerance either, so the comparison is negated.
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"{library}: expected vectors that differ from the run's by at most {TOLERANCE:.0e}, got {difference:.1e}; "
            "nothing was written: use another format"
        )
    return difference


def example_images() -> list[Image.Image]:
    """Create images of noise, landscape, portrait and small, a single-colored one, and three to be converted first.

    These are partly transparent, of 16-bit gray, and a JPEG whose EXIF block says that it lies on its side.
    """
    random = np.random.default_rng(0)
    sizes = ((320, 200), (200, 320), (37, 41))
    noise = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]

    # Libraries convert these to RGB in different ways.
    transparent = Image.fromarray(random.integers(0, 256, (80, 60, 4), dtype=np.uint8))
    gray = Image.fromarray(random.integers(0, 2**16, (60, 80), dtype=np.uint16))
    return [*noise, Image.new("RGB", (120, 90), (200, 30, 60)), transparent, gray, _lying_jpeg(random)]


def _lying_jpeg(random: np.random.Generator) -> Image.Image:
    blocks = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((140, 100))

    # Orientation 6: viewers turn the image by 90 degrees clockwise.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    blocks.save(file, "JPEG", exif=exif)
    return Image.open(file)
