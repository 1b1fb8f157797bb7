"""A trained recognizer of speech with its frozen encoders: from recordings and videos to text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Array, Ints
from embedcache.axis import Axis
from embedcache.devices import AUTO, torch_device
from embedcache.encoders.base import Encoder
from embedcache.encoders.open import feature_names, reopen_encoder
from embedcache.errors import DataError, ItemError
from embedcache.networks.ctc import WordTime, num_ctc_frames, word_times
from embedcache.networks.saved import ModuleConfig, load_module
from embedcache.networks.speech import (
    CTC_WEIGHT,
    Frames,
    SpeechNetwork,
    check_decoder,
    recognize,
    stack_frames,
    to_text,
)
from embedcache.networks.transcripts import SYMBOLS
from embedcache.progress import NullProgress, Progress
from embedcache.transcription.clips import AudioLike, Clip, VideoLike, Window, iter_windows, open_clip
from embedcache.transcription.settings import TRAINED_FRACTION, WINDOW_S, Mouth, TranscribeSettings
from embedcache.transcription.transcript import Transcript, join_transcripts

_WINDOWS_PER_BATCH = 8
_SHORTEST_WINDOW_S = 2.0
_SMALL_NETWORK = 5_000_000  # parameters


def load_speech(run_path: Path | str, *, device: str = AUTO) -> "SpeechModel":
    """Load a run of `train_speech`.

    Args:
        run_path: folder of the run.
        device: torch device of encoders and network.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run recognizes no speech.
        CorruptError: the weights do not match the config.
        SettingError: the device does not exist.
    """
    device = str(torch_device(device, needs_float64=True))
    network, config = load_module(Path(run_path), kind="speech", device=device)
    assert isinstance(network, SpeechNetwork)
    return SpeechModel(network, config, run_path=Path(run_path), device=device)


class SpeechModel:
    """A trained recognizer of speech with its frozen encoders. Create it with `load`.

    It uses sound, lips or both, as its run was trained. Views of the training, such as added noise, do not matter here.
    """

    def __init__(self, network: SpeechNetwork, config: ModuleConfig, *, run_path: Path, device: str) -> None:
        self._network, self._run_path, self._device = network, run_path, device
        self._encoders: dict[str, Encoder] = {}
        self.config = config

    def __repr__(self) -> str:
        features = " + ".join(side.feature for side in self.config.sides.values())
        return f"SpeechModel({features} -> {len(SYMBOLS)} symbols)"

    def __fspath__(self) -> str:
        """Return the folder of the run."""
        return str(self._run_path)

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams that the run was trained on, `audio`, `video` or both."""
        return self._network.streams

    @overload
    def transcribe(
        self,
        audio: AudioLike | None = None,
        video: VideoLike | None = None,
        *,
        mouth: Mouth | None = None,
        settings: TranscribeSettings | None = None,
        progress: Progress | None = None,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Sequence[AudioLike] | None = None,
        video: Sequence[VideoLike] | None = None,
        *,
        mouth: Mouth | None = None,
        settings: TranscribeSettings | None = None,
        progress: Progress | None = None,
    ) -> list[Transcript]: ...

    def transcribe(
        self,
        audio: AudioLike | Sequence[AudioLike] | None = None,
        video: VideoLike | Sequence[VideoLike] | None = None,
        *,
        mouth: Mouth | None = None,
        settings: TranscribeSettings | None = None,
        progress: Progress | None = None,
    ) -> Transcript | list[Transcript]:
        """Transcribe recordings, videos or both.

        Files are decoded and resampled as in extraction. Long ones are cut at quiet places and read once, from
        beginning to end: memory does not grow with their length.

        Args:
            audio: sound of one recording, or of several. The path of a video serves as its frames too.
            video: frames of one video, or of several, in the order of `audio`.
            mouth: where the mouth is in all frames, (x0, y0, x1, y1) as fractions of width and height from the left
                upper corner, or `all` if the frames show nothing else, as those of the training did. Nothing looks for
                a face.
            settings: streams, decoder and windows; None: the defaults.
            progress: progress in seconds of the recordings.

        Returns:
            A transcript, or for several recordings a list.

        Raises:
            PathError: a file does not exist.
            DataError: a recording cannot be decoded, lacks a stream, or sound and frames differ in length; the message
                names it. Or the run cannot do without a stream.
            SettingError: there is no region of the mouth, or a decoder was not trained.
            FingerprintError: an encoder is not the one whose features the run was trained on.
            MissingExtraError: a package is not installed.
        """
        is_one = not (_is_many(audio) or _is_many(video))
        pairs: list[Any] = [(audio, video)] if is_one else _pair_up(audio, video)
        transcripts = list(self.iter_transcripts(pairs, mouth=mouth, settings=settings, progress=progress))
        return transcripts[0] if is_one else transcripts

    def iter_transcripts(
        self,
        pairs: Sequence[tuple[AudioLike | None, VideoLike | None]],
        *,
        mouth: Mouth | None = None,
        settings: TranscribeSettings | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Transcript]:
        """Iterate over the transcripts of several recordings, each as soon as it is complete.

        All inputs are opened and checked before the first is transcribed. Windows of several recordings share a batch.

        Args:
            pairs: sound and frames of each recording; either may be None.
            mouth, settings, progress: as in `transcribe`.
        """
        settings, progress = settings or TranscribeSettings(), progress or NullProgress()
        check_decoder(self.config.training, settings.decoding)
        clips = [
            open_clip(
                audio, video, streams=self.streams, wanted=settings.streams, mouth=mouth, name=f"recording {number}"
            )
            for number, (audio, video) in enumerate(pairs)
        ]
        for clip in clips:
            self._check_streams(clip)
        lengths = [clip.duration_s for clip in clips]
        total_s = sum(length or 0.0 for length in lengths)
        progress.start("transcribe", 0 if None in lengths else round(total_s), "s of speech")
        parts: list[Transcript] = []
        number, done_s = 0, 0.0
        for found, part in self._transcribe_windows(clips, settings):
            if found != number:
                yield join_transcripts(parts)
                number, parts = found, []
            parts.append(part)
            progress.advance(round(done_s + part.duration_s) - round(done_s))
            done_s += part.duration_s
        if parts:
            yield join_transcripts(parts)
        progress.finish()

    def _transcribe_windows(
        self, clips: Sequence[Clip], settings: TranscribeSettings
    ) -> Iterator[tuple[int, Transcript]]:
        batch: list[_PreparedWindow] = []
        for number, clip in enumerate(clips):
            step_s = self._step_s(clip.streams[0])
            for window in iter_windows(clip, window_s=self._window_s(settings), step_s=step_s):
                prepared = _PreparedWindow(number, window.start_s, window.stop_s, self._prepare(clip, window))
                if batch and (len(batch) == _WINDOWS_PER_BATCH or batch[0].streams.keys() != prepared.streams.keys()):
                    yield from self._recognize(batch, settings)
                    batch = []
                batch.append(prepared)
        yield from self._recognize(batch, settings) if batch else ()

    def _prepare(self, clip: Clip, window: Window) -> dict[str, Array]:
        """Prepare the sound, and encode the frames, which take far more memory than their features."""
        prepared: dict[str, Array] = {}
        for stream, item in window.items.items():
            try:
                (inputs,) = self._encoder(stream).prepare([item])
            except ItemError as error:
                raise DataError(f"{clip.name}: {error}") from error
            prepared[stream] = inputs if stream == "audio" else self._encode(stream, [inputs])[0]
        return prepared

    def _encode(self, stream: str, inputs: Sequence[Array]) -> list[Array]:
        name = self._feature_name(stream)
        return self._encoder(stream).encode(inputs, [name])[name]

    @torch.inference_mode()
    def _recognize(
        self, batch: "Sequence[_PreparedWindow]", settings: TranscribeSettings
    ) -> list[tuple[int, Transcript]]:
        features = {name: [window.streams[name] for window in batch] for name in batch[0].streams}
        if "audio" in features:
            features["audio"] = self._encode("audio", features["audio"])
        with _few_threads(self._network):
            return list(self._find_transcripts(batch, features, settings))

    def _find_transcripts(
        self, batch: "Sequence[_PreparedWindow]", features: Mapping[str, Sequence[Array]], settings: TranscribeSettings
    ) -> Iterator[tuple[int, Transcript]]:
        streams = {
            name: self._pad([stack_frames(item_TD, self._network.stacks[name]) for item_TD in items])
            for name, items in features.items()
        }
        encoded = self._network.encode(streams)
        found = recognize(self._network, encoded, settings.decoding)
        log_probs_BTC, lengths_B = self._network.ctc_log_probs(encoded), encoded.is_valid_BT.sum(dim=1)
        step_s = self._step_s(next(iter(streams)))
        for window, best, log_probs_TC, length in zip(batch, found, log_probs_BTC, lengths_B.tolist(), strict=True):
            transcript = Transcript(
                text=to_text(best.symbols),
                words=self._find_words(log_probs_TC[:length], best.symbols, window, step_s),
                score=best.score,
                duration_s=window.stop_s - window.start_s,
                streams=tuple(streams),
            )
            yield window.number, transcript

    def _find_words(
        self, log_probs_TC: Tensor, symbols_L: Ints, window: "_PreparedWindow", step_s: float
    ) -> list[WordTime]:
        start_s, stop_s = window.start_s, window.stop_s
        is_trained = self.config.training.get("ctc_weight", CTC_WEIGHT) > 0
        if not is_trained or num_ctc_frames(symbols_L) > len(log_probs_TC):
            return [WordTime(word, start_s, stop_s) for word in to_text(symbols_L).split()]
        return [
            WordTime(word, round(min(start_s + first_s, stop_s), 3), round(min(start_s + last_s, stop_s), 3))
            for word, first_s, last_s in word_times(log_probs_TC, symbols_L, 1 / step_s)
        ]

    def _pad(self, items: Sequence[Array]) -> Frames:
        lengths = np.array([len(item) for item in items], np.int64)
        padded = np.zeros((len(items), int(lengths.max()), items[0].shape[1]), np.float32)
        for row, item in zip(padded, items, strict=True):
            row[: len(item)] = item
        return Frames(torch.from_numpy(padded).to(self._device), torch.from_numpy(lengths).to(self._device))

    def _encoder(self, stream: str) -> Encoder:
        """Return the encoder of a stream, opened on first use."""
        if stream not in self._encoders:
            side = self.config.sides[stream]
            self._encoders[stream] = reopen_encoder(
                side.spec,
                modality=stream,  # type: ignore[arg-type]  # audio or video
                feature=side.feature,
                fingerprint=side.fingerprint,
                device=self._device,
            )
        return self._encoders[stream]

    def _feature_name(self, stream: str) -> str:
        (name,) = feature_names(self.config.sides[stream].feature)
        return name

    def _step_s(self, stream: str) -> float:
        """Return the seconds per frame of the network."""
        axes: Mapping[str, Axis] = getattr(self._encoder(stream), "axes", {})
        axis = axes.get(self._feature_name(stream))
        if axis is None or axis.rate_hz is None:
            raise DataError(
                f"{self.config.sides[stream].feature}: expected a feature with an axis of time; train again"
            )
        return self._network.stacks[stream] / axis.rate_hz

    def _window_s(self, settings: TranscribeSettings) -> float:
        longest_s = float(self.config.training.get("longest_s") or np.inf)
        return settings.window_s or max(_SHORTEST_WINDOW_S, min(WINDOW_S, TRAINED_FRACTION * longest_s))

    def _check_streams(self, clip: Clip) -> None:
        """Check that the network can do without the streams that a recording lacks."""
        missing = [name for name in self.streams if name not in clip.streams]
        chances = (self.config.training.get("augmentation") or {}).get("missing") or {}
        for name in missing:
            if not chances.get(name):
                raise DataError(
                    f"{clip.name}: expected {' and '.join(self.streams)}, got {' and '.join(clip.streams)} alone: the "
                    f"run was trained without modality dropout of its {name}, so what it does without is arbitrary; "
                    f"give both, or train with SpeechAugmentation(missing={{'{name}': 0.25, …}})"
                )


class _PreparedWindow(NamedTuple):
    """A window of the recording of a number: what the encoder of its sound takes, and the features of its frames."""

    number: int
    start_s: float
    stop_s: float
    streams: Mapping[str, Array]


@contextmanager
def _few_threads(network: SpeechNetwork) -> Iterator[None]:
    """Use one thread for a small network: its products are over before others join in."""
    before = torch.get_num_threads()
    if sum(value.numel() for value in network.parameters()) < _SMALL_NETWORK:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_many(items: Any) -> bool:
    return isinstance(items, Sequence) and not isinstance(items, str | bytes)


def _pair_up(audio: Any, video: Any) -> list[tuple[Any, Any]]:
    """Return pairs of the items of two sequences, one of which may be None."""
    if not all(items is None or _is_many(items) for items in (audio, video)):
        raise DataError("expected one recording, or sequences for both audio and video, got one of each")
    count = len(audio if audio is not None else video)
    if audio is not None and video is not None and len(video) != count:
        raise DataError(f"expected as many videos as recordings, got {len(video)} and {count}")
    return list(zip(audio or [None] * count, video or [None] * count, strict=True))
