"""Iconify as a source plug-in: some 390,000 drawings of 230 families, each with its name as caption, in an npm package.

`npm install @iconify/json` gets them. The package has a JSON file per family. An item is the place in this file where
the description of an icon starts, and is drawn when it is read.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import reading
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.sources.files import check_read_allowed
from embedcache.sources.open import SourceSettings
from pipelines.icons.drawing import draw_png

KIND = "pipelines.icons.source:IconifySource"
_IMAGE_PX = 256
_MARGIN = 1 / 16  # of the image, on each side: encoders cut that much off
_COLOR = "#1f2933"  # of currentColor, which a family leaves to the page
_DEFAULT_SIZE = 16.0  # width and height of an icon without its own, as in Iconify's tools
_TRANSFORMS = {"rotate", "hFlip", "vFlip"}
_ICONS = re.compile(r'"icons"\s*:\s*\{')
_NAME = re.compile(r'\s*,?\s*"([^"\\]+)"\s*:\s*')
_DECODER = json.JSONDecoder()
_READ_BYTES = 8192  # nearly all icons are shorter


_Icon: TypeAlias = tuple[str, tuple[str, ...], int]
"""Family, names, and the offset of the description in the file of the family."""


class IconifySource:
    """The icons of the npm package `@iconify/json`, drawn as images of 256 x 256 pixels on white.

    An icon is a sample. Its captions are its name and its other names, with spaces in place of hyphens; turned or
    mirrored aliases do not count. Columns are `family`, `palette` (`color` or `mono`), `licence` (SPDX) and `category`,
    as stated by the package. The order depends on hashes of the keys, so that the first N samples come from all
    families.

    The location is the folder of the package, or the folder in which npm installed it. After a comma follows the prefix
    of the only family to use, if any. Otherwise all families that allow use are read, except for families of emoji,
    which draw the same things as OpenMoji. `families` has the package's entry of each family that is used: its name,
    author, license and others.
    """

    credit = "Icons: Iconify's collection (iconify.design); columns family and licence say whose and on which terms"

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("iconify")
        path, _, self._only = location.partition(",")
        self._folder = _find_package(Path(path))

        about = json.loads((self._folder / "collections.json").read_text())
        self.families = {}
        for prefix, family in sorted(about.items()):
            if prefix == self._only if self._only else _is_used(prefix, family):
                self.families[prefix] = family
        if not self.families:
            raise SourceError(f"{location}: expected a family of icons, got none; check the prefix")

    def describe(self) -> Mapping[str, Any]:
        """Return the description that reopens the source, with the versions of the icons and of the renderer."""
        package = json.loads((self._folder / "package.json").read_text())
        return {
            "type": KIND,
            "path": f"{self._folder},{self._only}" if self._only else str(self._folder),
            "settings": {},
            "versions": {"@iconify/json": str(package.get("version")), "resvg_py": version("resvg_py")},
        }

    def samples(self) -> Iterator[Sample]:
        """Iterate over the icons in the order of the SHA-256 of their keys. Memory: some 300 bytes per icon."""
        icons = [icon for prefix in self.families for icon in _list_icons(self._folder, prefix)]
        icons.sort(key=_order)

        for prefix, names, offset in icons:
            family = self.families[prefix]

            # Names that differ only in punctuation are one caption.
            captions = dict.fromkeys(name.replace("-", " ").replace("_", " ").strip() for name in names)

            yield Sample(
                key=f"{prefix}:{names[0]}",
                images=(FileItem(path=f"json/{prefix}.json", offset=offset),),
                texts=tuple(TextItem(text=text, language="en") for text in captions),
                columns={
                    "family": prefix,
                    "palette": "color" if family.get("palette") else "mono",
                    "licence": _licence(family),
                    "category": family.get("category"),
                },
            )

    def read(self, item: FileItem) -> bytes:
        """Draw one icon as a PNG."""
        path = self._folder / item.path
        with reading(path, error_class=ItemError):
            check_read_allowed(path)

        try:
            icon = _read_icon(path, item.offset)
            size = _sizes(path)
        except (OSError, ValueError) as error:
            raise ItemError(f"{item.path} has no icon at byte {item.offset}: {error}") from error

        # The icon keeps a margin, because encoders crop the center of the image.
        left, top, width, height = (float(icon.get(name, size[name])) for name in size)
        margin = _MARGIN * _IMAGE_PX
        inner = (1 - 2 * _MARGIN) * _IMAGE_PX
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="{_COLOR}" '
            f'width="{_IMAGE_PX}" height="{_IMAGE_PX}"><svg x="{margin:g}" y="{margin:g}" width="{inner:g}" '
            f'height="{inner:g}" viewBox="{left:g} {top:g} {width:g} {height:g}">{icon["body"]}</svg></svg>'
        )

        try:
            return draw_png(svg_string=svg, background="white", skip_system_fonts=True)
        except ValueError as error:
            raise ItemError(f"cannot be drawn: {error}") from error


def _order(icon: _Icon) -> bytes:
    prefix, names, _ = icon
    return hashlib.sha256(f"{prefix}:{names[0]}".encode()).digest()[:8]


def _licence(family: Mapping[str, Any]) -> str | None:
    licence: str | None = family.get("license", {}).get("spdx")
    return licence


def _find_package(path: Path) -> Path:
    for folder in (path, path / "package", path / "node_modules" / "@iconify" / "json"):
        if (folder / "collections.json").is_file() and (folder / "json").is_dir():
            return folder
    raise PathError(
        f"{path}: expected the folder of the npm package @iconify/json, which has a collections.json; "
        "get it with: npm install @iconify/json"
    )


def _is_used(prefix: str, family: Mapping[str, Any]) -> bool:
    """Return whether a family is not one of emoji, and its licence is known and allows any use."""
    is_emoji = family.get("category") == "Emoji" or "emoji" in f"{prefix} {family.get('name')}".lower()
    licence = _licence(family)
    return not is_emoji and licence is not None and "-NC" not in licence


def _read_family(path: Path) -> tuple[dict[str, tuple[int, Mapping[str, Any]]], Mapping[str, Any]]:
    """Read the file of a family: name -> first byte and content of each icon, and all other entries.

    Memory: twice its 20 MB at most.
    """
    text = path.read_bytes().decode("latin-1")  # one character per byte
    match = _ICONS.search(text)
    assert match is not None, f"{path} is not a family of icons"

    icons: dict[str, tuple[int, Mapping[str, Any]]] = {}
    position = match.end()
    while name := _NAME.match(text, position):
        # The decoder stops where an icon ends, which gives the offset of the next one.
        content, position = _DECODER.raw_decode(text, name.end())
        icons[name[1].encode("latin-1").decode()] = name.end(), content

    rest = json.loads((text[: match.end()] + text[position:]).encode("latin-1"))
    return icons, rest


def _read_icon(path: Path, offset: int) -> Mapping[str, Any]:
    """Read the JSON object that starts at a byte. Its length is unknown, since an item has only an offset."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(_READ_BYTES)

        while True:
            try:
                icon: Mapping[str, Any] = _DECODER.raw_decode(data.decode(errors="ignore"))[0]
            except ValueError:
                more = file.read(4 * len(data))
                if not more:
                    raise
                data += more
            else:
                return icon


def _list_icons(folder: Path, prefix: str) -> Iterator[_Icon]:
    """Iterate over the icons of a family that are not hidden."""
    icons, rest = _read_family(folder / "json" / f"{prefix}.json")
    names = _other_names(rest.get("aliases", {}))
    for name, (offset, content) in icons.items():
        if not content.get("hidden"):
            yield prefix, (name, *names.get(name, ())), offset


def _other_names(aliases: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Sequence[str]]:
    """Return name of an icon -> its aliases that draw the same."""
    names = defaultdict(list)
    for alias, content in aliases.items():
        # An alias can name another alias; `ancestors` ends a circle of them.
        parent = content
        ancestors = {alias}
        while parent["parent"] in aliases and parent["parent"] not in ancestors and not _TRANSFORMS & parent.keys():
            ancestors.add(parent["parent"])
            parent = aliases[parent["parent"]]

        if not _TRANSFORMS & parent.keys() and not content.get("hidden"):
            names[parent["parent"]].append(alias)
    return names


@cache
def _sizes(path: Path) -> dict[str, float]:
    """Return left, top, width and height of icons of a family that do not have their own."""
    _, rest = _read_family(path)
    defaults = {"left": 0.0, "top": 0.0, "width": _DEFAULT_SIZE, "height": _DEFAULT_SIZE}
    return {name: float(rest.get(name, default)) for name, default in defaults.items()}
