"""Record the values of the net: `python -m tests.net.record` writes `values.json` and `features.npz`.

Record only when a change of values is meant, and say in the commit which values changed and why.
"""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np

from embedcache.quickstart.quickstart import quickstart
from embedcache.registry import trust_code
from tests.net import commands
from tests.net.modalities import make_modalities

FOLDER = Path(__file__).parent
VALUES, FEATURES = FOLDER / "values.json", FOLDER / "features.npz"
NUM_REAL_ITEMS = 8
"""Items of the quickstart's cache whose features are recorded."""


def record(folder: Path) -> None:
    """Compute all values in an empty folder."""
    trust_code("tests")
    toy, real = folder / "toy", folder / "quickstart"
    toy.mkdir()
    with contextlib.chdir(toy):
        commands.make_toy()
        values = dict(commands.toy_figures())
        for recipe in commands.RECIPES:
            values.update(commands.train_figures(recipe))
        for projector in commands.PROJECTORS:
            values.update(commands.projector_figures(projector))

    quickstart("openmoji:en", real)
    with contextlib.chdir(real):
        quickstart_values = dict(commands.quickstart_figures())

    arrays = {f"toy {name}": array for name, array in commands.features_of(toy / "cache").items()}
    modality_arrays = commands.features_of(make_modalities(folder))
    arrays.update({f"modalities {name}": array for name, array in modality_arrays.items()})
    real_arrays = commands.features_of(real / "cache", NUM_REAL_ITEMS)
    arrays.update({f"quickstart {name}": array for name, array in real_arrays.items()})
    np.savez_compressed(FEATURES, **arrays)  # type: ignore[arg-type]
    VALUES.write_text(json.dumps({"toy": values, "quickstart": quickstart_values}, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        record(Path(temporary))
