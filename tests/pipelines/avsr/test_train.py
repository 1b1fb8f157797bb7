"""The network of recognition, its batches, and its training."""

import json
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase, digits
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from embedcache.arrays import Inputs, Ints
from embedcache.derive.derive import derive_from_run
from embedcache.errors import DataError
from embedcache.runs import is_finished
from embedcache.settings import from_flat
from embedcache.store.cache import Cache
from embedcache.train.batches import Batch, BatchInput
from embedcache.train.settings import FitSettings
from pipelines.avsr.layers import MaskedNorm
from pipelines.avsr.network import EncodedSpeech, Frames, SpeechNetwork, load_network
from pipelines.avsr.train import (
    SpeechObjective,
    SpeechRecipe,
    SpeechTargets,
    SpeechTask,
    encode_utterances,
    pad_transcripts,
    train_speech,
)
from pipelines.avsr.transcripts import END, decode_symbols, encode_transcript
from pipelines.avsr.utterances import SpeechAugmentation, Stream, Utterances, mask_spans, open_utterances
from pipelines.sequence import valid_frames
from tests.crash import crash_function
from tests.pipelines.avsr.cases import MODEL, QUIET, fit_settings, make_cache, recipe, utterances

PARTS = "fusion+ctc+attention"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("speech")
    return make_cache(folder / "train", 40), make_cache(folder / "valid", 12, first=100)


@pytest.fixture(scope="module")
def runs(caches: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stream, and the states of its encoder in both caches."""
    found = {}
    for name in ("audio", "video"):
        found[name] = tmp_path_factory.mktemp("runs") / name
        train_speech(*(utterances(cache, name) for cache in caches), found[name], recipe(), fit_settings())
        for cache in caches:
            derive_from_run(cache, found[name], f"{name}-states", dtype="float32")
    return found


def states(cache: Path) -> Utterances:
    names = {name: f"{name}-{name}-states/{name}-states" for name in ("audio", "video")}
    return open_utterances(Cache(cache), names)


def train_fusion(caches: tuple[Path, Path], run: Path, runs: dict[str, Path], *, on_states: bool) -> Path:
    both = [utterances(cache, "audio", "video") for cache in caches]
    derived = tuple(states(cache) for cache in caches) if on_states else None
    settings = fit_settings(init_from=tuple(f"{name}={start}" for name, start in runs.items()), trainable=PARTS)
    train_speech(both[0], both[1], run, recipe(model={**MODEL, "fusion_layers": 1}), settings, states=derived)  # type: ignore[arg-type]
    return run


@pytest.mark.slow
@pytest.mark.no_mutants
def test_a_recognizer_learns_letters_from_sound_or_lips(caches: tuple[Path, Path], tmp_path: Path) -> None:
    for name, epochs, seed in (("audio", 40, 0), ("video", 20, 2)):
        data = [utterances(cache, name) for cache in caches]
        settings = fit_settings(epochs=epochs, lr=1e-2, batch_size=4, seed=seed)
        report = train_speech(*data, tmp_path / name, recipe(ctc_weight=1.0), settings)
        assert report.measures["WER plain"] < 0.35
        assert set(report.measures) == {"WER plain"}


def train_with_views(caches: tuple[Path, Path], run: Path, checkpoint_s: float) -> None:
    """Train on drawn views, in a process of its own."""
    augmentation = SpeechAugmentation(views={"audio": {"plain": 0.5, QUIET: 0.5}}, masked=0.2)
    data = [utterances(cache, "audio", views={"audio": ["plain", QUIET]}) for cache in caches]
    train_speech(*data, run, recipe(augmentation=augmentation), fit_settings(checkpoint_s=checkpoint_s))


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_bytes(caches: tuple[Path, Path], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_with_views(caches, whole, 60.0)
    crash_function(train_with_views, (caches, killed, 0.0), "after", "checkpoint.pt", 7)
    assert not is_finished(killed)
    train_with_views(caches, killed, 0.0)
    for name in ("model.safetensors", "losses.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_training_on_derived_states_is_training_through_the_frozen_encoders(
    caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    losses = []
    for name, on_states in (("through", False), ("states", True)):
        run = train_fusion(caches, tmp_path / name, runs, on_states=on_states)
        lines = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    outputs = []
    data = utterances(caches[1], "audio", "video")
    for name in ("through", "states"):
        module, _ = load_network(tmp_path / name)
        parts = encode_utterances(module, data)
        outputs.append(torch.cat([module.ctc_log_probs(part)[part.is_valid_BT] for part in parts]))
        for stream, start in runs.items():
            own = {key: value for key, value in load_file(start / "model.safetensors").items() if stream in key}
            assert len(own) > 10
            assert all(torch.equal(module.state_dict()[key], value) for key, value in own.items())
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("length", [12, 70, 300])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.8])
def test_masked_spans_cover_the_fraction_in_the_mean(fraction: float, length: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, (1000, length + 10, 1)).astype(np.float32)
    is_masked = (mask_spans(values, np.full(1000, length), fraction, rng) != values)[..., 0]
    assert not is_masked[:, length:].any()
    assert is_masked[:, :length].mean() == pytest.approx(fraction, abs=0.02)
    assert is_masked[:, :length].mean(axis=1).max() <= min(1, 2 * fraction) + 1 / length


STREAMS: Mapping[str, Mapping[str, int]] = {"audio": {"width": 6, "stack": 2}, "video": {"width": 5, "stack": 1}}

SMALL: Mapping[str, Any] = {"width": 16, "num_layers": 1, "decoder_layers": 1, "num_heads": 2, "feed_forward": 32}

LENGTHS = torch.tensor([7, 4, 9])

TEXTS = ("BIN", "AT 2", "O")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network(*, names: tuple[str, ...] = ("audio", "video"), **options: Any) -> SpeechNetwork:
    streams = {name: STREAMS[name] for name in names}
    return SpeechNetwork(streams=streams, **{**SMALL, "fusion_layers": len(names) - 1, **options}).eval()


def inputs(*, names: tuple[str, ...] = ("audio", "video"), lengths_B: torch.Tensor = LENGTHS) -> dict[str, Frames]:
    shape = (len(lengths_B), int(lengths_B.max()))
    return {n: Frames(torch.randn(*shape, STREAMS[n]["width"] * STREAMS[n]["stack"]), lengths_B) for n in names}


def batch(streams: Mapping[str, Frames]) -> Batch:
    symbols, lengths = pad_transcripts([encode_transcript(text) for text in TEXTS])
    return Batch(
        samples=np.arange(len(TEXTS)),
        num_samples=len(TEXTS),
        inputs={name: BatchInput(*frames) for name, frames in streams.items()},
        targets=SpeechTargets(torch.from_numpy(symbols), torch.from_numpy(lengths)),
    )


def test_masked_norm_is_layer_norm_over_valid_frames_and_channels() -> None:
    values = torch.randn(3, 9, 5)
    normed = MaskedNorm()(values, valid_frames(LENGTHS, 9))
    for row, length in enumerate(LENGTHS.tolist()):
        expected = nn.functional.layer_norm(values[row, :length], (length, 5))
        torch.testing.assert_close(normed[row, :length], expected)
        assert not normed[row, length:].any()


@pytest.mark.parametrize("kind", ["concat", "gated"])
def test_padding_changes_nothing(kind: str) -> None:
    module, streams = network(fusion=kind), inputs()
    together = module.encode(streams)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = module.encode({n: Frames(v[row : row + 1, :length], k[row : row + 1]) for n, (v, k) in streams.items()})
        torch.testing.assert_close(together.frames_BTP[row, :length], alone.frames_BTP[0], atol=1e-5, rtol=1e-4)
        probs = module.ctc_log_probs(together)[row, :length]
        torch.testing.assert_close(probs, module.ctc_log_probs(alone)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["concat", "gated"])
def test_an_absent_stream_is_a_missing_one(kind: str) -> None:
    module, streams = network(fusion=kind), inputs()
    is_missing = {"video": torch.ones(3, dtype=torch.bool)}
    dropped = module.encode(streams, is_missing=is_missing).frames_BTP
    alone = module.encode({"audio": streams["audio"]}).frames_BTP
    is_valid = valid_frames(LENGTHS, 9)
    torch.testing.assert_close(dropped[is_valid], alone[is_valid])
    assert not torch.allclose(dropped[is_valid], module.encode(streams).frames_BTP[is_valid])


def test_the_loss_is_that_of_its_docstring() -> None:
    module, streams = network(), inputs()
    loaded = batch(streams)
    encoded = module.encode(streams)
    log_probs = module.ctc_log_probs(encoded)
    ctc, uniform, nll, mean = [], [], [], []
    for row, text in enumerate(TEXTS):
        target, length = torch.from_numpy(encode_transcript(text)), int(LENGTHS[row])
        lengths = torch.tensor(length), torch.tensor(len(target))
        loss = nn.CTCLoss(reduction="sum")(log_probs[row, :length], target, *lengths)
        ctc.append(loss / len(target))
        uniform += [-log_probs[row, :length].flatten()]
        prefix = torch.cat([torch.tensor([END]), target])[None]
        frames = encoded.frames_BTP[row : row + 1, :length], encoded.is_valid_BT[row : row + 1, :length]
        following = module.attention(prefix, *frames)[0].log_softmax(dim=-1)
        nll.append(-following[torch.arange(len(target) + 1), torch.cat([target, torch.tensor([END])])])
        mean.append(-following.mean(dim=-1))
    of_ctc = 0.99 * torch.stack(ctc).mean() + 0.01 * torch.cat(uniform).mean()
    of_attention = 0.99 * torch.cat(nll).mean() + 0.01 * torch.cat(mean).mean()
    torch.testing.assert_close(SpeechObjective(module).loss(loaded), 0.2 * of_ctc + 0.8 * of_attention)
    torch.testing.assert_close(SpeechObjective(module, ctc_weight=1).loss(loaded), of_ctc)
    torch.testing.assert_close(SpeechObjective(module, ctc_weight=0).loss(loaded), of_attention)


@pytest.fixture
def module() -> SpeechNetwork:
    return network()


def encode(module: SpeechNetwork) -> EncodedSpeech:
    with torch.no_grad():
        return module.encode(inputs())


def test_symbols_have_stored_numbers() -> None:
    """Trained heads depend on the order, so it never changes."""
    text = f"{ascii_uppercase}{digits}'"
    assert encode_transcript(text).tolist() == list(range(2, 39))
    assert encode_transcript(" a\ta").tolist() == [2, 1, 2]
    assert decode_symbols([0, *range(2, 39), END, 4]) == text
    with pytest.raises(DataError, match="got ','"):
        encode_transcript("so, yes")


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
