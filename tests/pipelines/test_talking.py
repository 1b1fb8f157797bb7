"""The world of talking faces."""

import ctypes.util
import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import MissingExtraError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.progress import NullProgress
from embedcache.settings import replace_fields
from embedcache.sources import Source, open_source
from embedcache.sources.media import decode_audio, decode_video
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from embedcache.testing.sources import SourceContract
from pipelines.worlds import talking, talking_recordings, talking_speech
from pipelines.worlds.talking import (
    KIND,
    MANIFEST,
    SETS,
    TINY,
    WorldSettings,
    draw_record,
    encode_clip,
    plan_set,
    read_manifest,
    write_world,
)
from pipelines.worlds.talking_mouth import (
    PARAMETERS,
    PHONES,
    WIDTH,
    Face,
    Phone,
    draw_clip,
    draw_face,
    draw_mouths,
    mouth_track,
)
from pipelines.worlds.talking_recordings import RECORDINGS, load_recordings
from pipelines.worlds.talking_speech import DIGITS, LETTERS, WORDS, espeak, speak_flite
from tests.crash import crash_function
from tests.extract.cases import tree
from tests.media_toy import MEDIA

HAS_ESPEAK = ctypes.util.find_library("espeak-ng") is not None

HAS_FLITE = shutil.which("flite") is not None

HAS_RECORDINGS = importlib.util.find_spec("pocketsphinx") is not None and all(
    any(Path(pattern).parent.is_dir() for pattern in place.folders.values()) for place in RECORDINGS.values()
)

needs_espeak = pytest.mark.skipif(not HAS_ESPEAK, reason="needs Debian's libespeak-ng1")

needs_flite = pytest.mark.skipif(not HAS_FLITE, reason="needs Debian's flite")

NEEDS_RECORDINGS = "needs pocketsphinx and Debian's asterisk-core-sounds-en-g722 and klettres-data"

needs_recordings = pytest.mark.skipif(not HAS_RECORDINGS, reason=NEEDS_RECORDINGS)

SMALL = replace_fields(TINY, train=3, tape_s=1, pauses=0.5)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class TestSpeech:
    @needs_espeak
    def test_espeak_says_every_word_with_times(self) -> None:
        words = sorted(WORDS)
        for first in range(0, len(words), 5):
            utterance = espeak().speak(words[first : first + 5], voice="m3", rng=rng(first))
            self.check(utterance, words[first : first + 5])

    @needs_flite
    def test_flite_says_every_word_with_times(self) -> None:
        words = sorted(WORDS)
        for first in range(0, len(words), 10):
            utterance = speak_flite(words[first : first + 10], voice="kal16", stretch=1.1, rng=rng(first))
            self.check(utterance, words[first : first + 10])

    def check(self, utterance: talking_speech.Utterance, words: list[str]) -> None:
        assert utterance.text == " ".join(words)
        assert len(utterance.samples) == 640 * utterance.num_frames
        assert np.abs(utterance.samples).max() == pytest.approx(0.5, abs=1e-3)
        duration_s = len(utterance.samples) / 16_000
        bounds = [bound for phone in utterance.phones for bound in phone[1:]]
        assert bounds[0] == 0
        assert bounds[-1] == pytest.approx(duration_s)
        assert np.all(np.diff(bounds) > -1e-6)
        names = {phone.name for phone in utterance.phones}
        assert names <= set(PHONES)
        loud = [self.level(utterance, word.start_s, word.stop_s) for word in utterance.words]
        assert min(loud) > 10 * self.level(utterance, 0.0, 0.1)
        closed = [phone for phone in utterance.phones if phone.name == "IY"]
        assert all(self.level(utterance, phone.start_s, phone.stop_s) > 0.01 for phone in closed)

    def level(self, utterance: talking_speech.Utterance, start_s: float, stop_s: float) -> float:
        part = utterance.samples[round(start_s * 16_000) : round(stop_s * 16_000)]
        return float(np.sqrt(np.mean(part**2))) if len(part) else 0.0

    @pytest.mark.slow
    @needs_recordings
    def test_recordings_are_aligned_and_trimmed(self) -> None:
        recordings = load_recordings("allison")
        assert [recording.word for recording in recordings] == [*LETTERS, *DIGITS]
        for recording in recordings:
            duration_s = len(recording.samples) / 16_000
            assert 0.4 < duration_s < 0.9
            phones = (LETTERS | DIGITS)[recording.word].split()
            assert [phone.name for phone in recording.phones] == phones
            assert recording.phones[0].start_s == pytest.approx(0.03)
            assert recording.phones[-1].stop_s == pytest.approx(duration_s - 0.03)

    def test_missing_program_names_its_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(MissingExtraError, match="flite is not installed; run: apt-get install flite"):
            speak_flite(["BIN"], voice="slt", rng=rng())
        nowhere = talking_recordings.Speaker({"letters": "/nowhere/{}.ogg"}, "klettres-data")
        monkeypatch.setitem(talking_recordings.RECORDINGS, "klettres-us", nowhere)  # type: ignore[arg-type]
        with pytest.raises(
            MissingExtraError, match=r"/nowhere/a.ogg is not installed; run: apt-get install klettres-data"
        ):
            load_recordings("klettres-us")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of the sets that need no recordings. Not to be changed."""
    if not (HAS_ESPEAK and HAS_FLITE):
        pytest.skip("needs Debian's libespeak-ng1 and flite")
    folder = tmp_path_factory.mktemp("world") / "world"
    write_world(folder, SMALL, sets=("train", "valid", "A", "B"))
    return folder


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets of recordings, written without the programs that speak. Not to be changed."""
    if not HAS_RECORDINGS:
        pytest.skip(NEEDS_RECORDINGS)
    folder = tmp_path_factory.mktemp("recorded") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        patch.setattr(talking, "espeak", None)
        write_world(folder, SMALL, sets=("R", "K"))
    return folder


@pytest.mark.slow
class TestTalkingSource(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, world: Path) -> Source:
        return open_source(str(world / "train"), kind=KIND)


@pytest.mark.slow
class TestWorld:
    def test_files_fit_their_manifest(self, world: Path) -> None:
        for name in ("train", "valid", "A", "B"):
            for record in read_manifest(world / name):
                samples = decode_audio((world / name / record["audio"]).read_bytes())
                assert len(samples) == 640 * record["num_frames"]
                assert len(record["text"].split()) == 5
                assert [word[0] for word in record["words"]] == record["text"].split()
                assert len(record["faces"]) == (2 if name == "train" else 1)
                for face in record["faces"]:
                    frames = decode_video((world / name / face["video"]).read_bytes()).frames_THW3
                    assert len(frames) == record["num_frames"]
                    drawn = draw_record(record, face)
                    assert np.abs(frames[..., 0].astype(float) - drawn).mean() < 6

    def test_killed_run_continues_to_the_same_faces(self, world: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(world, tmp_path / "world")
        manifest = (folder / "train" / MANIFEST).read_bytes()
        kept = (folder / "train/0001.face0.mp4").read_bytes()
        (folder / "train/0001.face0.mp4").unlink()
        (folder / "train" / MANIFEST).unlink()
        (folder / f"train/.0001.wav.{'x' * 3}.1.partial").write_bytes(b"half")
        write_world(folder, SMALL, sets=("train",))
        assert (folder / "train/0001.face0.mp4").read_bytes() == kept
        assert (folder / "train" / MANIFEST).read_bytes() == manifest

    def test_finished_world_is_left_alone_and_other_settings_are_refused(self, world: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()}
        write_world(world, SMALL, sets=("train", "valid", "A", "B"))
        assert {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()} == before
        with pytest.raises(SettingError, match="its seed is 0, requested 1; use a new folder"):
            write_world(world, replace_fields(SMALL, seed=1))
        with pytest.raises(SettingError, match="expected names of train, valid, A, B, R, K, got 'C'"):
            write_world(world, SMALL, sets=("C",))

    def test_recorded_sets_name_their_recordings(self, recorded: Path) -> None:
        (first, second) = open_source(str(recorded / "K"), kind=KIND).samples()
        assert [sample.columns["voice"] for sample in (first, second)] == ["klettres-us", "klettres-gb"]
        (sample, _) = open_source(str(recorded / "R"), kind=KIND).samples()
        recordings = str(sample.columns["recordings"]).split()
        assert recordings == [f"allison/{word}" for word in sample.texts[0].text.split()]

    @pytest.mark.parametrize(("moment", "pattern"), [("after", r"R/0001\.wav"), ("before", MANIFEST)])
    def test_resume_after_kill_is_identical(self, recorded: Path, tmp_path: Path, moment: str, pattern: str) -> None:
        crash_function(write_world, (tmp_path / "world", SMALL, NullProgress(), ("R",)), moment, pattern)
        assert not (tmp_path / "world/R" / MANIFEST).exists()
        write_world(tmp_path / "world", SMALL, sets=("R",))
        assert tree(tmp_path / "world" / "R") == tree(recorded / "R")

    def test_sets_share_no_voice(self) -> None:
        voices = {name: {plan.voice for plan in plan_set(name, WorldSettings())} for name in SETS}
        assert not voices["train"] & (voices["A"] | voices["B"])
        assert not voices["valid"] & voices["A"]
        assert len(voices["train"]) == 16
        assert sum(plan.voice in voices["train"] for plan in plan_set("valid", WorldSettings())) == 45


@pytest.mark.slow
def test_world_becomes_a_cache(recorded: Path, tmp_path: Path) -> None:
    source = open_source(str(recorded / "R"), kind=KIND)
    settings = ExtractSettings(features=("frames",))
    extract(source, tmp_path / "cache", encoder={"audio": [MEDIA], "video": [MEDIA]}, settings=settings)
    cache = Cache(tmp_path / "cache")
    samples = Cache(tmp_path / "cache").samples
    records = list(read_manifest(recorded / "R"))
    assert samples["voice"].to_pylist() == ["allison"] * 2
    assert cache.items("text")["text"].to_pylist() == [record["text"] for record in records]
    audio, video = (cache.feature(name, "open_media/frames") for name in ("audio", "video"))
    rows = np.arange(2)
    frames = [len(tokens) for tokens in video.gather_tokens(rows)]
    assert frames == [record["num_frames"] for record in records]
    assert [len(tokens) for tokens in audio.gather_tokens(rows)] == [2 * count for count in frames]
    assert not verify(cache)


COLUMN = {name: column for column, name in enumerate(PARAMETERS)}


def held(phone: str, face: Face, *, width: int = WIDTH) -> np.ndarray:
    """Return a frame in the middle of a phone of 0.2 s between two vowels."""
    phones = [Phone("IY", 0.0, 0.2), Phone(phone, 0.2, 0.4), Phone("IY", 0.4, 0.6)]
    return draw_clip(phones, num_frames=15, face=face, rng=rng(), width=width)[7]


def darkness(frame: np.ndarray, face: Face) -> float:
    """Return the area that is about as dark as the opening of the mouth, in pixels of a frame of 48 x 32."""
    return float((frame < (face.opening + face.lip) / 2).sum() * (WIDTH / frame.shape[1]) ** 2)


@pytest.mark.parametrize("seed", range(4))
def test_lips_close_for_p_b_m_and_open_wide_for_aa(seed: int) -> None:
    face = replace(draw_face(rng(seed)), noise=0.0, softness=1.0, light=(0.0, 0.0))
    face = replace(face, teeth=face.opening)  # else they hide it
    closed = [darkness(held(phone, face), face) for phone in "PBM"]
    assert max(closed) < 0.25 * darkness(held("AA", face), face)
    assert np.array_equal(held("P", face), held("M", face))
    track_T6 = mouth_track([Phone("AA", 0, 0.2), Phone("M", 0.2, 0.3), Phone("AA", 0.3, 0.5)], num_frames=12, face=face)
    assert track_T6[6, COLUMN["height"]] < 0.25 * track_T6[3, COLUMN["height"]]


@pytest.mark.slow
def test_sounds_with_other_lips_look_different_and_those_alike_do_not() -> None:
    faces = [draw_face(rng(seed)) for seed in range(20)]

    def distance(first: str, second: str) -> float:
        return float(np.mean([np.abs(held(first, f).astype(float) - held(second, f)).mean() for f in faces]))

    different = [distance(*pair) for pair in ("BD", "FS", "MN", "BV")]
    assert min(different) > 1
    assert [distance(*pair) for pair in ("PB", "TD", "SZ", "FV")] == [0.0] * 4


def test_clip_is_the_same_bytes_and_decodes_to_its_frames() -> None:
    face = replace(draw_face(rng(2)), noise=3.0)
    frames = draw_mouths(mouth_track([Phone("AA", 0.1, 0.5)], num_frames=20), face=face, rng=rng())
    data = encode_clip(frames)
    assert data == encode_clip(frames)
    video = decode_video(data)
    assert video.rate_hz == 25
    assert video.frames_THW3.shape == (*frames.shape, 3)
    error = video.frames_THW3[..., 0].astype(float) - frames
    assert abs(error.mean()) < 1
    assert error.std() < 5
