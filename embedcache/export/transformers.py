"""A model folder of transformers, its code inside: AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer.

Copies modules of this package into a model folder, so that they run there without it.
"""

import ast
import gc
import inspect
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedcache.export.base import MODALITIES, TEXTS, Run, Written, check_parity, expected, pictures, refusal
from embedcache.export.towers import OpenTower, open_image_tower, open_text_tower
from embedcache.provenance import read_json, write_json

_FORM = "transformers"
_CODE_ROOM = "embedcache.export.hub_code"
_MODEL, _IMAGES = "modeling_embedcache", "image_processing_embedcache"
_CODE = """\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder = "{folder}"  # this folder, or OWNER/NAME on the hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

picture = Image.new("RGB", (320, 200), "red")
texts = ["a red picture", "two dogs on a hill"]
inputs = processor(text=texts, images=picture, return_tensors="pt", padding=True, truncation=True)
with torch.inference_mode():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
    print(model.get_image_features(inputs["pixel_values"]).shape)
    print(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).shape)
"""


def write_transformers(run: Run, folder: Path) -> Written:
    """Write a folder that transformers opens with `trust_remote_code=True`, and open it there.

    Raises:
        SettingError: a tower or a projector that such a folder can't hold.
        ArtifactError: transformers computes other vectors.
    """
    towers = {"image": open_image_tower(run, _FORM), "text": open_text_tower(run, _FORM)}
    for tower in towers.values():
        tower.save(folder)
    _ship_code(run, folder)
    _write_config(run, folder, towers)
    save_file(_state(run, towers), folder / "model.safetensors", metadata={"format": "pt"})
    differences = _check(run, folder)
    is_timm = towers["image"].about["kind"] == "timm"
    return Written(
        library="transformers",
        task="zero-shot-image-classification",
        code=_CODE,
        needs=("transformers", "torch", "torchvision", "pillow", *(["timm"] if is_timm else [])),
        differences=differences,
        notes=(
            "Features have length 1. Texts are padded on the right and cut at the tokenizer's `model_max_length`.",
            "The code in this folder is run with `trust_remote_code=True`: read it first, it is short.",
        ),
    )


def load_exported(folder: Path) -> Any:
    """Open a folder that was just written."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def _ship_code(run: Run, folder: Path) -> None:
    kinds = {modality: run.projector_class(modality) for modality in MODALITIES}
    lines = ['"""The projectors of both sides."""', ""]
    lines += [
        f"from .{kind.__module__.rpartition('.')[2]} import {kind.__name__} as {modality.title()}Projector"
        for modality, kind in kinds.items()
    ]
    (folder / "projectors.py").write_text("\n".join([*lines, "", '__all__ = ["ImageProjector", "TextProjector"]', ""]))
    modules = [f"{_CODE_ROOM}.{_MODEL}", *(kind.__module__ for kind in kinds.values())]
    if (folder / "preprocessor_config.json").is_file() and _is_ours(folder):
        modules.append(f"{_CODE_ROOM}.{_IMAGES}")
    ship(modules, folder, _FORM)


def _is_ours(folder: Path) -> bool:
    return bool(
        read_json(folder / "preprocessor_config.json").get("image_processor_type") == "EmbedcacheImageProcessor"
    )


def _write_config(run: Run, folder: Path, towers: Mapping[str, OpenTower]) -> None:
    from embedcache.export.hub_code.modeling_embedcache import EmbedcacheConfig

    config = EmbedcacheConfig(
        image=towers["image"].about,
        text=towers["text"].about,
        projection_dim=run.config.shared_width,
        architectures=["EmbedcacheModel"],
    )
    config.auto_map = {"AutoConfig": f"{_MODEL}.EmbedcacheConfig", "AutoModel": f"{_MODEL}.EmbedcacheModel"}
    config.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    processor = {**read_json(path), "processor_class": "VisionTextDualEncoderProcessor"}
    if _is_ours(folder):
        processor["auto_map"] = {"AutoImageProcessor": f"{_IMAGES}.EmbedcacheImageProcessor"}
    write_json(path, processor)
    write_json(folder / "processor_config.json", {"processor_class": "VisionTextDualEncoderProcessor"})


def _state(run: Run, towers: Mapping[str, OpenTower]) -> dict[str, Tensor]:
    state = {"logit_scale": run.pair.scale.detach().log()}
    for modality, tower in towers.items():
        for name, module in (("encoder", tower.module), ("tower", run.pair.tower(modality))):
            state |= {f"{modality}_side.{name}.{key}": value for key, value in _tensors(module).items()}
    state |= {f"image_side.pools.{key}": value for key, value in _pools(towers["image"].about).items()}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Get all tensors of a module, those too that its state leaves out."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _pools(about: Mapping[str, Any]) -> dict[str, Tensor]:
    from embedcache.export.hub_code.modeling_embedcache import patch_pools

    return _tensors(patch_pools(about))


@torch.inference_mode()
def _check(run: Run, folder: Path) -> dict[str, float]:
    from transformers import AutoProcessor

    model = load_exported(folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = processor(images=pictures(), return_tensors="pt")["pixel_values"]
    texts = processor(text=list(TEXTS), return_tensors="pt", padding=True, truncation=True)
    found = {
        "image": model.get_image_features(images),
        "text": model.get_text_features(texts["input_ids"], texts["attention_mask"]),
    }
    del model
    gc.collect()
    return {modality: check_parity("transformers", found[modality], expected(run, modality)) for modality in MODALITIES}


_IMPORT = re.compile(r"^(\s*from )(embedcache\.[\w.]+)( import )", re.MULTILINE)
_HEADER = "# Copyright the embedcache authors. Apache-2.0. Copied from {module} of embedcache by its export.\n"
_ALLOWED = {"PIL", "numpy", "torch", "transformers", *sys.stdlib_module_names}


def ship(modules: list[str], folder: Path, form: str) -> None:
    """Copy modules, and those of this package that they import; imports of it become relative.

    Raises:
        SettingError: a module imports what the folder can't bring.
    """
    waiting, done = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        source = inspect.getsource(import_module(module))
        waiting += [found for _, found, _ in _IMPORT.findall(source)]
        text = _IMPORT.sub(lambda match: f"{match[1]}.{match[2].rpartition('.')[2]}{match[3]}", source)
        _check_imports(module, text, form)
        path = folder / f"{module.rpartition('.')[2]}.py"
        if not path.exists():  # what was written there before takes its place
            path.write_text(_HEADER.format(module=module) + text, encoding="utf-8")


def _check_imports(module: str, text: str, form: str) -> None:
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
        for name in names:
            if name.split(".")[0] not in _ALLOWED:
                raise refusal(form, f"{module} imports {name}, which a model folder can't bring")
