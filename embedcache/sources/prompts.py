"""Prompts of classes, for zero-shot classification: class names put into templates, or prompts of one's own."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import open_path
from embedcache.registry import require, unknown_name
from embedcache.sources.base import ImageItem, Sample, TextItem
from embedcache.sources.settings import SourceSettings

CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
"""Files of a data set in CLIP_benchmark's layout."""

_SLOT = "{c}"
_OWN_PROMPTS = "cupl"
_LANGUAGES = ("ar", "cn", "en", "it", "jp")


class PromptsSource:
    """One sample a class, its prompts as captions; columns `class`, its name, and `label`, its number from 0.

    The location is `CLASSES` or `CLASSES+TEMPLATES`. Classes are a `.txt` with a name a line; a `.json` of name ->
    prompts, which needs no templates; a folder with `classnames.txt`, or else of a sub-folder a class; or the name of
    a set whose class names the package clip-benchmark holds, such as `imagenet1k`. Templates are a `.txt` with a
    template a line, `{c}` where the name goes; the name of a set of clip-benchmark; or `cupl`, prompts that a language
    model wrote for each ImageNet class. Left out, they are the folder's or the set's own, or `a photo of a {c}.`

    Args:
        location: as above.
        settings: `languages` may hold one of clip-benchmark's: ar, cn, en, it, jp.

    Raises:
        PathError: there is no such file or folder.
        SourceError: classes without names or prompts, or a template without `{c}`.
        UnknownNameError: clip-benchmark has no set of that name.
        MissingExtraError: clip-benchmark is needed and not installed.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("prompts", "languages")
        classes, templates = _parts(location)
        if len(settings.languages) > 1:
            raise SourceError(f"prompts are of one language, not of {', '.join(settings.languages)}")
        self._language = settings.languages[0] if settings.languages else "en"
        self._location, self._settings = _absolute(location), settings
        self._prompts = _read(classes, templates, self._language)

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "prompts", "path": self._location, "settings": self._settings.given()}

    def samples(self) -> Iterator[Sample]:
        """Go through the classes."""
        for number, (name, prompts) in enumerate(self._prompts):
            yield Sample(
                key=f"{number:05}/{name}",
                texts=tuple(TextItem(text=prompt, language=self._language) for prompt in prompts),
                columns={"class": name, "label": number},
            )

    def read(self, item: ImageItem) -> bytes:
        """Refuse: there is no image."""
        raise ItemError(f"prompts have no image such as {item.path}")


def template_sets(language: str = "en") -> list[str]:
    """Name the sets whose templates clip-benchmark holds.

    Raises:
        MissingExtraError: it is not installed.
    """
    return sorted(_shipped(f"{language}_zeroshot_classification_templates.json"))


def _absolute(location: str) -> str:
    """Make the paths of a location independent of the working directory; names stay."""
    parts = [part for part in _parts(location) if part]
    return "+".join(str(open_path(part).absolute()) if _is_path(part) else part for part in parts)


def _parts(location: str) -> tuple[str, str | None]:
    classes, _, templates = (location, "", "") if open_path(location).exists() else location.partition("+")
    return classes, templates or None


def _is_path(part: str) -> bool:
    return "/" in part or part.endswith((".txt", ".json")) or open_path(part).exists()


def _read(classes: str, templates: str | None, language: str) -> list[tuple[str, Sequence[str]]]:
    """Get each class's name and prompts."""
    if classes.endswith(".json"):
        if templates is not None:
            raise SourceError(f"{classes} holds the prompts itself; leave the templates {templates} out")
        return _own_prompts(open_path(classes))
    names, own = _class_names(classes, language)
    if templates == _OWN_PROMPTS:
        return [(name, prompts) for name, prompts in zip(names, _cupl(names), strict=True)]
    lines = own if templates is None else _templates(templates, language)
    spoken = [name.replace("_", " ") for name in names] if _has_sub_folders(classes) else names
    return [(name, [line.replace(_SLOT, said) for line in lines]) for name, said in zip(names, spoken, strict=True)]


def _own_prompts(path: Path) -> list[tuple[str, Sequence[str]]]:
    if not path.is_file():
        raise PathError(f"no such file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise SourceError(f"{path} must hold an object of class name -> list of prompts")
    return [(name, _prompts_of(name, prompts, path)) for name, prompts in content.items()]


def _prompts_of(name: str, prompts: Any, path: Path) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) and one.strip() for one in listed):
        raise SourceError(f"class {name!r} of {path} has no prompts; give a list of texts for each class")
    return listed


def _class_names(classes: str, language: str) -> tuple[list[str], list[str]]:
    """Get the names, and the templates that come with them."""
    plain = [f"a photo of a {_SLOT}."]
    path = open_path(classes)
    if _has_sub_folders(classes):
        return _sub_folders(path), plain
    if path.is_dir():
        own = path / TEMPLATES
        return _lines(path / CLASS_NAMES), _checked(_lines(own), own) if own.is_file() else plain
    if _is_path(classes):
        return _lines(path), plain
    names: list[str] = _of_set(f"{language}_classnames.json", classes, "class names")
    return names, _shipped(f"{language}_zeroshot_classification_templates.json").get(classes, plain)


def _has_sub_folders(classes: str) -> bool:
    path = open_path(classes)
    return path.is_dir() and not (path / CLASS_NAMES).is_file()


def _sub_folders(path: Path) -> list[str]:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise SourceError(f"{path} holds neither {CLASS_NAMES} nor a sub-folder a class")
    return names


def _templates(templates: str, language: str) -> list[str]:
    if _is_path(templates):
        path = open_path(templates)
        return _checked(_lines(path), path)
    lines: list[str] = _of_set(f"{language}_zeroshot_classification_templates.json", templates, "templates")
    return lines


def _checked(lines: list[str], path: Path) -> list[str]:
    for line in lines:
        if _SLOT not in line:
            raise SourceError(f"template {line!r} of {path} lacks {_SLOT}, where the class name goes")
    return lines


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise PathError(f"no such file: {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise SourceError(f"{path} is empty")
    for number, line in enumerate(lines):
        if not line:
            raise SourceError(
                f"{path} line {number + 1} is blank, and a line's number is its class's; name all classes"
            )
    return lines


def _cupl(names: Sequence[str]) -> list[Sequence[str]]:
    prompts = _shipped("cupl_prompts.json")["imagenet1k"]
    missing = [name for name in names if name not in prompts]
    if missing:
        raise SourceError(f"CuPL has no prompts for {len(missing)} of {len(names)} classes, first {missing[0]!r}")
    return [prompts[name] for name in names]


def _of_set(file: str, name: str, kind: str) -> Any:
    sets = _shipped(file)
    if name not in sets:
        raise unknown_name(f"set of clip-benchmark with {kind}", name, sets, hint="or give a file or a folder")
    return sets[name]


def _shipped(file: str) -> dict[str, Any]:
    """Read a file of the package clip-benchmark."""
    package = require("clip_benchmark", extra="clip-benchmark")
    path = Path(str(package.__file__)).parent / "datasets" / file
    if not path.is_file():
        language = file.split("_")[0]
        raise SourceError(f"clip-benchmark has no class names in {language!r}; it has {', '.join(_LANGUAGES)}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
