"""Recordings and videos to text: trained networks, windows, streams, subtitles, and published encoders."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError, PathError, SettingError
from embedcache.store.cache import Cache
from pipelines.avsr import transcribe
from pipelines.avsr.clips import WHOLE_FRAME, Clip, iter_windows, open_clip, parse_mouth
from pipelines.avsr.ctc import WordTime
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.lrs import KIND
from pipelines.avsr.noise import VIEW
from pipelines.avsr.train import SpeechRecipe, train_speech
from pipelines.avsr.transcribe import Recognizer, Transcript
from pipelines.avsr.utterances import SpeechAugmentation, open_utterances
from tests.cli.run import succeed
from tests.encoders.checkpoints import save_speech, save_timm
from tests.media_files import encode_video, moving_square, tone, wav
from tests.pipelines.avsr.cases import fit_settings
from tests.pipelines.avsr.speech import (
    PIXELS,
    SIZES,
    TOY,
    random_text,
    save_run,
    say,
    train_network,
    write_clips,
)
from tests.sources.files import write

pytestmark = pytest.mark.slow

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


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    write(tmp_path, {"a.wav": wav(noise(100.0))})
    clip = opened(tmp_path / "a.wav")
    tracemalloc.start()
    num_windows = sum(1 for _ in iter_windows(clip, window_s=10.0, step_s=0.04))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_windows >= 10
    assert peak < 4e6  # 100 s are 6.4 MB


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


def test_subtitles_are_short() -> None:
    words = [WordTime(word, 1 + 0.5 * number, 1.4 + 0.5 * number) for number, word in enumerate(["BIN", "BLUE", "AT"])]
    words.append(WordTime("AGAIN", 3661.2345, 3661.9))
    transcript = Transcript(text="", words=words, score=0.0, duration_s=2.0, streams=("audio",))
    lines = "1\n00:00:01,000 --> 00:00:02,400\nBIN BLUE AT\n\n2\n01:01:01,234 --> 01:01:01,900\nAGAIN\n"
    assert transcript.to_srt() == lines


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
