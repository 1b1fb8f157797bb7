"""Clips in the layout of LRS2 and LRS3."""

from pathlib import Path

import pytest

from embedcache.errors import SourceError
from embedcache.sources import Source, open_source
from embedcache.sources.media import decode_video
from embedcache.testing.sources import SourceContract
from pipelines.avsr.lrs import KIND
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


def test_folders_and_lists_have_clips_with_capital_transcripts(corpus: Path) -> None:
    source = open_source(str(corpus / "main"), kind=KIND)
    samples = list(source.samples())
    assert {sample.key: sample.texts[0].text for sample in samples} == CLIPS
    assert samples[0].columns == {"speaker": "anna", "split": None, "noise": None}
    assert decode_video(source.read(samples[2].files["video"][0])).frames_THW3.shape == (20, 24, 32, 3)
    listed = open_source(f"{corpus}/main::{corpus}/train.txt", kind=KIND).samples()
    assert [sample.key for sample in listed] == ["bert/50001", "anna/00001"]
    (test,) = open_source(f"{corpus}/main::{corpus}/test.txt", kind=KIND).samples()
    assert test.columns == {"speaker": "anna", "split": "test", "noise": "NF"}


def test_a_clip_without_its_transcript_is_named(corpus: Path) -> None:
    (corpus / "main/anna/00002.txt").write_text("HELLO WORLD\n")
    with pytest.raises(SourceError, match=r"anna/00002.txt: expected 'Text:'"):
        list(open_source(str(corpus / "main"), kind=KIND).samples())
