"""Utterances of a cache and their random batches: transcripts, and features of sound and lips in several views.

Each epoch draws anew which view and item of an utterance it reads, and how they are augmented.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Inputs, Ints, blocks, distinct
from embedcache.dataset.inputs import PLAIN, InputFeature, Reader, check_same_view, gather, open_input, view_feature
from embedcache.dataset.pairs import read_items
from embedcache.errors import DataError
from embedcache.registry import unknown_name
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.train.distributed import check_batches
from pipelines.avsr.network import KIND
from pipelines.avsr.transcripts import encode_transcript

_SLACK_S = 0.25
"""Streams of one utterance may differ by this much in length, because the tracks of a file rarely end together."""
_BUCKET_BATCHES = 8  # batches whose utterances are sorted by length together
_LONGEST_SPAN = 10  # frames that are masked at once, 0.4 s
_BLOCK = 256
_SHUFFLED_TOGETHER = 8  # utterances of similar length that exchange their lips
_RECORDINGS = "recordings"  # column with the recording of each word of an utterance, joined by spaces


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream of all utterances, such as their sound: items and the readers of their views.

    Args:
        feature: the plain feature.
        readers: view -> reader of its rows.
        rate_hz: frames per second of the feature.
        order_M: (M,) rows of the items, utterance after utterance.
        first_S: (S,) position in `order_M` of the first item of each utterance.
        count_S: (S,) number of its items.
    """

    feature: InputFeature
    readers: Mapping[str, Reader]
    rate_hz: float
    order_M: Ints
    first_S: Ints
    count_S: Ints

    @property
    def longest_s(self) -> float:
        """Length of the longest item in seconds."""
        return float(self.feature.lengths()[self.order_M].max() / self.rate_hz)

    def rows(self, numbers_B: Ints, items_B: Ints | None = None) -> Ints:
        """Return the feature's row of one item of each utterance: (B,).

        Args:
            numbers_B: utterances.
            items_B: which of several items, such as faces, modulo their number (the first if None).
        """
        offsets_B = 0 if items_B is None else items_B % self.count_S[numbers_B]
        rows_B: Ints = self.order_M[self.first_S[numbers_B] + offsets_B]
        return rows_B

    def read(self, rows_B: Ints, views_B: Ints) -> Inputs:
        """Read each row from the view with the given number."""
        return gather(self.readers.values(), rows_B, views_B)


@dataclass(frozen=True, kw_only=True)
class Utterances:
    """Utterances with a transcript and at least one item of every stream.

    Args:
        cache: the cache.
        samples_S: (S,) their samples.
        keys: their keys.
        texts: their transcripts.
        symbols: their transcripts as numbers of `SYMBOLS`.
        streams: stream -> its items and features.
    """

    cache: Cache
    samples_S: Ints
    keys: Sequence[str]
    texts: Sequence[str]
    symbols: Sequence[Ints]
    streams: Mapping[str, Stream]

    def __len__(self) -> int:
        return len(self.samples_S)

    def view_number(self, stream: str, view: str) -> int:
        """Return the number of a view of a stream, or raise an `UnknownNameError`."""
        names = list(self.streams[stream].readers)
        if view not in names:
            raise unknown_name("view", view, names, where=f"of the {stream} of {self.cache.path}")
        return names.index(view)

    def require_close_lengths(self, inputs: Mapping[str, Inputs], numbers_B: Ints) -> None:
        """Check that the streams of each utterance have the same length, to within a quarter of a second.

        Raises:
            DataError: the streams of an utterance differ.
        """
        seconds = {name: frame_counts(values) / self.streams[name].rate_hz for name, values in inputs.items()}
        first, *rest = seconds
        for other in rest:
            bad = np.flatnonzero(np.abs(seconds[first] - seconds[other]) > _SLACK_S)
            if len(bad):
                raise DataError(
                    f"{self.keys[numbers_B[bad[0]]]}: expected {first} and {other} of one length, to {_SLACK_S} s, got "
                    f"{seconds[first][bad[0]]:.2f} and {seconds[other][bad[0]]:.2f} s; are they of one recording, and "
                    "their frame rates right?"
                )


def frame_counts(inputs: Inputs) -> Ints:
    """Return the number of frames of each item: (B,)."""
    values, lengths = inputs
    return np.full(len(values), values.shape[1], np.int64) if lengths is None else lengths


def stack_inputs(inputs: Inputs, stack: int, shifts_B: Ints | None = None) -> tuple[Array, Ints]:
    """Concatenate `stack` consecutive frames of each item: (B, T, stack · D) and (B,) lengths.

    The last frame of an item fills its last row and the rows of padding.

    Args:
        shifts_B: (B,) frames by which each item is moved to earlier times; the first or last frame fills the rest.
    """
    lengths_B = frame_counts(inputs)
    stacked_B = -(-lengths_B // stack)
    frames_T = np.arange(int(stacked_B.max()) * stack)
    shifts_B = np.zeros_like(lengths_B) if shifts_B is None else shifts_B

    frames_BT = np.clip(frames_T + shifts_B[:, None], 0, lengths_B[:, None] - 1)
    values: Array = np.take_along_axis(inputs.values, frames_BT[..., None], axis=1)
    return values.reshape(len(values), len(frames_T) // stack, -1), stacked_B


def open_utterances(
    cache: Cache,
    features: Mapping[str, str],
    *,
    views: Mapping[str, Sequence[str]] | None = None,
) -> Utterances:
    """Open the utterances of a cache, and the features of each stream. Utterances without a transcript are left out.

    Args:
        cache: a cache with one transcript per utterance.
        features: stream, `audio` or `video` -> name of its feature, with an axis of time.
        views: stream -> names of its views, such as `plain` and `babble-5dB`. If None, `plain`.

    Raises:
        UnknownNameError: there is no such feature or view.
        UnfinishedError: a feature is not complete.
        DataError: a feature has no axis of time, an utterance has several texts, a transcript has other characters than
            `SYMBOLS`, or no utterance has all of them.
    """
    view_features = {
        name: _open_views(cache, name, feature, (views or {}).get(name)) for name, feature in features.items()
    }
    rows = {name: _rows_of_all_views(cache, stream_views) for name, stream_views in view_features.items()}
    owners = {name: cache.items(name, columns=["sample"])["sample"].to_numpy() for name in features}

    table = cache.items("text", columns=["sample", "text"])
    table = table.filter(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table["text"])), 0))

    # Only samples with a transcript and an item of every stream can be used.
    samples_S = distinct(table["sample"].to_numpy())
    for name in features:
        samples_S = np.intersect1d(samples_S, owners[name][rows[name]])
    if not len(samples_S):
        raise DataError(f"{cache.path}: expected utterances with a transcript and {' and '.join(features)}, got none")

    streams = {}
    for name, stream_views in view_features.items():
        rows_M = rows[name][np.isin(owners[name][rows[name]], samples_S)]
        streams[name] = _open_stream(cache, name, stream_views, rows_M, owners[name][rows_M])

    keys = cache.column("key").take(samples_S).to_pylist()
    texts = _read_transcripts(table, samples_S, keys)
    symbols = [encode_transcript(text) for text in texts]
    return Utterances(cache=cache, samples_S=samples_S, keys=keys, texts=texts, symbols=symbols, streams=streams)


def open_for_run(
    cache: Cache,
    run_path: Path | str,
    *,
    views: Sequence[str] = (PLAIN,),
    streams: Sequence[str] | None = None,
) -> Utterances:
    """Open the utterances of a cache with the features that a run was trained on, in some views of the sound.

    Args:
        cache: the cache.
        run_path: a run of `train_speech`.
        views: views of the sound.
        streams: streams of the run to open (all if None).

    Raises:
        UnknownNameError: the cache has no such feature or view.
        FingerprintError: a view comes from another encoder than the run was trained on.
        DataError: the run is not a speech recognizer, or as in `open_utterances`.
    """
    inputs = Run.open(run_path, kind=KIND).info.inputs
    names = tuple(streams or inputs)
    stream_views = {name: views if name == "audio" else (PLAIN,) for name in names}

    # A view must come from the encoder of the training, or its features mean nothing to the run.
    for name in names:
        for view in stream_views[name]:
            feature = open_input(cache, name, view_feature(inputs[name].feature, view))
            check_same_view(
                f"the {name} feature of {run_path}",
                inputs[name].fingerprint,
                feature.fingerprint,
                view,
                next_step=f"{feature.name} of {cache.path} comes from another encoder: extract it with the same one",
            )

    features = {name: inputs[name].feature for name in names}
    return open_utterances(cache, features, views=stream_views)


def _open_views(cache: Cache, stream: str, feature: str, views: Sequence[str] | None) -> dict[str, InputFeature]:
    return {view: open_input(cache, stream, view_feature(feature, view)) for view in views or (PLAIN,)}


def _rows_of_all_views(cache: Cache, views: Mapping[str, InputFeature]) -> Ints:
    """Return the rows that every view of a stream has."""
    items = [read_items([cache], [feature]) for feature in views.values()]
    return reduce(np.intersect1d, [view.rows for view in items])


def _open_stream(cache: Cache, name: str, views: Mapping[str, InputFeature], rows_M: Ints, samples_M: Ints) -> Stream:
    """Open a stream of the items of some rows, given the sample of each."""
    plain = next(iter(views.values()))
    axis = cache.feature(name, plain.name).axis
    if axis is None or axis.rate_hz is None:
        raise DataError(f"{plain.name}: expected a feature with an axis of time, such as states; name another one")

    # Items of one utterance become neighbors, so that a position and a count describe them.
    order = np.argsort(samples_M, kind="stable")
    _, first_S, count_S = np.unique(samples_M[order], return_index=True, return_counts=True)

    return Stream(
        feature=plain,
        readers={view: feature.load() for view, feature in views.items()},
        rate_hz=axis.rate_hz,
        order_M=rows_M[order],
        first_S=first_S,
        count_S=count_S,
    )


def _read_transcripts(table: pa.Table, samples_S: Ints, keys: Sequence[str]) -> list[str]:
    """Return the text of each sample from a table of text items. Raises `DataError` if a sample has several."""
    # Texts are sorted by sample, so that a position and a count give the texts of a sample.
    owner_T = table["sample"].to_numpy()
    order_T = np.argsort(owner_T, kind="stable")
    first_S = np.searchsorted(owner_T[order_T], samples_S)
    count_S = np.searchsorted(owner_T[order_T], samples_S, side="right") - first_S
    if (count_S > 1).any():
        number = int(count_S.argmax())
        several = table["text"].take(order_T[first_S[number] :][: count_S[number]]).to_pylist()
        raise DataError(
            f"{keys[number]}: expected one transcript, got {len(several)} texts, {several[0]!r} and {several[1]!r}; "
            "write the transcript in one line"
        )
    texts: list[str] = table["text"].take(order_T[first_S]).to_pylist()
    return texts


@dataclass(frozen=True, kw_only=True)
class SpeechAugmentation:
    """Changes of the utterances in training, drawn anew in every epoch.

    Args:
        views: stream -> view -> probability.
        missing: stream -> probability that an utterance is treated as if it had no such stream. At least one stream
            always stays.
        shift_s: lips are early or late by up to this many seconds.
        swapped: probability that the lips come from another utterance.
        masked: mean fraction of the frames of each stream that are replaced by their mean, in spans of up to 0.4 s.
    """

    views: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)
    shift_s: float = 0.0
    swapped: float = 0.0
    masked: float = 0.0


class DrawnBatch(NamedTuple):
    """Utterances of a batch: a pure function of seed, epoch and step.

    Args:
        numbers_B: (B,) utterances.
        seed: seed of the run. With epoch and step it seeds the augmentation.
    """

    numbers_B: Ints
    seed: int
    epoch: int
    step: int


class UtteranceBatches:
    """Random batches of utterances of similar lengths. Each epoch has every utterance once.

    Raises:
        SettingError: a batch has fewer utterances than torchrun started processes.
    """

    def __init__(self, lengths_S: Ints, *, batch_size: int, seed: int) -> None:
        self._lengths_S = lengths_S
        self._batch_size = batch_size
        self._seed = seed
        self.num_samples = len(lengths_S)
        self.num_steps = -(-len(lengths_S) // batch_size)
        check_batches(self.num_samples, self.num_steps)

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[DrawnBatch]:
        """Iterate over the batches of one epoch, starting at a step."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(self.num_samples)

        # Utterances of similar lengths share a batch, so that little of it is padding.
        buckets = [order[rows] for rows in blocks(self.num_samples, self._batch_size * _BUCKET_BATCHES)]
        order = np.concatenate([bucket[np.argsort(self._lengths_S[bucket], kind="stable")] for bucket in buckets])

        parts = np.array_split(order, self.num_steps)
        for step in rng.permutation(self.num_steps)[first_step:].tolist():
            yield DrawnBatch(parts[step], self._seed, number, step)


def read_augmented(
    utterances: Utterances,
    numbers_B: Ints,
    stacks: Mapping[str, int],
    augmentation: SpeechAugmentation,
    rng: np.random.Generator,
) -> dict[str, tuple[Array, Ints]]:
    """Read utterances in a random view and item of each stream, and augment them: stream -> values and lengths.

    Args:
        stacks: stream -> number of frames to concatenate.
    """
    is_swapped_B = rng.random(len(numbers_B)) < augmentation.swapped
    video_owners_B = np.where(is_swapped_B, rng.integers(len(utterances), size=len(numbers_B)), numbers_B)

    inputs = {}
    for name, stream in utterances.streams.items():
        owners_B = video_owners_B if name == "video" else numbers_B
        rows_B = stream.rows(owners_B, rng.integers(2**31, size=len(numbers_B)))
        inputs[name] = stream.read(rows_B, _draw_views(utterances, name, augmentation, len(numbers_B), rng))

    # Swapped lips may differ in length from the sound; the rest must not.
    unswapped = np.flatnonzero(~is_swapped_B)
    originals = {name: values.take(unswapped) for name, values in inputs.items()}
    utterances.require_close_lengths(originals, numbers_B[unswapped])

    streams = {}
    for name, values in inputs.items():
        furthest = round(augmentation.shift_s * utterances.streams[name].rate_hz) if name == "video" else 0
        shifts_B = rng.integers(-furthest, furthest + 1, size=len(numbers_B))
        stacked_BTD, lengths_B = stack_inputs(values, stacks[name], shifts_B)
        streams[name] = mask_spans(stacked_BTD, lengths_B, augmentation.masked, rng), lengths_B
    return streams


def _draw_views(
    utterances: Utterances, name: str, augmentation: SpeechAugmentation, count: int, rng: np.random.Generator
) -> Ints:
    weights = augmentation.views.get(name, {PLAIN: 1.0})
    numbers = np.array([utterances.view_number(name, view) for view in weights])
    chances = np.array(list(weights.values()))
    views_B: Ints = numbers[rng.choice(len(numbers), size=count, p=chances / chances.sum())]
    return views_B


def draw_missing(
    chances: Mapping[str, float], streams: Sequence[str], count: int, rng: np.random.Generator
) -> dict[str, Bools]:
    """Draw the utterances that lose a stream: stream -> (B,) bool. No utterance loses all streams."""
    if len(streams) < 2:
        return {}

    # One draw per utterance, so that at most one stream is lost.
    limits = np.cumsum([chances.get(name, 0.0) for name in streams])
    lost_B = np.searchsorted(limits, rng.random(count), side="right")
    return {name: lost_B == number for number, name in enumerate(streams)}


def mask_spans(values_BTD: Array, lengths_B: Ints, fraction: float, rng: np.random.Generator) -> Array:
    """Replace some frames of each item by the mean of its frames, in spans of 1 to 10 frames.

    The masked part of an item is drawn uniformly, with mean `fraction`. Frames are not replaced by zeros, which
    would be unlike any frame: channels of frozen encoders are far from zero, by up to 14 standard deviations.
    """
    if not fraction:
        return values_BTD

    is_masked_BT = np.zeros(values_BTD.shape[:2], bool)
    for row, length in enumerate(lengths_B.tolist()):
        num_masked = round(rng.uniform(max(0.0, 2 * fraction - 1), min(1.0, 2 * fraction)) * length)
        while (lacking := num_masked - np.count_nonzero(is_masked_BT[row])) > 0:
            start = rng.integers(length)
            span = min(lacking, rng.integers(1, _LONGEST_SPAN + 1))
            is_masked_BT[row, start : min(start + span, length)] = True

    is_valid_BT1 = (np.arange(values_BTD.shape[1]) < lengths_B[:, None])[..., None]

    # Padding has no part in the mean of an item.
    means_B1D = values_BTD.mean(axis=1, keepdims=True, dtype=np.float32, where=is_valid_BT1).astype(values_BTD.dtype)
    return np.where(is_masked_BT[..., None], means_B1D, values_BTD)


def word_clusters(utterances: Utterances) -> Ints:
    """Return the cluster of each word, (M,): its recording, from the column `recordings`, or else its utterance.

    Words of one recording sound the same in every utterance, so they are not independent.

    Raises:
        DataError: an utterance has more or fewer recordings than words.
    """
    cache = utterances.cache
    recording_names = [None] * len(utterances)
    if _RECORDINGS in cache.columns:
        recording_names = cache.samples[_RECORDINGS].take(utterances.samples_S).to_pylist()

    numbers: dict[tuple[str, str], int] = {}
    clusters: list[int] = []
    for key, text, names in zip(utterances.keys, utterances.texts, recording_names, strict=True):
        words = text.split()
        recordings = (names or "").split()
        if recordings and len(recordings) != len(words):
            raise DataError(
                f"{key}: expected one recording for each of {len(words)} words in the column {_RECORDINGS}, got "
                f"{len(recordings)}"
            )

        # Without recordings, the words of an utterance are one cluster.
        places = [(_RECORDINGS, name) for name in recordings] or [("utterances", key)] * len(words)
        clusters += [numbers.setdefault(place, len(numbers)) for place in places]
    return np.array(clusters, np.int64)


def shuffle_videos(utterances: Utterances, *, seed: int) -> Ints:
    """Return the utterance whose lips each one gets, (N,): another one of similar length.

    Transcripts differ if the utterances of similar lengths allow it.

    Raises:
        DataError: there are fewer than two utterances.
    """
    if len(utterances) < 2:
        raise DataError(f"lips of other utterances: expected at least 2 utterances, got {len(utterances)}")

    rng = np.random.default_rng(seed)
    lengths_N = _num_frames(utterances, "video")
    order = rng.permutation(len(lengths_N))
    order = order[np.argsort(lengths_N[order], kind="stable")]

    videos_of = np.arange(len(order))
    for group in np.array_split(order, max(1, len(order) // _SHUFFLED_TOGETHER)):
        texts = np.array([utterances.texts[number] for number in group], object)

        # Of all rotations of a group, the one with the fewest equal transcripts.
        turns = [np.roll(np.arange(len(group)), turn) for turn in range(1, len(group))]
        best = max(turns, key=lambda turn: int((texts != texts[turn]).sum()))
        videos_of[group] = group[best]
    return videos_of


def _num_frames(utterances: Utterances, stream_name: str) -> Ints:
    """Return the number of frames of each utterance, (N,), reading the features block by block."""
    stream = utterances.streams[stream_name]
    counts = []
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
