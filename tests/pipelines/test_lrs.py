"""Clips in the layout of LRS2 and LRS3."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.sources import Source, open_source
from embedcache.sources.sound import decode_audio
from embedcache.sources.video import decode_video
from embedcache.testing.sources import SourceContract
from pipelines.speech.lrs import KIND
from tests.media_files import encode_video, moving_square, tone

CLIPS = {"anna/00001": "SO WE SAW 3 OF THEM", "anna/00002": "IT'S HERE", "bert/50001": "GOOD NIGHT"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three clips of two speakers with sound, a list of two of them, and one that names noise."""
    for number, (key, text) in enumerate(CLIPS.items()):
        path = tmp_path / "main" / f"{key}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_video(moving_square(10 + 5 * number), samples=tone(0.4 + 0.2 * number)))
        path.with_suffix(".txt").write_text(f"Text:  {text.lower()}\nConf:  4\n\nWORD START END ASDSCORE\n")
    (tmp_path / "train.txt").write_text("bert/50001\nanna/00001\n\n")
    (tmp_path / "test.txt").write_text("anna/00002 NF\n")
    return tmp_path


class TestLrs(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, corpus: Path) -> Source:
        return open_source(f"{corpus}/main::{corpus}/train.txt", kind=KIND)


def test_folder_has_all_clips_with_capital_transcripts(corpus: Path) -> None:
    samples = list(open_source(str(corpus / "main"), kind=KIND).samples())
    assert {sample.key: sample.texts[0].text for sample in samples} == CLIPS
    assert [sample.columns for sample in samples] == [
        {"speaker": key[:4], "split": None, "noise": None} for key in CLIPS
    ]


def test_list_chooses_clips_in_its_order(corpus: Path) -> None:
    samples = list(open_source(f"{corpus}/main::{corpus}/train.txt", kind=KIND).samples())
    assert [(sample.key, sample.columns["split"]) for sample in samples] == [
        ("bert/50001", "train"),
        ("anna/00001", "train"),
    ]
    (test,) = open_source(f"{corpus}/main::{corpus}/test.txt", kind=KIND).samples()
    assert test.columns == {"speaker": "anna", "split": "test", "noise": "NF"}


def test_clip_is_recording_and_video(corpus: Path) -> None:
    source = open_source(str(corpus / "main"), kind=KIND)
    sample = list(source.samples())[2]
    video = decode_video(source.read(sample.files["video"][0]))
    assert video.frames_THW3.shape == (20, 24, 32, 3)
    assert video.rate_hz == 25
    samples = decode_audio(source.read(sample.files["audio"][0]))
    assert len(samples) / 16_000 == pytest.approx(0.8, abs=0.1)
    assert np.abs(samples).max() > 0.3


@pytest.mark.parametrize("first_line", ["", "Text:\n", "HELLO WORLD\n"])
def test_transcript_without_text_is_refused(corpus: Path, first_line: str) -> None:
    (corpus / "main/anna/00002.txt").write_text(first_line)
    with pytest.raises(SourceError, match=r"anna/00002.txt: expected 'Text:' and words in its first line, got"):
        list(open_source(str(corpus / "main"), kind=KIND).samples())


def test_missing_files_are_named(corpus: Path) -> None:
    with pytest.raises(PathError, match="expected a list of clips"):
        open_source(f"{corpus}/main::{corpus}/dev.txt", kind=KIND)
    with pytest.raises(SourceError, match="name the folder of speakers"):
        list(open_source(str(corpus), kind=KIND).samples())
    (corpus / "main/anna/00001.mp4").unlink()
    source = open_source(f"{corpus}/main::{corpus}/train.txt", kind=KIND)
    with pytest.raises(ItemError, match=r"no such file: .*anna/00001.mp4"):
        source.read(list(source.samples())[1].files["video"][0])
    (corpus / "main/anna/00001.txt").unlink()
    with pytest.raises(SourceError, match=r"no such file: .*anna/00001.txt"):
        list(source.samples())
    (corpus / "train.txt").write_text("bert/50001\n50002\n")
    with pytest.raises(SourceError, match=r"train.txt, line 2: expected SPEAKER/CLIP, got '50002'"):
        list(source.samples())
