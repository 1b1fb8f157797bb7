"""Export a model folder for transformers (AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer).

transformers has no class for two frozen encoders with trained projectors, nor an image processor that prepares images
exactly as at extraction. With `trust_remote_code=True` it runs the code in the folder instead: the files of
`embedcache.modeling`, which transformers copies when it saves the model and the image processor.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedcache.encoders.base import Modality
from embedcache.encoders.weights import quiet_transformers
from embedcache.export.base import (
    MODALITIES,
    TEXTS,
    ExportNotes,
    compare_examples,
    example_images,
    projector_of,
    unsupported,
)
from embedcache.export.towers import EncoderModule, open_module
from embedcache.modeling import heads
from embedcache.projectors.base import bind_projector
from embedcache.provenance import write_json
from embedcache.runs import Run

_FORMAT = "transformers"
_PIPELINE = "AutoModelForZeroShotImageClassification"


def write_transformers(run: Run, folder: Path) -> ExportNotes:
    """Write a folder that transformers opens with `trust_remote_code=True`, and check it with that library."""
    encoders = {modality: open_module(run, modality, _FORMAT) for modality in MODALITIES}
    model = _build_model(run, encoders)

    # safetensors refuses tensors that share memory.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)

    for encoder in encoders.values():
        encoder.processor.save_pretrained(folder)
    write_json(folder / "processor_config.json", {"processor_class": "VisionTextDualEncoderProcessor"})

    differences = compare_examples(run, _FORMAT, _embed_examples(folder))
    is_timm = encoders["image"].config["kind"] == "timm"
    return ExportNotes(
        library="transformers",
        task="zero-shot-image-classification",
        requirements=("transformers>=4.57", "torch", "torchvision", "pillow", *(["timm"] if is_timm else [])),
        differences=differences,
    )


def load_exported(folder: Path) -> Any:
    """Open an exported folder with transformers, without its progress bar."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def _build_model(run: Run, encoders: Mapping[Modality, EncoderModule]) -> Any:
    from embedcache.modeling.modeling_embedcache import EmbedcacheConfig, EmbedcacheModel

    EmbedcacheConfig.register_for_auto_class()
    EmbedcacheModel.register_for_auto_class("AutoModel")

    sides: dict[str, Any] = {}
    for name, encoder in encoders.items():
        sides[name] = {**encoder.config, **_tower_config(run, name)}
    config = EmbedcacheConfig(**sides, projection_dim=run.shared_width)
    config.auto_map = {_PIPELINE: "modeling_embedcache.EmbedcacheModel"}
    model = EmbedcacheModel(config)

    for name, encoder in encoders.items():
        side = model.get_submodule(f"{name}_side")
        side.encoder.load_state_dict(_tensors(encoder.module), assign=True)
        side.tower.load_state_dict(_tensors(run.pair.tower(name)))

    with torch.no_grad():
        model.logit_scale.copy_(run.pair.scale.log())
    return model


def _tower_config(run: Run, modality: Modality) -> dict[str, Any]:
    """Return the names of the classes of a tower and its projector, and the projector's parameters."""
    tower = run.pair.tower(modality)
    name = projector_of(run, modality)
    if type(tower.projector).__module__ != heads.__name__:
        raise unsupported(_FORMAT, f"its {modality} projector {name} is a plug-in")
    return {
        "tower": type(tower).__name__,
        "projector": type(tower.projector).__name__,
        "parameters": bind_projector(name).keywords,
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a module, including buffers that its state dict leaves out."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


@torch.inference_mode()
def _embed_examples(folder: Path) -> Mapping[Modality, Any]:
    from transformers import AutoProcessor

    model = load_exported(folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = processor(images=example_images(), return_tensors="pt")["pixel_values"]
    texts = processor(text=list(TEXTS), return_tensors="pt", padding=True, truncation=True)
    vectors: dict[Modality, Any] = {
        "image": model.get_image_features(images),
        "text": model.get_text_features(texts["input_ids"], texts["attention_mask"]),
    }

    # The weights are freed before the run's encoders are opened for the comparison.
    del model
    gc.collect()
    return vectors
