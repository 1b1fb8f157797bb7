"""ONNX graphs: the projectors, or the whole towers, from prepared items to the shared space."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.arrays import Array, Inputs
from embedcache.encoders.backends import OnnxGraph, export_graph
from embedcache.encoders.base import Modality
from embedcache.export.base import MODALITIES, TEXTS, Run, Written, check_parity, expected, pictures
from embedcache.export.transformers import load_exported, write_transformers
from embedcache.projectors.pair import AnyTower
from embedcache.projectors.saved import project
from embedcache.projectors.towers import TokenTower
from embedcache.provenance import read_json
from embedcache.registry import require

_PROJECTORS_CODE = """\
import numpy as np
import onnxruntime

for side in ("image", "text"):
    session = onnxruntime.InferenceSession(f"{folder}/{{side}}_projector.onnx")
    inputs = {{}}
    for place in session.get_inputs():  # features (B, D), or (B, T, D) with lengths (B,)
        if place.name == "lengths":
            inputs["lengths"] = np.full(2, 4, np.int64)
        else:
            inputs[place.name] = np.random.rand(*[size if isinstance(size, int) else 2 * (axis + 1)
                                                  for axis, size in enumerate(place.shape)]).astype(np.float32)
    print(side, session.run(None, inputs)[0].shape, session.get_modelmeta().custom_metadata_map["feature"])
"""
_TOWERS_CODE = """\
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

folder = "{folder}"
pixels = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(
    images=[Image.new("RGB", (320, 200), "red")], return_tensors="pt"
)["pixel_values"].numpy()
ids = AutoTokenizer.from_pretrained(folder)(
    ["a red picture", "two dogs on a hill"], padding=True, truncation=True, return_tensors="np"
)
image = onnxruntime.InferenceSession(f"{{folder}}/image.onnx").run(None, {{"pixel_values": pixels}})[0]
names = ("input_ids", "attention_mask")
tokens = {{name: ids[name].astype(np.int64) for name in names}}
text = onnxruntime.InferenceSession(f"{{folder}}/text.onnx").run(None, tokens)[0]
print(image @ text.T)
"""
_NUM_ROWS, _NUM_TOKENS = 7, 5
_KEPT = (".json", ".txt", ".model", ".jinja")
_PROCESSOR_CODE = ("image_processing_embedcache.py", "image_features.py", "images.py", "errors.py")


def write_onnx(run: Run, folder: Path, *, towers: bool = False) -> Written:
    """Write ONNX graphs with any number of items, opset 17, and run them with onnxruntime.

    Args:
        run: what is exported.
        folder: to fill.
        towers: whether the encoders are inside.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        SettingError: an encoder that can't be inside.
        ArtifactError: a module that ONNX can't say, or onnxruntime computes other vectors.
    """
    require("onnx", extra="cpu")
    return _write_towers(run, folder) if towers else _write_projectors(run, folder)


class _Projection(nn.Module):
    """A tower, and the scaling to length 1."""

    def __init__(self, tower: AnyTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        return {"embeds": normalize(self.tower(features, lengths), dim=-1)}


def _write_projectors(run: Run, folder: Path) -> Written:
    differences: dict[str, float] = {}
    for modality in MODALITIES:
        tower, path = run.pair.tower(modality), folder / f"{modality}_projector.onnx"
        example = _features(run, modality, 3, 4)
        axes = {name: {0: "batch"} for name in (*example, "embeds")}
        if isinstance(tower, TokenTower):
            axes["features"][1] = "tokens"
        export_graph(path, _Projection(tower).eval(), example=example, outputs=["embeds"], axes=axes)
        _describe(path, run, modality)
        differences[modality] = _check_projector(path, run, modality)
    return Written(
        library="onnx",
        task=None,
        code=_PROJECTORS_CODE,
        needs=("onnxruntime", "numpy"),
        differences=differences,
        notes=("The encoders are not inside: `features` are what the encoders below give, not normalized.",),
        sides=(),
    )


def _features(run: Run, modality: Modality, num_rows: int, num_tokens: int) -> dict[str, Array]:
    width = run.config.tower_input(modality).width
    random = np.random.default_rng(num_rows)
    if not isinstance(run.pair.tower(modality), TokenTower):
        return {"features": random.normal(size=(num_rows, width)).astype(np.float32)}
    lengths = random.integers(1, num_tokens + 1, num_rows)
    lengths[0], lengths[-1] = 1, num_tokens
    return {
        "features": random.normal(size=(num_rows, num_tokens, width)).astype(np.float32),
        "lengths": lengths.astype(np.int64),
    }


def _check_projector(path: Path, run: Run, modality: Modality) -> float:
    graph, worst = OnnxGraph(path), 0.0
    for num_rows in (1, _NUM_ROWS):
        inputs = _features(run, modality, num_rows, _NUM_TOKENS)
        wanted = project(run.pair.tower(modality), Inputs(inputs["features"], inputs.get("lengths")))
        worst = max(worst, check_parity("onnxruntime", graph(inputs, ["embeds"])["embeds"], wanted))
    return worst


class _Half(nn.Module):
    """One side of the exported model."""

    def __init__(self, model: nn.Module, modality: Modality) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"embeds": getattr(self.model, f"get_{self.modality}_features")(**inputs)}


def _write_towers(run: Run, folder: Path) -> Written:
    write_transformers(run, folder)
    model = load_exported(folder)
    differences: dict[str, float] = {}
    for modality, inputs in _prepared(folder).items():
        path = folder / f"{modality}.onnx"
        axes = {name: {0: "batch"} | ({1: "tokens"} if array.ndim == 2 else {}) for name, array in inputs.items()}
        axes["embeds"] = {0: "batch"}
        example = {name: array[:2] for name, array in inputs.items()}
        export_graph(
            path, _Half(model, modality), example=example, outputs=["embeds"], axes={**axes, "embeds": {0: "batch"}}
        )
        _describe(path, run, modality)
        wanted = expected(run, modality)
        differences[modality] = check_parity("onnxruntime", OnnxGraph(path)(inputs, ["embeds"])["embeds"], wanted)
        alone = OnnxGraph(path)({name: array[:1] for name, array in inputs.items()}, ["embeds"])["embeds"]
        check_parity("onnxruntime, one item alone,", alone, wanted[:1])
    _keep_small_files(folder)
    return Written(
        library="onnx",
        task="zero-shot-image-classification",
        code=_TOWERS_CODE,
        needs=("onnxruntime", "transformers", "torch", "pillow"),
        differences=differences,
        notes=(
            "`image.onnx` takes `pixel_values`, `text.onnx` takes `input_ids` and `attention_mask`; both give "
            "`embeds`, rows of length 1. The processor and the tokenizer of this folder make their inputs.",
        ),
    )


def _prepared(folder: Path) -> Mapping[Modality, dict[str, Array]]:
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = processor(images=pictures(), return_tensors="pt")["pixel_values"].numpy()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    ids = {name: np.asarray(tokens[name], np.int64) for name in ("input_ids", "attention_mask")}
    return {"image": {"pixel_values": pixels}, "text": ids}


def _describe(path: Path, run: Run, modality: Modality) -> None:
    """Write into the graph where it comes from."""
    onnx = require("onnx", extra="cpu")
    side = run.config.tower_input(modality)
    graph = onnx.load(path)
    about = {
        "producer": "embedcache",
        "feature": side.feature,
        "projector": run.projector(modality),
        "fingerprint": json.dumps(dict(side.fingerprint), sort_keys=True),
        "run_weights": run.config.weights_digest,
        "temperature": f"{float(run.pair.temperature.detach()):.9g}",
    }
    onnx.helper.set_model_props(graph, about)
    onnx.save(graph, path)


def _keep_small_files(folder: Path) -> None:
    """Leave the graphs, and what makes their inputs."""
    (folder / "model.safetensors").unlink()
    is_ours = read_json(folder / "preprocessor_config.json").get("image_processor_type") == "EmbedcacheImageProcessor"
    kept: Sequence[str] = _PROCESSOR_CODE if is_ours else ()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix == ".py" and path.name not in kept:
            path.unlink()
    (folder / "config.json").unlink()
    (folder / "processor_config.json").unlink()
