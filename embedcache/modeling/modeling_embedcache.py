"""Two frozen encoders with trained projectors into a shared space, with the interface of transformers' CLIPModel."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.clip.modeling_clip import CLIPOutput

from .features import Dense, ImageFeatures, TextFeatures, TimmFeatures, derive_features, patch_pools
from .heads import build_tower


class EmbedcacheConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    """Config of both towers.

    Args:
        image: encoder, features and projector of the image tower.
        text: encoder, features and projector of the text tower.
        projection_dim: width of the shared space.
    """

    model_type = "embedcache"

    def __init__(
        self,
        image: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        projection_dim: int = 0,
        **others: Any,
    ) -> None:
        self.image = dict(image or {})
        self.text = dict(text or {})
        self.projection_dim = projection_dim
        super().__init__(**others)


class EmbedcacheModel(transformers.PreTrainedModel):  # type: ignore[misc]
    """An aligned pair: `get_image_features`, `get_text_features`, and `logits_per_image` of both."""

    config_class = EmbedcacheConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: EmbedcacheConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # some networks compute with their tensors while they are built
            self.image_side = ImageTower(config.image, config.projection_dim)
            self.text_side = TextTower(config.text, config.projection_dim)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # The weights file contains every tensor that affects the output.
        for module in self.modules():
            module._non_persistent_buffers_set.clear()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load the model.

        Raises:
            RuntimeError: this version of transformers has other names for the encoders' weights.
        """
        model, info = super().from_pretrained(*arguments, output_loading_info=True, **options)
        if info["missing_keys"] or info["unexpected_keys"]:
            missing = sorted(info["missing_keys"] or info["unexpected_keys"])
            written_with = getattr(model.config, "transformers_version", None) or "VERSION"
            raise RuntimeError(
                f"transformers {transformers.__version__} has other names for {len(missing)} weights of the encoders, "
                f"such as {missing[0]}; install the version that wrote them: pip install transformers=={written_with}"
            )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every weight is loaded from the file."""

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """Embed prepared images: (B, 3, H, W) float32 -> (B, P) float32, rows of length 1."""
        return normalize(self.image_side(pixel_values), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Embed token ids: (B, T), padded on the right -> (B, P) float32, rows of length 1."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return normalize(self.text_side(input_ids, mask), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CLIPOutput:
        """Compare images with texts; either may be omitted.

        Returns:
            `image_embeds` and `text_embeds`, rows of length 1; `logits_per_image`, their scaled cosine similarities;
            `logits_per_text`, its transpose.
        """
        image = None if pixel_values is None else self.get_image_features(pixel_values)
        text = None if input_ids is None else self.get_text_features(input_ids, attention_mask)
        logits = None if image is None or text is None else self.logit_scale.exp() * image @ text.t()
        return CLIPOutput(
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            image_embeds=image,
            text_embeds=text,
        )


class ImageTower(nn.Module):
    """Embed images: (B, 3, H, W) -> (B, P), not normalized."""

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        self.encoder = _image_encoder(config)
        self.tower = _tower(config, width)
        self._names = config["features"]
        self.pools = patch_pools(self._names, config["shapes"], config["input_size"])

    def forward(self, pixel_values: Tensor) -> Tensor:
        parts = derive_features(self._names, self.encoder(pixel_values), self.pools)
        projected: Tensor = self.tower(_concatenate(list(parts.values())))
        return projected


class TextTower(nn.Module):
    """Embed texts: token ids and mask, (B, T) -> (B, P), not normalized."""

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        self.encoder = _text_encoder(config)
        self.tower = _tower(config, width)
        self._names = config["features"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        parts = [outputs[name] for name in self._names]
        lengths_B = attention_mask.sum(dim=1)
        num_before = sum(1 if part.ndim == 2 else part.shape[1] for part in parts[:-1])
        projected: Tensor = self.tower(_concatenate(parts), None if parts[-1].ndim == 2 else lengths_B + num_before)
        return projected


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate vectors and tokens along the token axis; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part if part.ndim == 3 else part[:, None] for part in parts], dim=1)


def _image_encoder(config: Mapping[str, Any]) -> nn.Module:
    if config["kind"] == "transformers":
        return ImageFeatures(_pretrained(config), config["layers"])
    timm = importlib.import_module("timm")  # by name: transformers requires every library of an import statement
    model = timm.create_model(config["model"], pretrained=False, num_classes=0)
    if config.get("image_size"):
        model.set_input_size(img_size=(config["image_size"], config["image_size"]))
    return TimmFeatures(model, config["layers"])


def _text_encoder(config: Mapping[str, Any]) -> nn.Module:
    heads = [
        Dense(
            head["input_width"],
            head["output_width"],
            has_bias=head["has_bias"],
            activation=getattr(nn, head["activation"])(),
        )
        for head in config["heads"]
    ]
    return TextFeatures(_pretrained(config), config["layers"], config["pools"], heads, config["width"])


def _pretrained(config: Mapping[str, Any]) -> nn.Module:
    settings = dict(config["config"])
    model_config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model: nn.Module = getattr(transformers, config["class"])._from_config(model_config)
    return model


def _tower(config: Mapping[str, Any], width: int) -> nn.Module:
    return build_tower(config["tower"], config["projector"], config["parameters"], config["width"], width)
