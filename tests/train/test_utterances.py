"""Streams of utterances whose values tell where they come from: what is read, drawn, shifted, masked and encoded."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs, Ints
from embedcache.errors import DataError, SettingError
from embedcache.networks.speech import SpeechNetwork
from embedcache.settings import from_flat
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from embedcache.train.speech import SpeechRecipe, SpeechTask, encode_utterances, sample_frames, train_speech
from embedcache.train.utterances import (
    SpeechAugmentation,
    Stream,
    UtteranceBatches,
    Utterances,
    draw_missing,
    mask_spans,
    open_utterances,
    read_augmented,
)
from tests.train.speech_cases import MODEL, fit_settings, recipe

NUM = 7
NUM_VIDEOS = np.array([1, 2, 3, 1, 1, 2, 1])
STACKS = {"audio": 2, "video": 1}


def make_stream(rate_hz: float, count_S: Ints, lengths_M: Ints, *, is_ragged: bool = True) -> Stream:
    """A stream whose frame t of row r has the value 100 · r + t, and 10,000 more in the view `loud`."""
    num_rows, num_frames = len(lengths_M), int(lengths_M.max())

    def reader(more: int) -> Any:
        def read(rows: Ints) -> Inputs:
            values = more + 100.0 * rows[:, None, None] + np.arange(num_frames)[:, None]
            return Inputs(values.astype(np.float32), lengths_M[rows] if is_ragged else None)

        return read

    return Stream(
        feature=SimpleNamespace(width=1, lengths=lambda: lengths_M),  # type: ignore[arg-type]
        readers={"plain": reader(0), "loud": reader(10_000)},
        rate_hz=rate_hz,
        order_M=np.arange(num_rows)[::-1],
        first_S=np.cumsum(count_S) - count_S,
        count_S=count_S,
    )


def make_utterances(audio_frames: Mapping[int, int] | None = None, **options: Any) -> Utterances:
    """Seven utterances of 3 s: 12 frames of sound at 4 Hz, or other numbers, and 6 of one to three videos at 2 Hz."""
    lengths = np.full(NUM, 12)
    for number, count in (audio_frames or {}).items():
        lengths[NUM - 1 - number] = count
    return Utterances(
        cache=SimpleNamespace(path="cache"),  # type: ignore[arg-type]
        samples_S=np.arange(NUM),
        keys=[f"k{number}" for number in range(NUM)],
        texts=["A"] * NUM,
        symbols=[np.array([1])] * NUM,
        streams={
            "audio": make_stream(4.0, np.ones(NUM, np.int64), lengths, **options),
            "video": make_stream(2.0, NUM_VIDEOS, np.full(NUM_VIDEOS.sum(), 6), **options),
        },
    )


def test_items_of_utterances_are_numbered_from_the_first() -> None:
    video, numbers = make_utterances().streams["video"], np.array([2, 0, 5])
    assert video.rows(numbers).tolist() == [7, 10, 2]
    assert video.rows(numbers, np.array([1, 7, 4])).tolist() == [6, 10, 2]
    assert video.rows(numbers, np.array([5, 0, 3])).tolist() == [5, 10, 1]


def test_the_longest_item_is_one_of_those_in_use() -> None:
    stream = make_stream(4.0, np.ones(3, np.int64), np.array([9, 5, 7]))
    assert stream.longest_s == 2.25
    assert replace(stream, order_M=np.array([1, 2])).longest_s == 1.75


def read_both(data: Utterances, numbers: Ints) -> dict[str, Inputs]:
    plain = np.zeros(len(numbers), np.int64)
    return {name: stream.read(stream.rows(numbers), plain) for name, stream in data.streams.items()}


def test_streams_may_differ_by_a_quarter_of_a_second() -> None:
    data = make_utterances({1: 13, 2: 11, 3: 14, 5: 10})
    near = np.array([0, 1, 2])
    data.require_close_lengths(read_both(data, near), near)
    for number, seconds in ((3, "3.50"), (5, "2.50")):
        numbers = np.array([2, number])
        message = (
            f"k{number}: expected audio and video of one length, to 0.25 s, got {seconds} and 3.00 s; are they of one "
            "recording, and their frame rates right?"
        )
        with pytest.raises(DataError) as caught:
            data.require_close_lengths(read_both(data, numbers), numbers)
        assert str(caught.value) == message


def augmented(data: Utterances, numbers: Ints, seed: int = 0, **options: Any) -> dict[str, tuple[np.ndarray, Ints]]:
    rng = np.random.default_rng(seed)
    return read_augmented(data, numbers, dict.fromkeys(data.streams, 1), SpeechAugmentation(**options), rng)


@pytest.mark.parametrize("is_ragged", [True, False])
def test_lips_alone_are_shifted_by_up_to_the_seconds(is_ragged: bool) -> None:
    data, numbers = make_utterances(is_ragged=is_ragged), np.repeat(np.arange(NUM), 20)
    streams = augmented(data, numbers, shift_s=1.0)
    audio, lengths = streams["audio"]
    assert audio[..., 0].tolist() == (100.0 * (6 - numbers[:, None]) + np.arange(12)).tolist()
    assert lengths.tolist() == [12] * len(numbers)
    video = streams["video"][0][..., 0] % 100
    shifted = {shift: tuple(np.clip(np.arange(6.0) + shift, 0, 5)) for shift in range(-2, 3)}
    assert set(map(tuple, video)) == set(shifted.values())
    assert set(map(tuple, augmented(data, numbers)["video"][0][..., 0] % 100)) == {shifted[0]}


def test_lips_alone_are_swapped() -> None:
    data, numbers = make_utterances({3: 16}), np.repeat([1, 3], 100)
    with pytest.raises(DataError, match="k3: expected audio and video of one length"):
        augmented(data, numbers)
    streams = augmented(data, numbers, swapped=1.0)  # lips of others need not last as long
    assert set((streams["audio"][0][:, 0, 0] // 100).tolist()) == {5, 3}
    assert set((streams["video"][0][:, 0, 0] // 100).tolist()) == set(range(11))


def test_draws_of_a_seed_are_those_of_earlier_versions() -> None:
    streams = augmented(
        make_utterances(),
        np.array([2, 5, 1, 2, 2, 5]),
        swapped=0.4,
        shift_s=1.0,
        views={"audio": {"plain": 1, "loud": 1}},
    )
    assert streams["audio"][0][:, 0, 0].tolist() == [10400, 100, 10500, 400, 10400, 10100]
    assert streams["video"][0][:, 2, 0].tolist() == [704, 304, 1, 103, 704, 203]


def test_spans_of_one_to_ten_frames_are_masked() -> None:
    values = np.arange(3000.0, dtype=np.float32)[None, :, None].repeat(100, axis=0)
    masked = mask_spans(values, np.full(100, 3000), 0.005, np.random.default_rng(0))  # too few to touch often
    changes = np.flatnonzero(np.diff((masked != values).ravel().astype(int), prepend=0, append=0))
    lengths = changes[1::2] - changes[::2]
    counts = np.bincount(lengths)
    assert set(range(1, 11)) <= set(lengths.tolist())
    assert counts[11:].sum() < 0.05 * counts.sum()


def test_utterances_are_sorted_by_length_within_eight_batches() -> None:
    lengths = np.random.default_rng(0).permutation(20)
    plan = UtteranceBatches(lengths, batch_size=1, seed=0)
    batches = sorted(plan.epoch(0), key=lambda batch: batch.step)
    ordered = lengths[np.concatenate([batch.numbers_B for batch in batches])]
    assert (np.flatnonzero(np.diff(ordered) < 0) + 1).tolist() == [8, 16]


def test_one_of_three_streams_is_missing_by_its_probability() -> None:
    missing = draw_missing({"a": 0.25, "c": 0.75}, ("a", "b", "c"), 4000, np.random.default_rng(0))
    assert [missing[name].mean() for name in "abc"] == pytest.approx([0.25, 0, 0.75], abs=0.02)
    assert (sum(missing[name].astype(int) for name in "abc") == 1).all()


def make_task(data: Utterances, speech: SpeechRecipe, batch_size: int) -> SpeechTask:
    streams = {name: {"width": 1, "stack": stack} for name, stack in STACKS.items()}
    module = SpeechNetwork(streams=streams, fusion_layers=1, **MODEL)
    return SpeechTask(module, data, data, from_flat(FitSettings, {"batch_size": batch_size}), speech)


def test_first_epochs_align_ctc_on_plain_views() -> None:
    augmentation = SpeechAugmentation(views={"audio": {"loud": 1.0}}, missing={"audio": 0.5})
    task = make_task(make_utterances(), SpeechRecipe(align_epochs=2, augmentation=augmentation), 4)
    for epoch in range(4):
        for loaded in task.loader.epoch(epoch):
            values = loaded.batch.streams["audio"].values_BTD
            assert values.shape[1:] == (6, 2)  # stacked
            assert loaded.batch.is_ctc_alone == (epoch < 2)
            assert bool((values >= 10_000).all()) == (epoch >= 2)
            assert bool((values < 10_000).all()) == (epoch < 2)
            assert loaded.batch.is_missing.keys() == {"audio", "video"}


def test_a_batch_may_have_one_utterance() -> None:
    data = make_utterances()
    task = make_task(replace(data, symbols=data.symbols[:3]), SpeechRecipe(), 2)
    batches = [loaded.numbers_B for loaded in task.loader.epoch(0)]
    assert sorted(map(len, batches)) == [1, 2]
    assert sorted(np.concatenate(batches)) == [0, 1, 2]


def test_each_process_counts_the_utterances_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.train.speech.own_slice", lambda count: slice(count // 2, count))
    task = make_task(make_utterances(), SpeechRecipe(), NUM)
    (loaded,) = task.loader.epoch(0)
    assert (len(loaded.numbers_B), task.count(loaded)) == (4, NUM)


def test_bad_losses_name_the_feature_or_five_utterances() -> None:
    task = make_task(make_utterances(), SpeechRecipe(), NUM)
    (loaded,) = task.loader.epoch(0)
    keys = ", ".join(f"k{number}" for number in loaded.numbers_B[:5])
    assert str(task.explain(loaded, loss=float("inf"), step=4)) == (
        f"the loss is inf at step 4, in the batch of the utterances {keys} …; lower the learning rate"
    )
    loaded.batch.streams["video"].values_BTD[1, 0] = torch.nan
    with pytest.raises(DataError, match="at step 4, the video feature holds NaN or infinity"):
        task.explain(loaded, loss=float("inf"), step=4)


def test_streams_and_views_of_utterances_are_encoded_as_named() -> None:
    data = make_utterances({1: 16})
    network: Any = SimpleNamespace(stacks=STACKS, eval=lambda: None, encode=lambda streams, **options: streams)

    def encode(**options: Any) -> dict[str, list[list[float]]]:
        parts: Any = [*encode_utterances(network, data, batch_size=4, **options)]
        assert [len(next(iter(part.values())).values_BTD) for part in parts] == [4, 3]
        return {name: [row for part in parts for row in part[name].values_BTD[:, 0].tolist()] for name in parts[0]}

    with pytest.raises(DataError, match="k1: expected audio and video of one length"):
        encode()
    others = np.array([2, 0, 1, 6, 5, 4, 3])  # whose lips last as long or not
    own = [[100.0 * row, 100.0 * row + 1] for row in range(NUM)[::-1]]
    first_videos = data.streams["video"].rows(others)
    assert encode(videos_of=others) == {"audio": own, "video": [[100.0 * row] for row in first_videos.tolist()]}
    loud = [[10_000 + value for value in row] for row in own]
    assert encode(streams=("audio",), views={"audio": "loud"}) == {"audio": loud}
    assert encode(streams=("audio",), is_encoded=True) == {"audio": [row[:1] for row in own]}


def test_frames_of_256_spread_utterances_are_sampled() -> None:
    lengths = np.full(1000, 2)
    stream = make_stream(25.0, np.ones(1000, np.int64), lengths)
    found = sample_frames(stream)
    rows = np.sort(999 - np.linspace(0, 999, 256).astype(int))
    assert found.dtype == np.float32
    assert found[:, 0].tolist() == (100.0 * rows[:, None] + np.arange(2)).ravel().tolist()


def test_rates_without_a_whole_ratio_are_refused() -> None:
    data = make_utterances()
    streams = {
        "audio": replace(data.streams["audio"], rate_hz=50.0),
        "video": replace(data.streams["video"], rate_hz=30),
    }
    message = "expected frame rates that are multiples of 25 Hz, got 30 Hz of video; extract it at another rate"
    data = replace(data, streams=streams)
    with pytest.raises(SettingError) as caught:
        train_speech(data, data, "never", recipe(), fit_settings())
    assert str(caught.value) == message


def test_a_feature_without_time_is_refused(squares_paths: Any) -> None:
    with pytest.raises(DataError, match="open_toy/patches: expected a feature with an axis of time, such as states"):
        open_utterances(Cache(squares_paths[0]), {"image": "open_toy/patches"})
