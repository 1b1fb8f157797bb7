"""Transcripts of recordings and of cached utterances, and their errors by noise."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError, PathError, SettingError
from embedcache.metrics import MetricValues
from embedcache.store.cache import Cache
from pipelines.avsr import transcribe
from pipelines.avsr.clips import WHOLE_FRAME, Clip, iter_windows, open_clip, parse_mouth
from pipelines.avsr.ctc import WordTime
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.evaluate import recognize_utterances
from pipelines.avsr.lrs import KIND
from pipelines.avsr.noise import VIEW
from pipelines.avsr.results import gain_table, rate_table
from pipelines.avsr.train import SpeechRecipe, train_speech
from pipelines.avsr.transcribe import Recognizer, Transcript
from pipelines.avsr.utterances import (
    SpeechAugmentation,
    Utterances,
    open_for_run,
    open_utterances,
    shuffle_videos,
    take_utterances,
    word_clusters,
)
from pipelines.results import Result, Results
from tests.cli.run import succeed
from tests.encoders.checkpoints import save_speech, save_timm
from tests.media_files import encode_video, moving_square, tone, wav
from tests.pipelines.avsr.cases import QUIET, fit_settings, make_cache, recipe, utterances
from tests.pipelines.avsr.speech import PIXELS, SIZES, TOY, random_text, save_run, say, train_network, write_clips
from tests.sources.files import write

CTC = Decoding(decoder="ctc")

BOTH = ("audio", "video")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a network that reads `say`, without modality dropout."""
    return save_run(tmp_path_factory.mktemp("trained") / "run", TOY | PIXELS, module=train_network())


def noise(seconds: float, *quiet: tuple[float, float]) -> np.ndarray:
    """Return noise with quieter intervals in it."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
    for start_s, stop_s in quiet:
        samples[round(start_s * 16_000) : round(stop_s * 16_000)] *= 0.1
    return samples


def opened(path: Path, *, streams: tuple[str, ...] = BOTH) -> Clip:
    return open_clip(path, streams, (), WHOLE_FRAME)


@pytest.mark.slow
def test_long_recordings_are_cut_between_words_whose_times_are_known(trained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    speech = say(random_text(rng, 12), rng, pause=18)
    write(tmp_path, {"long.mp4": encode_video(speech.frames, samples=speech.samples)})
    recognizer = Recognizer(trained)
    clip = recognizer.open(tmp_path / "long.mp4", mouth=WHOLE_FRAME)
    transcript = recognizer.transcribe(clip, CTC, window_s=4.0)
    assert transcript.duration_s > 12
    assert transcript.text == " ".join(word for word, _, _ in speech.words)
    times = [word[1:] for word in transcript.words]
    np.testing.assert_allclose(times, [word[1:] for word in speech.words], atol=0.09)


@pytest.mark.slow
def test_windows_end_where_it_is_quiet(tmp_path: Path) -> None:
    samples = noise(20, (3.0, 3.7), (0.6, 1.5), (6.0, 6.7), (9.0, 9.7), (12.0, 12.7))  # not in [0.6, 1.5]: too early
    resting = moving_square(500)
    resting[85:95] = resting[85]  # 3.4 to 3.8 s
    write(tmp_path, {"a.wav": wav(samples), "a.mp4": encode_video(resting, samples=samples)})
    windows = list(iter_windows(opened(tmp_path / "a.wav"), window_s=4.0, step_s=0.04))
    assert (windows[0].start_s, windows[-1].stop_s) == (0, 20)
    assert [window.stop_s for window in windows[:-1]] == [window.start_s for window in windows[1:]]
    for window, (low, high) in zip(windows, [(3.0, 3.7), (6.0, 6.7), (9.0, 9.7), (12.0, 12.7)], strict=False):
        assert low < window.stop_s < high
    sound = np.concatenate([window.items["audio"] for window in windows])  # type: ignore[arg-type]
    np.testing.assert_allclose(sound, samples, atol=1e-4)
    first, *_ = iter_windows(opened(tmp_path / "a.mp4", streams=("video",)), window_s=4.0, step_s=0.04)
    assert 3.4 < first.stop_s < 3.8
    both = list(iter_windows(opened(tmp_path / "a.mp4"), window_s=4.0, step_s=0.04))
    assert sum(len(window.items["video"].frames_THW3) for window in both) == 500  # type: ignore[union-attr]


@pytest.mark.slow
def test_files_that_do_not_fit_are_refused(trained: Path, tmp_path: Path) -> None:
    apart = encode_video(moving_square(125), samples=noise(9.0))
    write(tmp_path, {"apart.mp4": apart, "a.wav": wav(tone(1.0)), "text.mp4": b"no video at all" * 40})
    with pytest.raises(DataError, match=r"one length, to 0.25 s, got 9\.\d* s of sound and 5\.\d* s of frames"):
        opened(tmp_path / "apart.mp4")
    with pytest.raises(DataError, match="expected frames"):
        open_clip(tmp_path / "a.wav", BOTH, ("video",), WHOLE_FRAME)
    with pytest.raises(SettingError, match="mouth"):
        open_clip(tmp_path / "apart.mp4", BOTH, (), None)
    with pytest.raises(DataError, match="damaged file"):
        opened(tmp_path / "text.mp4")
    with pytest.raises(PathError, match="none.wav"):
        opened(tmp_path / "none.wav")
    with pytest.raises(DataError, match="without modality dropout of its video"):
        Recognizer(trained).open(tmp_path / "a.wav")
    for region in ("1,2,3", "lips", ".8,.1,.2,.9", "10,10,90,50"):
        with pytest.raises(SettingError, match="mouth: expected X0,Y0"):
            parse_mouth(region)


@pytest.mark.slow
def test_subtitles_are_short() -> None:
    words = [WordTime(word, 1 + 0.5 * number, 1.4 + 0.5 * number) for number, word in enumerate(["BIN", "BLUE", "AT"])]
    words.append(WordTime("AGAIN", 3661.2345, 3661.9))
    transcript = Transcript(text="", words=words, score=0.0, duration_s=2.0, streams=("audio",))
    lines = "1\n00:00:01,000 --> 00:00:02,400\nBIN BLUE AT\n\n2\n01:01:01,234 --> 01:01:01,900\nAGAIN\n"
    assert transcript.to_srt() == lines


@pytest.mark.slow
def test_published_encoders_and_clips_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips in the layout of LRS3, a wav2vec 2.0 and a ResNet of their libraries, noise, a run and its transcript."""
    write_clips(tmp_path / "lrs3", 6)
    (tmp_path / "babble.wav").write_bytes(wav(noise(2.0)))
    save_speech(tmp_path / "wav2vec2", "Wav2Vec2", seed=0, feat_extract_norm="layer", do_stable_layer_norm=True)
    save_timm("test_resnet", tmp_path, seed=0)
    encoders = ("audio=hf:./wav2vec2", "video=frames:timm:test_resnet,weights=test_resnet.safetensors,rate=25")
    options = [word for encoder in encoders for word in ("--encoder", encoder)]
    options += ["--feature", "states,patch_mean", "--view", f"{VIEW}:5,tape=babble.wav", "--source-type", KIND]
    succeed("extract", "lrs3", "cache", *options, cwd=tmp_path)
    features = {"audio": "wav2vec2/states", "video": "test_resnet/patch_mean"}
    data = open_utterances(Cache(tmp_path / "cache"), features, views={"audio": ["plain", "babble5dB"]})
    augmentation = SpeechAugmentation(views={"audio": {"plain": 1, "babble5dB": 1}}, missing={"video": 0.3})
    recipe = SpeechRecipe(model={**SIZES, "fusion_layers": 1}, augmentation=augmentation)
    train_speech(data, data, tmp_path / "run", recipe, fit_settings(epochs=1, batch_size=3))

    monkeypatch.chdir(tmp_path)
    words = "transcribe run lrs3/anna/00002.mp4 --mouth all --decoder attention --json --srt a.srt --streams"
    for streams in (["audio", "video"], ["audio"]):
        monkeypatch.setattr(sys, "argv", [*words.split(), *streams])
        transcribe.main()
        (record,) = json.loads(capsys.readouterr().out)
        assert record["streams"] == streams
        assert record["text"]
        (tmp_path / "a.srt").unlink()


VIEWS = ("plain", QUIET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache of 20 utterances, and a run of each stream. Not to be changed."""
    folder = tmp_path_factory.mktemp("speech")
    cache = make_cache(folder / "test", 20, first=200, is_recorded=True)
    for name in ("audio", "video"):
        data = utterances(cache, name)
        train_speech(data, data, folder / name, recipe(align_epochs=6), fit_settings(epochs=8, lr=1e-2, batch_size=4))
    return folder


def opened_run(folder: Path, run: str) -> Utterances:
    return open_for_run(Cache(folder / "test"), folder / run, views=VIEWS)


@pytest.mark.slow
def test_transcripts_do_not_depend_on_other_utterances_or_views(folder: Path) -> None:
    data = opened_run(folder, "audio")
    whole = recognize_utterances(folder / "audio", data, VIEWS, decoding=CTC)
    numbers = np.array([7, 2, 11])
    part = recognize_utterances(folder / "audio", take_utterances(data, numbers), [QUIET], decoding=CTC)
    assert part[QUIET] == [whole[QUIET][number] for number in numbers]
    assert whole["plain"] != whole[QUIET]
    lips = recognize_utterances(folder / "video", opened_run(folder, "video"), VIEWS, decoding=CTC)
    assert lips["plain"] is lips[QUIET]


@pytest.mark.slow
def test_lips_of_another_utterance_are_recognized_as_that_one(folder: Path) -> None:
    data = opened_run(folder, "video")
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
    data = opened_run(folder, "audio")
    numbers = word_clusters(data)
    words = [(key, word) for key, text in zip(data.keys, data.texts, strict=True) for word in text.split()]
    names = [word if int(key) % 2 else key for key, word in words]
    for first, second in pairwise(range(len(words))):
        assert (numbers[first] == numbers[second]) == (names[first] == names[second])
    assert len(np.unique(numbers)) == 10 + 3


NOISY_VIEWS = ["plain", *(f"babble{level}dB" for level in (10, 5, 0, -5, -10))]

RATES = {"audio": (5, 13, 22, 50, 86, 98), "video": (35,) * 6, "fusion": (3, 6, 10, 17, 30, 31)}

"""Percent of wrong words per level."""


def make_result(model: str, rates: tuple[float, ...], seed: int) -> Result:
    """A result in which that percentage of 200 words is wrong at each level, and one point more with the next seed."""
    places = np.arange(200) / 2
    errors = {
        view: MetricValues(places < rate + seed, np.arange(200) // 5)
        for view, rate in zip(NOISY_VIEWS, rates, strict=True)
    }
    return Result(model=model, question="A", seed=seed, num_examples=40, measures=errors)


def test_tables_are_means_over_seeds_by_the_level_of_noise() -> None:
    results = Results(make_result(model, rates, seed) for model, rates in RATES.items() for seed in (1, 0))
    columns, rows = rate_table(results, [*RATES, "missing"], "A")
    assert columns == ["WER in %", "clean", "10 dB", "5 dB", "0 dB", "-5 dB", "-10 dB"]
    assert [row[0] for row in rows] == [*RATES]
    assert [cell.split()[0] for cell in rows[0][1:]] == ["5.5", "13.5", "22.5", "50.5", "86.5", "98.5"]
    _, rows = gain_table(results, ["fusion"], ["audio", "video"], "A")
    gains = [float(cell.split()[0]) for cell in rows[0][1:]]
    assert gains == pytest.approx([-2, -7, -12, -18, -5, -4], abs=0.01)
