"""Export a model folder for transformers (AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer).

The folder includes its code: modules of this package, copied so that they run without it.
"""

import ast
import gc
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedcache.encoders.base import Modality
from embedcache.encoders.weights import quiet_transformers
from embedcache.export.base import MODALITIES, TEXTS, ExportNotes, ExportRun, example_images, unsupported
from embedcache.export.towers import EncoderModule, open_module
from embedcache.provenance import digest_file, read_json, write_json

_FORMAT = "transformers"
_CODE_PACKAGE = "embedcache.export.hub_code"
_MODEL = "modeling_embedcache"
_PROCESSOR_MODULE = f"{_CODE_PACKAGE}.image_processing_embedcache"
_WEIGHTS = "model.safetensors"

_IMPORT = re.compile(r"^(\s*from )(embedcache\.[\w.]+)( import )", re.MULTILINE)
_HEADER = "# Copyright the embedcache authors. Apache-2.0. Copied from {module} of embedcache by its export.\n"
_NESTED = "# Imports of the modules above: transformers 4 copies only what this file imports itself.\n"
_LIBRARIES = ("PIL", "numpy", "torch", "transformers")
_ALLOWED = {*_LIBRARIES, *sys.stdlib_module_names}

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
    _copy_code(run, folder)
    save_file(_state(run, encoders), folder / _WEIGHTS, metadata={"format": "pt"})
    _write_config(run, folder, encoders)
    differences = _check(run, folder)
    is_timm = encoders["image"].config["kind"] == "timm"
    return ExportNotes(
        library="transformers",
        task="zero-shot-image-classification",
        code=_CODE,
        requirements=("transformers", "torch", "torchvision", "pillow", *(["timm"] if is_timm else [])),
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


def _copy_code(run: ExportRun, folder: Path) -> None:
    projectors = {modality: run.projector_class(modality) for modality in MODALITIES}
    lines = ['"""The projectors of both modalities."""', ""]
    lines += [
        f"from .{projector.__module__.rpartition('.')[2]} import {projector.__name__} as {modality.title()}Projector"
        for modality, projector in projectors.items()
    ]
    (folder / "projectors.py").write_text("\n".join([*lines, "", '__all__ = ["ImageProjector", "TextProjector"]', ""]))
    modules = [f"{_CODE_PACKAGE}.{_MODEL}", *(projector.__module__ for projector in projectors.values())]
    copy_code(modules, folder, _FORMAT)


def copy_code(modules: Sequence[str], folder: Path, format_name: str) -> None:
    """Copy modules, that of the image processor, and those of this package that they import; keep existing files.

    transformers 4 copies only what a module that it opens imports itself from a local folder, so that the first module
    and that of the processor import all that their imports import.
    """
    opened = [*modules[:1], *([_PROCESSOR_MODULE] if _has_own_processor(folder) else [])]
    waiting, imports, texts = [*modules, *opened], dict[str, list[str]](), dict[str, str]()
    while waiting:
        module = waiting.pop()
        if module in imports:
            continue
        source = inspect.getsource(import_module(module))
        imports[module] = [imported for _, imported, _ in _IMPORT.findall(source)]
        waiting += imports[module]
        texts[module] = _IMPORT.sub(lambda match: f"{match[1]}.{match[2].rpartition('.')[2]}{match[3]}", source)
        _check_imports(module, texts[module], format_name)
    for module in opened:
        roots = modules if module in modules else [module]
        nested = _reachable(roots, imports) - {module, *imports[module]}
        lines = [f"from .{name.rpartition('.')[2]} import __name__ as _\n" for name in sorted(nested)]
        texts[module] += "".join(["\n", _NESTED, *lines] if lines else [])
    for module, text in texts.items():
        path = folder / f"{module.rpartition('.')[2]}.py"
        if not path.exists():  # `projectors.py` was written for this run
            path.write_text(_HEADER.format(module=module) + text, encoding="utf-8")


def _reachable(roots: Sequence[str], imports: Mapping[str, Sequence[str]]) -> set[str]:
    """Return modules with all that they import, directly or not."""
    found, waiting = set[str](), list(roots)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports[module]
    return found


def _has_own_processor(folder: Path) -> bool:
    """Return whether an exported folder's image processor is embedcache's, not transformers'."""
    kind: str | None = read_json(folder / "preprocessor_config.json").get("image_processor_type")
    return kind == "EmbedcacheImageProcessor"


def _check_imports(module: str, text: str, format_name: str) -> None:
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
        for name in names:
            if name.split(".")[0] not in _ALLOWED:
                raise unsupported(format_name, f"{module} imports {name}: expected only {', '.join(_LIBRARIES)}")


def _write_config(run: ExportRun, folder: Path, encoders: Mapping[Modality, EncoderModule]) -> None:
    from embedcache.export.hub_code.modeling_embedcache import EmbedcacheConfig

    config = EmbedcacheConfig(
        image=encoders["image"].config,
        text=encoders["text"].config,
        projection_dim=run.config.shared_width,
        architectures=["EmbedcacheModel"],
    )
    config.auto_map = {"AutoConfig": f"{_MODEL}.EmbedcacheConfig", "AutoModel": f"{_MODEL}.EmbedcacheModel"}
    config.save_pretrained(folder)
    path = folder / "config.json"
    write_json(path, {**read_json(path), "weights_sha256": {_WEIGHTS: digest_file(folder / _WEIGHTS)}})
    path = folder / "preprocessor_config.json"
    processor = {**read_json(path), "processor_class": "VisionTextDualEncoderProcessor"}
    if _has_own_processor(folder):
        processor["auto_map"] = {
            "AutoImageProcessor": f"{_PROCESSOR_MODULE.rpartition('.')[2]}.EmbedcacheImageProcessor"
        }
    write_json(path, processor)
    write_json(folder / "processor_config.json", {"processor_class": "VisionTextDualEncoderProcessor"})


def _state(run: ExportRun, encoders: Mapping[Modality, EncoderModule]) -> dict[str, Tensor]:
    from embedcache.export.hub_code.modeling_embedcache import patch_pools

    state = {"logit_scale": run.pair.scale.detach().log()}
    for modality, encoder in encoders.items():
        for name, module in (("encoder", encoder.module), ("tower", run.pair.tower(modality))):
            state |= {f"{modality}_side.{name}.{key}": value for key, value in _tensors(module).items()}
    pools = _tensors(patch_pools(encoders["image"].config))
    state |= {f"image_side.pools.{key}": value for key, value in pools.items()}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a module, including those that its state dict leaves out."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


@torch.inference_mode()
def _check(run: ExportRun, folder: Path) -> dict[str, float]:
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
    return run.check_parity(_FORMAT, vectors)
