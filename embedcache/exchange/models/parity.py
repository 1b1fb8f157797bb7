"""Is what the other library computes what we compute? Asked of every export before it takes its place."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Floats
from embedcache.errors import ArtifactError
from embedcache.exchange.models.run import Run

TOLERANCE = 1e-4
"""The largest difference in one number of a vector of length 1; sums in another order give some 1e-6."""

TEXTS = ("a red cat", "two small dogs on the green hill, and a cat.", "x", "Zwei kleine Hunde " * 200)


def pictures() -> list[Image.Image]:
    """Make pictures of noise, wide, tall and small, and one of a single colour."""
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
