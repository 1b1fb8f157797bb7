"""`hf:facebook/dinov2-base` or `hf:/local/folder`: models of transformers, with their own processor.

Image and text models, and audio models of the kind of wav2vec 2.0 (`states`, one per 20 ms, and their `mean`).
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from embedcache.arrays import Array, Floats
from embedcache.encoders.audio import SAMPLE_RATE_HZ, WINDOW_S, AudioEncoder
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.models import (
    PixelScale,
    PixelTransform,
    build_graph,
    build_image_encoder,
    build_text_encoder,
    open_tokenizer,
    plain_json,
    split_transform,
)
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.weights import (
    ModelFolder,
    find_model_class,
    find_model_folder,
    load_config,
    load_part,
    load_pretrained,
)
from embedcache.errors import SettingError
from embedcache.modeling.features import (
    TEXT_POOLING,
    ImageFeatures,
    TextFeatures,
    requested_layers,
    state_features,
    untie_last_state,
)
from embedcache.store.layout import Axis

IMAGE_POOLING: Mapping[str, str] = {
    "pooled": "the model's own pooled output",
    "cls": "last state of the class token",
    "patch_mean": "mean over the patch tokens, or over the positions of the last map",
    "patches": "last states of the patch tokens, or the positions of the last map, row by row",
}
TEXT_POOLS: Mapping[str, Sequence[str]] = {"mean": ("mean",), "cls": ("cls",)}
STATES_POOLING: Mapping[str, str] = {"mean": "mean over the last states", "states": "last states, one per frame"}
SPEECH_TYPES = ("data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
"""Types of models that are a stack of convolutions and a transformer, one state per frame."""


def open_transformers(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open an image, text or audio model. Options: `revision` (of a hub model), for texts also `max_tokens`.

    If a model has several modalities, such as CLIP, the tower of the requested one is opened.
    """
    check_options(spec, ("max_tokens", "revision") if modality == "text" else ("revision",))
    folder = find_model_folder(spec)

    openers = {"image": _open_image, "text": _open_text, "audio": _open_audio}
    if modality not in openers:
        check_modality(spec, modality, _served(load_config(folder.path)))  # names the modality that the model serves

    return openers[modality](spec, folder, settings)


def _open_image(spec: EncoderSpec, folder: ModelFolder, settings: EncoderSettings) -> Encoder:
    model, weights = _load_tower(spec, folder, "image")
    return build_image_encoder(
        ImageFeatures(model, requested_layers(settings.features)),
        pixel_transform(folder.path),
        spec.fingerprint(weights=weights, pooling=IMAGE_POOLING, revision=folder.revision),
        settings,
        config=_graph_config(model),
    )


def _open_text(spec: EncoderSpec, folder: ModelFolder, settings: EncoderSettings) -> Encoder:
    model, weights = _load_tower(spec, folder, "text")
    return build_text_encoder(
        TextFeatures(model, requested_layers(settings.features), TEXT_POOLS),
        open_tokenizer(folder.path, max_tokens=spec.int_option("max_tokens"), model=model),
        spec.fingerprint(weights=weights, pooling=TEXT_POOLING, revision=folder.revision),
        settings,
        config=_graph_config(model),
    )


def _graph_config(model: Any) -> dict[str, Any]:
    return {"transformers": version("transformers"), "model": plain_json(model.config.to_dict())}


def _load_tower(spec: EncoderSpec, folder: ModelFolder, modality: Modality) -> tuple[Any, str]:
    """Load a model, or its tower of one modality; return it with the digest of its weights."""
    config, loader = find_tower(folder.path, modality)
    check_modality(spec, modality, _served(config))
    return load_pretrained(loader, folder.path, config)


def find_tower(folder: Path, modality: Modality) -> tuple[Any, Any]:
    """Return the config of a folder's model, or of its tower of a modality, and the class that loads it."""
    import transformers

    config = load_config(folder)
    part = getattr(config, "vision_config" if modality == "image" else "text_config", None)
    if part is None:
        return config, find_model_class(config)
    if type(part) not in transformers.MODEL_MAPPING:
        raise SettingError(f"{folder} is a {config.model_type}, whose {modality} tower cannot be loaded alone")
    return part, transformers.AutoModel


def _served(config: Any) -> Modality:
    if config.model_type in SPEECH_TYPES or hasattr(config, "num_mel_bins"):
        return "audio"
    is_vision = hasattr(config, "num_channels") and not hasattr(config, "vocab_size")
    return "image" if is_vision else "text"


def pixel_transform(folder: Path) -> PixelTransform:
    """Return the transform of the image processor in a model's folder.

    Raises:
        PathError: the folder has no image processor.
        SettingError: the processor returns a different shape per image.
    """
    from transformers import AutoImageProcessor

    processor = load_part(AutoImageProcessor, folder, "image processor", "add preprocessor_config.json")

    def whole(image: Image) -> Array:
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    def to_pixels(image: Image) -> Array:
        pixels = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(pixels[0])

    published = published_settings(processor)
    mean = [0.0] * 3
    std = [1.0] * 3
    if published.get("do_normalize"):
        mean = published["image_mean"]
        std = published["image_std"]

    # The library's processors scale mean and std to the range of the pixels, not the pixels to [0, 1].
    pixel_range = 1.0 / published["rescale_factor"] if published.get("do_rescale") else 1.0
    scale = PixelScale(torch.tensor(mean) * pixel_range, torch.tensor(std) * pixel_range)
    return split_transform(whole, to_pixels, scale, published)


def published_settings(processor: Any) -> dict[str, Any]:
    """Return the settings of an image processor or feature extractor, as JSON values."""
    return plain_json({name: value for name, value in processor.to_dict().items() if not name.startswith("_")})


def _open_audio(spec: EncoderSpec, folder: ModelFolder, settings: EncoderSettings) -> Encoder:
    """Open a stack of convolutions and a transformer.

    A recording is cut into windows of 30 s. Windows overlap as far as the convolutions reach, so that their frames
    equal the frames of the whole recording.
    """
    import transformers

    config = load_config(folder.path)
    check_modality(spec, "audio", _served(config))
    expected = f"expected {', '.join(SPEECH_TYPES)} at {SAMPLE_RATE_HZ} Hz without an adapter"
    if config.model_type not in SPEECH_TYPES or getattr(config, "add_adapter", False):
        raise SettingError(f"{spec.text} is a {config.model_type}: {expected}; for Whisper use the family whisper")

    extractor = load_part(
        transformers.AutoFeatureExtractor, folder.path, "feature extractor", "add preprocessor_config.json"
    )
    if extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise SettingError(f"{spec.text} takes {extractor.sampling_rate} Hz: {expected}; choose another model")

    model, weights = load_pretrained(transformers.AutoModel, folder.path, config)
    layers = requested_layers(settings.features)
    field, stride = _receptive_field(config)

    def prepare(audio_N: Floats) -> Array:
        inputs = extractor(audio_N, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        return np.ascontiguousarray(inputs["input_values"][0], dtype=np.float32)

    def split(audio_N: Array) -> list[Array]:
        step = WINDOW_S * SAMPLE_RATE_HZ // stride * stride
        return [audio_N[start : start + step + field - stride] for start in range(0, len(audio_N) - field + 1, step)]

    # A layer that the model lacks is left out, as with other features that an encoder cannot derive.
    layer_states = [f"layer{layer}.states" for layer in layers if layer <= config.num_hidden_layers]
    fingerprint = spec.fingerprint(
        weights=weights,
        pooling=STATES_POOLING,
        revision=folder.revision,
        preprocessing={**published_settings(extractor), "window_s": WINDOW_S},
    )
    return AudioEncoder(
        build_graph(_SpeechStates(model, layers), settings, fingerprint),
        prepare=prepare,
        split=split,
        states=["states", *layer_states],
        width=int(config.hidden_size),
        min_samples=field,
        long_window=WINDOW_S * SAMPLE_RATE_HZ,
        num_tokens=lambda audio_N: (len(audio_N) - field) // stride + 1,
        axis=Axis(kind="time", rate_hz=SAMPLE_RATE_HZ / stride, start_s=field / 2 / SAMPLE_RATE_HZ),
        fingerprint=fingerprint,
        settings=settings,
    )


def _receptive_field(config: Any) -> tuple[int, int]:
    """Return the number of samples that a frame is computed from, and those from one frame to the next."""
    field = 1
    stride = 1
    for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
        field += (kernel - 1) * stride
        stride *= step
    return field, stride


class _SpeechStates(torch.nn.Module):
    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        untie_last_state(model, layers)
        self._model = model
        self._layers = layers

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return state_features(self._model, {"input_values": inputs}, self._layers, lambda state: {"states": state})[1]
