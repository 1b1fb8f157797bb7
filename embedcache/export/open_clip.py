"""Export a folder that open_clip opens as `local-dir:`: config, weights, tokenizer.

The image encoder is one of timm, the text encoder a BERT or RoBERTa. open_clip's heads get features as the encoder
returns them, so projectors that normalize or center are not supported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.errors import one_line
from embedcache.export.base import TEXTS, ExportNotes, compare_examples, example_images, projector_of, unsupported
from embedcache.export.towers import open_module
from embedcache.modeling.images import rgb_image
from embedcache.provenance import write_json
from embedcache.registry import require
from embedcache.runs import Run

_FORMAT = "open-clip"
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_POOLS = {"pooled": "", "cls": "token", "patch_mean": "avg"}
"""Image feature -> how timm pools."""
_RESIZE_MODES = {"center": "shortest", "squash": "squash"}
_HEADS: Mapping[str, Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]]] = {
    "image": {
        "openclip-linear": ({"timm_proj": "linear"}, {"0.weight": "proj.weight"}),
        "openclip-mlp-image": (
            {"timm_proj": "mlp"},
            {"0.weight": "mlp.fc1.weight", "0.bias": "mlp.fc1.bias", "2.weight": "mlp.fc2.weight"},
        ),
    },
    "text": {
        "openclip-linear": ({"hf_proj_type": "linear"}, {"0.weight": "weight"}),
        "openclip-mlp-text": ({"hf_proj_type": "mlp"}, {"0.weight": "0.weight", "2.weight": "2.weight"}),
    },
}
"""Modality -> projector -> its entries in open_clip's config, and the names of its weights in open_clip."""


def write_open_clip(run: Run, folder: Path, *, address: str) -> ExportNotes:
    """Write a folder that open_clip opens, and check it with that library.

    `address` is the path that the folder will have, or the repository that it will be uploaded to.
    """
    require("open_clip", extra=_FORMAT)
    text = open_module(run, "text", _FORMAT)
    image = open_module(run, "image", _FORMAT)
    _check_supported(run, text.config["config"])
    image_head_config, image_head = _head(run, "image")
    text_head_config, text_head = _head(run, "text")

    text.processor.save_pretrained(folder)
    transformer: Any = text.module.get_submodule("_model")
    transformer.config.save_pretrained(folder)
    modules = {
        "visual.trunk": image.module.get_submodule("_model").state_dict(),
        "visual.head": image_head,
        "text.transformer": transformer.state_dict(),
        "text.proj": text_head,
    }

    # safetensors writes only contiguous tensors that share no memory.
    state = {"logit_scale": run.pair.scale.log().detach().clone().contiguous()}
    for module, weights in modules.items():
        for name, value in weights.items():
            # open_clip builds the transformer without its pooler.
            if module != "text.transformer" or not name.startswith("pooler."):
                state[f"{module}.{name}"] = value.detach().clone().contiguous()
    save_file(state, folder / "open_clip_model.safetensors")

    transform = run.input("image").fingerprint["preprocessing"]
    vision_config = {
        "image_size": image.config["input_size"][-1],
        "timm_model_name": image.config["model"],
        "timm_model_pretrained": False,
        "timm_pool": _POOLS["+".join(image.config["features"])],
        "timm_proj_bias": False,
        **image_head_config,
    }
    text_config = {
        "hf_pooler_type": _POOLERS["+".join(text.config["features"])],
        "context_length": text.processor.model_max_length,
        **text_head_config,
    }
    config: dict[str, Any] = {
        "model_cfg": {"embed_dim": run.shared_width, "vision_cfg": vision_config, "text_cfg": text_config},
        "preprocess_cfg": {
            "size": transform["input_size"][-1],
            "mode": "RGB",
            "mean": transform["mean"],
            "std": transform["std"],
            "interpolation": transform["interpolation"],
            "resize_mode": _RESIZE_MODES[transform["crop_mode"]],
        },
    }
    spec = EncoderSpec.parse(run.input("text").spec)
    is_on_hub = spec.family == "hf" and not spec.is_path
    text_model = run.input("text").fingerprint["model"] if is_on_hub else address

    # During the check, open_clip finds the text tower's config in this folder.
    text_config |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    write_json(folder / "open_clip_config.json", config)
    differences = _compare(run, folder)
    text_config |= {"hf_model_name": text_model, "hf_tokenizer_name": text_model}
    write_json(folder / "open_clip_config.json", config)

    return ExportNotes(
        library="open_clip",
        task="zero-shot-image-classification",
        requirements=("open_clip_torch>=3.3", "transformers"),
        differences=differences,
        address=text_model,
    )


def _check_supported(run: Run, text_config: Mapping[str, Any]) -> None:
    """Check that open_clip has every part of a run, or raise a `SettingError`."""
    image = run.input("image")
    text = run.input("text")
    parts = {
        "image encoder's family": (image.fingerprint["family"], ("timm",)),
        "image feature": ("+".join(feature_names(image.feature)), _POOLS),
        "crop_mode": (image.fingerprint["preprocessing"].get("crop_mode"), _RESIZE_MODES),
        "text encoder": (text_config["model_type"], ("bert", "roberta", "xlm-roberta")),
        "text feature": ("+".join(feature_names(text.feature)), _POOLERS),
        "image projector": (projector_of(run, "image"), _HEADS["image"]),
        "text projector": (projector_of(run, "text"), _HEADS["text"]),
    }
    for part, (name, names) in parts.items():
        if name not in names:
            raise unsupported(_FORMAT, f"its {part} is {name}: expected {', '.join(names)}")


def _head(run: Run, modality: Modality) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the entries of a head in open_clip's config, and its weights under the names of open_clip."""
    entries, names = _HEADS[modality][projector_of(run, modality)]
    tower: Any = run.pair.tower(modality)
    weights = tower.projector.layers.state_dict()

    # open_clip's heads get features as they are, so the first layer divides by their length.
    weights["0.weight"] = weights["0.weight"] / tower.length
    return entries, {names[name]: value for name, value in weights.items()}


@torch.inference_mode()
def _compare(run: Run, folder: Path) -> dict[str, float]:
    import open_clip

    name = f"local-dir:{folder}"
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenizer = open_clip.get_tokenizer(name)
        model.eval()

        # The format has no place for the conversion to RGB, which open_clip does in another way.
        images = torch.stack([preprocess(rgb_image(image)) for image in example_images()])
        vectors: dict[Modality, Tensor] = {
            "image": model.encode_image(images, normalize=True),
            "text": model.encode_text(tokenizer(list(TEXTS)), normalize=True),
        }
    # Some timm networks have another width than they announce to open_clip.
    except RuntimeError as error:
        raise unsupported(_FORMAT, f"open_clip cannot run its encoders: {one_line(error)}") from error
    return compare_examples(run, "open_clip", vectors)
