"""`embedcache transcribe` on real media files: texts, records, subtitles, and each error in one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.run import embedcache, succeed
from tests.media_files import encode_video, moving_square, wav
from tests.sources.files import write
from tests.transcription.runs import PIXELS, TOY, WHISPER, Speech, save_run, say, train_network

SPEECH: Speech = say("AB CD BA", np.random.default_rng(7))
TEXT, CTC = "AB CD BA", ("--mouth", "all", "--decoder", "ctc")


@pytest.fixture(scope="module")
def folder(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the run of a network that reads `say`, two runs with random weights, and media files."""
    folder = tmp_path_factory.mktemp("transcribe")
    save_run(folder / "run", TOY | PIXELS, module=train_network())
    save_run(folder / "loose", TOY | PIXELS, training={"augmentation": {"missing": {"video": 0.3}}})
    save_run(folder / "whisper", WHISPER)
    shutil.copytree(run_path, folder / "pair")
    write(
        folder,
        {
            "clip.mp4": encode_video(SPEECH.frames, samples=SPEECH.samples),
            "clip.wav": wav(SPEECH.samples),
            "silent.mp4": encode_video(moving_square(50)),
            "damaged.mp4": encode_video(SPEECH.frames, samples=SPEECH.samples)[:3000],
            "notes.txt": b"no recording " * 100,
        },
    )
    return folder


@pytest.mark.slow
def test_text_is_printed(folder: Path) -> None:
    assert succeed("transcribe", "run", "clip.mp4", *CTC, cwd=folder) == f"{TEXT}\n"
    both = succeed("transcribe", "run", "clip.mp4", "clip.mp4", *CTC, cwd=folder)
    assert both == f"clip.mp4: {TEXT}\n" * 2


def test_json_and_subtitles(folder: Path) -> None:
    options = ("--json", "--output", "out.json", "--srt", "out.srt", "--vtt", "out.vtt")
    (record,) = json.loads(succeed("transcribe", "run", "clip.mp4", *CTC, *options, cwd=folder))
    (written,) = json.loads((folder / "out.json").read_text())
    assert written == {**record, "digest": written["digest"]}
    assert (record["file"], record["text"], record["streams"]) == ("clip.mp4", TEXT, ["audio", "video"])
    assert record["duration_s"] == pytest.approx(len(SPEECH.labels) / 25, abs=0.1)  # the codec pads
    assert [word["word"] for word in record["words"]] == TEXT.split()
    for word, (_, start_s, stop_s) in zip(record["words"], SPEECH.words, strict=True):
        assert (word["start_s"], word["stop_s"]) == pytest.approx((start_s, stop_s), abs=0.1)
    assert (folder / "out.srt").read_text().startswith("1\n00:00:00,")
    assert (folder / "out.vtt").read_text().splitlines()[0] == "WEBVTT"
    assert TEXT in (folder / "out.vtt").read_text()


def test_progress_and_what_was_used(folder: Path) -> None:
    done = embedcache("transcribe", "loose", "clip.wav", *CTC, cwd=folder)
    assert "clip.wav has no frames: transcribed by its sound alone" in done.stderr
    assert "s of speech in" in done.stderr
    named = embedcache("transcribe", "loose", "clip.mp4", "--streams", "audio", "--decoder", "ctc", cwd=folder)
    assert (named.code, "no frames" in named.stderr) == (0, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run silent.mp4 --mouth all", "silent.mp4: expected sound, got none: the file has no audio stream; .*"),
        ("run clip.mp4", "--mouth: no face region given for the frames of clip.mp4: expected X0,Y0,X1,Y1 .*"),
        ("run clip.mp4 --mouth 1,2,3", "--mouth: expected X0,Y0,X1,Y1 in fractions .*, got '1,2,3'"),
        ("run clip.mp4 --mouth .8,.1,.2,.9", "--mouth: expected .* with X0 < X1 .*, got 0.8,0.1,0.2,0.9"),
        ("run clip.wav --mouth all", "clip.wav: expected audio and video, got audio alone: the run was trained .*"),
        ("whisper damaged.mp4", "damaged.mp4: damaged file: Invalid data .*"),
        ("whisper notes.txt", "notes.txt: expected sound, got none: .*"),
        ("whisper none.mp4", "none.mp4 does not exist: expected a recording or a video.*"),
        ("whisper .", ". is a folder: expected a recording or a video.*"),
        ("none clip.mp4", "none does not exist; make one with: train_speech, see docs/howto/speech.md"),
        ("pair clip.mp4", "pair: expected a run of kind speech, got one of kind pair"),
        ("run clip.mp4 --streams lips", "--streams: expected audio or video, got 'lips'"),
        ("whisper clip.mp4 --streams video", "--streams: expected audio, which the run was trained on, got video"),
        ("run clip.mp4 --beam 0", "--beam: expected a whole number from 1 to 1000, got 0"),
        ("run clip.mp4 --window-s 1", "--window-s: expected a number from 2 to 600, got 1.0"),
        ("run clip.mp4 clip.wav --srt a.srt", "--srt: expected one recording, got 2; transcribe each alone"),
        ("run clip.mp4 --srt .", ".: expected a file, got a folder; .*"),
    ],
)  # fmt: skip
def test_errors_are_one_line(words: str, message: str, folder: Path) -> None:
    done = embedcache("transcribe", *words.split(), cwd=folder)
    assert (done.code, done.stdout) == (1, "")
    assert re.fullmatch(f"(device: cpu\n)?error: {message}\n", done.stderr), done.stderr
