"""The utterances that a speech recognizer is evaluated on: their features, clusters of their words, shuffled lips."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Ints, blocks
from embedcache.dataset.inputs import PLAIN, check_same_view, open_input, view_feature
from embedcache.errors import DataError, SettingError
from embedcache.networks.saved import ModuleConfig, read_module_config
from embedcache.store.cache import Cache
from embedcache.train.utterances import Utterances, frame_counts, open_utterances

RECORDINGS = "recordings"
"""Column of the names of recordings, joined by spaces, that the words of an utterance come from."""

_BLOCK = 256
_SHUFFLED_TOGETHER = 8  # utterances of similar length that exchange their lips


def open_for_run(
    cache: Cache,
    run_path: Path | str,
    *,
    views: Sequence[str] = (PLAIN,),
    streams: Sequence[str] | None = None,
    samples: Ints | None = None,
) -> Utterances:
    """Open the utterances of a cache with the features that a run was trained on, in some views of the sound.

    Args:
        cache: the cache.
        run_path: a run of `train_speech`.
        views: views of the sound.
        streams: streams of the run to open; None: all.
        samples: samples to use; None: all.

    Raises:
        SettingError: the run has no such stream.
        UnknownNameError: the cache has no such feature or view.
        FingerprintError: a view comes from another encoder than the run was trained on.
        DataError: the run is no speech recognizer; or as in `open_utterances`.
    """
    config = read_speech_config(run_path, streams or ())
    names = tuple(streams or config.sides)
    opened = {name: views if name == "audio" else (PLAIN,) for name in names}
    for name in names:
        for view in opened[name]:
            feature = open_input(cache, name, view_feature(config.sides[name].feature, view))
            check_same_view(
                f"the {name} feature of {run_path}",
                config.sides[name].fingerprint,
                feature.fingerprint,
                view,
                next_step=f"{feature.name} of {cache.path} comes from another encoder: extract it with the same one",
            )
    features = {name: config.sides[name].feature for name in names}
    return open_utterances(cache, features, views=opened, samples=samples)


def read_speech_config(run_path: Path | str, streams: Sequence[str] = ()) -> ModuleConfig:
    """Read the config of a run of `train_speech`, after checking that it has some streams.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run is no speech recognizer.
        SettingError: the run has no such stream.
    """
    config = read_module_config(Path(run_path), kind="speech")
    for name in streams:
        if name not in config.sides:
            raise SettingError(f"streams: {run_path}: expected {' or '.join(config.sides)}, got {name}")
    return config


class WordClusters(NamedTuple):
    """Clusters of words, which intervals resample as a whole.

    Args:
        noun: what they are.
        numbers_M: (M,) int64, cluster of each word of all utterances.
    """

    noun: str
    numbers_M: Ints


def word_clusters(utterances: Utterances) -> WordClusters:
    """Return the cluster of each word: the recording it comes from, by the column `recordings`, else its utterance.

    Words of one recording have the same sound, in whichever utterance they are: they are not independent.

    Raises:
        DataError: an utterance has not one recording per word.
    """
    cache, named = utterances.cache, [None] * len(utterances)
    numbers: dict[tuple[str, str], int] = {}
    if RECORDINGS in cache.columns:
        named = cache.samples[RECORDINGS].take(utterances.samples_S).to_pylist()
    clusters: list[int] = []
    for key, text, names in zip(utterances.keys, utterances.texts, named, strict=True):
        words, recordings = text.split(), (names or "").split()
        if recordings and len(recordings) != len(words):
            raise DataError(
                f"{key}: expected one recording for each of {len(words)} words in the column {RECORDINGS}, got "
                f"{len(recordings)}"
            )
        places = [(RECORDINGS, name) for name in recordings] or [("utterances", key)] * len(words)
        clusters += [numbers.setdefault(place, len(numbers)) for place in places]
    nouns = dict.fromkeys(noun for noun, _ in numbers)
    return WordClusters(" and ".join(nouns), np.array(clusters, np.int64))


def clusters_of_characters(clusters_M: Ints, references: Sequence[str]) -> Ints:
    """Return the cluster of each character: that of its word; a space belongs to the word before it."""
    repeats: list[int] = []
    for text in references:
        words = text.split()
        repeats += [len(word) + 1 for word in words[:-1]] + [len(word) for word in words[-1:]]
    return np.repeat(clusters_M, repeats)


def shuffle_videos(utterances: Utterances, *, seed: int) -> Ints:
    """Return the utterance whose lips each one gets: (N,), another one of similar length.

    Transcripts differ where the utterances of similar lengths allow it.

    Raises:
        DataError: there are fewer than two utterances.
    """
    if len(utterances) < 2:
        raise DataError(f"lips of other utterances: expected at least 2 utterances, got {len(utterances)}")
    rng, lengths_N = np.random.default_rng(seed), _num_frames(utterances, "video")
    order = rng.permutation(len(lengths_N))
    order = order[np.argsort(lengths_N[order], kind="stable")]
    videos_of = np.arange(len(order))
    for group in np.array_split(order, max(1, len(order) // _SHUFFLED_TOGETHER)):
        texts = np.array([utterances.texts[number] for number in group], object)
        turns = [np.roll(np.arange(len(group)), turn) for turn in range(1, len(group))]
        best = max(turns, key=lambda turn: int((texts != texts[turn]).sum()))
        videos_of[group] = group[best]
    return videos_of


def _num_frames(utterances: Utterances, stream_name: str) -> Ints:
    """Return the number of frames of each utterance, (N,), reading the features of a block at a time."""
    stream, counts = utterances.streams[stream_name], []
    for rows in blocks(len(utterances), _BLOCK):
        rows_B = stream.rows(np.arange(rows.start, rows.stop))
        counts.append(frame_counts(stream.read(rows_B, np.zeros_like(rows_B))))
    return np.concatenate(counts)


def take_utterances(utterances: Utterances, numbers: Ints) -> Utterances:
    """Return some of the utterances, in the given order."""
    streams = {
        name: replace(stream, first_S=stream.first_S[numbers], count_S=stream.count_S[numbers])
        for name, stream in utterances.streams.items()
    }
    return replace(
        utterances,
        samples_S=utterances.samples_S[numbers],
        keys=[utterances.keys[number] for number in numbers],
        texts=[utterances.texts[number] for number in numbers],
        symbols=[utterances.symbols[number] for number in numbers],
        streams=streams,
    )
