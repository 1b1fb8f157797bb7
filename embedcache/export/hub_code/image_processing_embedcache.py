"""Pictures as the frozen encoder was fed them."""

import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from embedcache.encoders.image_features import crop
from embedcache.sources.images import rgb_image


class EmbedcacheImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Resizes, cuts and scales pictures.

    Args:
        kind: `timm`, its own transform; `lite`, that of EfficientNet-Lite.
        settings: of the transform.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, kind: str = "timm", settings: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.kind, self.settings = kind, settings or {}

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """Turn pictures of any size and mode into `pixel_values`, (B, 3, H, W) float32."""
        pictures = [rgb_image(to_pil_image(image)) for image in make_flat_list_of_images(images)]
        scale = self._lite if self.kind == "lite" else self._timm()
        return BatchFeature({"pixel_values": np.stack([scale(picture) for picture in pictures])}, return_tensors)

    def _timm(self) -> Any:
        data = importlib.import_module("timm.data")
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()}
        transform = data.create_transform(**settings, is_training=False)
        return lambda picture: transform(picture).numpy()

    def _lite(self, picture: Image.Image) -> Any:
        pixels = torch.from_numpy(crop(picture, self.settings["size_px"])).float()
        return ((pixels - self.settings["mean"]) / self.settings["std"]).numpy()
