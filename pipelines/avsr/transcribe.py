"""Transcribe recordings and videos with a trained run.

    python -m pipelines.avsr.transcribe RUN FILE … [--mouth 0.35,0.55,0.65,0.8] [--srt FILE.srt] [--json]

The run was trained on sound, on lips or on both. Files of any format and length are read once, and cut at quiet places:
memory does not grow with their length.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from embedcache.arrays import Array
from embedcache.cli.console import open_progress, print_line, run_program
from embedcache.encoders.base import Encoder
from embedcache.encoders.open import feature_names, reopen_encoder
from embedcache.errors import DataError, ItemError, SettingError
from embedcache.processes import AUTO, torch_device
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_output, replacing_files, write_output
from embedcache.store.layout import Axis
from pipelines.avsr.clips import MOUTH_FORM, Clip, Window, iter_windows, open_clip, parse_mouth
from pipelines.avsr.ctc import WordTime, num_ctc_frames, word_times
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.network import Frames, check_decoder, load_network, recognize, stack_frames, to_text

WINDOW_S = 20.0
"""Longest window by default, in seconds."""
TRAINED_FRACTION = 0.6
"""Longest window by default, as a fraction of the longest training utterance.

Few utterances are nearly as long as the longest, so that a network knows little of such windows: one that was trained
on utterances of 2 s, the longest of 5.1 s, made twice as many word errors in windows of 5.1 s as in ones of 3 s.
"""
_SHORTEST_WINDOW_S = 2.0
_WINDOWS_PER_BATCH = 8
_CUE_CHARACTERS = 42
_CUE_S = 6.0
_PAUSE_S = 1.0
"""Longest line of a subtitle, its longest time on the screen, and the silence after which a new one begins."""


def main() -> None:
    """Print the transcript of each file, and write subtitles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="recordings or videos, of any format")
    parser.add_argument("--mouth", metavar="X0,Y0,X1,Y1", help=f"where the mouth is in all frames: {MOUTH_FORM}")
    parser.add_argument("--streams", nargs="+", choices=("audio", "video"), default=[], help="default: all there are")
    parser.add_argument("--window-s", type=float, help="cut longer files at quiet places into windows of this length")
    parser.add_argument("--decoder", choices=("hybrid", "ctc", "attention"), default="hybrid")
    parser.add_argument("--device", default=AUTO)
    parser.add_argument("--json", action="store_true", help="print JSON with the times of words")
    parser.add_argument("--srt", type=Path, help="write SubRip subtitles of one recording to a file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args()
    if options.srt and len(options.files) > 1:
        raise SettingError(f"subtitles: expected one recording, got {len(options.files)}; transcribe each alone")

    with replacing_files(options.overwrite):
        if options.srt:
            check_output(options.srt)  # before the work, not after it
        _transcribe_files(options)


def _transcribe_files(options: argparse.Namespace) -> None:
    recognizer = Recognizer(options.run, device=options.device)
    decoding = Decoding(decoder=options.decoder)
    mouth = None if options.mouth is None else parse_mouth(options.mouth)

    # All files are opened first, so that a missing one is reported before the work.
    clips = [recognizer.open(path, streams=options.streams, mouth=mouth) for path in options.files]

    transcripts = []
    for clip in clips:
        transcript = recognizer.transcribe(clip, decoding, window_s=options.window_s, progress=open_progress())
        transcripts.append(transcript)
        if not options.json:
            print_line(transcript.text if len(clips) == 1 else f"{clip.path}: {transcript.text}")

    if options.json:
        records = []
        for clip, transcript in zip(clips, transcripts, strict=True):
            words = [word._asdict() for word in transcript.words]
            records.append({"file": str(clip.path), **asdict(transcript), "words": words})
        print_line(json.dumps(records, indent=2, ensure_ascii=False))
    if options.srt:
        write_output(options.srt, transcripts[0].to_srt().encode())


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The transcript of a recording.

    Args:
        text: words in capitals, with spaces between them; empty if no speech was recognized.
        words: the words with the times at which CTC is certain of their letters, a little shorter than the sound. Words
            of a window with more letters than frames have the times of the window.
        score: log-probability of the text, as its decoder weighs it, summed over the windows.
        duration_s: length of the recording in seconds.
        streams: streams that were used, such as `audio` and `video`.
    """

    text: str
    words: Sequence[WordTime]
    score: float
    duration_s: float
    streams: Sequence[str]

    def to_srt(self) -> str:
        """Return SubRip subtitles."""
        cues = enumerate(_cues(self.words), start=1)
        return "\n".join(f"{number}\n{_interval(words)}\n{_line(words)}\n" for number, words in cues)


class _PreparedWindow(NamedTuple):
    """A window with the prepared input of the audio encoder and the features of its frames."""

    start_s: float
    stop_s: float
    streams: Mapping[str, Array]


class Recognizer:
    """A trained run of `train_speech` with its frozen encoders. Views of the training, such as noise, are not used.

    Args:
        run_path: folder of the run.
        device: torch device of encoders and network.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run is not a speech recognizer.
        CorruptError: the weights have other bytes than were written.
    """

    def __init__(self, run_path: Path | str, *, device: str = AUTO) -> None:
        self._device = str(torch_device(device, needs_float64=True))
        self._network, self.run = load_network(run_path, device=self._device)
        self._encoders: dict[str, Encoder] = {}

    def open(self, path: Path, *, streams: Sequence[str] = (), mouth: Sequence[float] | None = None) -> Clip:
        """Open a recording or video as `open_clip`; DataError if the network cannot do without a missing stream."""
        clip = open_clip(path, self._network.streams, streams, mouth)

        # A network that always had both streams in training cannot be trusted with one.
        chances = self.run.info.settings["augmentation"]["missing"]
        for stream in self._network.streams:
            if stream not in clip.streams and not chances.get(stream):
                raise DataError(
                    f"{path}: expected {' and '.join(self._network.streams)}, got {' and '.join(clip.streams)} only: "
                    f"the run was trained without modality dropout of its {stream}; give both, or train with "
                    f"SpeechAugmentation(missing={{'{stream}': 0.25, …}})"
                )
        return clip

    @torch.inference_mode()
    def transcribe(
        self,
        clip: Clip,
        decoding: Decoding | None = None,
        *,
        window_s: float | None = None,
        progress: Progress | None = None,
    ) -> Transcript:
        """Transcribe a recording, several windows at a time.

        Args:
            clip: the recording, from `open`.
            decoding: the decoder.
            window_s: longest window in seconds. If None, 20 or 0.6 of the longest training utterance, the smaller one.
            progress: progress in seconds of the recording.

        Raises:
            DataError: the recording is damaged, or sound and frames differ in length.
            SettingError: the decoder was not trained, or the window is too short.
            FingerprintError: an encoder is not the one whose features the run was trained on.
        """
        decoding = decoding or Decoding()
        progress = progress or NullProgress()
        check_decoder(self.run.info.settings, decoding)

        trained_s = TRAINED_FRACTION * float(self.run.info.settings["longest_s"])
        window_s = window_s or max(_SHORTEST_WINDOW_S, min(WINDOW_S, trained_s))
        if window_s < _SHORTEST_WINDOW_S:
            raise SettingError(f"window-s: expected at least {_SHORTEST_WINDOW_S:g} seconds, got {window_s:g}")

        duration_s = next(iter(clip.streams.values())).duration_s
        progress.start("transcribe", round(duration_s or 0), "s of speech")

        parts: list[Transcript] = []
        batch: list[_PreparedWindow] = []
        transcribed_s = 0.0
        for window in iter_windows(clip, window_s=window_s, step_s=self._step_s(next(iter(clip.streams)))):
            batch.append(self._prepare(clip, window))
            if len(batch) == _WINDOWS_PER_BATCH:
                parts += self._recognize(batch, decoding)
                batch = []
            progress.advance(round(window.stop_s) - round(transcribed_s))
            transcribed_s = window.stop_s

        if batch:
            parts += self._recognize(batch, decoding)
        progress.finish()

        return Transcript(
            text=" ".join(part.text for part in parts if part.text),
            words=[word for part in parts for word in part.words],
            score=sum(part.score for part in parts),
            duration_s=sum(part.duration_s for part in parts),
            streams=tuple(clip.streams),
        )

    def _prepare(self, clip: Clip, window: Window) -> _PreparedWindow:
        """Prepare the sound, and encode the frames, which take far more memory than their features."""
        streams: dict[str, Array] = {}
        for stream, item in window.items.items():
            try:
                (inputs,) = self._encoder(stream).prepare([item])
            except ItemError as error:
                raise DataError(f"{clip.path}: {error}") from error
            streams[stream] = inputs if stream == "audio" else self._encode(stream, [inputs])[0]
        return _PreparedWindow(window.start_s, window.stop_s, streams)

    def _encode(self, stream: str, inputs: Sequence[Array]) -> list[Array]:
        name = self._feature_name(stream)
        return self._encoder(stream).encode(inputs, [name])[name]

    def _recognize(self, batch: Sequence[_PreparedWindow], decoding: Decoding) -> Iterator[Transcript]:
        # The sound is encoded in batches; the frames already were, window by window.
        features = {name: [window.streams[name] for window in batch] for name in batch[0].streams}
        if "audio" in features:
            features["audio"] = self._encode("audio", features["audio"])
        streams = {}
        for name, items in features.items():
            streams[name] = self._pad([stack_frames(item_TD, self._network.stacks[name]) for item_TD in items])

        encoded = self._network.encode(streams)
        hypotheses = recognize(self._network, encoded, decoding)
        log_probs_BTC = self._network.ctc_log_probs(encoded)
        lengths_B = encoded.is_valid_BT.sum(dim=1).tolist()
        step_s = self._step_s(next(iter(streams)))

        # CTC times the words if it was trained and the window has enough frames. Otherwise they get the window's times.
        for window, best, log_probs_TC, length in zip(batch, hypotheses, log_probs_BTC, lengths_B, strict=True):
            text = to_text(best.symbols)
            words = [WordTime(word, window.start_s, window.stop_s) for word in text.split()]
            if self.run.info.settings["ctc_weight"] > 0 and num_ctc_frames(best.symbols) <= length:
                words = [
                    _move_word(word, window) for word in word_times(log_probs_TC[:length], best.symbols, 1 / step_s)
                ]

            duration_s = window.stop_s - window.start_s
            yield Transcript(
                text=text, words=words, score=best.score, duration_s=duration_s, streams=tuple(window.streams)
            )

    def _pad(self, items: Sequence[Array]) -> Frames:
        lengths = torch.tensor([len(item) for item in items], device=self._device)
        tensors = [torch.from_numpy(np.asarray(item, np.float32)) for item in items]
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return Frames(padded.to(self._device), lengths)

    def _encoder(self, stream: str) -> Encoder:
        """Return the encoder of a stream, opened on first use."""
        if stream not in self._encoders:
            side = self.run.info.inputs[stream]
            self._encoders[stream] = reopen_encoder(
                side.spec,
                modality=stream,  # type: ignore[arg-type]  # audio or video
                feature=side.feature,
                fingerprint=side.fingerprint,
                device=self._device,
            )
        return self._encoders[stream]

    def _feature_name(self, stream: str) -> str:
        (name,) = feature_names(self.run.info.inputs[stream].feature)
        return name

    def _step_s(self, stream: str) -> float:
        """Return the seconds per frame of the network."""
        axes: Mapping[str, Axis] = getattr(self._encoder(stream), "axes", {})
        axis = axes.get(self._feature_name(stream))
        if axis is None or axis.rate_hz is None:
            raise DataError(f"{self.run.info.inputs[stream].feature}: expected a feature with an axis of time")
        return self._network.stacks[stream] / axis.rate_hz


def _move_word(word: WordTime, window: _PreparedWindow) -> WordTime:
    """Return a word of a window with its times in the recording."""
    start_s = round(min(window.start_s + word.start_s, window.stop_s), 3)
    stop_s = round(min(window.start_s + word.stop_s, window.stop_s), 3)
    return WordTime(word.word, start_s, stop_s)


def _cues(words: Sequence[WordTime]) -> Iterator[list[WordTime]]:
    """Iterate over the words of each subtitle."""
    cue: list[WordTime] = []
    for word in words:
        if cue and (
            len(_line([*cue, word])) > _CUE_CHARACTERS
            or word.stop_s - cue[0].start_s > _CUE_S
            or word.start_s - cue[-1].stop_s > _PAUSE_S
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _line(words: Sequence[WordTime]) -> str:
    return " ".join(word.word for word in words)


def _interval(words: Sequence[WordTime]) -> str:
    return f"{_clock(words[0].start_s)} --> {_clock(words[-1].stop_s)}"


def _clock(time_s: float) -> str:
    """Return a time such as `00:01:02,345`."""
    seconds, milliseconds = divmod(round(time_s * 1000), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{milliseconds:03}"


if __name__ == "__main__":
    run_program(main)
