"""Evaluation of speech recognizers: errors, intervals, controls, and results that do not depend on the batch."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jiwer
import numpy as np
import pytest

from embedcache.derive.derive import derive_from_run
from embedcache.errors import DataError, FingerprintError, SettingError, UnknownNameError
from embedcache.evaluate.settings import SpeechSettings
from embedcache.evaluate.speech import SpeechReport, compare_runs, compare_speech, estimate_errors, evaluate_speech
from embedcache.evaluate.utterances import (
    clusters_of_characters,
    open_for_run,
    shuffle_videos,
    take_utterances,
    word_clusters,
)
from embedcache.networks.saved import load_module, read_module_config, save_module
from embedcache.networks.settings import DecodingSettings
from embedcache.store.cache import Cache
from embedcache.train.utterances import Utterances, open_utterances
from tests.evaluate.speech_runs import make_runs
from tests.train.speech_cases import QUIET

VIEWS = ("plain", QUIET)
CTC = DecodingSettings(decoder="ctc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache and four runs. Not to be changed."""
    return make_runs(tmp_path_factory.mktemp("speech"))


def opened(folder: Path, run: str, **options: object) -> Utterances:
    return open_for_run(Cache(folder / "test"), folder / run, views=VIEWS, **options)  # type: ignore[arg-type]


def evaluate(folder: Path, run: str, **options: object) -> SpeechReport:
    return evaluate_speech(folder / run, opened(folder, run), views=VIEWS, **{"decoding": CTC, **options})  # type: ignore[arg-type]


def test_error_rates_are_those_of_jiwer(folder: Path) -> None:
    report = evaluate(folder, "audio-0")
    for view, found in report.views.items():
        assert estimate_errors([report], view).value == pytest.approx(
            jiwer.wer(list(report.references), list(found.hypotheses))
        )
        assert estimate_errors([report], view, unit="characters").value == pytest.approx(
            jiwer.cer(list(report.references), list(found.hypotheses))
        )
    assert 0 < estimate_errors([report], "plain", unit="characters").value < 1
    assert report.views["plain"].hypotheses != report.views[QUIET].hypotheses


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["ctc", "attention", "hybrid"])
@pytest.mark.parametrize("run", ["audio-0", "fusion"])
def test_results_do_not_depend_on_the_batch_size(folder: Path, run: str, decoder: str) -> None:
    decoding = DecodingSettings(decoder=decoder)  # type: ignore[arg-type]
    reports = [evaluate(folder, run, decoding=decoding, batch_size=size) for size in (1, 7, 64)]
    for first, second in pairwise(reports):
        assert all(first.views[view].hypotheses == second.views[view].hypotheses for view in VIEWS)
    assert len(set(reports[0].views["plain"].hypotheses)) > 1


def test_words_of_one_recording_are_one_cluster(folder: Path) -> None:
    data = opened(folder, "audio-0")
    noun, numbers = word_clusters(data)
    words = [(key, word) for key, text in zip(data.keys, data.texts, strict=True) for word in text.split()]
    names = [word if int(key) % 2 else key for key, word in words]
    for first, second in pairwise(range(len(words))):
        assert (numbers[first] == numbers[second]) == (names[first] == names[second])
    assert set(noun.split(" and ")) == {"recordings", "utterances"}
    assert len(np.unique(numbers)) == 10 + 3


def test_interval_resamples_recordings(folder: Path) -> None:
    report = evaluate(folder, "audio-0")
    errors, numbers = report.views["plain"].words.errors_M, report.clusters.numbers_M
    rng, draws = np.random.default_rng(1), []
    rows = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    for _ in range(4000):
        drawn = np.concatenate([rows[number] for number in rng.integers(len(rows), size=len(rows))])
        draws.append(errors[drawn].mean())
    estimate = estimate_errors([report], "plain", num_draws=4000)
    assert [estimate.low, estimate.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_characters_belong_to_the_recording_of_their_word() -> None:
    found = clusters_of_characters(np.array([5, 6, 7]), ["AB C", "DEF"])
    assert found.tolist() == [5, 5, 5, 6, 7, 7, 7]  # "AB ", "C", "DEF"


@pytest.mark.slow
def test_difference_is_paired(folder: Path) -> None:
    seeds, lips = [evaluate(folder, f"audio-{seed}") for seed in (0, 1)], [evaluate(folder, "video-0")] * 2
    found = compare_speech(lips, seeds)
    assert set(found) == set(VIEWS)
    rates = [estimate_errors(reports, QUIET).value for reports in (lips, seeds)]
    assert found[QUIET].value == pytest.approx(rates[0] - rates[1])
    assert compare_speech(seeds, seeds)[QUIET].low == 0
    other = replace(seeds[0], keys=[f"x{key}" for key in seeds[0].keys])
    with pytest.raises(DataError, match="the same utterances"):
        compare_speech([other], seeds[:1])


def test_views_of_the_sound_do_not_change_lips(folder: Path) -> None:
    report = evaluate(folder, "video-0")
    assert report.views["plain"] is report.views[QUIET]
    alone = evaluate(folder, "fusion", streams=("video",))
    assert alone.views["plain"] is alone.views[QUIET]
    assert alone.warnings() == []


def test_a_view_needs_no_plain_feature_beside_it(folder: Path) -> None:
    data = open_for_run(Cache(folder / "test"), folder / "audio-0", views=[QUIET])
    report = evaluate_speech(folder / "audio-0", data, views=[QUIET], decoding=CTC)
    assert report.views[QUIET].hypotheses == evaluate(folder, "audio-0").views[QUIET].hypotheses


def test_a_missing_stream_without_dropout_is_a_warning(folder: Path) -> None:
    report = evaluate(folder, "fusion", streams=("audio",))
    assert report.warnings() == []
    training = {**report.config.training, "augmentation": {"missing": {"audio": 0.3}}}
    changed = replace(report, config=replace(report.config, training=training), was_seen=True)
    assert len(changed.warnings()) == 2
    assert "without modality dropout of the video" in changed.warnings()[1]


def test_shuffled_videos_are_of_others_of_similar_length(folder: Path) -> None:
    data = opened(folder, "fusion")
    videos_of = shuffle_videos(data, seed=0)
    assert sorted(videos_of) == list(range(20))
    assert all(data.texts[a] != data.texts[b] for a, b in enumerate(videos_of))
    lengths = np.array([len(text) for text in data.texts])
    assert np.abs(lengths - lengths[videos_of]).mean() < 0.6 * np.abs(lengths - lengths[::-1]).mean() + 0.5
    assert not np.array_equal(videos_of, shuffle_videos(data, seed=1))
    with pytest.raises(DataError, match="at least 2 utterances, got 1"):
        shuffle_videos(take_utterances(data, np.array([3])), seed=0)


def test_lips_of_another_utterance_are_recognized_as_that_one(folder: Path) -> None:
    data = opened(folder, "video-0")
    videos_of = shuffle_videos(data, seed=0)
    report, own = evaluate(folder, "video-0", videos_of=videos_of), evaluate(folder, "video-0")
    assert report.is_shuffled
    expected = [own.views["plain"].hypotheses[other] for other in videos_of]
    assert report.views["plain"].hypotheses == expected


@pytest.mark.slow
def test_taken_utterances_are_recognized_as_before(folder: Path) -> None:
    numbers = np.array([7, 2, 11])
    whole = evaluate(folder, "fusion").views["plain"].hypotheses
    part = evaluate_speech(folder / "fusion", take_utterances(opened(folder, "fusion"), numbers), decoding=CTC)
    assert part.views["plain"].hypotheses == [whole[number] for number in numbers]


@pytest.mark.slow
def test_states_of_the_frozen_encoders_give_the_same(folder: Path) -> None:
    for name in ("audio", "video"):
        derive_from_run(folder / "test", folder / f"{name}-0", f"{name}-states", dtype="float32")
    names = {name: f"{name}-0-{name}-states/{name}-states" for name in ("audio", "video")}
    states = open_utterances(Cache(folder / "test"), names)
    report = evaluate_speech(folder / "fusion", states, decoding=CTC, is_encoded=True)
    assert report.views["plain"].hypotheses == evaluate(folder, "fusion").views["plain"].hypotheses
    derive_from_run(folder / "test", folder / "audio-1", "audio-states", dtype="float32")
    others = open_utterances(Cache(folder / "test"), {**names, "audio": "audio-1-audio-states/audio-states"})
    with pytest.raises(FingerprintError, match="audio encoder: expected states that were derived from the run"):
        evaluate_speech(folder / "fusion", others, is_encoded=True)
    with pytest.raises(FingerprintError, match="comes from another encoder"):
        evaluate_speech(folder / "fusion", states)


@pytest.mark.slow
def test_seeds_of_a_recipe_are_one_model(folder: Path) -> None:
    paths = [folder / name for name in ("audio-0", "audio-1", "fusion")]
    settings = SpeechSettings(views=VIEWS, decoding=CTC, shuffle_videos=True)
    reports = compare_runs(folder / "test", paths, settings)
    assert {name: len(seeds) for name, seeds in reports.items()} == {
        "audio": 2,
        "fusion": 1,
        "fusion, lips of other utterances": 1,
    }
    own, shuffled = (
        reports[name][0].views["plain"].hypotheses for name in ("fusion", "fusion, lips of other utterances")
    )
    assert own != shuffled
    assert reports["audio"][0].line().startswith("20 utterances, 49 words; audio; best path of CTC; 95% intervals over")


def test_trained_utterances_are_a_warning(folder: Path, tmp_path: Path) -> None:
    config = read_module_config(folder / "audio-0")
    path = shutil.copytree(folder / "audio-0", tmp_path / "run")
    digest = Cache(folder / "test").info.index_digest
    module, _ = load_module(path)
    save_module(path, module, replace(config, index_digest=f"of others+{digest}"))
    (reports,) = compare_runs(folder / "test", [path], SpeechSettings(decoding=CTC)).values()
    assert reports[0].warnings() == ["WARNING: run was trained or validated on these utterances"]


def test_user_errors_are_named(folder: Path) -> None:
    with pytest.raises(SettingError, match="streams: .*expected audio, got video"):
        open_for_run(Cache(folder / "test"), folder / "audio-0", streams=("video",))
    with pytest.raises(UnknownNameError, match="babble0dB"):
        open_for_run(Cache(folder / "test"), folder / "audio-0", views=("babble0dB",))
    with pytest.raises(SettingError, match="at least one run"):
        compare_runs(folder / "test", [])
    with pytest.raises(SettingError, match="expected each run once"):
        compare_runs(folder / "test", [folder / "audio-0", folder / "audio-0"])
    with pytest.raises(DataError, match="got none, as it has no column split"):
        compare_runs(folder / "test", [folder / "audio-0"], SpeechSettings(part="test"))
