"""Export a folder that open_clip opens as `local-dir:`: config, weights, tokenizer.

open_clip's heads get features as the encoder returns them, so projectors that normalize or center are not supported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.open_clip import load_checkpoint
from embedcache.errors import one_line
from embedcache.export.base import MODALITIES, TEXTS, ExportNotes, ExportRun, check_plain, example_images, unsupported
from embedcache.export.towers import DenseLayer, dense_chain, open_module
from embedcache.provenance import write_json
from embedcache.registry import require
from embedcache.sources.images import rgb_image

_FORMAT = "open-clip"
_TRANSFORMERS = "use embedcache export transformers"
"""Next step where both encoders are known to be some that the format transformers supports."""
_OTHER_HEADS = f"train with --projector openclip-linear or openclip-mlp, or {_TRANSFORMERS}"
_OTHER_HEADS_OF_CLIP = (
    "train with --projector openclip-linear, or use embedcache export safetensors, which supports the projectors of "
    "any run"
)
_CODE = """\
import open_clip
import torch
from PIL import Image

name = "local-dir:{folder}"  # the path of this folder, or hf-hub:OWNER/NAME
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
model.eval()

images = torch.stack([preprocess(Image.new("RGB", (320, 200), "red"))])
texts = tokenizer(["a red image", "two dogs on a hill"])
with torch.inference_mode():
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(texts, normalize=True)
    print((model.logit_scale.exp() * image @ text.T).softmax(dim=-1))
"""
_RGB_NOTE = (
    "open_clip's own transform prepares images, and only RGB images give the vectors of the run: it ignores the EXIF "
    "orientation, drops transparency, clips 16-bit gray, and resizes other modes before it converts them. Convert such "
    "images first: upright, transparent pixels on white."
)
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_ARCHITECTURES = ("bert", "roberta", "xlm-roberta")
_LAST_MAPS = {
    "image": ("visual.proj", "visual.head.proj", "visual.attnpool.c_proj"),
    "text": ("text_projection", "text.text_projection", "text.proj"),
}
"""Where open_clip's own towers end in a linear map: a matrix (D, P), or a linear layer."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """Content of the folder: `model_cfg`, `preprocess_cfg` and weights."""

    config: dict[str, Any]
    preprocess: dict[str, Any]
    state: dict[str, Tensor]
    text_config: Any = None
    """Config of the text transformer, which open_clip looks up by name; None: an own tower of open_clip."""
    text_name: str | None = None
    """Name of the transformer on the hub; None: a local folder."""


def write_open_clip(run: ExportRun, folder: Path, *, final: str, hub_name: str | None) -> ExportNotes:
    """Write a folder that open_clip opens, and check it with that library.

    `final` is the path that the folder will have, `hub_name` the repository that it will be uploaded to, if any.
    """
    require("open_clip", extra=_FORMAT)
    for modality in MODALITIES:
        check_plain(run.config.tower_input(modality), _FORMAT)
    families = {EncoderSpec.parse(run.config.tower_input(modality).spec).family for modality in MODALITIES}
    model = _clip_model(run, folder) if families == {"open_clip"} else _timm_and_transformer_model(run, folder)
    state = {**model.state, "logit_scale": run.pair.scale.log()}
    state = {name: value.detach().clone().contiguous() for name, value in state.items()}
    save_file(state, folder / "open_clip_model.safetensors")
    notes, requirements = [_RGB_NOTE], ["open_clip_torch>=3.3"]
    if model.text_config is not None:
        model.text_config.save_pretrained(folder)
        requirements.append("transformers")
        notes.append("open_clip cleans texts before it reads them: HTML entities, broken Unicode and runs of spaces.")
    _write_config(folder, model, text_name=str(folder))  # its present path, for the check
    differences = _check(run, folder)
    if model.text_config is not None:
        name = model.text_name or hub_name or final
        notes.append(
            f"open_clip reads the text tower's config from `{name}`, named in `open_clip_config.json`"
            + ("; if you move the folder, write its new path there." if name == final else ".")
        )
        _write_config(folder, model, text_name=name)
    return ExportNotes(
        library="open_clip",
        task="zero-shot-image-classification",
        code=_CODE,
        shorten="torch.nn.functional.normalize(model.encode_text(…)[:, :{width}], dim=-1)",
        requirements=requirements,
        differences=differences,
        notes=notes,
    )


def _write_config(folder: Path, model: _Model, *, text_name: str) -> None:
    """Write the config; `text_name` is where open_clip finds the text transformer's config and tokenizer."""
    if model.text_config is not None:
        model.config["text_cfg"] |= {"hf_model_name": text_name, "hf_tokenizer_name": text_name}
    write_json(folder / "open_clip_config.json", {"model_cfg": model.config, "preprocess_cfg": model.preprocess})


def _layers(run: ExportRun, modality: Modality, next_step: str) -> tuple[DenseLayer, ...]:
    chain = dense_chain(run.pair.tower(modality), _FORMAT, next_step)
    if chain.has_unit_input:
        raise unsupported(
            _FORMAT,
            f"the projector {run.projector(modality)} normalizes and centers its input, and open_clip's heads do not",
            next_step,
        )
    return chain.layers


def _timm_and_transformer_model(run: ExportRun, folder: Path) -> _Model:
    """Read a timm image encoder and a transformers text encoder with their heads; save the tokenizer."""
    text = open_module(run, "text", _FORMAT)  # encoders before projectors: another projector does not help them
    family = run.config.tower_input("image").fingerprint["family"]
    if family != "timm":
        next_step = _TRANSFORMERS if family in ("hf", "lite") else ""
        reason = f"its image encoder is of the family {family!r}: expected timm, or open_clip for both encoders"
        raise unsupported(_FORMAT, reason, next_step)
    image = open_module(run, "image", _FORMAT)
    preprocess, vision_config = _preprocess_config(run), _vision_config(image.config)
    pooler = _text_pooler(run, text.config)
    layers = {modality: _layers(run, modality, _OTHER_HEADS) for modality in MODALITIES}
    width = run.config.shared_width
    image_head_config, image_head = _image_head(layers["image"], width)
    text_head_config, text_head = _text_head(layers["text"], width)
    text.save_processor(folder)
    transformer: Any = text.module.get_submodule("_transformer" if text.config["kind"] == "sentences" else "_model")
    state: dict[str, Tensor] = transformer.state_dict()
    transformer_state = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    spec = EncoderSpec.parse(run.config.tower_input("text").spec)
    is_on_hub = spec.family == "hf" and not spec.is_path
    return _Model(
        config={
            "embed_dim": width,
            "vision_cfg": {**vision_config, **image_head_config},
            "text_cfg": {
                "hf_model_name": "",
                "hf_tokenizer_name": "",
                "hf_pooler_type": pooler,
                "context_length": int(run.config.tower_input("text").fingerprint["preprocessing"]["max_tokens"]),
                **text_head_config,
            },
        },
        preprocess=preprocess,
        state={
            **_prefixed("visual.trunk", image.module.get_submodule("_model").state_dict()),
            **_prefixed("visual.head", image_head),
            **_prefixed("text.transformer", transformer_state),
            **_prefixed("text.proj", text_head),
        },
        text_config=transformer.config,
        text_name=run.config.tower_input("text").fingerprint["model"] if is_on_hub else None,
    )


def _text_pooler(run: ExportRun, text_config: Mapping[str, Any]) -> str:
    """Return open_clip's pooler of a text encoder; raise a `SettingError` if open_clip cannot run the encoder."""
    architecture = text_config["config"]["model_type"]
    if architecture not in _ARCHITECTURES:
        reason = f"its text encoder is a {architecture}: expected {', '.join(_ARCHITECTURES)}"
        raise unsupported(_FORMAT, reason, _TRANSFORMERS)
    pooler = _POOLERS.get("_".join(text_config["features"]))
    if pooler is None:
        reason = f"its text feature is {run.config.tower_input('text').feature}: expected mean or cls"
        raise unsupported(_FORMAT, reason, _TRANSFORMERS)
    return pooler


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["features"] not in (["pooled"], ["cls"], ["patch_mean"]):
        feature = "+".join(config["features"])
        reason = f"its image feature is {feature}: expected pooled, cls or patch_mean, as timm pools"
        raise unsupported(_FORMAT, reason, _TRANSFORMERS)
    if config["image_size"]:
        reason = "its encoder has the option image_size, and open_clip uses timm's published size"
        raise unsupported(_FORMAT, reason, _TRANSFORMERS)
    return {
        "image_size": config["input_size"][-1],
        "timm_model_name": config["model"],
        "timm_model_pretrained": False,
        "timm_pool": {"pooled": "", "cls": "token", "patch_mean": "avg"}[config["features"][0]],
    }


def _preprocess_config(run: ExportRun) -> dict[str, Any]:
    """Return timm's transform as open_clip's config, if it only resizes to the input size and crops or squeezes."""
    timm = run.config.tower_input("image").fingerprint["preprocessing"]
    modes = {"center": "shortest", "squash": "squash"}
    if timm["crop_pct"] != 1 or timm["crop_mode"] not in modes or timm["interpolation"] not in ("bicubic", "bilinear"):
        raise unsupported(
            _FORMAT,
            f"timm crops this model's images with crop_pct {timm['crop_pct']}, crop_mode {timm['crop_mode']}, "
            f"{timm['interpolation']}, and open_clip resizes to the input size, bicubic or bilinear",
            f"{_TRANSFORMERS}, or an encoder with crop_pct 1",
        )
    return {
        "size": timm["input_size"][-1],
        "mode": "RGB",
        "mean": timm["mean"],
        "std": timm["std"],
        "interpolation": timm["interpolation"],
        "resize_mode": modes[timm["crop_mode"]],
    }


_Head = tuple[dict[str, Any], dict[str, Tensor]]
"""Entries of a head in open_clip's config, and its weights by the names of its modules."""


def _image_head(layers: Sequence[DenseLayer], shared_width: int) -> _Head:
    """Return layers as the head of a timm tower: `linear`, or `mlp` with 2 P hidden units and a hidden bias."""
    if _is_linear(layers):
        kind, name, state = "linear", "proj", {}
    elif _is_mlp(layers, 2 * shared_width):
        kind, name, hidden = "mlp", "mlp.fc2", layers[0]
        bias_P = hidden.weight_PD.new_zeros(2 * shared_width) if hidden.bias_P is None else hidden.bias_P
        state = {"mlp.fc1.weight": hidden.weight_PD, "mlp.fc1.bias": bias_P}
    else:
        raise unsupported(
            _FORMAT,
            "its image projector is neither a linear map nor two of them with a GELU between and 2 P hidden units",
            _OTHER_HEADS,
        )
    state[f"{name}.weight"] = layers[-1].weight_PD
    if layers[-1].bias_P is not None:
        state[f"{name}.bias"] = layers[-1].bias_P
    return {"timm_proj": kind, "timm_proj_bias": layers[-1].bias_P is not None}, state


def _text_head(layers: Sequence[DenseLayer], shared_width: int) -> _Head:
    """Return layers as the head of a transformer: `linear`, or `mlp` with (D + P) / 2 hidden units, without biases."""
    has_bias = any(layer.bias_P is not None for layer in layers)
    if _is_linear(layers) and not has_bias:
        return {"hf_proj_type": "linear"}, {"weight": layers[0].weight_PD}
    if layers and _is_mlp(layers, (layers[0].weight_PD.shape[1] + shared_width) // 2) and not has_bias:
        return {"hf_proj_type": "mlp"}, {"0.weight": layers[0].weight_PD, "2.weight": layers[1].weight_PD}
    raise unsupported(
        _FORMAT,
        "its text projector is neither a linear map without a bias nor two of them with a GELU between and (D + P) / 2 "
        "hidden units",
        _OTHER_HEADS,
    )


def _clip_model(run: ExportRun, folder: Path) -> _Model:
    """Fold both projectors into the linear maps at the end of a CLIP model's own towers."""
    specs = {modality: EncoderSpec.parse(run.config.tower_input(modality).spec) for modality in MODALITIES}
    if specs["image"] != specs["text"]:
        raise unsupported(_FORMAT, f"its towers belong to two models, {specs['image'].text} and {specs['text'].text}")
    import open_clip

    checkpoint = load_checkpoint(open_clip, specs["image"], "cpu")
    state = dict(checkpoint.model.state_dict())
    for modality in MODALITIES:
        _fold_into_tower(state, modality, _layers(run, modality, _OTHER_HEADS_OF_CLIP))
    config = {**open_clip.get_model_config(specs["image"].model), "embed_dim": run.config.shared_width}
    tokenizer = open_clip.get_tokenizer(specs["image"].model)
    if config["text_cfg"].get("hf_tokenizer_name"):
        tokenizer.save_pretrained(str(folder))
    return _Model(config=config, preprocess=dict(open_clip.get_model_preprocess_cfg(checkpoint.model)), state=state)


def _fold_into_tower(state: dict[str, Tensor], modality: str, layers: Sequence[DenseLayer]) -> None:
    """Fold a linear projector into the linear map at the end of an own tower of open_clip."""
    if not _is_linear(layers) or layers[0].bias_P is not None:
        raise unsupported(
            _FORMAT,
            f"the {modality} projector is more than a linear map, and open_clip's towers end in a linear map",
            _OTHER_HEADS_OF_CLIP,
        )
    weight_PD = layers[0].weight_PD.double()
    for name in _LAST_MAPS[modality]:
        keys = [key for key in (name, f"{name}.weight", f"{name}.bias") if key in state]
        for key in keys:
            last = state[key].double()
            state[key] = (last @ weight_PD.T if key == name else weight_PD @ last).float()
        if keys:
            return
    raise unsupported(_FORMAT, f"the {modality} tower does not end in a linear map to fold the projector into")


def _is_linear(layers: Sequence[DenseLayer]) -> bool:
    return len(layers) == 1 and layers[0].is_linear


def _is_mlp(layers: Sequence[DenseLayer], hidden_width: int) -> bool:
    return (
        len(layers) == 2
        and isinstance(layers[0].activation, nn.GELU)
        and layers[0].activation.approximate == "none"
        and layers[1].is_linear
        and len(layers[0].weight_PD) == hidden_width
    )


@torch.inference_mode()
def _check(run: ExportRun, folder: Path) -> dict[str, float]:
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
    except RuntimeError as error:  # some timm networks have another width than they announce to open_clip
        specs = f"{run.config.tower_input('image').spec} with {run.config.tower_input('text').spec}"
        next_step = _TRANSFORMERS if run.config.tower_input("image").fingerprint["family"] == "timm" else ""
        raise unsupported(_FORMAT, f"open_clip cannot run {specs}: {one_line(error)}", next_step) from error
    return run.check_parity("open_clip", vectors)
