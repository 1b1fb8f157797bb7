"""Captions in COCO's JSON (COCO, nocaps) and in the JSON of Karpathy's splits (COCO, Flickr8k, Flickr30k)."""

import posixpath
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from embedcache.errors import SourceError
from embedcache.files import decode_text, is_remote, open_path, reading
from embedcache.modalities import FileItem, Sample
from embedcache.settings import replace_fields
from embedcache.sources.files import (
    find_root,
    item_path,
    parse_json_object,
    read_bytes,
    read_item_file,
    require_file,
    resolve_item,
    to_scalar_columns,
    to_text_items,
)
from embedcache.sources.open import SourceSettings

_LOOKED_FOR = 100  # images of which one must exist
_EXPECTED = (
    "expected the JSON of COCO's captions, with images and annotations, or of Karpathy's splits, whose images have "
    "sentences"
)


class CocoSource:
    """One sample per image with all of its captions, in the order of the file.

    The key is the image's path without its suffix, such as `000000397133`. The fields of an image that are numbers or
    texts become columns; its `id` becomes `image_id`, and the split `restval` of Karpathy's COCO `train`. An image
    without captions is a sample without texts.

    Paths of images are relative to the setting `root`. Without it, to the folder that is named like the end of
    the file (`annotations/captions_val2017.json`: `val2017`) beside that of the file or in it, as COCO is unpacked,
    and else to the folder of the file. The location is the path or URL of the file.
    """

    items_are_files = True

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("coco", "root")
        self._path = open_path(location).absolute()
        require_file(self._path)
        self._root_text = find_root(settings.root or str(_guess_root(self._path)))
        self._root = open_path(self._root_text)
        self._settings = replace_fields(settings, root=self._root_text)

    def describe(self) -> Mapping[str, Any]:
        return {"type": "coco", "path": str(self._path), "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images. Memory holds the parsed file: 0.5 GB for the 592,000 captions of COCO's train2017.

        Raises:
            SourceError: the file is neither kind of JSON, contradicts itself, or none of its first images exists.
        """
        with reading(self._path):
            text = decode_text(read_bytes(self._path), str(self._path), SourceError)

        fields = parse_json_object(text, str(self._path))
        images = _field(fields, "images", list, self._path)
        names = [_image_name(image, f"{self._path}: image {number}") for number, image in enumerate(images)]

        # Only Karpathy's JSON keeps the captions within the images.
        read = _karpathy_samples if images and "sentences" in images[0] else partial(_coco_samples, fields)
        self._check_images(names)

        for sample in read(images, self._path):
            path = item_path(self._root_text, self._root_text, sample.images[0].path)
            yield replace(sample, images=(FileItem(path=path),))

    def read(self, item: FileItem) -> bytes:
        return read_item_file(resolve_item(self._root, item.path))

    def _check_images(self, names: Sequence[str]) -> None:
        """Check that one of the first images exists, so that not each one becomes a failed row."""
        if is_remote(self._root) or not names:
            return
        if not any((self._root / name).exists() for name in islice(names, _LOOKED_FOR)):
            raise SourceError(f"{self._path}: expected images in {self._root}, got no {names[0]}; name it with --root")


def _guess_root(path: Path) -> Path:
    """Return the folder of the images of a file, by the usual layouts."""
    if is_remote(path):
        return path.parent.parent / path.stem.rpartition("_")[2]
    name = path.stem.rpartition("_")[2]
    folders = (path.parent.parent / name, path.parent / name, path.parent.parent / "images" / name)
    return next((folder for folder in folders if folder.is_dir()), path.parent)


def _coco_samples(fields: Mapping[str, Any], images: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Sample]:
    captions_of = defaultdict(list)
    for number, annotation in enumerate(_field(fields, "annotations", list, path)):
        location = f"{path}: annotation {number}"
        caption = _field(annotation, "caption", str, location)
        captions_of[_field(annotation, "image_id", int | str, location)].append(caption)

    ids = [_field(image, "id", int | str, f"{path}: image {number}") for number, image in enumerate(images)]
    if len(set(ids)) < len(ids):
        raise SourceError(f"{path}: expected images with different id, got one twice; download the file again")

    for image_id, image in zip(ids, images, strict=True):
        columns = {name: value for name, value in image.items() if name not in ("id", "file_name", "filename")}
        yield _sample(_image_name(image, str(path)), captions_of.pop(image_id, []), {**columns, "image_id": image_id})

    # Captions that no image claimed would be lost silently.
    if captions_of:
        raise SourceError(f"{path}: expected annotations of its images, got image_id {min(captions_of)!r}; repair it")


def _karpathy_samples(images: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Sample]:
    for number, image in enumerate(images):
        location = f"{path}: image {number}"
        captions = [_field(sentence, "raw", str, location) for sentence in _field(image, "sentences", list, location)]
        columns = {name: value for name, value in image.items() if name not in ("filename", "filepath")}
        if columns.get("split") == "restval":  # of COCO: the part of val2014 that everybody trains on
            columns["split"] = "train"

        yield _sample(_image_name(image, location), captions, columns)


def _sample(name: str, captions: Sequence[str], columns: Mapping[str, Any]) -> Sample:
    return Sample(
        key=posixpath.splitext(name)[0],
        images=(FileItem(path=name),),
        texts=to_text_items(captions, None),
        columns=to_scalar_columns({name: value for name, value in columns.items() if name != "key"}),
    )


def _image_name(image: Any, location: str) -> str:
    """Return the path of an image as written in the file."""
    is_karpathy = isinstance(image, dict) and "filename" in image
    name: str = _field(image, "filename" if is_karpathy else "file_name", str, location)

    folder = image.get("filepath")
    return f"{folder}/{name}" if folder and isinstance(folder, str) else name


def _field(fields: Any, name: str, kind: Any, location: object) -> Any:
    """Return a field of a JSON object, of a type; the error for another value starts with `location`."""
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise SourceError(f"{location}: expected {name}, got {value!r:.60}; {_EXPECTED}")
    return value
