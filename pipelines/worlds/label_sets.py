"""Real images and audio with words: emoji, Fashion-MNIST, and letters spoken by three people.

| source | package | license |
| --- | --- | --- |
| `EmojiSource` | the packages of `openmoji:` | CC BY-SA 4.0 |
| `FashionSource` | Debian `dataset-fashion-mnist` | MIT |
| `LettersSource` | Debian `asterisk-core-sounds-en-g722` (CC BY-SA 3.0), `klettres-data` (GPL-2+) | in brackets |
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedcache.errors import ItemError, MissingExtraError, SettingError
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.quickstart.openmoji import OpenmojiSource
from embedcache.registry import unknown_name
from embedcache.sources.open import SourceSettings
from pipelines.worlds.examples import draw_examples, in_split
from pipelines.worlds.idx import encode_png, read_idx
from pipelines.worlds.talking_recordings import RECORDINGS, find_recordings, read_recording
from pipelines.worlds.talking_speech import LETTERS, encode_wav

EMOJI_KIND = "pipelines.worlds.label_sets:EmojiSource"
FASHION_KIND = "pipelines.worlds.label_sets:FashionSource"
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_LABELS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Word of each class number."""
FASHION_TRAIN = 60_000
"""Number of published training images."""
LETTERS_KIND = "pipelines.worlds.label_sets:LettersSource"
_VALID_FRACTION = 0.1


class EmojiSource:
    """OpenMoji's images with their English names. The location is `all`, or the number of first images."""

    credit = OpenmojiSource.credit

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("emoji")
        if location != "all" and not location.isdecimal():
            raise SettingError(f"emoji: expected all or a number of images, got {location!r}")
        self._location = location
        self._source = OpenmojiSource("en", SourceSettings())

    def describe(self) -> Mapping[str, Any]:
        return {**self._source.describe(), "type": EMOJI_KIND, "path": self._location}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images, as `openmoji:en` does."""
        return islice(self._source.samples(), None if self._location == "all" else int(self._location))

    def read(self, item: FileItem) -> bytes:
        """Draw an image as a PNG of 256 x 256 pixels."""
        return self._source.read(item)


class FashionSource:
    """The first images of Fashion-MNIST's two parts, with words as labels.

    The location is `TRAIN+TEST`, numbers of images. The last tenth of the training images has the split `valid`.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("fashion")
        counts = location.split("+")
        if len(counts) != 2 or not all(count.isdecimal() for count in counts):
            raise SettingError(f"fashion: expected two numbers of images such as 6000+2000, got {location!r}")
        if not FASHION_FOLDER.is_dir():
            raise MissingExtraError("Fashion-MNIST is not installed; run: apt-get install dataset-fashion-mnist")
        self._counts = dict(zip(("train", "test"), map(int, counts), strict=True))

    def describe(self) -> Mapping[str, Any]:
        return {"type": FASHION_KIND, "path": "+".join(map(str, self._counts.values())), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images in the order of the files, test images first."""
        num_valid = int(self._counts["train"] * _VALID_FRACTION)
        for name, split in (("t10k", "test"), ("train", "train")):
            labels = read_idx(FASHION_FOLDER / f"{name}-labels-idx1-ubyte.gz")[: self._counts[split]]

            for row, label in enumerate(labels.tolist()):
                # The file is in random order, so its end is as good as a draw.
                is_valid = split == "train" and len(labels) - row <= num_valid
                yield Sample(
                    key=f"{name}/{row:05d}",
                    images=(FileItem(path=f"{name}-images-idx3-ubyte.gz", offset=row),),
                    columns={"split": "valid" if is_valid else split, "label": FASHION_LABELS[label]},
                )

    def read(self, item: FileItem) -> bytes:
        """Return an image as a gray PNG of 28 x 28 pixels."""
        try:
            return encode_png(read_idx(FASHION_FOLDER / item.path)[item.offset])
        except (OSError, IndexError) as error:
            raise ItemError(f"{item.path} has no image {item.offset}: {error}") from None


def draw_labels(labels: pa.Table, fraction: float, *, seed: int) -> pa.Table:
    """Draw a fraction of the published training labels of Fashion-MNIST, stratified by class. 1 % are 600 labels.

    Validation labels are not drawn. If the fraction is more than the other labels, all of them are returned.
    """
    train = in_split(labels, "train")
    return draw_examples(train, min(len(train), round(fraction * FASHION_TRAIN)), seed=seed)


class LettersSource:
    """The letters of the alphabet as three people say them, without the silence around them.

    The location is names of `RECORDINGS` joined by `+`. Keys are `SPEAKER/LETTER`. Columns are `label`, the letter in
    lower case, and `split`, the speaker, so that a test can leave one voice out.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("letters")
        self._paths: dict[str, Path] = {}
        for speaker in location.split("+"):
            if speaker not in RECORDINGS:
                raise unknown_name("speaker", speaker, RECORDINGS)
            for word, path in find_recordings(speaker):
                if word in LETTERS:
                    self._paths[f"{speaker}/{word.lower()}"] = path
        self._location = location

    def describe(self) -> Mapping[str, Any]:
        return {"type": LETTERS_KIND, "path": self._location, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the letters, speaker by speaker."""
        for key in self._paths:
            speaker, _, letter = key.partition("/")
            yield Sample(
                key=key,
                texts=(TextItem(text=letter, language="en"),),
                columns={"split": speaker, "label": letter},
                files={"audio": (FileItem(path=f"{key}.wav"),)},
            )

    def read(self, item: FileItem) -> bytes:
        """Return the audio as a WAV file of 16 bits at 16 kHz."""
        path = self._paths.get(item.path.removesuffix(".wav"))
        if path is None:
            raise ItemError(f"expected SPEAKER/LETTER.wav, got {item.path}")
        return encode_wav(read_recording(path))
