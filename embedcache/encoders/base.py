"""The shape of one item's feature.

What an encoder is to the rest of the package.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

from embedcache.arrays import Array

ItemShape: TypeAlias = tuple[int, ...]
"""`(D,)` a vector, `(T, D)` a fixed number of tokens, `(-1, D)` any number of tokens."""

Modality: TypeAlias = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All that decides an encoder's output.

    Args:
        family: the plug-in that made it: `timm`, `hf`, `st`, `lite`, `open_clip`, `use`, `wordllama`.
        model: the model's name inside the family, or the name of a local folder.
        revision: the hub's commit where one is known.
        weights: SHA-256 over the names, dtypes, shapes and bytes of all weights.
        preprocessing: what happens to a raw item before the model: sizes, interpolation, mean, std, longest text.
        pooling: feature name -> how it is made from the model's last states; derived features need no word here.
        backend: what runs the model: `torch` or `onnxruntime`.
        precision: dtype of the forward pass.
    """

    family: str
    model: str
    revision: str | None
    weights: str
    preprocessing: Mapping[str, Any]
    pooling: Mapping[str, str]
    backend: Literal["torch", "onnxruntime"] = "torch"
    precision: Literal["float32", "bfloat16"] = "float32"

    def to_json(self) -> dict[str, Any]:
        """Give the fields as JSON reads them back."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields


class Encoder(Protocol):
    """A frozen model of one modality.

    `prepare` runs on many threads at once and needs no device; `encode` runs on one.
    """

    modality: Modality
    features: Mapping[str, ItemShape]
    """What it can give, in order; the first is the default."""
    fingerprint: Fingerprint
    batch_size: int
    """How many items one `encode` call should get."""

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Turn raw items into model inputs.

        Args:
            items: RGB `PIL.Image.Image` objects, or strings.

        Returns:
            One array an item: (3, H, W) for an image, uint8 where the model scales pixels on its device, float32
            where the published transform can't be cut there; (T,) int64 token ids, cut at the model's longest
            input, for a text.
        """
        ...

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Run the model on one batch.

        Args:
            prepared: arrays from `prepare`; texts may differ in length.
            names: which features to give.

        Returns:
            feature name -> one float32 array an item, shaped as `features` says, not normalized.
        """
        ...
