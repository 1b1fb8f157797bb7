"""Views: items altered before encoding, by `crop:0.5`, `flip` or your own `my_module:blur`.

A view is a deterministic function from one item, as its decoder returns it, to another of the same modality. Its
features are stored in a folder of their own, `encoder@view`.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image, Transpose

from embedcache.encoders.base import Modality
from embedcache.errors import PathError, SettingError
from embedcache.modalities import MODALITIES
from embedcache.provenance import check_same, digest
from embedcache.registry import Registry, names_from

VIEWS = Registry(
    "view",
    {
        "crop": "embedcache.extract.views:open_crop",
        "flip": "embedcache.extract.views:open_flip",
    },
    group="embedcache.views",
    arguments=1,
)
"""Each is a function of the text after the colon that returns a `View`."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to alter items.

    Args:
        name: name that opens it in the folder where its files are; no more than the names of these files.
        modality: modality of the items.
        apply: alters one item; called from many threads at once. An `ItemError` is the reason why an item fails.
        fingerprint: everything that decides its output, as JSON values; part of the features' fingerprint.
        label: short name in that of the encoder's folder; empty: the name.
        location: name that opens it from any folder, with the paths of its files; empty: the name does.
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

    Without an argument, the attribute is the function of an item. It takes images, unless it has an attribute
    `modality` that names another one. With an argument, it is a function of this text that returns a `View`.

    Raises:
        UnknownNameError: there is no such view.
        SettingError: the argument is invalid.
        PathError: a file that the view needs does not exist.
    """
    kind, _, argument = name.partition(":")
    if kind in VIEWS:
        view: View = VIEWS.load(kind)(argument)
        return view

    attribute, has_argument, argument = argument.partition(":")
    apply = VIEWS.load(f"{kind}:{attribute}" if attribute else kind)
    if has_argument:
        view = apply(argument)
        if not isinstance(view, View):
            raise SettingError(f"view {name}: expected a function that returns a View, got a {type(view).__name__}")
        return view
    modality = getattr(apply, "modality", "image")
    if modality not in MODALITIES:
        raise SettingError(
            f"view {name}: expected its attribute modality to be one of {', '.join(MODALITIES)}, got {modality!r}"
        )
    return View(
        name=name,
        modality=MODALITIES[modality].name,
        apply=apply,
        fingerprint={"name": name, "code": _source_digest(apply)},
    )


def reopen_view(fingerprint: Mapping[str, Any], location: str = "") -> View:
    """Open the view that a fingerprint records; a file that is no longer there is looked for in the current folder.

    The caller compares the fingerprints.

    Raises:
        PathError: the file is in neither.
    """
    name, found = fingerprint["name"], []
    for place in dict.fromkeys((location or name, name)):
        try:
            with names_from("the cache"):
                return open_view(place)
        except PathError as error:
            found.append(str(error))
    raise PathError(f"{found[0]}; put it back, or run this in the folder where it is")


def reopen_recorded_view(feature: str, fingerprint: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return the view that a feature's fingerprint records, as a function of an item; without one, the identity.

    Raises:
        FingerprintError: the view is no longer the same.
        PathError: a file of it no longer exists.
    """
    expected = fingerprint.get("view")
    if expected is None:
        return lambda item: item
    view = reopen_view(expected)
    next_step = "restore the function, or extract again"
    check_same(f"the view of feature {feature}", expected, view.fingerprint, next_step=next_step)
    return view.apply


def open_crop(argument: str) -> View:
    """Open a center crop: `crop:0.5` keeps half of the width and half of the height."""
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

    name = f"crop:{argument}"
    return View(name=name, modality="image", apply=crop, fingerprint={"name": name})


def open_flip(argument: str) -> View:
    """Open a horizontal flip."""
    if argument:
        raise SettingError(f"invalid view 'flip:{argument}': expected flip without an argument, got {argument!r}")

    def flip(image: Image) -> Image:
        return image.transpose(Transpose.FLIP_LEFT_RIGHT)

    return View(name="flip", modality="image", apply=flip, fingerprint={"name": "flip"})


def _source_digest(function: Callable[[Any], Any]) -> str | None:
    """Return a digest of a function's source code, so that a changed function is another view."""
    try:
        return digest(inspect.getsource(function))
    except (OSError, TypeError):
        return None
