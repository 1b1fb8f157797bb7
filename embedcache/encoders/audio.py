"""Encoders of recordings: a waveform per item, prepared on threads, and a model per batch of equally long windows.

Most models of speech were trained without a mask, and padding changes what they compute. So nothing is padded: a long
recording is cut into windows, and windows of one length share a batch. The batch size does not change the output by
more than float32 rounding, 2e-5 of values of about 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.axis import Axis
from embedcache.encoders.backends import Graph, torch_device
from embedcache.encoders.base import Fingerprint, ItemShape, Modality
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import ItemError
from embedcache.registry import unknown_name

SAMPLE_RATE_HZ = 16_000
"""Rate of raw audio items."""
INPUT = "inputs"
"""Name of an audio model's input."""
WINDOW_S = 30
"""Length of the windows that longer recordings are cut into."""


class AudioEncoder:
    """An encoder of recordings.

    Its features are the outputs of the graph. Tokens of a recording's windows are joined, and each name that ends in
    `states` also has a `mean` over time, in float32; vectors are averaged over the windows.

    Args:
        graph: computes the outputs of a batch of windows of one shape, passed as `INPUT`.
        prepare: checked waveform, (n,) float32 at 16 kHz -> model input; called from many threads at once.
        split: model input -> its windows.
        outputs: name -> shape of one item, `(-1, D)` for tokens.
        min_samples: samples of the shortest recording that gives one token.
        axis: of the tokens.
        num_tokens: model input -> number of tokens that belong to the recording, not to padding; None: all.
        fingerprint: of the model; backend and precision are filled in by the caller.
    """

    modality: Modality = "audio"

    def __init__(
        self,
        graph: Graph,
        *,
        prepare: Callable[[Floats], Array],
        split: Callable[[Array], Sequence[Array]],
        outputs: Mapping[str, ItemShape],
        min_samples: int,
        axis: Axis | None = None,
        num_tokens: Callable[[Array], int] | None = None,
        fingerprint: Fingerprint,
        settings: EncoderSettings,
    ) -> None:
        self._graph, self._prepare, self._split = graph, prepare, split
        self._outputs, self._min_samples, self._num_tokens = outputs, min_samples, num_tokens
        self.features: Mapping[str, ItemShape] = dict(_features(outputs))
        self.axes = {name: axis for name, shape in self.features.items() if axis is not None and shape[0] == -1}
        on_cpu, on_gpu = 8, 32
        self.batch_size = settings.batch_size or (on_cpu if torch_device(settings.device).type == "cpu" else on_gpu)
        self.fingerprint = fingerprint

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert waveforms to model inputs; an `ItemError` names the reason why one of them cannot be encoded."""
        return [self._prepare(check_audio(item, self._min_samples)) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Compute the named features of one batch: name -> one float32 array per item, (D,) or (T, D)."""
        for name in names:
            if name not in self.features:
                raise unknown_name("feature", name, self.features)
        windows = [self._split(inputs) for inputs in prepared]
        outputs = self._run([window for item in windows for window in item], sorted({_source(name) for name in names}))
        starts = np.cumsum([0, *(len(item) for item in windows)])
        encoded: dict[str, list[Array]] = {name: [] for name in names}
        for inputs, start, stop in zip(prepared, starts[:-1], starts[1:], strict=True):
            num_tokens = None if self._num_tokens is None else self._num_tokens(inputs)
            for name in names:
                encoded[name].append(self._join(name, outputs[_source(name)][start:stop], num_tokens))
        return encoded

    def _run(self, windows: Sequence[Array], names: Sequence[str]) -> dict[str, list[Floats]]:
        """Run the graph on windows of any lengths, those of one length together; outputs are in the windows' order."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, window in enumerate(windows):
            numbers.setdefault(window.shape, []).append(number)
        outputs: dict[str, list[Any]] = {name: [None] * len(windows) for name in names}
        for same in numbers.values():
            for first in range(0, len(same), self.batch_size):
                batch = same[first : first + self.batch_size]
                found = self._graph({INPUT: np.stack([windows[number] for number in batch])}, names)
                for name in names:
                    for number, output in zip(batch, found[name], strict=True):
                        outputs[name][number] = output
        return outputs

    def _join(self, name: str, outputs: Sequence[Floats], num_tokens: int | None) -> Floats:
        if self._outputs[_source(name)][0] != -1:
            vector: Floats = np.mean(outputs, axis=0, dtype=np.float32)
            return vector
        states_TD = np.concatenate(outputs)[:num_tokens]
        return states_TD if name == _source(name) else states_TD.mean(axis=0, dtype=np.float32)


def check_audio(item: Any, min_samples: int) -> Floats:
    """Return a raw item if it is a waveform of at least `min_samples`, or raise an `ItemError`."""
    audio = np.asarray(item)
    if audio.ndim != 1 or audio.dtype != np.float32:
        raise ItemError(f"expected mono float32 samples, got {audio.dtype} of shape {audio.shape}")
    if len(audio) < min_samples:
        raise ItemError(
            f"too short: {len(audio)} samples, {len(audio) / SAMPLE_RATE_HZ:.3f} s; this encoder needs at least "
            f"{min_samples} at {SAMPLE_RATE_HZ} Hz, {min_samples / SAMPLE_RATE_HZ:.3f} s"
        )
    if not np.isfinite(audio).all():
        raise ItemError(f"{np.count_nonzero(~np.isfinite(audio))} of {len(audio)} samples are NaN or infinite")
    return audio


def resample(audio_N: Floats, rate_hz: int) -> Floats:
    """Resample from 16 kHz with a polyphase filter; the band above 8 kHz stays empty."""
    if rate_hz == SAMPLE_RATE_HZ:
        return audio_N
    from scipy.signal import resample_poly

    common = gcd(rate_hz, SAMPLE_RATE_HZ)
    resampled: Floats = resample_poly(audio_N, rate_hz // common, SAMPLE_RATE_HZ // common).astype(np.float32)
    return resampled


def _features(outputs: Mapping[str, ItemShape]) -> Iterator[tuple[str, ItemShape]]:
    """Iterate over features with their shapes: a `mean` comes before the states that it is the mean of."""
    for name, shape in outputs.items():
        if shape[0] == -1:
            yield name.removesuffix("states") + "mean", shape[1:]
        yield name, shape


def _source(name: str) -> str:
    """Return the output that a feature is computed from."""
    return name.removesuffix("mean") + "states" if name.rpartition(".")[2] == "mean" else name
