"""Export the projectors as plain tensors, with a config that describes how to apply them."""

import inspect
from pathlib import Path
from typing import Any

from embedcache.encoders.base import Modality
from embedcache.export.base import MODALITIES, ExportNotes, ExportRun
from embedcache.projectors.saved import save_weights
from embedcache.projectors.towers import RawTower, TokenTower
from embedcache.provenance import write_json

_CODE = """\
import json
from pathlib import Path

from safetensors.torch import load_file

folder = Path("{folder}")
tensors = load_file(folder / "model.safetensors")
config = json.loads((folder / "config.json").read_text())
for line in config["recipe"]:
    print(line)
for name, tensor in tensors.items():
    print(name, tuple(tensor.shape))
"""


def write_safetensors(run: ExportRun, folder: Path) -> ExportNotes:
    """Write `model.safetensors` and `config.json`; any run is supported, and the encoders are not included."""
    save_weights(folder / "model.safetensors", run.pair)
    state = run.pair.state_dict()
    temperature = float(run.pair.temperature.detach())
    config: dict[str, Any] = {
        "shared_width": run.config.shared_width,
        "temperature": temperature,
        "image": _describe(run, "image"),
        "text": _describe(run, "text"),
        "tensors": {name: {"shape": list(value.shape), "dtype": str(value.dtype)[6:]} for name, value in state.items()},
        "recipe": [
            *(line for modality in MODALITIES for line in _recipe(run, modality)),
            f"similarity: the dot product of both, divided by the temperature {temperature:.6g}",
        ],
    }
    write_json(folder / "config.json", config)
    return ExportNotes(
        library="safetensors",
        task=None,
        code=_CODE,
        requirements=("safetensors", "torch"),
        notes=("The encoders are not included: `config.json` names them and describes how to project.",),
        encoders=(),
    )


def _describe(run: ExportRun, modality: Modality) -> dict[str, Any]:
    tower_input = run.config.tower_input(modality)
    return {
        "encoder": dict(tower_input.fingerprint),
        "feature": tower_input.feature,
        "width": tower_input.width,
        "projector": run.projector(modality),
    }


def _recipe(run: ExportRun, modality: Modality) -> list[str]:
    """Return the steps from a feature to the shared space in words."""
    projector, tower = run.projector_class(modality), run.pair.tower(modality)
    if isinstance(tower, TokenTower):
        steps = ["take all tokens as they are, without padding"]
    elif isinstance(tower, RawTower):
        steps = [f"divide by {modality}.length"]
    else:
        steps = ["scale to length 1", f"subtract {modality}.mean"]
    meaning = " ".join((inspect.getdoc(projector) or projector.__name__).split("Args:")[0].split())
    return [
        f"{modality}: take the feature {run.config.tower_input(modality).feature} of the encoder, in float32",
        *(f"{modality}: {step}" for step in steps),
        f"{modality}: apply {projector.__name__} with the tensors {modality}.projector.*, dropout off: {meaning}",
        f"{modality}: scale to length 1",
    ]
