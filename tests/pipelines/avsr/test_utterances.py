"""Streams of utterances whose values tell where they come from: what is read, drawn, shifted, masked and encoded."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from embedcache.arrays import Inputs, Ints
from embedcache.settings import from_flat
from embedcache.train.settings import FitSettings
from pipelines.avsr.network import SpeechNetwork
from pipelines.avsr.train import SpeechRecipe, SpeechTask
from pipelines.avsr.utterances import (
    SpeechAugmentation,
    Stream,
    Utterances,
    read_augmented,
)
from tests.pipelines.avsr.cases import MODEL

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


def augmented(data: Utterances, numbers: Ints, seed: int = 0, **options: Any) -> dict[str, tuple[np.ndarray, Ints]]:
    rng = np.random.default_rng(seed)
    return read_augmented(data, numbers, dict.fromkeys(data.streams, 1), SpeechAugmentation(**options), rng)


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


def make_task(data: Utterances, speech: SpeechRecipe, batch_size: int) -> SpeechTask:
    streams = {name: {"width": 1, "stack": stack} for name, stack in STACKS.items()}
    module = SpeechNetwork(streams=streams, fusion_layers=1, **MODEL)
    return SpeechTask(module, data, data, from_flat(FitSettings, {"batch_size": batch_size}), speech)


def test_first_epochs_align_ctc_on_plain_views() -> None:
    augmentation = SpeechAugmentation(views={"audio": {"loud": 1.0}}, missing={"audio": 0.5})
    task = make_task(make_utterances(), SpeechRecipe(align_epochs=2, augmentation=augmentation), 4)
    for epoch in range(4):
        for batch in task.batches(epoch, 0):
            values = batch.inputs["audio"].values
            assert values.shape[1:] == (6, 2)  # stacked
            assert batch.targets.is_ctc_alone == (epoch < 2)
            assert bool((values >= 10_000).all()) == (epoch >= 2)
            assert bool((values < 10_000).all()) == (epoch < 2)
            assert batch.targets.is_missing.keys() == {"audio", "video"}
