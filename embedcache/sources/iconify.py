"""Iconify as a source: some 390,000 drawings of 230 families, each with its name as caption, in one npm package.

`npm install @iconify/json` gets them. The package has a JSON file per family; an item is the place in it where the
description of one icon begins, and is drawn when it is read.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SettingError, SourceError
from embedcache.files import read_limited
from embedcache.registry import require, unknown_name
from embedcache.sources.base import FileItem, Sample, TextItem
from embedcache.sources.files import check_read_allowed
from embedcache.sources.settings import SourceSettings
from embedcache.sources.svg import check_svg, draw_png

_IMAGE_PX = 256
_MARGIN = 1 / 16  # of the image, on each side: encoders cut that much off
_COLOR = "#1f2933"  # of what a family leaves to the page: currentColor
_DEFAULT_SIZE = 16.0  # width and height of an icon that its family does not give, as in Iconify's own tools
_TRANSFORMS = {"rotate", "hFlip", "vFlip"}
_OPTIONS = ("families", "without", "palette", "licences")
_PALETTES = ("color", "mono")
_ICONS = re.compile(r'"icons"\s*:\s*\{')
_NAME = re.compile(r'\s*,?\s*"([^"\\]+)"\s*:\s*')
_DECODER = json.JSONDecoder()
_READ_BYTES = 8192  # nearly all icons are shorter


class IconifySource:
    """The icons of the npm package `@iconify/json`, drawn as images of 256 x 256 pixels on white.

    One sample per icon; its captions are its name and its other names (aliases that are not turned or mirrored), with
    spaces in place of hyphens. Columns: `family`, `palette` (`color` or `mono`), `licence` (SPDX) and `category`, as
    the package states them. The order is drawn from the keys, so that the first N samples are of all families.

    The location is the folder of the package, or the one in which npm installed it, and options after commas:
    `families=mdi+tabler` (all if absent), `without=flag+cif`, `palette=color`, and `licences=MIT+Apache-2.0` (all that
    allow use if absent). Families of emoji are left out unless they are named, since they draw what OpenMoji draws.
    `families` holds what the package says about each family that is used: its name, author, license and others.
    """

    credit = "Icons: Iconify's collection (iconify.design); columns family and licence say whose and on which terms"

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("iconify")
        path, *options = location.split(",")
        self._folder = _find_package(Path(path))
        self._options = _parse_options(options)
        require("resvg_py", extra="svg")
        self.families = _choose_families(_read_json(self._folder / "collections.json"), self._options)

    def describe(self) -> Mapping[str, Any]:
        """Return what reopens the source, with the versions of the icons and of what draws them."""
        options = [f"{name}={'+'.join(values)}" for name, values in self._options.items()]
        package = _read_json(self._folder / "package.json")
        return {
            "type": "iconify",
            "path": ",".join([str(self._folder), *options]),
            "settings": {},
            "versions": {"@iconify/json": str(package.get("version")), "resvg_py": version("resvg_py")},
        }

    def samples(self) -> Iterator[Sample]:
        """Iterate over the icons in the order of the SHA-256 of their keys. Memory: some 300 bytes per icon."""
        icons = [icon for prefix in self.families for icon in _list_icons(self._folder, prefix)]
        icons.sort(key=lambda icon: icon.order)
        for icon in icons:
            family = self.families[icon.prefix]
            yield Sample(
                key=f"{icon.prefix}:{icon.names[0]}",
                images=(FileItem(path=f"json/{icon.prefix}.json", offset=icon.offset),),
                texts=tuple(TextItem(text=text, language="en") for text in dict.fromkeys(map(_caption, icon.names))),
                columns={
                    "family": icon.prefix,
                    "palette": "color" if family.get("palette") else "mono",
                    "licence": _licence(family),
                    "category": family.get("category"),
                },
            )

    def read(self, item: FileItem) -> bytes:
        """Draw one icon as a PNG."""
        path = self._folder / item.path
        check_read_allowed(path)
        try:
            icon = _read_icon(path, item.offset)
            size = _sizes(path)
            left, top, width, height = (float(icon.get(name, size[name])) for name in size)
            body = str(icon["body"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ItemError(f"{item.path} holds no icon at byte {item.offset}: {error}") from error
        margin, inner = _MARGIN * _IMAGE_PX, (1 - 2 * _MARGIN) * _IMAGE_PX
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="{_COLOR}" '
            f'width="{_IMAGE_PX}" height="{_IMAGE_PX}"><svg x="{margin:g}" y="{margin:g}" width="{inner:g}" '
            f'height="{inner:g}" viewBox="{left:g} {top:g} {width:g} {height:g}">{body}</svg></svg>'
        )
        check_svg(svg.encode())
        try:
            return draw_png(svg_string=svg, background="white", skip_system_fonts=True)
        except ValueError as error:
            raise ItemError(f"cannot be drawn: {error}") from error


@dataclass(frozen=True, slots=True)
class _Icon:
    """One icon: its family, its names, and where its description begins in the file of the family."""

    prefix: str
    names: tuple[str, ...]
    offset: int

    @property
    def order(self) -> bytes:
        return hashlib.sha256(f"{self.prefix}:{self.names[0]}".encode()).digest()[:8]


def _caption(name: str) -> str:
    return name.replace("-", " ").replace("_", " ").strip()


def _licence(family: Mapping[str, Any]) -> str | None:
    licence: str | None = family.get("license", {}).get("spdx")
    return licence


def _find_package(path: Path) -> Path:
    for folder in (path, path / "package", path / "node_modules" / "@iconify" / "json"):
        if (folder / "collections.json").is_file() and (folder / "json").is_dir():
            return folder
    if path.suffix in {".tgz", ".gz"} and path.is_file():
        raise PathError(f"{path}: expected the folder of the package, got an archive; unpack it with: tar xzf {path}")
    raise PathError(
        f"{path}: expected the folder of the npm package @iconify/json, which has a collections.json; "
        "get it with: npm install @iconify/json"
    )


def _parse_options(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    options = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if name not in _OPTIONS:
            raise unknown_name("option of iconify", name, _OPTIONS)
        if not equals or not values:
            raise SettingError(f"{name}: expected values joined by +, such as {name}=a+b, got {text!r}")
        options[name] = tuple(values.split("+"))
    for palette in options.get("palette", ()):
        if palette not in _PALETTES:
            raise unknown_name("palette", palette, _PALETTES)
    return options


def _choose_families(
    families: Mapping[str, Mapping[str, Any]], options: Mapping[str, Sequence[str]]
) -> dict[str, Mapping[str, Any]]:
    """Return prefix -> description of the families to use, by prefix."""
    for name in (*options.get("families", ()), *options.get("without", ())):
        if name not in families:
            raise unknown_name("family", name, families)
    named = options.get("families")
    chosen = {
        prefix: family
        for prefix, family in sorted(families.items())
        if (prefix in named if named else not _is_emoji(prefix, family))
        and prefix not in options.get("without", ())
        and _allows_use(_licence(family), options.get("licences"))
        and ("color" if family.get("palette") else "mono") in options.get("palette", _PALETTES)
    }
    if not chosen:
        raise SourceError(f"expected at least one of {len(families)} families, got none with these options")
    return chosen


def _is_emoji(prefix: str, family: Mapping[str, Any]) -> bool:
    return family.get("category") == "Emoji" or "emoji" in f"{prefix} {family.get('name')}".lower()


def _allows_use(licence: str | None, chosen: Sequence[str] | None) -> bool:
    """Return whether a licence is among the chosen ones; without a choice, whether it is known and allows any use."""
    return licence in chosen if chosen else licence is not None and "-NC" not in licence


@dataclass(frozen=True, slots=True)
class _Family:
    """The file of a family: name -> first byte and content of each icon, and all that is not an icon."""

    icons: Mapping[str, tuple[int, Mapping[str, Any]]]
    others: Mapping[str, Any]


def _read_family(path: Path) -> _Family:
    """Read the file of a family. Memory: twice its 20 MB at most."""
    try:
        text = path.read_bytes().decode("latin-1")  # one character per byte
        found = _ICONS.search(text)
        if found is None:
            raise ValueError('it has no object "icons"')
        icons: dict[str, tuple[int, Mapping[str, Any]]] = {}
        position = found.end()
        while name := _NAME.match(text, position):
            content, position = _DECODER.raw_decode(text, name.end())
            icons[name[1].encode("latin-1").decode()] = name.end(), content
        others = json.loads((text[: found.end()] + text[position:]).encode("latin-1"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: expected a family of icons in Iconify's JSON: {error}") from error
    return _Family(icons, others)


def _read_icon(path: Path, offset: int) -> Mapping[str, Any]:
    """Read the JSON object that begins at a byte. An item has no length, which would be that of the drawing."""
    size = _READ_BYTES
    with path.open("rb") as file:
        while True:
            file.seek(offset)
            data = file.read(size)
            try:
                icon, _ = _DECODER.raw_decode(data.decode(errors="ignore"))
            except ValueError:
                if len(data) < size:
                    raise
                size *= 4
                continue
            if not isinstance(icon, dict):
                raise ValueError(f"expected an object, got {icon!r:.40}")
            return icon


def _list_icons(folder: Path, prefix: str) -> Iterator[_Icon]:
    """Iterate over the icons of a family that are not hidden."""
    family = _read_family(folder / "json" / f"{prefix}.json")
    names = _other_names(family.others.get("aliases", {}))
    for name, (offset, content) in family.icons.items():
        if not content.get("hidden"):
            yield _Icon(prefix, (name, *names.get(name, ())), offset)


def _other_names(aliases: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Sequence[str]]:
    """Return name of an icon -> its aliases that draw the same."""
    names = defaultdict(list)
    for alias, content in aliases.items():
        parent, seen = content, {alias}
        while parent["parent"] in aliases and parent["parent"] not in seen and not _TRANSFORMS & parent.keys():
            seen.add(parent["parent"])
            parent = aliases[parent["parent"]]
        if not _TRANSFORMS & parent.keys() and not content.get("hidden"):
            names[parent["parent"]].append(alias)
    return names


@cache
def _sizes(path: Path) -> dict[str, float]:
    """Return what an icon of a family has if it gives no left, top, width or height of its own."""
    others = _read_family(path).others
    defaults = {"left": 0.0, "top": 0.0, "width": _DEFAULT_SIZE, "height": _DEFAULT_SIZE}
    return {name: float(others.get(name, default)) for name, default in defaults.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_limited(path))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: expected JSON of Iconify: {error}") from error
