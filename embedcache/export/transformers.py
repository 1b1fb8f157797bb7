"""Export a model folder for transformers (AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer).

The folder includes its code: modules of this package, copied so that they run without it.
"""

import gc
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedcache.encoders.base import Modality
from embedcache.encoders.weights import quiet_transformers
from embedcache.errors import one_line
from embedcache.export.base import MODALITIES, TEXTS, ExportNotes, ExportRun, example_images
from embedcache.export.code import MODEL_MODULE, PROCESSOR_MODULE, change_plugin, write_model_code
from embedcache.export.towers import EncoderModule, open_module
from embedcache.provenance import read_json, write_json

_FORMAT = "transformers"
_MODEL = MODEL_MODULE.rpartition(".")[2]
_PROCESSOR = PROCESSOR_MODULE.rpartition(".")[2]
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
    projectors = {modality: run.projector_path(modality) for modality in MODALITIES}
    plugins = write_model_code(projectors, folder, _FORMAT)
    save_file(_state(run, encoders), folder / "model.safetensors", metadata={"format": "pt"})
    _write_config(run, folder, encoders)
    differences = _check(run, folder, plugins)
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
            *(
                f"Files whose first line names `{name}` are copies of its code: its license applies."
                for name in sorted(plugins)
            ),
        ),
    )


def load_exported(folder: Path) -> Any:
    """Open an exported folder with transformers, without its progress bar."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def _write_config(run: ExportRun, folder: Path, encoders: Mapping[Modality, EncoderModule]) -> None:
    from embedcache.export.hub_code.modeling_embedcache import EmbedcacheConfig

    config = EmbedcacheConfig(
        image=encoders["image"].config,
        text=encoders["text"].config,
        projection_dim=run.config.shared_width,
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


def _check(run: ExportRun, folder: Path, plugins: Collection[str]) -> dict[str, float]:
    """Compare the vectors of the exported folder with the run's; it is loaded while plug-ins cannot be imported."""
    try:
        with _hidden(plugins):
            vectors = _embed_examples(folder)
    except Exception as error:
        if not plugins:
            raise
        names, cause = ", ".join(sorted(plugins)), f"{type(error).__name__}: {one_line(error)}"
        reason = f"the copied code of {names} does not run outside of that package: {cause}"
        raise change_plugin(_FORMAT, reason) from error
    return run.check_parity(_FORMAT, vectors)


@contextmanager
def _hidden(packages: Collection[str]) -> Iterator[None]:
    """Make every import from packages fail, as where they are not installed."""
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    sys.modules.update(dict.fromkeys(loaded))  # type: ignore[arg-type]  # None: Python does not look for it
    try:
        yield
    finally:
        sys.modules.update(loaded)


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
