"""Export ONNX graphs: the projectors, or the whole towers, from prepared items to the shared space."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.arrays import Array, Inputs
from embedcache.encoders.base import Modality
from embedcache.encoders.models import OnnxExport, OnnxGraph, export_graph
from embedcache.errors import ArtifactError
from embedcache.export.base import (
    TEXTS,
    ExportNotes,
    check_parity,
    embed_examples,
    example_images,
    projector_of,
    unsupported,
)
from embedcache.export.transformers import load_exported, write_transformers
from embedcache.modeling.heads import AnyTower, TokenTower
from embedcache.projectors.base import project
from embedcache.registry import require
from embedcache.runs import Run


def write_onnx(run: Run, folder: Path, *, towers: bool) -> ExportNotes:
    """Write ONNX graphs (opset 17, any number of items), and check them with onnxruntime."""
    require("onnx", extra="onnx")
    return _write_towers(run, folder) if towers else _write_projectors(run, folder)


class _Projection(nn.Module):
    """A tower, then normalization to length 1."""

    def __init__(self, tower: AnyTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        return {"embeds": normalize(self.tower(features, lengths), dim=-1)}


def _write_projectors(run: Run, folder: Path) -> ExportNotes:
    differences: dict[str, float] = {}
    for modality in run.modalities:
        tower = run.pair.tower(modality)
        example = _example_features(run, modality, 3, 4)
        dynamic_axes = {name: {0: "batch"} for name in (*example, "embeds")}
        if isinstance(tower, TokenTower):
            dynamic_axes["features"][1] = "tokens"

        module = _Projection(tower).eval()
        export = OnnxExport(module=module, example=example, outputs=["embeds"], dynamic_axes=dynamic_axes)
        graph = _write_graph(export, folder / f"{modality}_projector.onnx", run, modality)

        # A graph could be bound to the number of rows that it was traced with.
        row_differences = []
        for num_rows in (1, 7):
            inputs = _example_features(run, modality, num_rows, 5)
            expected = project(tower, Inputs(inputs["features"], inputs.get("lengths")))
            row_differences.append(check_parity("onnxruntime", graph(inputs, ["embeds"])["embeds"], expected))
        differences[modality] = max(row_differences)

    return ExportNotes(
        library="onnx",
        task=None,
        requirements=("onnxruntime", "numpy"),
        differences=differences,
        encoders=(),
    )


def _example_features(run: Run, modality: str, num_rows: int, num_tokens: int) -> dict[str, Array]:
    width = run.input(modality).width
    random = np.random.default_rng(num_rows)
    if not isinstance(run.pair.tower(modality), TokenTower):
        return {"features": random.normal(size=(num_rows, width)).astype(np.float32)}

    # The shortest and the longest item are among the examples.
    lengths = random.integers(1, num_tokens + 1, num_rows)
    lengths[0] = 1
    lengths[-1] = num_tokens
    return {
        "features": random.normal(size=(num_rows, num_tokens, width)).astype(np.float32),
        "lengths": lengths.astype(np.int64),
    }


class _ModelTower(nn.Module):
    """One tower of the exported model."""

    def __init__(self, model: nn.Module, modality: str) -> None:
        super().__init__()
        self.model = model
        self.modality = modality

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"embeds": getattr(self.model, f"get_{self.modality}_features")(**inputs)}


def _write_towers(run: Run, folder: Path) -> ExportNotes:
    from transformers import AutoImageProcessor, AutoTokenizer

    with TemporaryDirectory(dir=folder) as path:
        requirements = write_transformers(run, Path(path)).requirements
        model = load_exported(Path(path))
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        for part in (processor, tokenizer):
            part.save_pretrained(folder)

    pixels = processor(images=example_images(), return_tensors="pt")["pixel_values"].numpy()
    tokens = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    ids = {name: np.asarray(tokens[name], np.int64) for name in ("input_ids", "attention_mask")}
    prepared: dict[Modality, dict[str, Array]] = {"image": {"pixel_values": pixels}, "text": ids}
    _fix_positions(model, pixels)

    differences: dict[str, float] = {}
    for modality, inputs in prepared.items():
        example = {}
        first_item = {}
        axes = {}
        for name, array in inputs.items():
            example[name] = array[:2]
            first_item[name] = array[:1]
            axes[name] = {0: "batch", 1: "tokens"} if array.ndim == 2 else {0: "batch"}
        export = OnnxExport(
            module=_ModelTower(model, modality),
            example=example,
            outputs=["embeds"],
            dynamic_axes={**axes, "embeds": {0: "batch"}},
        )

        # The transformers format has just been written, so it supports this run.
        next_step = "use embedcache export transformers"
        graph = _write_graph(export, folder / f"{modality}.onnx", run, modality, next_step=next_step)
        expected = embed_examples(run, modality)
        differences[modality] = check_parity("onnxruntime", graph(inputs, ["embeds"])["embeds"], expected)
        single = graph(first_item, ["embeds"])["embeds"]
        check_parity("onnxruntime, for a single item,", single, expected[:1])

    return ExportNotes(
        library="onnx",
        task="zero-shot-image-classification",
        requirements=("onnxruntime", *requirements),
        differences=differences,
    )


@torch.inference_mode()
def _fix_positions(model: Any, pixels: Array) -> None:
    """Keep the position embeddings for images of this size, the only one of the graph, as constants.

    Classes of transformers interpolate them whenever they are traced, also to their own size, and DINOv2 with registers
    by an operator that ONNX lacks.
    """
    for module in model.modules():
        if hasattr(module, "interpolate_pos_encoding"):
            module.interpolate_pos_encoding = _keep_first(module.interpolate_pos_encoding)
    model.get_image_features(torch.from_numpy(pixels[:1]))


def _keep_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that computes its result once, and returns it for all later arguments."""
    results: list[Tensor] = []

    def first(*arguments: Any) -> Tensor:
        if not results:
            results.append(function(*arguments))
        return results[0]

    return first


def _write_graph(
    export: OnnxExport, path: Path, run: Run, modality: str, *, next_step: str = "embedcache.load applies it"
) -> OnnxGraph:
    """Write a graph with the run, feature and encoder in its metadata, and open it."""
    onnx = require("onnx", extra="onnx")
    try:
        export_graph(export, path)
    except ArtifactError as error:
        raise unsupported("onnx", f"{path.stem.replace('_', ' ')}: {error}", next_step) from error

    tower_input = run.input(modality)
    graph = onnx.load(path)
    metadata = {
        "producer": "embedcache",
        "feature": tower_input.feature,
        "projector": projector_of(run, modality),
        "fingerprint": json.dumps(dict(tower_input.fingerprint), sort_keys=True),
        "run_weights": run.info.weights,
        "temperature": f"{float(run.pair.temperature.detach()):.9g}",
    }
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, path)
    return OnnxGraph(path)
