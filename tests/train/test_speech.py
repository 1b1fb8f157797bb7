"""Training of speech recognizers: one stream, then the fusion on both complete runs with their encoders frozen."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.arrays import Inputs
from embedcache.dataset.inputs import InputFeature
from embedcache.derive.derive import derive_from_run
from embedcache.errors import DataError, FingerprintError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.networks.saved import load_module, read_module_config
from embedcache.networks.speech import SpeechNetwork
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache
from embedcache.train.speech import encode_utterances, train_speech
from embedcache.train.utterances import (
    SpeechAugmentation,
    UtteranceBatches,
    Utterances,
    draw_missing,
    mask_spans,
    open_utterances,
    read_augmented,
    stack_inputs,
)
from tests.crash import crash_function
from tests.edits import damage_column
from tests.media_files import tone, wav
from tests.media_toy import MEDIA
from tests.train.runs import log_lines
from tests.train.speech_cases import FEATURES, MODEL, QUIET, fit_settings, make_cache, recipe, utterances

pytestmark = pytest.mark.slow

PARTS = "fusion+ctc+attention"
STREAMS = {"audio": {"width": 2, "stack": 2}, "video": {"width": 3, "stack": 1}}


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


def starts(runs: dict[str, Path], *names: str) -> tuple[str, ...]:
    return tuple(f"{name}={runs[name]}" for name in names or runs)


def train_fusion(
    caches: tuple[Path, Path], run: Path, runs: dict[str, Path], *, on_states: bool, **options: object
) -> Path:
    both = [utterances(cache, "audio", "video") for cache in caches]
    derived = tuple(states(cache) for cache in caches) if on_states else None
    settings = fit_settings(**{"init_from": starts(runs), "trainable": PARTS, **options})
    train_speech(both[0], both[1], run, recipe(model={**MODEL, "fusion_layers": 1}), settings, states=derived)  # type: ignore[arg-type]
    return run


@pytest.mark.no_mutants
def test_a_recognizer_learns_letters_from_sound_or_lips(caches: tuple[Path, Path], tmp_path: Path) -> None:
    for name, epochs in (("audio", 40), ("video", 28)):
        data = [utterances(cache, name) for cache in caches]
        report = train_speech(
            *data, tmp_path / name, recipe(ctc_weight=1.0), fit_settings(epochs=epochs, lr=1e-2, batch_size=4)
        )
        assert report.measures["WER plain"] < 0.35
        assert set(report.measures) == {"WER plain"}


def test_an_epoch_is_chosen_by_both_readouts(caches: tuple[Path, Path], tmp_path: Path) -> None:
    data = [utterances(cache, "audio") for cache in caches]
    run = tmp_path / "run"
    report = train_speech(*data, run, recipe(align_epochs=1), fit_settings(epochs=2))
    logged = [line["validation"] for line in log_lines(run) if "validation" in line]
    assert all(set(measures) == {"WER plain", "attention WER plain"} for measures in logged)
    assert dict(report.measures) == min(logged, key=lambda measures: sum(measures.values()))


def test_settings_and_the_longest_utterance_are_recorded(caches: tuple[Path, Path], tmp_path: Path) -> None:
    data = [utterances(cache, "audio") for cache in caches]
    data = [replace(part, streams={"audio": replace(part.streams["audio"], rate_hz=23.0)}) for part in data]
    train_speech(*data, tmp_path / "run", recipe(), fit_settings(epochs=0))
    config = read_module_config(tmp_path / "run")
    assert config.arguments["streams"] == {"audio": {"width": 2, "stack": 1}}
    augmentation = {"views": {}, "missing": {}, "shift_s": 0.0, "swapped": 0.0, "masked": 0.0}
    recorded = {"model": MODEL, "augmentation": augmentation, "measured": ["plain"], "align_epochs": 0, "states": None}
    assert {name: config.training[name] for name in recorded} == recorded
    assert config.training["longest_s"] == 1.565  # 36 frames


def train_with_views(caches: tuple[Path, Path], run: Path, checkpoint_s: float) -> None:
    """Train on drawn views, in a process of its own."""
    augmentation = SpeechAugmentation(views={"audio": {"plain": 0.5, QUIET: 0.5}}, masked=0.2)
    data = [utterances(cache, "audio", views={"audio": ["plain", QUIET]}) for cache in caches]
    train_speech(*data, run, recipe(augmentation=augmentation), fit_settings(checkpoint_s=checkpoint_s))


def test_an_interrupted_run_resumes_to_the_same_bytes(caches: tuple[Path, Path], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_with_views(caches, whole, 60.0)
    crash_function(train_with_views, (caches, killed, 0.0), "after", "checkpoint.pt", 7)
    assert not (killed / "config.json").exists()
    train_with_views(caches, killed, 0.0)
    for name in ("model.safetensors", "losses.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_a_fusion_holds_both_complete_runs_unchanged(
    caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    fused = load_file(train_fusion(caches, tmp_path / "av", runs, on_states=False) / "model.safetensors")
    for name, run in runs.items():
        weights = load_file(run / "model.safetensors")
        own = {key: value for key, value in weights.items() if key.startswith(f"encoders.{name}.")}
        assert len(own) > 10
        for key, value in own.items():
            assert torch.equal(fused[key], value), key
    fresh = SpeechNetwork(streams=STREAMS, fusion_layers=1, **MODEL)
    assert {name for name, _ in fresh.named_parameters() if name.startswith("encoders.")} <= fused.keys()


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
        module, _ = load_module(tmp_path / name)
        assert isinstance(module, SpeechNetwork)
        outputs.append(
            torch.cat([module.ctc_log_probs(part)[part.is_valid_BT] for part in encode_utterances(module, data)])
        )
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


def test_states_of_another_run_are_refused(caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "audio"
    train_speech(*(utterances(cache, "audio") for cache in caches), other, recipe(), fit_settings(seed=1))
    with pytest.raises(FingerprintError, match="audio encoder: expected states that were derived from the run"):
        train_fusion(caches, tmp_path / "av", {**runs, "audio": other}, on_states=True)


@pytest.mark.parametrize("trainable", [None, "audio+fusion"])
def test_states_cannot_train_the_encoders(
    trainable: str | None, caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=rf"frozen ones, got {re.escape(trainable or 'all')}; use fusion\+ctc"):
        train_fusion(caches, tmp_path / "av", runs, on_states=True, trainable=trainable)


def test_a_start_run_without_the_part_is_an_error(
    caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"the part video of .* does not fit: it lacks encoders\.video"):
        train_fusion(caches, tmp_path / "av", {**runs, "video": runs["audio"]}, on_states=False)


def test_utterances_are_encoded_alike_in_any_batch(caches: tuple[Path, Path], runs: dict[str, Path]) -> None:
    module, _ = load_module(runs["audio"])
    assert isinstance(module, SpeechNetwork)
    data = utterances(caches[1], "audio")
    whole = torch.cat([part.frames_BTP[part.is_valid_BT] for part in encode_utterances(module, data)])
    single = torch.cat([part.frames_BTP[part.is_valid_BT] for part in encode_utterances(module, data, batch_size=1)])
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-4)


def test_videos_of_other_utterances_change_the_video_alone(caches: tuple[Path, Path]) -> None:
    module = SpeechNetwork(streams={"video": {"width": 3, "stack": 1}}, **MODEL).eval()
    data = utterances(caches[1], "video")
    order = np.roll(np.arange(len(data)), 1)
    (own,), (other,) = ([*encode_utterances(module, data, videos_of=of)] for of in (None, order))
    length = int(own.is_valid_BT[order[3]].sum())
    torch.testing.assert_close(other.frames_BTP[3, :length], own.frames_BTP[order[3], :length], atol=1e-5, rtol=1e-4)


def test_streams_of_other_lengths_are_refused(tmp_path: Path) -> None:
    data = utterances(make_cache(tmp_path / "cache", 4, late=(2,)), "audio", "video")
    module = SpeechNetwork(
        streams={"audio": {"width": 2, "stack": 2}, "video": {"width": 3, "stack": 1}}, fusion_layers=1, **MODEL
    )
    with pytest.raises(DataError, match=r"2: expected audio and video of one length, to 0\.25 s, got .* and .* s"):
        list(encode_utterances(module, data))


def test_each_epoch_holds_every_utterance_once_in_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    plan = UtteranceBatches(lengths, batch_size=16, seed=0)
    batches = [batch.numbers_B for batch in plan.epoch(0)]
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert np.mean([np.ptp(lengths[rows]) for rows in batches]) < 20
    assert not np.array_equal(batches[0], next(iter(plan.epoch(1))).numbers_B)
    rest = [batch.numbers_B.tolist() for batch in plan.epoch(0, first_step=60)]
    assert rest == [rows.tolist() for rows in batches[60:]]


def test_views_and_items_are_drawn_by_their_weights(caches: tuple[Path, Path]) -> None:
    data = utterances(caches[0], "audio", "video", views={"audio": ["plain", QUIET]})
    augmentation = SpeechAugmentation(views={"audio": {"plain": 1, QUIET: 3}})
    rng, rows = np.random.default_rng(0), np.zeros(400, np.int64)
    streams = read_augmented(data, rows, {"audio": 1, "video": 1}, augmentation, rng)
    loud = streams["audio"][0][:, 0, 0]
    assert len(np.unique(loud)) == 2
    assert 0.68 < (loud == loud.min()).mean() < 0.82
    assert 0.4 < (streams["video"][0][:, 0].max(axis=1) > 0.7).mean() < 0.6


def test_swapped_lips_are_those_of_others_and_shifted_ones_their_own(caches: tuple[Path, Path]) -> None:
    data = utterances(caches[0], "audio", "video")
    rows, stacks = np.arange(40), {"audio": 2, "video": 1}

    def read(augmentation: SpeechAugmentation) -> tuple[np.ndarray, np.ndarray]:
        return read_augmented(data, rows, stacks, augmentation, np.random.default_rng(1))["video"]

    plain, lengths = read(SpeechAugmentation())
    swapped, _ = read(SpeechAugmentation(swapped=1.0))
    shifted, _ = read(SpeechAugmentation(shift_s=0.2))
    hues = [frames.argmax(axis=2) for frames in (plain, swapped, shifted)]
    same = [np.mean([(hue[r, : lengths[r]] == hues[0][r, : lengths[r]]).mean() for r in rows]) for hue in hues[1:]]
    assert same[0] < 0.6 < same[1] < 1


def test_no_utterance_loses_every_stream() -> None:
    rng = np.random.default_rng(0)
    missing = draw_missing({"audio": 0.3, "video": 0.2}, ("audio", "video"), 10_000, rng)
    assert missing["audio"].mean() == pytest.approx(0.3, abs=0.02)
    assert missing["video"].mean() == pytest.approx(0.2, abs=0.02)
    assert not (missing["audio"] & missing["video"]).any()
    assert draw_missing({"audio": 0.3}, ("audio",), 10, rng) == {}


@pytest.mark.parametrize("length", [12, 70, 300])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.8])
def test_masked_spans_cover_the_fraction_in_the_mean(fraction: float, length: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, (1000, length + 10, 1)).astype(np.float32)
    is_masked = (mask_spans(values, np.full(1000, length), fraction, rng) != values)[..., 0]
    assert not is_masked[:, length:].any()
    assert is_masked[:, :length].mean() == pytest.approx(fraction, abs=0.02)
    assert is_masked[:, :length].mean(axis=1).max() <= min(1, 2 * fraction) + 1 / length


def test_masked_frames_are_the_mean_of_their_item() -> None:
    rng = np.random.default_rng(0)
    values, lengths = rng.normal(5, 1, (200, 80, 3)).astype(np.float16), np.full(200, 70)
    masked = mask_spans(values, lengths, 0.1, rng)
    is_masked = (masked != values).any(axis=2)
    means = np.repeat(values[:, :70].mean(axis=1, dtype=np.float32)[:, None], 80, axis=1)
    np.testing.assert_allclose(masked[is_masked], means[is_masked], atol=0.01)
    assert masked.dtype == np.float16
    assert mask_spans(values, lengths, 0.0, rng) is values


def test_stacking_a_padded_batch_is_stacking_each_item() -> None:
    values = np.arange(2 * 5 * 1).reshape(2, 5, 1).astype(np.float32)
    stacked, lengths = stack_inputs(Inputs(values, np.array([5, 3])), 2)
    assert lengths.tolist() == [3, 2]
    assert stacked[0].tolist() == [[0, 1], [2, 3], [4, 4]]
    assert stacked[1, :2].tolist() == [[5, 6], [7, 7]]
    early, _ = stack_inputs(Inputs(values, np.array([5, 3])), 1, np.array([1, -1]))
    assert early[..., 0].tolist() == [[1, 2, 3, 4, 4], [5, 5, 6, 7, 7]]


def test_an_unknown_view_is_named(caches: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="loud"):
        utterances(caches[0], "audio", views={"audio": ["plain", "loud"]})
    data = [utterances(cache, "audio") for cache in caches]
    augmentation = SpeechAugmentation(views={"audio": {"plain": 0.5, QUIET: 0.5}})
    with pytest.raises(UnknownNameError, match="unknown view '.*' of the audio of "):
        train_speech(*data, tmp_path / "run", recipe(augmentation=augmentation), fit_settings())


def test_utterances_are_opened_without_their_paths(caches: tuple[Path, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches[1], tmp_path / "cache"))
    damage_column(cache / "audio/items.parquet", "path")
    assert len(utterances(cache, "audio").texts) == 12


def test_an_utterance_has_one_transcript_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number, text in enumerate(("A B\n", " \n", "C\n", "A\nB\n")):
        (tmp_path / f"files/{number}.wav").write_bytes(wav(tone(0.3, 300.0)))
        (tmp_path / f"files/{number}.txt").write_text(text)
    settings = ExtractSettings(features=("frames",))
    extract(open_source(tmp_path / "files"), tmp_path / "cache", encoder={"audio": [MEDIA]}, settings=settings)
    cache, features = Cache(tmp_path / "cache"), {"audio": FEATURES["audio"]}
    found = open_utterances(cache, features, samples=np.arange(3))
    assert (found.samples_S.tolist(), found.texts) == ([0, 2], ["A B", "C"])
    with pytest.raises(
        DataError, match=r"3: expected one transcript, got 2 texts, 'A' and 'B'; write the transcript in"
    ):
        open_utterances(cache, features)


def test_features_are_read_into_memory_unless_told_otherwise(
    caches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, features, loaded = Cache(caches[1]), {"audio": FEATURES["audio"]}, []
    load = InputFeature.load
    monkeypatch.setattr(InputFeature, "load", lambda feature: loaded.append(feature.name) or load(feature))
    mapped = open_utterances(cache, features, in_memory=False).streams["audio"]
    assert loaded == []
    read = open_utterances(cache, features).streams["audio"]
    assert loaded == [FEATURES["audio"]]
    rows, views = mapped.rows(np.arange(3)), np.zeros(3, np.int64)
    np.testing.assert_array_equal(mapped.read(rows, views).values, read.read(rows, views).values)


def test_a_feature_without_time_is_refused(caches: tuple[Path, Path]) -> None:
    derive_from = Cache(caches[0])
    assert derive_from.feature("audio", FEATURES["audio"]).axis is not None
    with pytest.raises(DataError, match="expected utterances with a transcript"):
        open_utterances(derive_from, {"audio": FEATURES["audio"]}, samples=np.array([1000]))
