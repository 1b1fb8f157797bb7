"""Views: items altered before encoding, by `crop:0.5`, `flip` or a user's function `my_module:blur`.

A view is a deterministic function from one item, an RGB image or a text, to another. Its features are stored in a
folder of their own, `encoder@view`.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image, Transpose

from embedcache.encoders.base import Modality
from embedcache.errors import SettingError
from embedcache.provenance import digest
from embedcache.registry import Registry

VIEWS = Registry(
    "view",
    {"crop": "embedcache.extract.views:open_crop", "flip": "embedcache.extract.views:open_flip"},
)
"""Each is a function of the text after the colon that returns the function that alters an item."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to alter items.

    Args:
        name: name as the user wrote it.
        fingerprint: everything that decides its output, as JSON values; part of the features' fingerprint.
    """

    name: str
    modality: Modality
    apply: Callable[[Any], Any]
    fingerprint: Mapping[str, Any]

    @property
    def suffix(self) -> str:
        """Suffix of the encoder's folder."""
        return "@" + re.sub(r"[^\w.=+-]", "-", self.name)


def open_view(name: str) -> View:
    """Open a view by `name[:argument]`, or by `module:attribute` of a function.

    A user's function takes images, unless it has an attribute `modality` that is `text`.

    Raises:
        UnknownNameError: there is no such view.
        SettingError: the argument is invalid.
    """
    kind, _, argument = name.partition(":")
    if kind in VIEWS.paths:
        return View(name=name, modality="image", apply=VIEWS.load(kind)(argument), fingerprint={"name": name})
    apply = VIEWS.load(name)
    return View(
        name=name,
        modality=getattr(apply, "modality", "image"),
        apply=apply,
        fingerprint={"name": name, "code": _source_digest(apply)},
    )


def open_crop(argument: str) -> Callable[[Image], Image]:
    """Return a center crop: `crop:0.5` keeps half of the width and half of the height."""
    try:
        fraction = float(argument)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise SettingError(f"invalid view 'crop:{argument}': expected crop:S with 0 < S <= 1, such as crop:0.5")

    def crop(image: Image) -> Image:
        width, height = (max(1, round(side * fraction)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    return crop


def open_flip(argument: str) -> Callable[[Image], Image]:
    """Return a horizontal flip."""
    if argument:
        raise SettingError(f"invalid view 'flip:{argument}': expected flip without an argument, got {argument!r}")
    return lambda image: image.transpose(Transpose.FLIP_LEFT_RIGHT)


def _source_digest(function: Callable[[Any], Any]) -> str | None:
    """Return a digest of a function's source code, so that a changed function is another view."""
    try:
        return digest(inspect.getsource(function))
    except (OSError, TypeError):
        return None
