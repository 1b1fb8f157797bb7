"""What an untrained run writes at random: in any batch, with lips of others, in views; clusters of words."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from embedcache.store.cache import Cache
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.evaluate import recognize_utterances
from pipelines.avsr.train import train_speech
from pipelines.avsr.utterances import (
    Utterances,
    open_for_run,
    shuffle_videos,
    take_utterances,
    word_clusters,
)
from tests.pipelines.avsr.cases import QUIET, fit_settings, make_cache, recipe, utterances

VIEWS = ("plain", QUIET)
CTC = Decoding(decoder="ctc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache of 20 utterances, and a run of each stream. Not to be changed."""
    folder = tmp_path_factory.mktemp("speech")
    cache = make_cache(folder / "test", 20, first=200, is_recorded=True)
    for name in ("audio", "video"):
        data = utterances(cache, name)
        train_speech(data, data, folder / name, recipe(align_epochs=6), fit_settings(epochs=8, lr=1e-2, batch_size=4))
    return folder


def opened(folder: Path, run: str) -> Utterances:
    return open_for_run(Cache(folder / "test"), folder / run, views=VIEWS)


@pytest.mark.slow
def test_transcripts_do_not_depend_on_other_utterances_or_views(folder: Path) -> None:
    data = opened(folder, "audio")
    whole = recognize_utterances(folder / "audio", data, VIEWS, decoding=CTC)
    numbers = np.array([7, 2, 11])
    part = recognize_utterances(folder / "audio", take_utterances(data, numbers), [QUIET], decoding=CTC)
    assert part[QUIET] == [whole[QUIET][number] for number in numbers]
    assert whole["plain"] != whole[QUIET]
    lips = recognize_utterances(folder / "video", opened(folder, "video"), VIEWS, decoding=CTC)
    assert lips["plain"] is lips[QUIET]


@pytest.mark.slow
def test_lips_of_another_utterance_are_recognized_as_that_one(folder: Path) -> None:
    data = opened(folder, "video")
    videos_of = shuffle_videos(data, seed=0)
    own, shuffled = (
        recognize_utterances(folder / "video", data, ["plain"], decoding=CTC, videos_of=of)["plain"]
        for of in (None, videos_of)
    )
    assert shuffled == [own[other] for other in videos_of]
    assert sorted(videos_of) == list(range(20))
    assert all(data.texts[a] != data.texts[b] for a, b in enumerate(videos_of))
    lengths = np.array([len(text) for text in data.texts])
    assert np.abs(lengths - lengths[videos_of]).mean() < 0.6 * np.abs(lengths - lengths[::-1]).mean() + 0.5


@pytest.mark.slow
def test_words_of_one_recording_are_one_cluster(folder: Path) -> None:
    data = opened(folder, "audio")
    numbers = word_clusters(data)
    words = [(key, word) for key, text in zip(data.keys, data.texts, strict=True) for word in text.split()]
    names = [word if int(key) % 2 else key for key, word in words]
    for first, second in pairwise(range(len(words))):
        assert (numbers[first] == numbers[second]) == (names[first] == names[second])
    assert len(np.unique(numbers)) == 10 + 3
