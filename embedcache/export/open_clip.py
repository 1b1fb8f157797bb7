"""A folder that open_clip opens as `local-dir:`: config, weights, tokenizer. Its heads take features as they are.

The heads that open_clip puts on its towers, with the weights of a projector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedcache.encoders import open_clip as ours
from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.export.base import (
    MODALITIES,
    TEXTS,
    Run,
    Written,
    check_parity,
    check_plain,
    expected,
    pictures,
    refusal,
)
from embedcache.export.dense import Layer, dense_chain
from embedcache.export.towers import open_image_tower, open_text_tower
from embedcache.provenance import write_json
from embedcache.registry import require

_FORM = "open-clip"
_CODE = """\
import open_clip
import torch
from PIL import Image

name = "local-dir:{folder}"  # the path of this folder, or hf-hub:OWNER/NAME
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
model.eval()

pictures = torch.stack([preprocess(Image.new("RGB", (320, 200), "red"))])
texts = tokenizer(["a red picture", "two dogs on a hill"])
with torch.inference_mode():
    image = model.encode_image(pictures, normalize=True)
    text = model.encode_text(texts, normalize=True)
    print((model.logit_scale.exp() * image @ text.T).softmax(dim=-1))
"""
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_ARCHITECTURES = ("bert", "roberta", "xlm-roberta")


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What goes into the folder.

    Args:
        config: `model_cfg`.
        preprocess: `preprocess_cfg`.
        state: the weights.
        text_config: of the transformer whose config open_clip looks for by name; None: it has its own.
        text_name: the hub's name of that transformer; None: it is a folder here.
    """

    config: dict[str, Any]
    preprocess: dict[str, Any]
    state: dict[str, Tensor]
    text_config: Any = None
    text_name: str | None = None


def write_open_clip(run: Run, folder: Path, *, final: str, hub_name: str | None) -> Written:
    """Write a folder that open_clip opens, and open it there.

    Args:
        run: what is exported.
        folder: to fill.
        hub_name: the repository that the folder is for, where it is.
        final: the path that the folder will have.

    Raises:
        MissingExtraError: open_clip is not installed.
        SettingError: an encoder, a preprocessing or a head that open_clip does not have; says which.
        ArtifactError: open_clip computes other vectors.
    """
    require("open_clip", extra=_FORM)
    for modality in MODALITIES:
        check_plain(run.config.tower_input(modality), _FORM)
    families = {EncoderSpec.parse(run.config.tower_input(modality).spec).family for modality in MODALITIES}
    model = _own_towers(run, folder) if families == {"open_clip"} else _timm_and_transformer(run, folder)
    state = {**model.state, "logit_scale": run.pair.scale.detach().log()}
    save_file({name: value.detach().clone().contiguous() for name, value in state.items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    notes = []
    if model.text_config is not None:
        model.text_config.save_pretrained(folder)
        _name_text(model, str(folder))  # for the check
        notes.append("open_clip cleans texts before it reads them: HTML entities, broken Unicode and runs of spaces.")
    _write_config(folder, model)
    differences = _check(run, folder)
    if model.text_config is not None:
        name = model.text_name or hub_name or final
        _name_text(model, name)
        notes.append(f"open_clip reads the text tower's config from `{name}`, named in `open_clip_config.json`"
                     + ("; where the folder moves, write its new path there." if name == final else "."))  # fmt: skip
        _write_config(folder, model)
    return Written(
        library="open_clip",
        task="zero-shot-image-classification",
        code=_CODE,
        needs=("open_clip_torch", *(["transformers"] if model.text_config is not None else [])),
        differences=differences,
        notes=notes,
    )


def _name_text(model: _Model, name: str) -> None:
    """Say where the text tower's config and tokenizer are found; the weights are in the folder."""
    model.config["text_cfg"] |= {"hf_model_name": name, "hf_tokenizer_name": name}


def _write_config(folder: Path, model: _Model) -> None:
    write_json(folder / "open_clip_config.json", {"model_cfg": model.config, "preprocess_cfg": model.preprocess})


def _layers(run: Run, modality: Modality) -> tuple[Layer, ...]:
    chain = dense_chain(run.pair.tower(modality), _FORM)
    if chain.is_scaled:
        raise refusal(_FORM, f"the projector {run.projector(modality)} takes vectors of length 1, centered, and "
                      "open_clip's heads take them as the encoder gave them", NEXT)  # fmt: skip
    return chain.layers


def _timm_and_transformer(run: Run, folder: Path) -> _Model:
    layers = {modality: _layers(run, modality) for modality in MODALITIES}
    width = run.config.shared_width
    head, text_kind = image_head(layers["image"], width), text_head(layers["text"], width)
    preprocess = _preprocess(run)
    image, text = open_image_tower(run, _FORM), open_text_tower(run, _FORM)
    pooler = _pooler(text.about, run)
    text.save(folder)
    transformer = _part(text.module, "_transformer" if text.about["kind"] == "sentences" else "_model")
    family, _, name = run.config.text.spec.partition(":")
    is_on_hub = not EncoderSpec(family, name.partition(",")[0]).is_path and family == "hf"
    return _Model(
        config={
            "embed_dim": width,
            "vision_cfg": {**_vision(image.about), **head.config},
            "text_cfg": {
                "hf_model_name": "",
                "hf_tokenizer_name": "",
                "hf_pooler_type": pooler,
                "context_length": int(run.config.text.fingerprint["preprocessing"]["max_tokens"]),
                **text_kind.config,
            },
        },
        preprocess=preprocess,
        state={
            **_named("visual.trunk", _part(image.module, "_model").state_dict()),
            **_named("visual.head", head.state),
            **_named("text.transformer", _without_pooler(transformer.state_dict())),
            **_named("text.proj", text_kind.state),
        },
        text_config=transformer.config,
        text_name=run.config.text.fingerprint["model"] if is_on_hub else None,
    )


def _part(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)


def _named(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _without_pooler(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("pooler.")}


def _vision(about: Mapping[str, Any]) -> dict[str, Any]:
    if about["features"] not in (["pooled"], ["cls"], ["patch_mean"]):
        raise refusal(_FORM, f"its image feature is {'+'.join(about['features'])}, and timm pools pooled, cls or "
                             "patch_mean")  # fmt: skip
    if about["image_size"]:
        raise refusal(_FORM, "the encoder has the option image_size, and open_clip makes timm's networks at their own")
    return {
        "image_size": about["input_size"][-1],
        "timm_model_name": about["model"],
        "timm_model_pretrained": False,
        "timm_pool": {"pooled": "", "cls": "token", "patch_mean": "avg"}[about["features"][0]],
    }


def _preprocess(run: Run) -> dict[str, Any]:
    """Say timm's transform in open_clip's words: to the size, the middle cut out or squeezed; nothing else."""
    fingerprint = run.config.image.fingerprint
    if fingerprint["family"] != "timm":
        raise refusal(_FORM, f"its image encoder is of the family {fingerprint['family']!r}, and open_clip has towers "
                             "of timm and its own")  # fmt: skip
    timm = fingerprint["preprocessing"]
    modes = {"center": "shortest", "squash": "squash"}
    if timm["crop_pct"] != 1 or timm["crop_mode"] not in modes or timm["interpolation"] not in ("bicubic", "bilinear"):
        raise refusal(
            _FORM, f"timm crops this model's pictures with crop_pct {timm['crop_pct']}, crop_mode {timm['crop_mode']}, "
            f"{timm['interpolation']}, and open_clip resizes to the very size, bicubic or bilinear",
            "use embedcache export transformers, or an encoder with crop_pct 1",
        )  # fmt: skip
    return {
        "size": timm["input_size"][-1],
        "mode": "RGB",
        "mean": timm["mean"],
        "std": timm["std"],
        "interpolation": timm["interpolation"],
        "resize_mode": modes[timm["crop_mode"]],
    }


def _pooler(about: Mapping[str, Any], run: Run) -> str:
    kind = about["config"]["model_type"]
    if kind not in _ARCHITECTURES:
        raise refusal(_FORM, f"its text encoder is a {kind}, and open_clip has {', '.join(_ARCHITECTURES)}")
    name = "_".join(about["features"])
    if name not in _POOLERS:
        raise refusal(_FORM, f"its text feature is {run.config.text.feature}, and open_clip pools mean and cls")
    return _POOLERS[name]


def _own_towers(run: Run, folder: Path) -> _Model:
    """Fold both projectors into the linear maps that a CLIP's towers end in."""
    specs = {modality: EncoderSpec.parse(run.config.tower_input(modality).spec) for modality in MODALITIES}
    if specs["image"] != specs["text"]:
        raise refusal(_FORM, f"its towers are of two models, {specs['image'].text} and {specs['text'].text}")
    library = require("open_clip", extra=_FORM)
    checkpoint = ours.load_checkpoint(library, specs["image"], "cpu")
    state = dict(checkpoint.model.state_dict())
    for modality in MODALITIES:
        fold_behind(state, modality, _layers(run, modality))
    config = {**library.get_model_config(specs["image"].model), "embed_dim": run.config.shared_width}
    tokenizer = library.get_tokenizer(specs["image"].model)
    if config["text_cfg"].get("hf_tokenizer_name"):
        tokenizer.save_pretrained(str(folder))
    return _Model(config=config, preprocess=dict(library.get_model_preprocess_cfg(checkpoint.model)), state=state)


@torch.inference_mode()
def _check(run: Run, folder: Path) -> dict[str, float]:
    try:
        found = _vectors(folder)
    except RuntimeError as error:  # some networks of timm give open_clip another width than they announce
        reason = " ".join(str(error).split())[:150]
        spec = run.config.image.spec
        raise refusal(_FORM, f"open_clip can't run {spec} with {run.config.text.spec}: {reason}") from error
    return {modality: check_parity("open_clip", found[modality], expected(run, modality)) for modality in MODALITIES}


def _vectors(folder: Path) -> dict[Modality, Tensor]:
    """Embed the example pictures and texts with open_clip."""
    library = require("open_clip", extra=_FORM)
    name = f"local-dir:{folder}"
    model, _, preprocess = library.create_model_and_transforms(name)
    tokenizer = library.get_tokenizer(name)
    model.eval()
    return {
        "image": model.encode_image(torch.stack([preprocess(picture) for picture in pictures()]), normalize=True),
        "text": model.encode_text(tokenizer(list(TEXTS)), normalize=True),
    }


NEXT = "train with --projector openclip-linear or openclip-mlp, or use embedcache export transformers"
_LAST = {
    "image": (("visual.proj", "matrix"), ("visual.head.proj", "linear"), ("visual.attnpool.c_proj", "linear")),
    "text": (("text_projection", "matrix"), ("text.text_projection", "matrix"), ("text.text_projection", "linear"),
             ("text.proj", "linear")),
}  # fmt: skip
"""Where a tower of open_clip's own ends in a linear map: a table (D, P), or a layer."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head.

    Args:
        config: what names it in open_clip's config.
        state: its weights, by the names of its modules.
    """

    config: Mapping[str, Any]
    state: Mapping[str, Tensor]


def image_head(layers: Sequence[Layer], shared_width: int) -> Head:
    """Put layers into the head of a timm tower: `linear`, or `mlp`, 2 P wide inside and with a bias there.

    Raises:
        SettingError: they have another shape.
    """
    if _is_linear(layers):
        state = {"proj.weight": layers[0].weight_PD, **_bias("proj.bias", layers[0])}
        return Head(config={"timm_proj": "linear", "timm_proj_bias": layers[0].bias_P is not None}, state=state)
    if _is_mlp(layers, 2 * shared_width):
        hidden, output = layers
        state = {
            "mlp.fc1.weight": hidden.weight_PD,
            "mlp.fc1.bias": hidden.weight_PD.new_zeros(2 * shared_width) if hidden.bias_P is None else hidden.bias_P,
            "mlp.fc2.weight": output.weight_PD,
            **_bias("mlp.fc2.bias", output),
        }
        return Head(config={"timm_proj": "mlp", "timm_proj_bias": output.bias_P is not None}, state=state)
    raise refusal(_FORM, "the image projector is no linear map, and no two of them with a GELU between, twice the "
                         "shared width inside", NEXT)  # fmt: skip


def text_head(layers: Sequence[Layer], shared_width: int) -> Head:
    """Put layers into the head of a transformer: `linear`, or `mlp`, (D + P) / 2 wide inside, both without biases.

    Raises:
        SettingError: they have another shape.
    """
    has_bias = any(layer.bias_P is not None for layer in layers)
    if _is_linear(layers) and not has_bias:
        return Head(config={"hf_proj_type": "linear"}, state={"weight": layers[0].weight_PD})
    if layers and _is_mlp(layers, (layers[0].weight_PD.shape[1] + shared_width) // 2) and not has_bias:
        state = {"0.weight": layers[0].weight_PD, "2.weight": layers[1].weight_PD}
        return Head(config={"hf_proj_type": "mlp"}, state=state)
    raise refusal(_FORM, "the text projector is no linear map without a bias, and no two of them with a GELU between, "
                         "(D + P) / 2 wide inside", NEXT)  # fmt: skip


def fold_behind(state: dict[str, Tensor], modality: str, layers: Sequence[Layer]) -> None:
    """Put a linear map behind a tower of open_clip's own into the linear map that the tower ends in.

    Args:
        state: of the whole model; changed in place.
        modality: `image` or `text`.
        layers: of the projector.

    Raises:
        SettingError: the projector is more than a linear map, or the tower does not end in one.
    """
    if not _is_linear(layers) or layers[0].bias_P is not None:
        raise refusal(_FORM, f"the {modality} projector is more than a linear map, and open_clip's towers end in one",
                      "train with --projector openclip-linear")  # fmt: skip
    weight_PD = layers[0].weight_PD.double()
    for name, kind in _LAST[modality]:
        if kind == "matrix" and name in state:
            state[name] = (state[name].double() @ weight_PD.T).float()
            return
        if kind == "linear" and f"{name}.weight" in state:
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in state:
                    state[key] = (weight_PD @ state[key].double()).float()
            return
    raise refusal(_FORM, f"the {modality} tower does not end in a linear map that could take the projector in")


def _is_linear(layers: Sequence[Layer]) -> bool:
    return len(layers) == 1 and isinstance(layers[0].activation, nn.Identity)


def _is_mlp(layers: Sequence[Layer], hidden_width: int) -> bool:
    return (
        len(layers) == 2
        and isinstance(layers[0].activation, nn.GELU)
        and layers[0].activation.approximate == "none"
        and isinstance(layers[1].activation, nn.Identity)
        and len(layers[0].weight_PD) == hidden_width
    )


def _bias(name: str, layer: Layer) -> dict[str, Tensor]:
    return {} if layer.bias_P is None else {name: layer.bias_P}
