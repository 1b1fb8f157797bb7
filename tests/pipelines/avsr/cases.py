"""Spelled letters as tones and colors: caches of utterances that a tiny recognizer can learn, from real files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.settings import from_flat
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from pipelines.avsr.train import SpeechRecipe
from pipelines.avsr.utterances import Utterances, open_utterances
from tests.media_files import encode_video, tone, wav
from tests.media_toy import MEDIA

LETTERS = "ABC"
FEATURES = {"audio": "open_media/frames", "video": "open_media/frames"}
MODEL: Mapping[str, Any] = {
    "width": 16,
    "num_layers": 1,
    "decoder_layers": 1,
    "num_heads": 2,
    "feed_forward": 32,
    "dropout": 0.0,
}
_LETTER_S = 0.24


class SpellingSource:
    """Utterances of words of one letter; a letter has a pitch, a loudness and a color. Each has two videos, one darker.

    Args:
        is_recorded: the words of every second utterance name their recordings in a column.
    """

    def __init__(self, count: int, *, first: int = 0, is_recorded: bool = False) -> None:
        self._numbers, self._is_recorded = range(first, first + count), is_recorded

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.pipelines.avsr.cases:SpellingSource", "path": "", "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for number in self._numbers:
            audio = FileItem(path=f"{number}.wav", length=len(self.read(FileItem(path=f"{number}.wav", length=0))))
            names = [f"{number}.{face}.mp4" for face in range(2)]
            videos = tuple(FileItem(path=n, length=len(self.read(FileItem(path=n, length=0)))) for n in names)
            text = TextItem(text=" ".join(_letters(number)))
            recordings = " ".join(f"spoken/{letter}" for letter in _letters(number)) if number % 2 else None
            columns = {"recordings": recordings} if self._is_recorded else {}
            yield Sample(key=str(number), texts=(text,), files={"audio": (audio,), "video": videos}, columns=columns)

    def read(self, item: FileItem) -> bytes:
        number, *face, kind = item.path.split(".")
        places = [LETTERS.index(letter) for letter in _letters(int(number))]
        if kind == "wav":
            return wav(np.concatenate([tone(_LETTER_S, 300.0 * 3**place) * (0.1 + 0.4 * place) for place in places]))
        frames = np.zeros((6 * len(places), 16, 16, 3), np.uint8)
        for position, place in enumerate(places):
            frames[6 * position : 6 * position + 6, :, :, place] = 200 - 50 * int(face[0])
        return encode_video(frames)


def _letters(number: int) -> str:
    rng = np.random.default_rng(number)
    return "".join(rng.choice(list(LETTERS), size=rng.integers(2, 4)))


def quiet(samples: np.ndarray) -> np.ndarray:
    """Return a recording at half its loudness: a view."""
    return samples / 2


quiet.modality = "audio"  # type: ignore[attr-defined]
QUIET = "tests.pipelines.avsr.cases-quiet"
"""Name of the view."""


def make_cache(path: Path, count: int, **options: Any) -> Path:
    """Extract utterances with the toy encoders, plain and quiet."""
    extract(
        SpellingSource(count, **options),
        path,
        encoder={"audio": [MEDIA], "video": [MEDIA]},
        settings=ExtractSettings(chunk_size=8, features=("frames",), views=("tests.pipelines.avsr.cases:quiet",)),
    )
    return path


def utterances(cache: Path, *names: str, views: Mapping[str, Any] | None = None) -> Utterances:
    """Open the utterances of some streams."""
    return open_utterances(Cache(cache), {name: FEATURES[name] for name in names}, views=views)


def recipe(**options: Any) -> SpeechRecipe:
    """Return a recipe for the smallest network."""
    return SpeechRecipe(**{"model": MODEL, **options})


def fit_settings(**options: Any) -> FitSettings:
    """Return settings of a short training on one thread."""
    return from_flat(FitSettings, {"epochs": 2, "batch_size": 8, "lr": 3e-3, "threads": 1, **options})
