"""`hf:facebook/dinov2-base` or `hf:/local/folder`: image and text models of transformers, with their own processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, new

from embedcache.arrays import Array
from embedcache.encoders.backends import torch_graph
from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.image import ImageEncoder, ImageModel, Scale, Transform, plain_json, split_transform
from embedcache.encoders.image_features import ImageFeatures, native_features, requested_layers, untie
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.text import TextEncoder, max_tokens_option, open_tokenizer, text_graph
from embedcache.encoders.text_features import POOLING as TEXT_POOLING
from embedcache.encoders.text_features import TextFeatures
from embedcache.encoders.weights import ModelFolder, load_config, load_pretrained, model_folder
from embedcache.errors import PathError, SettingError
from embedcache.provenance import digest

IMAGE_POOLING: Mapping[str, str] = {
    "pooled": "the model's own pooled output",
    "cls": "last state of the class token",
    "patch_mean": "mean over the patch tokens, or over the positions of the last map",
    "patches": "last states of the patch tokens, or the positions of the last map, row by row",
}


def open_transformers(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a model of images or of texts. Options: `revision` (of a hub's model), for texts also `max_tokens`.

    A model of both, such as CLIP, gives the tower that is asked for.

    Raises:
        PathError: no such folder, and no such model on a hub that can be reached.
        SettingError: the model is not of that modality, or onnxruntime was asked for with images.
        ArtifactError: weights that do not fit.
    """
    check_options(spec, ("revision",) if modality == "image" else ("max_tokens", "revision"))
    folder = model_folder(spec)
    config, loader = tower_of(folder.path, modality)
    check_modality(spec, modality, "image" if _is_vision(config) else "text")
    model, weights = load_pretrained(loader, folder.path, config)
    open_tower = _open_image if modality == "image" else _open_text
    return open_tower(spec, folder, model, weights, settings)


def tower_of(folder: Path, modality: Modality) -> tuple[Any, Any]:
    """Find the config of a folder's model, or of the half that a modality asks for, and what loads it.

    Raises:
        PathError: there is no model.
        SettingError: it has no such half that stands alone.
    """
    import transformers

    config = load_config(folder)
    part = getattr(config, "vision_config" if modality == "image" else "text_config", None)
    if part is None:
        return _encoder_half(config, folder, transformers)
    if type(part) not in transformers.MODEL_MAPPING:
        raise SettingError(f"{folder} is a {config.model_type}, whose {modality} tower transformers can't open alone")
    return part, transformers.AutoModel


def _encoder_half(config: Any, folder: Path, transformers: Any) -> tuple[Any, Any]:
    if not getattr(config, "is_encoder_decoder", False):
        return config, transformers.AutoModel
    halves = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}
    if config.model_type not in halves:
        raise SettingError(
            f"{folder} is an encoder-decoder of type {config.model_type}; "
            f"of these only {' and '.join(halves)} can be opened"
        )
    return config, getattr(transformers, halves[config.model_type])


def _is_vision(config: Any) -> bool:
    return hasattr(config, "num_channels") and not hasattr(config, "vocab_size")


def _open_image(
    spec: EncoderSpec, folder: ModelFolder, model: torch.nn.Module, weights: str, settings: EncoderSettings
) -> ImageEncoder:
    transform, scale, published, input_size = pixel_transform(folder.path)
    layers = requested_layers(settings.features)
    untie(model, layers)
    module = ImageModel(ImageFeatures(model, layers), scale, input_size=input_size, asked=settings.features)
    return ImageEncoder(
        graph=torch_graph(module, settings, "hf image"),
        transform=transform,
        features=module.features,
        settings=settings,
        fingerprint=Fingerprint(
            family="hf",
            model=spec.folder if spec.is_path else spec.model,
            revision=folder.revision,
            weights=weights,
            preprocessing=published,
            pooling={name: IMAGE_POOLING[name] for name in native_features(module.features)},
            precision=settings.precision,
        ),
    )


def save_processor(folder: Path, out: Path) -> None:
    """Write a folder's image processor into another."""
    from transformers import AutoImageProcessor

    AutoImageProcessor.from_pretrained(folder).save_pretrained(out)


def pixel_transform(folder: Path) -> tuple[Transform, torch.nn.Module, dict[str, Any], tuple[int, ...]]:
    """Open a folder's image processor: up to uint8, what scales its result, its settings, and the shape it gives.

    Raises:
        PathError: there is none.
        SettingError: it gives each picture a shape of its own.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PathError(f"no image processor in {folder}: {reason}; it needs preprocessor_config.json") from error

    def whole(image: Image) -> Array:
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    def to_pixels(image: Image) -> Array:
        pixels = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(pixels[0])

    published = {name: value for name, value in processor.to_dict().items() if not name.startswith("_")}
    sizes = {whole(new("RGB", size)).shape for size in ((320, 200), (200, 320))}
    if len(sizes) != 1:
        raise SettingError(
            f"the image processor in {folder} keeps each picture's own shape {sorted(sizes)}; "
            "a batch needs one: set do_center_crop, or a size with height and width, in preprocessor_config.json"
        )
    transform, scale = split_transform(whole, to_pixels, _scale(published))
    return transform, scale, plain_json(published), sizes.pop()


def _scale(published: Mapping[str, Any]) -> Scale:
    # The library's processors bring mean and std to the range of the pixels, instead of the pixels to [0, 1].
    pixel_range = 1.0 / published["rescale_factor"] if published.get("do_rescale") else 1.0
    is_normalized = published.get("do_normalize")
    mean, std = (published["image_mean"], published["image_std"]) if is_normalized else ([0.0] * 3, [1.0] * 3)
    return Scale(*(torch.tensor(values) * pixel_range for values in (mean, std)))


def _open_text(
    spec: EncoderSpec, folder: ModelFolder, model: torch.nn.Module, weights: str, settings: EncoderSettings
) -> TextEncoder:
    tokenizer = open_tokenizer(folder.path, max_tokens=max_tokens_option(spec), model=model)
    config: Any = model.config
    what = {"name": f"hf-{spec.folder}", "config": digest(config.to_dict())}
    layers = requested_layers(settings.features)
    untie(model, layers)
    made = text_graph(
        TextFeatures(model, layers).eval(),
        settings=settings,
        weights=weights,
        what=what,
        pad_id=tokenizer.pad_id,
    )
    return TextEncoder(
        graph=made.graph,
        tokenize=tokenizer,
        features=made.features,
        fingerprint=Fingerprint(
            family="hf",
            model=spec.folder if spec.is_path else spec.model,
            revision=folder.revision,
            weights=weights,
            preprocessing=tokenizer.preprocessing,
            pooling={name: TEXT_POOLING[name] for name in native_features(made.features)},
            backend=made.backend,
            precision=settings.precision,
        ),
        pad_id=tokenizer.pad_id,
        settings=settings,
    )
