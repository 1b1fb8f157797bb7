"""Recognizers on recordings: text and times of trained networks, streams, windows, batches and what is refused."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import embedcache
from embedcache.encoders.open import open_encoder
from embedcache.errors import DataError, FingerprintError, PathError, SettingError
from embedcache.networks.decoding import decode_hybrid
from embedcache.networks.saved import load_module
from embedcache.networks.settings import DecodingSettings
from embedcache.networks.speech import Frames, SpeechNetwork, stack_frames
from embedcache.networks.transcripts import decode_symbols
from embedcache.sources.sound import decode_audio
from embedcache.sources.video import Video, decode_video
from embedcache.transcription.settings import TranscribeSettings
from tests.edits import edit_record
from tests.media_files import encode_video, wav
from tests.recorded import RecordedProgress
from tests.sources.files import write
from tests.transcription.runs import PIXELS, RATE_HZ, TOY, WHISPER, Speech, random_text, save_run, say, train_network

pytestmark = pytest.mark.slow

ATTENTION = TranscribeSettings(decoding=DecodingSettings(decoder="attention"))
CTC = TranscribeSettings(decoding=DecodingSettings(decoder="ctc"))
MISSING = {"augmentation": {"missing": {"audio": 0.2, "video": 0.2}}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a network that reads `say`."""
    return save_run(tmp_path_factory.mktemp("trained") / "run", TOY | PIXELS, module=train_network())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs with random weights: `audio`, `video`, `both`, `strict` without modality dropout, and
    `whisper`, on real states of sound.
    """
    folder = tmp_path_factory.mktemp("runs")
    for name, sides in {"audio": TOY, "video": PIXELS, "both": TOY | PIXELS, "strict": TOY | PIXELS}.items():
        save_run(folder / name, sides, training=MISSING if name == "both" else {"ctc_weight": 0.2})
    save_run(folder / "whisper", WHISPER | PIXELS)
    return folder


@pytest.fixture(scope="module")
def speech() -> Speech:
    return say("AB CD BA", np.random.default_rng(7))


@pytest.fixture(scope="module")
def clip(speech: Speech, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write(folder, {"clip.mp4": encode_video(speech.frames, samples=speech.samples), "clip.wav": wav(speech.samples)})
    return folder / "clip.mp4"


def video_of(speech: Speech) -> Video:
    return Video(frames_THW3=speech.frames, rate_hz=RATE_HZ)


def test_words_and_times_of_new_speech(trained: Path) -> None:
    model, rng = embedcache.load(trained, kind="speech"), np.random.default_rng(42)
    said = [say(random_text(rng, count), rng) for count in (1, 2, 3, 4)]
    found = model.transcribe([one.samples for one in said], [video_of(one) for one in said], mouth="all", settings=CTC)
    for transcript, speech in zip(found, said, strict=True):
        assert transcript.text == " ".join(word for word, _, _ in speech.words)
        assert transcript.duration_s == len(speech.labels) / RATE_HZ
        assert transcript.streams == ("audio", "video")
        for word, expected in zip(transcript.words, speech.words, strict=True):
            assert word.word == expected[0]
            np.testing.assert_allclose((word.start_s, word.stop_s), expected[1:], atol=0.09)


@pytest.mark.parametrize("is_file", [False, True])
def test_long_recordings_are_cut_between_words(is_file: bool, trained: Path, tmp_path: Path) -> None:
    model, rng = embedcache.load(trained, kind="speech"), np.random.default_rng(3)
    speech = say(random_text(rng, 24), rng, pause=18)
    settings = replace(CTC, window_s=4.0)
    if is_file:
        write(tmp_path, {"long.mp4": encode_video(speech.frames, samples=speech.samples)})
        found = model.transcribe(tmp_path / "long.mp4", mouth="all", settings=settings)
    else:
        found = model.transcribe(speech.samples, video_of(speech), mouth="all", settings=settings)
    assert found.duration_s > 20
    assert found.text == " ".join(word for word, _, _ in speech.words)
    starts = [word.start_s for word in found.words]
    np.testing.assert_allclose(starts, [start for _, start, _ in speech.words], atol=0.09)


def test_frame_rates_are_resampled(trained: Path, speech: Speech) -> None:
    model = embedcache.load(trained, kind="speech")
    twice = Video(frames_THW3=np.repeat(speech.frames, 2, axis=0), rate_hz=2 * RATE_HZ)
    expected = model.transcribe(speech.samples, video_of(speech), mouth="all", settings=CTC)
    assert model.transcribe(speech.samples, twice, mouth="all", settings=CTC) == expected
    with pytest.raises(DataError, match=r"one length.*are they of one recording, and their rates right\?"):
        model.transcribe(speech.samples, Video(frames_THW3=twice.frames_THW3, rate_hz=RATE_HZ), mouth="all")


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_text_is_that_of_the_parts(weight: float, runs: Path, clip: Path) -> None:
    """The encoders and the network by hand, on the file as extraction decodes it."""
    settings = TranscribeSettings(decoding=DecodingSettings(ctc_weight=weight, beam=3))
    found = embedcache.load(runs / "whisper", kind="speech").transcribe(clip, mouth="all", settings=settings)
    network, _ = load_module(runs / "whisper")
    assert isinstance(network, SpeechNetwork)
    data, streams = clip.read_bytes(), {}
    for name, raw in (("audio", decode_audio(data)), ("video", decode_video(data))):
        spec, feature = (WHISPER | PIXELS)[name]
        encoder, short = open_encoder(spec, modality=name), feature.rpartition("/")[2]  # type: ignore[arg-type]
        (values_TD,) = encoder.encode(encoder.prepare([raw]), [short])[short]
        stacked_TD = torch.from_numpy(stack_frames(values_TD, network.stacks[name]))
        streams[name] = Frames(stacked_TD[None], torch.tensor([len(stacked_TD)]))
    with torch.no_grad():
        encoded = network.encode(streams)
        lengths, steps = encoded.is_valid_BT.sum(dim=1), network.attention.steps(*encoded)
        (best,) = decode_hybrid(network.ctc_log_probs(encoded), lengths, steps, ctc_weight=weight, beam=3)
    assert found.text == " ".join(decode_symbols(best.symbols).split())
    assert found.score == pytest.approx(best.score, rel=1e-4)


@pytest.mark.parametrize("decoder", ["hybrid", "ctc", "attention"])
def test_batches_do_not_change_transcripts(decoder: Any, runs: Path, speech: Speech, clip: Path) -> None:
    model = embedcache.load(runs / "both", kind="speech")
    settings = TranscribeSettings(decoding=DecodingSettings(decoder=decoder))
    sounds = [speech.samples, speech.samples[:20_000], clip, clip.with_suffix(".wav"), speech.samples[:30_000]]
    together = model.transcribe(sounds, mouth="all", settings=settings)
    alone = [model.transcribe(sound, mouth="all", settings=settings) for sound in sounds]
    assert [found.streams for found in together] == [("audio",), ("audio",), ("audio", "video"), ("audio",), ("audio",)]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.words, one.duration_s) == (other.text, other.words, other.duration_s)
        assert one.score == pytest.approx(other.score, rel=1e-4)


def test_a_stream_may_be_missing_if_training_dropped_it(runs: Path, clip: Path) -> None:
    model = embedcache.load(runs / "both", kind="speech")
    sound = model.transcribe(clip.with_suffix(".wav"), settings=ATTENTION)
    lips = model.transcribe(video=clip, mouth="all", settings=ATTENTION)
    both = model.transcribe(clip, mouth="all", settings=ATTENTION)
    assert (sound.streams, lips.streams, both.streams) == (("audio",), ("video",), ("audio", "video"))
    assert len({sound.score, lips.score, both.score}) == 3
    only = replace(ATTENTION, streams=("audio",))
    assert model.transcribe(clip, settings=only).streams == ("audio",)  # needs no region of the mouth
    strict = embedcache.load(runs / "strict", kind="speech")
    assert strict.transcribe(clip, mouth="all").streams == ("audio", "video")
    for name, inputs in {"video": (clip.with_suffix(".wav"), None), "audio": (None, clip)}.items():
        with pytest.raises(DataError, match=rf"clip.*without modality dropout of its {name}.*missing={{'{name}': 0.25"):
            strict.transcribe(*inputs, mouth="all")


def test_runs_of_one_stream(runs: Path, clip: Path) -> None:
    for name in ("audio", "video"):
        model = embedcache.load(runs / name, kind="speech")
        assert model.streams == (name,)
        assert model.transcribe(clip, mouth="all").streams == (name,)
    with pytest.raises(SettingError, match="expected audio, which the run was trained on, got video"):
        embedcache.load(runs / "audio", kind="speech").transcribe(video=clip, mouth="all")


def test_encoders_are_opened_on_first_use_and_compared(runs: Path, clip: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    copied.mkdir()
    for file in (runs / "both").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    edit_record(copied / "config.json", {"pixels,size=12x8": "pixels,size=12x9"})
    model = embedcache.load(copied, kind="speech")
    assert model.transcribe(clip.with_suffix(".wav")).streams == ("audio",)  # opens no encoder of frames
    with pytest.raises(
        FingerprintError, match="feature pixels/pixels was made with other settings: model: stored 'pixels:12x8'"
    ):
        model.transcribe(clip, mouth="all")


def test_untrained_decoders_are_refused(trained: Path, speech: Speech, tmp_path: Path) -> None:
    for weight, missing, allowed in ((1.0, "attention", "ctc"), (0.0, "ctc", "attention")):
        run = save_run(tmp_path / f"{weight}", PIXELS, training={"ctc_weight": weight})
        model = embedcache.load(run, kind="speech")
        with pytest.raises(SettingError, match=f"decoder: .*its {missing} part is untrained: expected {allowed}"):
            model.transcribe(video=video_of(speech), mouth="all")
        settings = TranscribeSettings(decoding=DecodingSettings(decoder=allowed))  # type: ignore[arg-type]
        found = model.transcribe(video=video_of(speech), mouth="all", settings=settings)
        if not weight:  # no times without CTC
            assert all(word[1:] == (0, found.duration_s) for word in found.words)


def test_windows_are_no_longer_than_utterances_in_training(tmp_path: Path) -> None:
    speech = say("AB " * 40, np.random.default_rng(0))
    for longest_s, low, high in ((None, 8, 20), (60.0, 8, 20), (5.0, 2, 3)):
        run = save_run(tmp_path / f"{longest_s}", TOY, training={"longest_s": longest_s})
        progress = RecordedProgress()
        embedcache.load(run, kind="speech").transcribe(speech.samples, settings=CTC, progress=progress)
        seconds = round(len(speech.samples) / 16_000)
        assert progress.started == [("transcribe", seconds, "s of speech")]
        assert sum(progress.advances) == seconds
        assert low <= max(progress.advances) <= high


def test_memory_does_not_grow_with_the_length(trained: Path) -> None:
    speech = say("AB " * 20, np.random.default_rng(0), pause=20)
    model, settings, peaks = embedcache.load(trained, kind="speech"), replace(CTC, window_s=4.0), []
    for count in (1, 1, 3):  # the first opens the encoders
        video = Video(frames_THW3=np.tile(speech.frames, (count, 2, 2, 1)), rate_hz=RATE_HZ)
        samples = np.tile(speech.samples, count)
        tracemalloc.start()
        model.transcribe(samples, video, mouth="all", settings=settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]
    assert peaks[1] < 3e6  # a window of 4 s is 0.7 MB


def test_too_short_recordings_are_named(runs: Path, tmp_path: Path) -> None:
    write(tmp_path, {"tiny.wav": wav(np.zeros(200, np.float32))})
    with pytest.raises(DataError, match=r"tiny\.wav: too short: 200 samples"):
        embedcache.load(runs / "audio", kind="speech").transcribe(tmp_path / "tiny.wav")


def test_wrong_pairs_raise(runs: Path, clip: Path) -> None:
    model = embedcache.load(runs / "both", kind="speech")
    with pytest.raises(DataError, match="as many videos as recordings, got 1 and 2"):
        model.transcribe([clip, clip], [clip], mouth="all")
    with pytest.raises(DataError, match="expected one recording, or sequences for both"):
        model.transcribe([clip], clip, mouth="all")  # type: ignore[call-overload]
    with pytest.raises(DataError, match="recording 1: expected a path, or mono float32 samples at 16000 Hz, got bytes"):
        model.transcribe([clip, clip.read_bytes()], mouth="all")  # type: ignore[list-item]
    with pytest.raises(DataError, match="recording 0: expected a path, .* got bytes"):
        model.transcribe(clip.read_bytes(), mouth="all")  # type: ignore[call-overload]
    assert model.transcribe([], mouth="all") == []


def test_kinds_of_runs(runs: Path, tmp_path: Path) -> None:
    assert repr(embedcache.load(runs / "both")) == "SpeechModel(open_media/frames + pixels/pixels -> 40 symbols)"
    with pytest.raises(DataError, match="both: expected a run of kind pair, got one of kind speech"):
        embedcache.load(runs / "both", kind="pair")
    with pytest.raises(PathError, match="does not exist"):
        embedcache.load(tmp_path / "none", kind="speech")
