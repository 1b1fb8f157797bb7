"""Export the projectors as plain tensors, with a config that describes how to apply them."""

import inspect
from pathlib import Path
from typing import Any

from embedcache.export.base import ExportNotes, ExportRun
from embedcache.projectors.heads import IdentityProjector, LinearProjector, MlpProjector, RawTower, TokenTower, Tower
from embedcache.projectors.saved import save_weights
from embedcache.provenance import write_json

_HEAD = """\
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, normalize

folder = Path("{folder}")
tensors = load_file(folder / "model.safetensors")
config = json.loads((folder / "config.json").read_text())
for line in config["recipe"]:
    print(line)
"""
_PROJECT = """

def project_{modality}(vectors):  # (N, {width}) of {feature} -> (N, {shared_width}), rows of length 1
    x = normalize(vectors.float(), dim=-1) - tensors["{modality}.mean"]
{steps}
    return normalize(x, dim=-1)


print(project_{modality}(torch.rand(2, {width})).shape)  # with vectors of that feature in place of random ones
"""
_NO_CODE = """\
print([name for name in tensors if name.startswith("{modality}.")])  # how to use them is in the lines above
"""
_STEPS: dict[type, tuple[str, ...]] = {
    IdentityProjector: (),
    LinearProjector: ("x = x @ part['linear.weight'].T",),
    MlpProjector: (
        "hidden = layer_norm(x, x.shape[-1:], part['hidden.0.weight'], part['hidden.0.bias'])",
        "hidden = gelu(hidden @ part['hidden.1.weight'].T + part['hidden.1.bias'])",
        "x = x @ part['linear.weight'].T + hidden @ part['output.weight'].T",
    ),
}
"""Projector -> the lines that apply it, where these are few."""


def write_safetensors(run: ExportRun, folder: Path) -> ExportNotes:
    """Write `model.safetensors` and `config.json`; any run is supported, and the encoders are not included."""
    save_weights(folder / "model.safetensors", run.pair)
    state = run.pair.state_dict()
    temperature = float(run.pair.temperature.detach())
    config: dict[str, Any] = {
        "shared_width": run.config.shared_width,
        "temperature": temperature,
        **{modality: _describe(run, modality) for modality in run.config.modalities},
        "tensors": {name: {"shape": list(value.shape), "dtype": str(value.dtype)[6:]} for name, value in state.items()},
        "recipe": [
            *(line for modality in run.config.modalities for line in _recipe(run, modality)),
            f"similarity: the dot product of both, divided by the temperature {temperature:.6g}",
        ],
    }
    write_json(folder / "config.json", config)
    return ExportNotes(
        library="safetensors",
        task=None,
        code=_HEAD + "".join(_code(run, modality) for modality in run.config.modalities),
        requirements=("safetensors", "torch"),
        notes=("The encoders are not included: `config.json` names them and describes how to project.",),
        encoders=(),
    )


def _code(run: ExportRun, modality: str) -> str:
    """Return Python code that projects vectors of a modality with the tensors, where that takes a few lines."""
    tower, config = run.pair.tower(modality), run.config
    steps = _STEPS.get(type(tower.projector))
    if steps is None or not isinstance(tower, Tower):
        return _NO_CODE.format(modality=modality)
    lines = [step.replace("part['", f"tensors['{modality}.projector.").replace("'", '"') for step in steps]
    code = _PROJECT.format(
        modality=modality,
        width=tower.input_width,
        feature=config.tower_input(modality).feature,
        shared_width=config.shared_width,
        steps="\n".join(f"    {line}" for line in lines),
    )
    return code.replace("{", "{{").replace("}", "}}")  # the card fills in the folder


def _describe(run: ExportRun, modality: str) -> dict[str, Any]:
    tower_input = run.config.tower_input(modality)
    return {
        "encoder": dict(tower_input.fingerprint),
        "feature": tower_input.feature,
        "width": tower_input.width,
        "projector": run.projector(modality),
    }


def _recipe(run: ExportRun, modality: str) -> list[str]:
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
