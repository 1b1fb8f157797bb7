"""Prototypes: the classes of a classifier as pairs, a row of its last layer beside the name of the class.

The source has a text and an image of each class, and no image can be read: the vectors of the images are the rows. They
are stored as imported vectors are, under the name of the feature that the layer reads, with the encoder's weights in
their fingerprint.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from embedcache.arrays import Floats
from embedcache.encoders.base import NO_HEAD, Encoder, EncoderSettings, Head
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import ItemError, SettingError
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.progress import Progress
from embedcache.provenance import IMPORTED
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit, hash_item
from embedcache.store.feature import create_group
from embedcache.store.producer import FillReport, Output, Verb, fill
from embedcache.store.writer import ChunkFeatures

CLASSIFIER = "classifier"
"""Key in the preprocessing of a fingerprint: what the encoder and feature of prototypes must be."""


class PrototypesSource:
    """The classes of an encoder's classifier, a sample each: its name as the caption, and an image that is a vector.

    Columns are `class`, the first of its names, and `label`, its number from 0. The location is the spec of an image
    encoder, such as `lite:efficientnet-lite0` or `timm:resnet50.a1_in1k`.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("prototypes")
        self.spec = EncoderSpec.parse(location)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, on the CPU."""
        return open_encoder(self.spec, modality="image", settings=EncoderSettings(device="cpu", backend="torch"))

    @cached_property
    def head(self) -> Head:
        """The classifier of the encoder.

        Raises:
            SettingError: it has none, or one whose rows are not in the space of a feature, or classes without names.
        """
        read_head: Callable[[], Head] | None = getattr(self.encoder, "read_head", None)
        if read_head is None:
            raise SettingError(f"{self.spec.text}: expected an encoder with a classifier, got one without; {NO_HEAD}")
        return read_head()

    def describe(self) -> Mapping[str, Any]:
        return {"type": "prototypes", "path": self.spec.absolute.text, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for number, names in enumerate(self.head.names):
            name = names.partition(",")[0].strip()
            yield Sample(
                key=f"{number:05}/{name}",
                images=(FileItem(path=""),),
                texts=(TextItem(text=names),),
                columns={"class": name, "label": number},
            )

    def read(self, item: FileItem) -> bytes:
        del item
        raise ItemError(f"the classes of {self.spec.text} have vectors and names, and no images")


def store_rows(cache: Cache, source: PrototypesSource, *, dtype: str, progress: Progress) -> FillReport:
    """Store the rows of the classifier as image features of a cache of prototypes."""
    head = source.head
    encoder = source.encoder.fingerprint
    feature = next(name for name in source.encoder.features if name in head.features)
    fingerprint = {
        "family": IMPORTED,
        "model": f"classifier of {source.spec.text}",
        "revision": encoder.revision,
        "weights": encoder.weights,
        "preprocessing": {
            CLASSIFIER: {
                "family": encoder.family,
                "model": encoder.model,
                "weights": encoder.weights,
                "feature": feature,
            },
            "names": head.origin,
        },
        "pooling": {},
        "backend": None,
        "precision": None,
    }
    folder = source.spec.folder
    group = create_group(cache.path, "image", folder, cache.info, spec=f"{IMPORTED}:{folder}", fingerprint=fingerprint)
    return fill(group, _Rows(head.rows_CD, feature, dtype), progress=progress)


class _Rows:
    """The rows of a classifier as a producer."""

    verb: Verb = "imported"

    def __init__(self, rows_CD: Floats, feature: str, dtype: str) -> None:
        self.outputs = {feature: Output((rows_CD.shape[1],), dtype)}
        self._rows_CD = rows_CD.astype(dtype)
        self._feature = feature

    def compute(self, rows: slice) -> ChunkFeatures:
        """Return the rows of a chunk."""
        vectors = list(self._rows_CD[rows])
        hashes: list[bytes | None] = [hash_item(vector.tobytes()) for vector in vectors]
        return ChunkFeatures({self._feature: vectors}, hashes, {self._feature: [None] * len(vectors)})

    def retries(self, _: Commit) -> bool:
        """Return False: the model is the same as before."""
        return False
