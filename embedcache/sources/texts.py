"""Texts without images: one per line of a file, or prompts of classes for zero-shot classification.

Prompts are class names in templates, or custom prompts per class.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, SourceError
from embedcache.files import TEXT_ENCODING, check_regular, open_path, read_text, reading, split_lines
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.registry import require, unknown_name
from embedcache.sources.files import TEXT_SUFFIXES, has_suffix, parse_json, require_file, to_text_items
from embedcache.sources.open import SourceSettings

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
"""Files of a dataset in CLIP_benchmark's layout."""

_SLOT = "{c}"
DEFAULT_TEMPLATES = (_SLOT, f"a photo of a {_SLOT}.")
"""How each class name becomes prompts where neither templates nor a dataset are named."""

_TEMPLATES_OF_DATASETS = "zeroshot_classification_templates.json"


class TextsSource:
    """One sample per line of a `.txt`, in the order of the file; the key is `<name of the file without suffix>/<row>`.

    A blank line is an empty caption, so that row numbers are line numbers, and spaces around a text are stripped.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("texts", hint=f"; if the file is a table: table:{location}")
        self._path = open_path(location).absolute()
        require_file(self._path)
        if not has_suffix(location, TEXT_SUFFIXES):
            raise SourceError(f"{self._path}: expected a file of texts, .txt; save an array as a column of a .parquet")

    def describe(self) -> Mapping[str, Any]:
        return {"type": "texts", "path": str(self._path), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the texts. Memory holds one line."""
        with reading(self._path, "save it again as UTF-8", damage_class=SourceError):
            check_regular(self._path)
            with self._path.open(encoding=TEXT_ENCODING) as lines:
                for row, text in enumerate(lines):
                    yield Sample(key=f"{self._path.stem}/{row}", texts=to_text_items([text], None))

    def read(self, item: FileItem) -> bytes:
        raise ItemError(f"{self._path} holds texts, no image such as {item.path}")


class PromptsSource:
    """One sample per class with its prompts as captions; columns `class` (its name) and `label` (its number from 0).

    The location is `CLASSES` or `CLASSES+TEMPLATES`. Classes are a `.txt` with one name per line; a `.json` of name ->
    prompts, which takes no templates; a folder with `classnames.txt`, or else with one sub-folder per class; or a
    dataset of the package clip-benchmark, such as `imagenet1k`. Templates are a `.txt` with one template per line and
    `{c}` in place of the name, or a dataset of clip-benchmark. By default they are those of the folder or dataset, else
    two: the name as it is, and `a photo of a {c}.` The setting `languages` may hold one language of clip-benchmark: ar,
    cn, en, it or jp. A location that does not exist is split at its last `+`.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("prompts", "languages")
        if len(settings.languages) > 1:
            raise SourceError(f"expected one language of prompts, got {', '.join(settings.languages)}")
        self._language = settings.languages[0] if settings.languages else "en"
        classes, templates = _split_location(location)
        parts = [part for part in (classes, templates) if part]
        self._location = "+".join(str(open_path(part).absolute()) if _is_path(part) else part for part in parts)
        self._settings = settings
        self._prompts = _class_prompts(classes, templates, self._language)

    def describe(self) -> Mapping[str, Any]:
        return {"type": "prompts", "path": self._location, "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        for number, (name, prompts) in enumerate(self._prompts):
            yield Sample(
                key=f"{number:05}/{name}",
                texts=tuple(TextItem(text=prompt, language=self._language) for prompt in prompts),
                columns={"class": name, "label": number},
            )

    def read(self, item: FileItem) -> bytes:
        raise ItemError(f"prompts have no image such as {item.path}")


def _split_location(location: str) -> tuple[str, str]:
    """Return the classes and the templates of a location."""
    classes, plus, templates = location.rpartition("+")
    return (classes, templates) if plus and not open_path(location).exists() else (location, "")


def _is_path(part: str) -> bool:
    return "/" in part or part.endswith((".txt", ".json")) or open_path(part).exists()


def _class_prompts(classes: str, templates: str, language: str) -> list[tuple[str, Sequence[str]]]:
    """Return the name and the prompts of each class."""
    path = open_path(classes)
    if classes.endswith(".json"):
        if templates:
            raise SourceError(f"{classes} already holds prompts; remove the templates {templates}")
        return _json_prompts(path)

    lines: Sequence[str] = DEFAULT_TEMPLATES
    is_in_folder = path.is_dir() and (path / CLASS_NAMES).is_file()
    if is_in_folder:
        names = _read_lines(path / CLASS_NAMES)
        if (path / TEMPLATES).is_file():
            lines = _read_templates(path / TEMPLATES)
    elif path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise SourceError(f"{path}: expected {CLASS_NAMES} or one sub-folder per class, got neither")
    elif _is_path(classes):
        names = _read_lines(path)
    else:
        names = _dataset_entry(f"{language}_classnames.json", classes)
        lines = clip_benchmark_file(f"{language}_{_TEMPLATES_OF_DATASETS}").get(classes, lines)

    if templates:
        is_file = _is_path(templates)
        template_file = f"{language}_{_TEMPLATES_OF_DATASETS}"
        lines = _read_templates(open_path(templates)) if is_file else _dataset_entry(template_file, templates)
    words = [name.replace("_", " ") for name in names] if path.is_dir() and not is_in_folder else names
    return [(name, [line.replace(_SLOT, word) for line in lines]) for name, word in zip(names, words, strict=True)]


def _json_prompts(path: Path) -> list[tuple[str, Sequence[str]]]:
    require_file(path)
    content = parse_json(read_text(path, SourceError), str(path))
    if not isinstance(content, dict) or not content:
        raise SourceError(f"{path}: expected a JSON object of class name -> list of prompts, got {content!r:.60}")
    classes = {name: [prompts] if isinstance(prompts, str) else prompts for name, prompts in content.items()}
    for name, prompts in classes.items():
        are_texts = isinstance(prompts, list) and all(isinstance(text, str) and text.strip() for text in prompts)
        if not prompts or not are_texts:
            raise SourceError(f"class {name!r} of {path}: expected a list of prompts, got {prompts!r:.60}")
    return list(classes.items())


def _read_templates(path: Path) -> list[str]:
    lines = _read_lines(path)
    for line in lines:
        if _SLOT not in line:
            raise SourceError(f"template {line!r} of {path}: expected {_SLOT} in place of the class name")
    return lines


def _read_lines(path: Path) -> list[str]:
    require_file(path)
    text = read_text(path, SourceError).rstrip()
    if not text:
        raise SourceError(f"{path}: expected one text per line, got an empty file; add the texts")
    lines = [line.strip() for line in split_lines(text)]
    for number, line in enumerate(lines):
        if not line:
            raise SourceError(f"{path} line {number + 1} is blank; line numbers are class numbers, so name every class")
    return lines


def _dataset_entry(file: str, name: str) -> list[str]:
    datasets = clip_benchmark_file(file)
    if name not in datasets:
        raise unknown_name("dataset", name, datasets, where="of clip-benchmark", hint="or use a file or a folder")
    entry: list[str] = datasets[name]
    return entry


def clip_benchmark_file(file: str) -> dict[str, Any]:
    """Read a JSON file of the package clip-benchmark: dataset -> class names, templates or prompts."""
    package = require("clip_benchmark", package="clip-benchmark")
    path = Path(str(package.__file__)).parent / "datasets" / file
    if not path.is_file():
        raise SourceError(f"clip-benchmark has no {file}; it has the languages ar, cn, en, it and jp")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
