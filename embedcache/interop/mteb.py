"""mteb: the vectors of a cache as embeddings that its `CachedEmbeddingWrapper` finds, and a run as a model.

mteb 2 keeps a folder per task, and in it one per role of retrieval, `query` and `document`. It finds a vector by the
content of an item: the SHA-256 of its text, or of its pixels. Its own class writes the files, so that they are always
those of the installed version.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.keep import find_copies
from embedcache.dataset.thumbnails import Thumbnails
from embedcache.devices import AUTO
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, ItemError, UnknownNameError, one_line
from embedcache.files import AnyPath, building
from embedcache.inference import Model, load
from embedcache.interop.exporting import IMAGES_AND_TEXTS, check_new_folder, open_exported
from embedcache.interop.settings import MtebSettings
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.registry import require
from embedcache.search.vectors import Vectors
from embedcache.settings import merge_settings
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.store.rows import RowReader

_EXTRA = "mteb"
_BLOCK = 256
_ROLES = ("query", "document")


def write_mteb(
    cache_path: AnyPath,
    out_path: AnyPath,
    tasks: Sequence[Any],
    settings: MtebSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> int:
    """Write the vectors of all images and captions, so that mteb finds those of items with the same pixels or text.

    `CachedEmbeddingWrapper(model, out_path)` of mteb then computes only the items of a task that the cache does not
    have. Time: images are decoded again from the source, for the hash of their pixels. Memory: a block.

    Args:
        cache_path: path or URL of the cache.
        out_path: a new folder.
        tasks: names of tasks, or task objects of mteb.
        settings: features or a run, and the folders of images.
        progress: progress in items.
        options: settings by their names on the command line, which replace those of `settings`.

    Returns:
        The number of items that mteb finds, counted once.

    Raises:
        MissingExtraError: mteb is not installed.
        UnknownNameError: there is no such task or feature.
        DataError: no task has items of the modalities that the cache has vectors of.
        PathError: the folder is not new, or images may not be read, see `Thumbnails`.
        UnfinishedError, FingerprintError: see `Vectors`.
    """
    settings, progress = merge_settings(MtebSettings, settings, options), to_progress(progress)
    out_path = Path(out_path)
    opened = [_open_task(task) for task in tasks]
    check_new_folder(out_path)
    cache = Cache(cache_path)
    vectors = open_exported(cache, settings, IMAGES_AND_TEXTS)
    places = _places(opened, vectors)
    thumbnails = Thumbnails(cache) if "image" in {name for _, name in places} else None
    with building(out_path) as temporary:
        written = {
            modality: _write(
                temporary, [place for place, name in places if name == modality], each, thumbnails, progress
            )
            for modality, each in vectors.items()
        }
    return sum(written.values())


def load_mteb(run: AnyPath, *, device: str = AUTO) -> "MtebModel":
    """Open a run as a model of mteb: it encodes what a task has with the run's encoders and projectors.

    Raises the errors of `embedcache.load`, and `MissingExtraError` if mteb is not installed.
    """
    model = load(run, kind="pair", device=device)
    meta = require("mteb.models.model_meta", extra=_EXTRA)
    about = {
        "name": f"embedcache/{Path(run).resolve().name}",
        "revision": model.config.weights_digest[:40] or None,
        "modalities": list(model.config.modalities),
        "embed_dim": model.width,
        "similarity_fn_name": meta.ScoringFunction.COSINE,
    }
    return MtebModel(model, meta.ModelMeta.create_empty(about))


class MtebModel:
    """A trained pair with the methods that mteb calls; create it with `load_mteb`."""

    def __init__(self, model: Model, meta: Any) -> None:
        self.model, self.mteb_model_meta = model, meta

    def encode(self, inputs: Any, **_: Any) -> Floats:
        """Embed the items of a data loader of mteb, images or texts: (N, P) float32, rows of length 1.

        Raises `DataError` for items of both modalities, or of another one.
        """
        parts = [np.empty((0, self.model.width), np.float32)]
        for batch in inputs:
            given = [name for name in ("image", "text", "audio", "video") if name in batch]
            if given not in (["image"], ["text"]):
                raise DataError(f"mteb: expected items with an image or a text, got {' and '.join(given) or 'neither'}")
            encode = self.model.encode_image if given == ["image"] else self.model.encode_text
            parts.append(encode(list(batch[given[0]])))
        return np.concatenate(parts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosine of each of N embeddings with each of Q: (N, Q)."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosines of corresponding embeddings: (N,)."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)


def _unit(embeddings: Any) -> torch.Tensor:
    values = torch.as_tensor(np.atleast_2d(np.asarray(embeddings, np.float32)))
    return torch.nn.functional.normalize(values, dim=-1)


def _open_task(task: Any) -> Any:
    mteb = require("mteb", extra=_EXTRA)
    if not isinstance(task, str):
        return task
    try:
        return mteb.get_task(task)
    except KeyError as error:
        raise UnknownNameError(f"unknown task of mteb {task!r}: {one_line(error)}") from error


def _places(tasks: Sequence[Any], vectors: Mapping[Modality, Vectors]) -> list[tuple[str, Modality]]:
    """Return the folders of tasks, each with a modality whose vectors belong there."""
    types = require("mteb.types", extra=_EXTRA).PromptType
    retrieval = require("mteb.abstasks.retrieval", extra=_EXTRA).AbsTaskRetrieval
    places: list[tuple[str, Modality]] = []
    for task in tasks:
        metadata = task.metadata
        roles = [types(role) for role in _ROLES] if isinstance(task, retrieval) else _roles_of(task)
        for role in roles:
            folder = metadata.name if role is None else f"{metadata.name}/{role.value}"
            asked = metadata.get_modalities(role) if isinstance(task, retrieval) else metadata.modalities
            places += [(folder, modality) for modality in vectors if modality in asked]
    if not places:
        names = " and ".join(task.metadata.name for task in tasks) or "no task"
        raise DataError(f"expected a task with items of {' or '.join(vectors)}, got {names}")
    return places


def _roles_of(task: Any) -> list[Any]:
    """Return the roles that a task gives its two inputs, or None for a task without roles."""
    roles = [getattr(task, name, None) for name in ("input1_prompt_type", "input2_prompt_type")]
    return list(dict.fromkeys(roles))


def _write(
    folder: Path, places: Sequence[str], vectors: Vectors, thumbnails: Thumbnails | None, progress: Progress
) -> int:
    """Add the vectors of one modality to the folders of tasks; return the number of different items."""
    if not places:
        return 0
    backend = require("mteb.models.cache_wrappers.cache_backends.numpy_cache", extra=_EXTRA).NumpyCache
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that do not exist yet, and of other bytes of the same pixels
        caches = [backend(folder / place, initial_vectors=len(vectors.rows)) for place in places]
        for cache in caches:
            cache.load()  # of a task of both modalities, it has the other one
        before = len(caches[0].hash_to_index)
        first_rows = find_copies(vectors.cache, vectors.feature).unique_rows
        progress.start(f"writing {vectors.modality} vectors", len(first_rows), "items")
        for rows_B, vectors_BP in vectors.blocks():
            first = np.flatnonzero(np.isin(rows_B, first_rows))
            for block in blocks(len(first), _BLOCK):
                items, is_read = _items(vectors, rows_B[first[block]], thumbnails)
                for cache in caches:
                    cache.add(items, vectors_BP[first[block]][is_read])
                progress.advance(block.stop - block.start)
        progress.finish()
        for cache in caches:
            cache.save()
    return len(caches[0].hash_to_index) - before


def _items(vectors: Vectors, rows_B: Ints, thumbnails: Thumbnails | None) -> tuple[list[dict[str, Any]], Bools]:
    """Return items as mteb has them, and which rows could be read."""
    if vectors.modality == "text":
        texts = RowReader(vectors.cache, "text", ["text"]).take(rows_B)["text"].to_pylist()
        return [{"text": text} for text in texts], np.ones(len(rows_B), bool)
    assert thumbnails is not None
    images = list(_images(rows_B, thumbnails))
    return [{"image": image} for image in images if image is not None], np.array(
        [image is not None for image in images]
    )


def _images(rows_B: Array, thumbnails: Thumbnails) -> Iterator[Image.Image | None]:
    """Iterate over images as the library datasets decodes them, in their own mode; None where one cannot be read."""
    for row in rows_B.tolist():
        try:
            data = thumbnails.read(row)
            decode_image(data)  # which refuses what is damaged or too large
        except ItemError:
            yield None
            continue
        image = Image.open(io.BytesIO(data))
        image.load()
        yield ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation) else image
