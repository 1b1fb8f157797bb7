"""A talking-mouth world: speech of known words and a mouth drawn from its phones, written once as a folder of files.

    write_world(Path("world"), WorldSettings())
    open_source("world/A", kind="pipelines.worlds.talking:TalkingSource")

| set | who speaks | words |
| --- | --- | --- |
| `train` | voices of espeak-ng and some of flite, several faces per utterance | five of GRID's 51 |
| `valid` | half training voices, half other voices of espeak-ng (column `is_training_voice`) | five of GRID's 51 |
| `A` | voices of espeak-ng that are in no other set | five of GRID's 51 |
| `B` | voices of flite that are not in training | five of GRID's 51 |
| `R` | recordings of Allison Smith, phones found by an aligner | five of GRID's 25 letters and 10 digits |
| `K` | recordings of two other people, for development | five of GRID's 25 letters |

Texts, times of speaking and faces are drawn anew for every utterance, so sets do not share them. Each set is a
folder with `utterances.jsonl`, one WAV per utterance and one MP4 without sound per face. `tapes` has noise: `babble`
and `talker` from training voices; `babble-test` and `talker-test` from voices that are not in any set.

Everything but the recorded sound is synthetic: lips follow the same phones as the sound, cleaner and more
synchronous than those of real people. Nothing measured here estimates a figure of a corpus of real videos.
"""

import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Array
from embedcache.errors import DataError, SettingError, SourceError
from embedcache.files import make_folder, partial_path, remove_partials, write_atomic
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.processes import num_cores, run_processes
from embedcache.progress import NullProgress, Progress
from embedcache.registry import require
from embedcache.settings import Settings, setting
from embedcache.sources.files import read_item_file
from embedcache.sources.open import SourceSettings
from pipelines.worlds.talking_mouth import VIDEO_RATE_HZ, Phone, draw_clip, draw_face
from pipelines.worlds.talking_noise import write_tapes
from pipelines.worlds.talking_recordings import join_recordings, load_recordings
from pipelines.worlds.talking_speech import FLITE_VOICES, WORDS, Utterance, encode_wav, espeak, speak_flite

KIND = "pipelines.worlds.talking:TalkingSource"
SETS = ("train", "valid", "A", "B", "R", "K")
MANIFEST = "utterances.jsonl"
NUM_WORDS = 5
TRAINING_VOICES = (
    "m1", "m2", "m3", "m5", "m6", "m8", "f1", "f2", "f4", "klatt", "klatt2", "klatt4", "croak", "Storm",
)  # fmt: skip
TRAINING_FLITE_VOICES = ("awb", "kal16")
"""Voices of espeak-ng and of flite for training; set B has the other voices of flite."""
UNSEEN_VOICES = ("m4", "m7", "f3", "klatt3", "Annie")
"""Voices of espeak-ng for set A."""
VALID_VOICES = ("f5", "Mike", "Andrea", "klatt5")
SPEAKERS: Mapping[str, tuple[str, ...]] = {"R": ("allison",), "K": ("klettres-us", "klettres-gb")}

_FORMAT = 1
_FEW = 40  # utterances that take less time than starting a process


class WorldSettings(Settings):
    """Settings of a talking-mouth world."""

    seed: int = setting(0, "Draw texts, speech and faces from this seed.", ge=0)
    train: int = setting(1020, "Number of training utterances.", ge=1)
    valid: int = setting(90, "Number of validation utterances.", ge=1)
    test: int = setting(300, "Number of utterances of each of the sets A, B and R.", ge=1)
    development: int = setting(200, "Number of utterances of set K.", ge=1)
    faces: int = setting(5, "Number of faces per training utterance.", ge=1)
    pauses: float = setting(0.25, "Fraction of training utterances with pauses between words.", ge=0, le=1)
    slowest: float = setting(1.4, "Longest durations of training speech, relative to normal speech.", ge=1, le=3)
    tape_s: int = setting(90, "Length of each noise tape in seconds.", ge=1)


TINY = WorldSettings(train=6, valid=2, test=2, development=2, faces=2, tape_s=2)


class Plan(NamedTuple):
    """The plan of an utterance, before it is spoken."""

    set_name: str
    number: int
    engine: str
    voice: str

    @property
    def key(self) -> str:
        """File name without suffix."""
        return f"{self.number:04d}"


def write_world(
    folder: Path,
    settings: WorldSettings,
    progress: Progress | None = None,
    sets: Sequence[str] = SETS,
) -> None:
    """Write sets and their noise tapes. Existing files are kept.

    Tapes are written with the set `train`. A killed run continues: an utterance whose sound exists is not spoken again,
    and a missing face is drawn as before.

    Args:
        folder: folder of the world, new or started with the same settings.
        settings: settings of the world.
        progress: receives progress.
        sets: names of `SETS` to write. `R` and `K` need no synthesizer.

    Raises:
        SettingError: the folder has a world with other settings.
        MissingExtraError: a program is not installed; the message has the command that installs it.
    """
    progress = progress or NullProgress()
    _check_world(folder, settings)
    for name in sets:
        if name not in SETS:
            raise SettingError(f"sets: expected names of {', '.join(SETS)}, got {name!r}")
        _write_set(folder / name, name, settings, progress)

    if "train" in sets:
        training = [folder / "train" / record["audio"] for record in read_manifest(folder / "train")]
        write_tapes(folder / "tapes", training, length_s=settings.tape_s, seed=settings.seed, progress=progress)


def _check_world(folder: Path, settings: WorldSettings) -> None:
    """Record the settings of a new world, or compare the settings of an existing one."""
    path = folder / "world.json"

    # Through JSON, so that stored and requested values have the same types.
    record = json.loads(json.dumps({"format": _FORMAT, **settings.to_json()}))
    if not path.is_file():
        write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
        return

    stored = json.loads(path.read_text())
    for name in record:
        if stored.get(name) != record[name]:
            raise SettingError(
                f"{folder}: its {name} is {stored.get(name)!r}, requested {record[name]!r}; use a new folder"
            )
    remove_partials(folder)


def plan_set(name: str, settings: WorldSettings) -> list[Plan]:
    """Return the utterances of a set. Voices take turns."""
    training = [("espeak", voice) for voice in TRAINING_VOICES]
    training += [("flite", voice) for voice in TRAINING_FLITE_VOICES]
    valid_voices = [("espeak", voice) for voice in VALID_VOICES]

    # Voices of training and validation alternate in `valid`.
    speakers: Mapping[str, tuple[int, list[tuple[str, str]]]] = {
        "train": (settings.train, training),
        "valid": (settings.valid, list(chain(*zip(training, cycle(valid_voices), strict=False)))),
        "A": (settings.test, [("espeak", voice) for voice in UNSEEN_VOICES]),
        "B": (settings.test, [("flite", voice) for voice in FLITE_VOICES if voice not in TRAINING_FLITE_VOICES]),
        "R": (settings.test, [("recorded", voice) for voice in SPEAKERS["R"]]),
        "K": (settings.development, [("recorded", voice) for voice in SPEAKERS["K"]]),
    }

    count, voices = speakers[name]
    return [Plan(name, number, *voices[number % len(voices)]) for number in range(count)]


def _write_set(folder: Path, name: str, settings: WorldSettings, progress: Progress) -> None:
    """Write the missing utterances of a set, then its manifest."""
    make_folder(folder)
    plans = plan_set(name, settings)
    incomplete = [plan for plan in plans if not _is_complete(folder, plan)]
    if incomplete:
        # The manifest says that a set is complete, so it is removed first and written last.
        (folder / MANIFEST).unlink(missing_ok=True)
        workers = num_cores()
        parts = [incomplete[first::workers] for first in range(workers)] if len(incomplete) > _FEW else [incomplete]
        tasks = [(folder, settings, tuple(part)) for part in parts]
        if len(tasks) == 1:
            _write_utterances(tasks[0], progress)
            progress.finish()
        elif run_processes(_write_utterances, tasks, progress, is_shared=True)[1]:
            raise DataError(f"a process died while it wrote {folder}; finished files are kept: rerun the same command")

    if not (folder / MANIFEST).is_file():
        lines = [json.dumps(_read_record(folder, plan)) + "\n" for plan in plans]
        write_atomic(folder / MANIFEST, "".join(lines).encode())


def _is_complete(folder: Path, plan: Plan) -> bool:
    record = _read_record(folder, plan)
    if record is None:
        return False
    return all((folder / name).is_file() for name in (record["audio"], *_videos(record)))


def _read_record(folder: Path, plan: Plan) -> dict[str, Any] | None:
    path = folder / f"{plan.key}.json"
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return record


def _videos(record: Mapping[str, Any]) -> list[str]:
    return [face["video"] for face in record["faces"]]


def _write_utterances(task: tuple[Path, WorldSettings, tuple[Plan, ...]], progress: Progress) -> None:
    """Write utterances in this process. The record of an utterance, with its phones, is written after its sound."""
    folder, settings, plans = task
    progress.start(f"write {folder.name}", len(plans), "utterances")
    for plan in plans:
        record = _read_record(folder, plan)

        # Speech is not a function of its text, so new sound makes the old record and faces stale.
        if record is None or not (folder / record["audio"]).is_file():
            for stale in (f"{plan.key}.json", *(_videos(record) if record else ())):
                (folder / stale).unlink(missing_ok=True)

            utterance = speak(plan, settings)
            record = _record(plan, settings, utterance)
            _put(folder / record["audio"], encode_wav(utterance.samples))
            _put(folder / f"{plan.key}.json", json.dumps(record).encode())

        for face in record["faces"]:
            if not (folder / face["video"]).is_file():
                _put(folder / face["video"], encode_clip(draw_record(record, face)))
        progress.advance(1)


def speak(plan: Plan, settings: WorldSettings) -> Utterance:
    """Speak the words of an utterance, or join its recordings."""
    rng = _rng(settings, plan, "speech")
    if plan.engine == "recorded":
        recordings = [recording for recording in load_recordings(plan.voice) if recording.word in WORDS]  # no W
        sample = [recordings[number] for number in rng.permutation(len(recordings))[:NUM_WORDS]]
        return join_recordings(sample, rng=rng)

    words = [str(word) for word in rng.permutation(list(WORDS))[:NUM_WORDS]]
    is_training = plan.set_name in {"train", "valid"}
    has_pauses = is_training and rng.random() < settings.pauses

    # Durations are relative to 155 words per minute.
    stretch = rng.uniform(0.9, settings.slowest if is_training else 1.25)
    if plan.engine == "espeak":
        rate = round(155 / stretch)
        pitch = int(rng.integers(25, 76))
        return espeak().speak(words, voice=plan.voice, rate=rate, pitch=pitch, has_pauses=has_pauses, rng=rng)
    return speak_flite(words, voice=plan.voice, stretch=stretch, has_pauses=has_pauses, rng=rng)


def _record(plan: Plan, settings: WorldSettings, utterance: Utterance) -> dict[str, Any]:
    """Return the line of the manifest: words and phones with their times, and faces."""
    rng = _rng(settings, plan, "faces")
    faces = []
    for number in range(settings.faces if plan.set_name == "train" else 1):
        faces.append({"video": f"{plan.key}.face{number}.mp4", "seed": int(rng.integers(2**32))})
        rng.random()  # the value is unused; without this draw, the faces would differ from those of RESULTS.md

    return {
        "key": plan.key,
        "set": plan.set_name,
        "text": utterance.text,
        "engine": plan.engine,
        "voice": plan.voice,
        "is_training_voice": plan.voice in {*TRAINING_VOICES, *TRAINING_FLITE_VOICES},
        "num_frames": utterance.num_frames,
        "audio": f"{plan.key}.wav",
        "faces": faces,
        "words": [(text, round(a, 4), round(b, 4), recording) for text, a, b, recording in utterance.words],
        "phones": [(name, round(a, 4), round(b, 4)) for name, a, b in utterance.phones],
    }


def draw_record(record: Mapping[str, Any], face: Mapping[str, Any], **drawing: Any) -> Array:
    """Draw a face of an utterance of a manifest: (T, H, W) uint8; `drawing` contains other arguments of `draw_clip`."""
    rng = np.random.default_rng(face["seed"])
    phones = [Phone(*phone) for phone in record["phones"]]
    return draw_clip(phones, num_frames=record["num_frames"], face=draw_face(rng), rng=rng, **drawing)


def encode_clip(frames_THW: Array) -> bytes:
    """Return gray frames as MP4 (H.264, 25 frames per second, no sound). The same frames give the same bytes."""
    av = require("av", extra="media")
    file = io.BytesIO()
    height, width = frames_THW.shape[1:]

    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=VIDEO_RATE_HZ, width=width, height=height, pix_fmt="yuv420p")
        stream.options = {"preset": "superfast", "crf": "20"}
        stream.codec_context.thread_count = 1  # with more, the bytes differ from run to run
        for frame in frames_THW:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        out.mux(stream.encode(None))
    return file.getvalue()


def _put(path: Path, data: bytes) -> None:
    """Write a file without waiting for the disk as `write_atomic` does, because there are thousands."""
    temporary = partial_path(path)
    temporary.write_bytes(data)
    temporary.replace(path)


def _rng(settings: WorldSettings, plan: Plan, what: str) -> np.random.Generator:
    names = [zlib.crc32(name.encode()) for name in (plan.set_name, what)]
    return np.random.default_rng([settings.seed, names[0], plan.number, names[1]])


class TalkingSource:
    """Utterances of one set of a talking-mouth world. The location is the set's folder.

    A sample has one transcript, one audio file and one video per face. Its columns are `set`, `engine`, `voice`,
    `is_training_voice`, `num_frames` and `recordings`: names joined by spaces, one per word, or None if speech was
    synthesized.
    """

    credit = (
        "Set R: voice of Allison Smith, recorded for Asterisk, Digium, CC BY-SA 3.0. "
        "Set K: letters of KLettres, KDE, GPL-2.0-or-later."
    )

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("talking")
        self._folder = Path(location).absolute()
        if not (self._folder / MANIFEST).is_file():
            raise SourceError(
                f"expected the folder of one set, with {MANIFEST}, got {self._folder}; write it with write_world"
            )

    def describe(self) -> Mapping[str, Any]:
        return {"type": KIND, "path": str(self._folder), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the utterances in the order of the manifest."""
        for record in read_manifest(self._folder):
            recordings = " ".join(word[3] for word in record["words"])
            yield Sample(
                key=record["key"],
                texts=(TextItem(text=record["text"], language="en"),),
                files={
                    "audio": (FileItem(path=record["audio"]),),
                    "video": tuple(FileItem(path=name) for name in _videos(record)),
                },
                columns={
                    **{name: record[name] for name in ("set", "engine", "voice", "is_training_voice", "num_frames")},
                    "recordings": recordings.strip() or None,
                },
            )

    def read(self, item: FileItem) -> bytes:
        return read_item_file(self._folder / item.path)


def read_manifest(folder: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the records of a set: text, words, phones and faces of an utterance."""
    with (folder / MANIFEST).open() as file:
        yield from map(json.loads, file)
