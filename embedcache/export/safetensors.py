"""The plain form: one file of tensors, and a config that says in words what to do with them."""

import inspect
from pathlib import Path
from typing import Any

from embedcache.encoders.base import Modality
from embedcache.export.base import MODALITIES, Run, Written
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


def write_safetensors(run: Run, folder: Path) -> Written:
    """Write `model.safetensors` and `config.json`. Any run fits; the encoders are not inside."""
    save_weights(folder / "model.safetensors", run.pair)
    state = run.pair.state_dict()
    temperature = float(run.pair.temperature.detach())
    config: dict[str, Any] = {
        "shared_width": run.config.shared_width,
        "temperature": temperature,
        "image": _side(run, "image"),
        "text": _side(run, "text"),
        "tensors": {name: {"shape": list(value.shape), "dtype": str(value.dtype)[6:]} for name, value in state.items()},
        "recipe": [
            *(line for modality in MODALITIES for line in _recipe(run, modality)),
            f"similarity: the dot product of both, over the temperature {temperature:.6g}",
        ],
    }
    write_json(folder / "config.json", config)
    return Written(
        library="safetensors",
        task=None,
        code=_CODE,
        needs=("safetensors", "torch"),
        notes=("The encoders are not inside: `config.json` names them, and says what their features go through.",),
        sides=(),
    )


def _side(run: Run, modality: Modality) -> dict[str, Any]:
    side = run.config.tower_input(modality)
    return {
        "encoder": dict(side.fingerprint),
        "feature": side.feature,
        "width": side.width,
        "projector": run.projector(modality),
    }


def _recipe(run: Run, modality: Modality) -> list[str]:
    """Say in words what a feature goes through."""
    side, tower = run.config.tower_input(modality), run.pair.tower(modality)
    kind = run.projector_class(modality)
    meaning = " ".join((inspect.getdoc(kind) or kind.__name__).split("Args:")[0].split())
    return [
        f"{modality}: take the feature {side.feature} of the encoder, in float32",
        *(f"{modality}: {step}" for step in _first_steps(modality, tower)),
        f"{modality}: apply {kind.__name__} with the tensors {modality}.projector.*, dropout off: {meaning}",
        f"{modality}: scale to length 1",
    ]


def _first_steps(modality: Modality, tower: object) -> list[str]:
    if isinstance(tower, TokenTower):
        return ["take all tokens as they are, without padding"]
    if isinstance(tower, RawTower):
        return [f"divide by {modality}.length"]
    return ["scale to length 1", f"take {modality}.mean off"]
