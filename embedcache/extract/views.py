"""Other looks at the same items: `crop:0.5`, or a function of the user's own, `my_module:blur`.

A view is a function of one item, an RGB picture or a text, to another; its features stand in a folder of their own,
`encoder@view`. It must give the same for the same item every time.
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
"""Each is a function of the text behind the colon that gives the view."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One look at items.

    Args:
        name: as the user gave it.
        modality: of the items it takes.
        look: item -> item.
        about: what decides it, as JSON; goes into the fingerprint.
    """

    name: str
    modality: Modality
    look: Callable[[Any], Any]
    about: Mapping[str, Any]

    @property
    def suffix(self) -> str:
        """What it adds to the name of an encoder's folder."""
        return "@" + re.sub(r"[^\w.=+-]", "-", self.name)


def open_view(name: str) -> View:
    """Find a view: `name[:argument]`, or `module:attribute` of a function.

    A user's function looks at images unless it has an attribute `modality` that says `text`.

    Raises:
        UnknownNameError: there is no such view.
        SettingError: the argument does not suit it.
    """
    kind, _, argument = name.partition(":")
    if kind in VIEWS.paths:
        return View(name=name, modality="image", look=VIEWS.load(kind)(argument), about={"name": name})
    look = VIEWS.load(name)
    return View(
        name=name, modality=getattr(look, "modality", "image"), look=look, about={"name": name, "code": _code(look)}
    )


def open_crop(argument: str) -> Callable[[Image], Image]:
    """Keep the middle of a picture: `crop:0.5` keeps half of each side."""
    try:
        share = float(argument)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SettingError(f"the view crop:{argument} is none; write crop:S with S above 0 and at most 1, as crop:0.5")

    def crop(image: Image) -> Image:
        width, height = (max(1, round(side * share)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    return crop


def open_flip(argument: str) -> Callable[[Image], Image]:
    """Mirror a picture, left and right."""
    if argument:
        raise SettingError(f"the view flip takes no argument, not {argument!r}; write flip")
    return lambda image: image.transpose(Transpose.FLIP_LEFT_RIGHT)


def _code(look: Callable[[Any], Any]) -> str | None:
    """Get a digest of a function's source, so that another version of it is another view."""
    try:
        return digest(inspect.getsource(look))
    except (OSError, TypeError):
        return None
