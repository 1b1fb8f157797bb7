"""The encoder protocol, its settings, and the fingerprint that identifies what an encoder computes.

Nothing heavy is imported here, so that the command line starts quickly.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from pydantic import Field, field_validator

from embedcache.errors import SettingError
from embedcache.modalities import ModalityName
from embedcache.processes import AUTO
from embedcache.registry import unknown_name
from embedcache.settings import Settings, setting

if TYPE_CHECKING:
    from embedcache.arrays import Array

ItemShape: TypeAlias = tuple[int, ...]
"""Shape of one item's feature: `(D,)` a vector, `(T, D)` a fixed number of tokens, `(-1, D)` any number of tokens."""

Modality: TypeAlias = ModalityName
"""Name of a modality, such as `image`. `embedcache.modalities` defines them."""

Backend: TypeAlias = Literal["torch", "onnxruntime", "ctranslate2", "numpy"]
"""Library that computes features."""

NO_WEIGHTS = hashlib.sha256(b"").hexdigest()
"""Entry `weights` in the fingerprint of an encoder that has none."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that determines an encoder's output.

    Args:
        family: encoder family: a name in `ENCODERS` or a plug-in's own.
        model: the model's name within the family, or the name of a local folder.
        revision: commit on the Hugging Face hub, if known.
        weights: SHA-256 over the names, dtypes, shapes and bytes of all weights.
        preprocessing: conversion of a raw item to a model input: sizes, interpolation, mean, std, maximum text length.
        pooling: native feature -> its computation from the model's last states. Derived features are not listed.
        backend: library that runs the model.
        precision: dtype of the forward pass: `float32`, `float16` or `bfloat16`.
    """

    family: str
    model: str
    revision: str | None = None
    weights: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    pooling: Mapping[str, str]
    backend: Backend = "torch"
    precision: str = "float32"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they read back from JSON."""
        # A stored fingerprint has lists in place of tuples.
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields


def background_of(preprocessing: Mapping[str, Any] | None) -> str:
    """Return the color onto which transparent images are composited, given the preprocessing of a fingerprint."""
    return str((preprocessing or {}).get("background", "white"))


NO_HEAD = (
    "use an encoder that was trained as a classifier, import vectors with names, or give this encoder a text tower "
    "through a second image encoder (docs/howto/train.md)"
)
"""Next step if an encoder has no classifier."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The linear layer of a classifier, which has a vector per class in the space of a feature.

    Args:
        rows_CD: (C, D) float32 weights of the classes.
        names: name of each class, synonyms separated by commas.
        features: vector features of the encoder that the layer reads. There are several if they are equal.
        origin: source of the names, for the record.
    """

    rows_CD: "Array"
    names: Sequence[str]
    features: Collection[str]
    origin: str


class Encoder(Protocol):
    """A frozen model of one modality.

    It may have three more attributes. Two are mappings from feature names: `axes`, the `embedcache.store.layout.Axis`
    of a feature of tokens, and `dtypes`, the dtype on disk of a feature that ignores `--dtype`, such as `int16` for
    labels and `float32` for coordinates. `read_head` is a function without arguments that returns the `Head` of a model
    that was trained as a classifier.

    `prepare` is called from many threads concurrently and needs no device. `encode` is called from one thread.
    """

    modality: Modality
    features: Mapping[str, ItemShape]
    """Features that the encoder offers, in order. The first is the default."""
    fingerprint: Fingerprint
    batch_size: int
    """Number of items per call of `encode`."""

    def prepare(self, items: Sequence[Any]) -> "list[Array]":
        """Convert raw items to model inputs.

        Args:
            items: images as RGB `PIL.Image.Image`, texts as strings, recordings as (n,) float32 at 16 kHz, videos as
                `embedcache.sources.media.Video`, point clouds as name -> array with one row per point.

        Returns:
            One array per item. Image: (3, H, W), uint8 if the model normalizes pixels on its device, else float32.
            Text: (T,) int64 token ids, truncated to the model's maximum input length, or any array of a model without
            tokens. Others: any array.

        Raises:
            ItemError: an item is not fit for the model, such as a recording of 0 s. It fails with that reason.
        """
        ...

    def encode(self, prepared: "Sequence[Array]", names: Sequence[str]) -> "dict[str, list[Array]]":
        """Run the model on one batch.

        Args:
            prepared: arrays from `prepare`. Texts may differ in length.
            names: features to compute.

        Returns:
            feature name -> one float32 array per item, of the shape in `features`, not normalized. A feature with an
            integer dtype in `dtypes` has integers.

        Raises:
            UnknownNameError: the encoder offers no feature of that name; see `check_names`.
        """
        ...


def check_names(names: Iterable[str], features: Collection[str]) -> None:
    """Check that an encoder offers the requested features.

    Args:
        names: names of the requested features.
        features: names of the features that the encoder offers.

    Raises:
        UnknownNameError: lists the features that the encoder offers.
    """
    for name in names:
        if name not in features:
            raise unknown_name("feature", name, features)


class EncoderSettings(Settings):
    """Settings of an encoder. Only the backend, the precision and the background change its output.

    Args:
        device: torch device, or `auto`, the first of `cuda`, `mps` and `cpu` that this machine has.
        features: names of requested features; a name that an encoder can derive, such as `grid:4` or `layer6.cls`,
            joins its native features (grammar: `embedcache/modeling/features.py`), any other name is left out.

    Example:
        >>> settings = EncoderSettings(batch_size=32, precision="float32")
        >>> settings.to_json()  # only these change the output
        {'precision': 'float32', 'backend': 'auto', 'background': 'white'}
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
        from PIL import ImageColor

        try:
            color = "#" + bytes(ImageColor.getrgb(text)).hex()
        except ValueError:
            color = ""
        if len(color) != len("#rrggbb"):
            raise SettingError(f"background: expected an opaque color such as white, black or #7f7f7f, got {text!r}")
        return "white" if color == "#ffffff" else color
