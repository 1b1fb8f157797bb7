"""Views: items altered before encoding, by `crop:0.5`, `flip` or your own `my_module:blur`.

A view is a deterministic function from one item, as its decoder returns it, to another of the same modality. Its
features are stored in a separate folder, `encoder@view`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image, Transpose

from embedcache.arrays import Array, blocks
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import feature_names, reopen_encoder
from embedcache.errors import PathError, SettingError
from embedcache.modalities import MODALITIES
from embedcache.provenance import check_same, digest
from embedcache.registry import Registry, names_from

VIEWS = Registry(
    "view",
    {
        "crop": "embedcache.encoders.views:open_crop",
        "flip": "embedcache.encoders.views:open_flip",
    },
    group="embedcache.views",
)
"""Each is a function of the text after the colon that returns a `View`."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to alter items.

    Args:
        name: name that opens the view in the folder that contains its files; a path is shortened to the file's name.
        modality: modality of the items.
        apply: function that alters one item; called from many threads concurrently. An `ItemError` says why an item
            fails.
        fingerprint: everything that decides its output, as JSON values; part of the features' fingerprint.
        label: short name for the encoder's folder; the name if empty.
        location: name that opens the view from any folder, with the paths of its files; the name if empty.
    """

    name: str
    modality: Modality
    apply: Callable[[Any], Any]
    fingerprint: Mapping[str, Any]
    label: str = ""
    location: str = ""

    @property
    def suffix(self) -> str:
        """Suffix of the encoder's folder."""
        return "@" + re.sub(r"[^\w.=+-]", "-", self.label or self.name)


def open_view(name: str) -> View:
    """Open a view by `name[:argument]`, or by `module:attribute[:argument]` of your own.

    Without an argument, the attribute is a function of one item. The item is an image unless the function has an
    attribute `modality` that names another one. With an argument, the attribute maps this string to a `View`.

    Raises:
        UnknownNameError: there is no such view.
        SettingError: the argument is invalid.
        PathError: a file that the view needs does not exist.
    """
    kind, _, argument = name.partition(":")
    if kind not in VIEWS:
        attribute, colon, argument = argument.partition(":")
        kind = f"{kind}:{attribute}" if attribute else kind
        apply = VIEWS.load(kind)
        if not colon:
            return _from_function(name, apply)

    view = VIEWS.load(kind)(argument)
    if not isinstance(view, View):
        raise SettingError(f"view {name}: expected a function that returns a View, got a {type(view).__name__}")
    return view


def _from_function(name: str, apply: Callable[[Any], Any]) -> View:
    """Return the view of a function of an item; a digest of its source makes a changed function another view."""
    modality = getattr(apply, "modality", "image")
    if modality not in MODALITIES:
        raise SettingError(f"view {name}: expected a modality of {', '.join(MODALITIES)}, got {modality!r}")

    # A function without readable source, such as one of a notebook, is identified by its name only.
    try:
        code = digest(inspect.getsource(apply))
    except (OSError, TypeError):
        code = None

    return View(name=name, modality=MODALITIES[modality].name, apply=apply, fingerprint={"name": name, "code": code})


def reopen_view(fingerprint: Mapping[str, Any], location: str = "") -> View:
    """Open the view that a fingerprint records. A file that no longer exists is looked for in the current folder.

    The caller compares the fingerprints.

    Raises:
        PathError: the file exists in neither place.
    """
    # A stranger may have written the cache.
    with names_from("the cache"):
        try:
            return open_view(location or fingerprint["name"])
        except PathError as error:
            with suppress(PathError):
                return open_view(fingerprint["name"])
            raise PathError(f"{error}; put it back, or run this in the folder where it is") from error


@dataclass(frozen=True, kw_only=True)
class FeatureEncoder:
    """The encoder of a cached feature, and the view through which it sees items.

    Args:
        names: the encoder's own names of the parts of the feature.
    """

    encoder: Encoder
    view: Callable[[Any], Any]
    names: Sequence[str]

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert decoded items to the encoder's inputs, one array per item."""
        return self.encoder.prepare(list(map(self.view, items)))

    def batches(self, num_items: int, prepare: Callable[[slice], list[Array]]) -> Iterator[list[list[Array]]]:
        """Iterate over the values of items, a batch of the encoder at a time: for each name, an array per item."""
        for rows in blocks(num_items, self.encoder.batch_size):
            encoded = self.encoder.encode(prepare(rows), self.names)
            yield [encoded[name] for name in self.names]


def open_feature_encoder(
    spec: str, *, modality: Modality, feature: str, fingerprint: Mapping[str, Any], device: str
) -> FeatureEncoder:
    """Open the encoder that computed a cached feature, with the view that the feature's fingerprint records.

    Raises:
        FingerprintError: the encoder or the view is no longer the same.
        PathError: a file of the view no longer exists.
    """
    encoder = reopen_encoder(spec, modality=modality, feature=feature, fingerprint=fingerprint, device=device)
    expected = fingerprint.get("view")
    if expected is None:
        return FeatureEncoder(encoder=encoder, view=lambda item: item, names=feature_names(feature))

    view = reopen_view(expected)
    next_step = "restore the function, or extract again"
    check_same(f"the view of feature {feature}", expected, view.fingerprint, next_step=next_step)
    return FeatureEncoder(encoder=encoder, view=view.apply, names=feature_names(feature))


def open_crop(argument: str) -> View:
    """Open a center crop: `crop:0.5` keeps half of the width and half of the height."""
    try:
        fraction = float(argument)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise SettingError(f"invalid view 'crop:{argument}': expected crop:S with 0 < S <= 1, such as crop:0.5")

    def crop(image: Image) -> Image:
        # A tiny image keeps at least one pixel.
        width_px = max(1, round(image.width * fraction))
        height_px = max(1, round(image.height * fraction))
        left_px = (image.width - width_px) // 2
        top_px = (image.height - height_px) // 2
        return image.crop((left_px, top_px, left_px + width_px, top_px + height_px))

    name = f"crop:{argument}"
    return View(name=name, modality="image", apply=crop, fingerprint={"name": name})


def open_flip(argument: str) -> View:
    """Open a horizontal flip."""
    if argument:
        raise SettingError(f"invalid view 'flip:{argument}': expected flip without an argument, got {argument!r}")

    def flip(image: Image) -> Image:
        return image.transpose(Transpose.FLIP_LEFT_RIGHT)

    return View(name="flip", modality="image", apply=flip, fingerprint={"name": "flip"})
