"""Export a model folder for transformers (AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer).

transformers has no class for two frozen encoders with trained projectors, nor an image processor that prepares images
exactly as at extraction. With `trust_remote_code=True` it runs the code in the folder instead. That code is a copy of
modules of this package, in which imports of each other are relative, so that it runs without the package. Apart from
each other, they import PIL, NumPy, torch, transformers and the standard library only.
"""

import gc
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedcache.encoders.base import Modality
from embedcache.encoders.features import patch_pools
from embedcache.encoders.weights import quiet_transformers
from embedcache.export.base import MODALITIES, TEXTS, ExportNotes, ExportRun, example_images, unsupported
from embedcache.export.towers import EncoderModule, open_module
from embedcache.files import read_text
from embedcache.projectors.base import bind_projector
from embedcache.provenance import read_json, write_json

_FORMAT = "transformers"
_HUB_CODE = "embedcache.export.hub_code"
_MODEL = "modeling_embedcache"
_PROCESSOR = "image_processing_embedcache"
_COPIED = {
    f"{_HUB_CODE}.{_MODEL}": (
        f"{_HUB_CODE}.projectors",
        "embedcache.encoders.features",
        "embedcache.errors",
        "embedcache.projectors.heads",
        "embedcache.projectors.tokens",
    ),
    f"{_HUB_CODE}.{_PROCESSOR}": (
        "embedcache.arrays",
        "embedcache.encoders.features",
        "embedcache.errors",
        "embedcache.sources.images",
    ),
}
"""Module that transformers opens -> modules that it imports, directly or not."""
_IMPORT = re.compile(r"^(\s*from )embedcache[\w.]*(\.\w+ import)", re.MULTILINE)
_HEADER = "# Copyright the embedcache authors. Apache-2.0. Copied from {module} of embedcache by its export.\n"
_NESTED = "\n# Imports of the modules above: transformers 4 copies only what this file imports itself.\n"
_PIPELINE = "ZeroShotImageClassification"
_CODE = """\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder = "{folder}"  # this folder, or OWNER/NAME on the hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

image = Image.new("RGB", (320, 200), "red")
texts = ["a red image", "two dogs on a hill"]
inputs = processor(text=texts, images=image, return_tensors="pt", padding=True, truncation=True)
with torch.inference_mode():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
    print(model.get_image_features(inputs["pixel_values"]).shape)
    print(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).shape)
"""


def write_transformers(run: ExportRun, folder: Path) -> ExportNotes:
    """Write a folder that transformers opens with `trust_remote_code=True`, and check it with that library."""
    encoders = {modality: open_module(run, modality, _FORMAT) for modality in MODALITIES}
    for encoder in encoders.values():
        encoder.save_processor(folder)
    copy_processor_code(folder)
    _copy_code(f"{_HUB_CODE}.{_MODEL}", folder)
    _write_projectors(run, folder)
    save_file(_state(run, encoders), folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(run, folder, encoders)
    differences = run.check_parity(_FORMAT, _embed_examples(folder))
    is_timm = encoders["image"].config["kind"] == "timm"
    return ExportNotes(
        library="transformers",
        task="zero-shot-image-classification",
        code=_CODE,
        shorten="torch.nn.functional.normalize(model.get_text_features(…)[:, :{width}], dim=-1)",
        requirements=("transformers>=4.57", "torch", "torchvision", "pillow", *(["timm"] if is_timm else [])),
        differences=differences,
        notes=(
            "Embeddings have length 1. Texts are padded on the right and truncated to the tokenizer's "
            "`model_max_length`.",
            "`trust_remote_code=True` runs the code in this folder: read it first, it is short.",
        ),
    )


def load_exported(folder: Path) -> Any:
    """Open an exported folder with transformers, without its progress bar."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def copy_processor_code(folder: Path) -> None:
    """Copy the code of the image processor into a folder."""
    _copy_code(f"{_HUB_CODE}.{_PROCESSOR}", folder)


def _copy_code(opened: str, folder: Path) -> None:
    """Copy a module that transformers opens, and the modules that it imports, with relative imports."""
    for module in (opened, *_COPIED[opened]):
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text = _IMPORT.sub(r"\1\2", read_text(Path(spec.origin)))

        if module == opened:
            nested = [name.rpartition(".")[2] for name in _COPIED[opened]]
            text += _NESTED + "".join(f"from .{name} import __name__ as _\n" for name in nested)
        path = folder / f"{module.rpartition('.')[2]}.py"
        path.write_text(_HEADER.format(module=module) + text, "utf-8")


def _write_projectors(run: ExportRun, folder: Path) -> None:
    """Write the module that names the projectors of the run."""
    lines = ['"""The projectors of both modalities."""', "", "from functools import partial", ""]
    names = []
    for modality in MODALITIES:
        projector = type(run.pair.tower(modality).projector)
        if projector.__module__ not in _COPIED[f"{_HUB_CODE}.{_MODEL}"]:
            raise unsupported(_FORMAT, f"its {modality} projector {run.projector(modality)} is a plug-in")
        module = projector.__module__.rpartition(".")[2]
        lines.append(f"from .{module} import {projector.__name__}")
        parameters = bind_projector(run.projector(modality)).keywords
        names.append(f"{modality.title()}Projector = partial({projector.__name__}, **{parameters!r})")
    text = "\n".join([*lines, "", *names, "", '__all__ = ["ImageProjector", "TextProjector"]', ""])
    (folder / "projectors.py").write_text(text, "utf-8")


def _write_config(run: ExportRun, folder: Path, encoders: Mapping[Modality, EncoderModule]) -> None:
    from embedcache.export.hub_code.modeling_embedcache import EmbedcacheConfig

    config = EmbedcacheConfig(
        image=encoders["image"].config,
        text=encoders["text"].config,
        projection_dim=run.trained.shared_width,
        architectures=["EmbedcacheModel"],
    )
    classes = dict.fromkeys(("AutoModel", f"AutoModelFor{_PIPELINE}"), f"{_MODEL}.EmbedcacheModel")
    config.auto_map = {"AutoConfig": f"{_MODEL}.EmbedcacheConfig", **classes}
    config.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    processor = {
        **read_json(path),
        "processor_class": "VisionTextDualEncoderProcessor",
        "auto_map": {"AutoImageProcessor": f"{_PROCESSOR}.EmbedcacheImageProcessor"},
    }
    write_json(path, processor)
    write_json(folder / "processor_config.json", {"processor_class": "VisionTextDualEncoderProcessor"})


def _state(run: ExportRun, encoders: Mapping[Modality, EncoderModule]) -> dict[str, Tensor]:
    state = {"logit_scale": run.pair.scale.detach().log()}
    for modality, encoder in encoders.items():
        for name, module in (("encoder", encoder.module), ("tower", run.pair.tower(modality))):
            state |= {f"{modality}_side.{name}.{key}": value for key, value in _tensors(module).items()}
    image = encoders["image"].config
    pools = patch_pools(image["features"], image["shapes"], image["input_size"])
    state |= {f"image_side.pools.{key}": value for key, value in _tensors(pools).items()}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a module, including those that its state dict leaves out."""
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
    del model
    gc.collect()
    return vectors
