"""Settings of an encoder. Nothing heavy is imported here, so that the command line starts quickly."""

from typing import Literal

from pydantic import Field, field_validator

from embedcache.devices import AUTO
from embedcache.errors import SettingError
from embedcache.settings import Settings, setting


class EncoderSettings(Settings):
    """Settings of an encoder: how it runs. Only the backend and the precision change its output.

    Args:
        device: torch device, or `auto`, the first of `cuda`, `mps` and `cpu` that this machine has.
        features: names of requested features; a name that an encoder can derive, such as `grid:4` or `layer6.cls`,
            joins its native features (grammar: `embedcache/encoders/image_features.py`), any other name is left out.
    """

    device: str = Field(default=AUTO, exclude=True)
    features: tuple[str, ...] = Field(default=(), exclude=True)
    batch_size: int | None = setting(
        None,
        "Items per forward pass; halved automatically if the device runs out of memory.",
        ge=1,
        affects_result=False,
        default_text="on a CPU 32 images or 64 texts, on a GPU 128 or 512",
    )
    precision: Literal["auto", "float32", "float16", "bfloat16"] = setting(
        AUTO,
        "Precision of the forward pass; auto is that of the stored feature. For a new one it is bfloat16 on a GPU that "
        "has it, else float32.",
    )
    backend: Literal["auto", "torch", "onnxruntime"] = setting(
        "auto",
        "Library that runs the encoder; auto is that of the stored feature. For a new one it is onnxruntime on a CPU, "
        "if the encoder's export agrees with torch, else torch.",
    )
    compile: bool = setting(
        False,
        "Compile torch models: a slower start, then faster on a GPU; onnxruntime ignores it.",
        affects_result=False,
    )

    background: str = setting(
        "white",
        "Color behind transparent images: a name or #rrggbb.",
        metavar="COLOR",
    )

    @field_validator("background")
    @classmethod
    def _plain_color(cls, text: str) -> str:
        """Return a color as `white` or `#rrggbb`."""
        if text == "white":
            return text
        from PIL import ImageColor

        try:
            channels = ImageColor.getrgb(text)
            red, green, blue = channels[:3]
            if len(channels) > len((red, green, blue)):
                raise ValueError(text)
        except ValueError:
            raise SettingError(
                f"background: expected an opaque color such as white, black or #7f7f7f, got {text!r}"
            ) from None
        return "white" if (red, green, blue) == (255, 255, 255) else f"#{red:02x}{green:02x}{blue:02x}"
