"""Prepare images as for the frozen encoder at extraction."""

import importlib
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from .images import lite_crop, rgb_image


class EmbedcacheImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Converts images to RGB, upright and on white, then resizes, crops and normalizes them.

    Args:
        kind: `timm`: timm's transform; `lite`: that of EfficientNet-Lite; `transformers`: a processor of transformers.
        settings: settings of the transform, or of the processor.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, kind: str = "timm", settings: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.kind = kind
        self.settings = settings or {}

    def preprocess(self, images: Any, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Convert images of any size and mode to `pixel_values`, (B, 3, H, W) float32.

        Options, such as `do_normalize`, are those of a processor of transformers; other transforms have none.
        """
        rgb_images = [rgb_image(to_pil_image(image)) for image in make_flat_list_of_images(images)]
        if self.kind == "transformers":
            return self._library_processor()(rgb_images, return_tensors=return_tensors, **options)
        transform = self._lite if self.kind == "lite" else self._timm_transform()
        return BatchFeature({"pixel_values": np.stack([transform(image) for image in rgb_images])}, return_tensors)

    def _library_processor(self) -> Any:
        name = self.settings["image_processor_type"]
        processor = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Pil"))
        return processor.from_dict(self.settings)  # transformers 4 has no names that end in Pil

    def _timm_transform(self) -> Any:
        data = importlib.import_module("timm.data")
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()}
        transform = data.create_transform(**settings, is_training=False)
        return lambda image: transform(image).numpy()

    def _lite(self, image: Image.Image) -> Any:
        pixels = torch.from_numpy(lite_crop(image, self.settings["size_px"])).float()
        return ((pixels - self.settings["mean"]) / self.settings["std"]).numpy()
