"""Encoders of recordings: a waveform per item, prepared on threads, and a model per batch of equally long windows.

Most models of speech were trained without a mask, and padding changes what they compute. So nothing is padded: a long
recording is cut into windows, and windows of one length share a batch. The batch size does not change the output by
more than float32 rounding, 2e-5 of values of about 1.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, blocks
from embedcache.encoders.base import EncoderSettings, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.models import Graph
from embedcache.errors import ItemError
from embedcache.processes import prefetch_map, torch_device
from embedcache.store.layout import Axis

SAMPLE_RATE_HZ = 16_000
"""Rate of raw audio items."""
INPUT = "inputs"
"""Name of an audio model's input."""
WINDOW_S = 30
"""Length of the windows that longer recordings are cut into."""


class AudioEncoder:
    """An encoder of recordings.

    The tokens of a recording's windows are joined, and each name that ends in `states` also has a `mean` over time, in
    float32.

    Args:
        graph: computes the states of a batch of windows of one shape, passed as `INPUT`.
        prepare: checked waveform, (n,) float32 at 16 kHz -> model input; called from many threads concurrently.
        split: model input -> its windows.
        states: names of the outputs of the graph, (T, D) per window.
        width: D.
        min_samples: samples of the shortest recording that gives one token.
        long_window: size of an input that runs alone on a CPU, where several inputs of this size need much more memory
            and are hardly faster.
        num_parallel: number of batches that the graph runs concurrently, each called from its own thread.
        axis: axis of the tokens.
        num_tokens: model input -> number of tokens that belong to the recording, not to padding.
        fingerprint: fingerprint of the model; backend and precision are filled in here.
    """

    modality: Modality = "audio"

    def __init__(
        self,
        graph: Graph,
        *,
        prepare: Callable[[Floats], Array],
        split: Callable[[Array], Sequence[Array]],
        states: Sequence[str],
        width: int,
        min_samples: int,
        long_window: int,
        num_parallel: int = 1,
        axis: Axis,
        num_tokens: Callable[[Array], int],
        fingerprint: Fingerprint,
        settings: EncoderSettings,
    ) -> None:
        self._graph = graph
        self._prepare = prepare
        self._split = split
        self._min_samples = min_samples
        self._num_tokens = num_tokens

        self.axes = dict.fromkeys(states, axis)

        features: dict[str, ItemShape] = {}
        for name in states:
            features[name.removesuffix("states") + "mean"] = (width,)
            features[name] = (-1, width)
        self.features: Mapping[str, ItemShape] = features

        is_on_cpu = torch_device(settings.device).type == "cpu"
        self.batch_size = settings.batch_size or (max(8, 2 * num_parallel) if is_on_cpu else 32)
        self._long_window = long_window if is_on_cpu and settings.batch_size is None else None

        self._num_parallel = num_parallel
        self._threads = ThreadPoolExecutor(num_parallel, "audio")
        self.fingerprint = replace(fingerprint, backend=graph.backend, precision=settings.precision)

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert waveforms to model inputs.

        Raises:
            ItemError: one of the waveforms cannot be encoded. The message says why.
        """
        inputs = []
        for item in items:
            inputs.append(self._prepare(check_audio(item, self._min_samples)))
        return inputs

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Compute the named features of one batch: name -> one float32 array per item, (D,) or (T, D)."""
        check_names(names, self.features)

        # Windows of several items share batches, so that short items do not run one by one.
        windows: list[tuple[int, Array]] = []
        for item, inputs in enumerate(prepared):
            for window in self._split(inputs):
                windows.append((item, window))

        # A mean is computed from the states of all windows, so that the graph computes states only.
        sources = sorted(set(map(_source, names)))
        parts: dict[tuple[int, str], list[Floats]] = defaultdict(list)
        for item, outputs in self._run(windows, sources):
            for source in sources:
                parts[item, source].append(outputs[source])

        features: dict[str, list[Array]] = {name: [] for name in names}
        for item, inputs in enumerate(prepared):
            for name in names:
                tokens_TD = np.concatenate(parts[item, _source(name)])[: self._num_tokens(inputs)]
                # Sums of thousands of float32 rows lose digits that the batch size must not decide.
                mean_D = tokens_TD.mean(axis=0, dtype=np.float64).astype(np.float32)
                features[name].append(tokens_TD if name in self.axes else mean_D)

        return features

    def _run(
        self, windows: Sequence[tuple[int, Array]], names: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Floats]]]:
        """Run the graph on windows of any lengths, and yield the outputs of each with the number of its item.

        The windows of one length run together. The longest come first, so that the windows of a recording, of which the
        last may be shorter, come in order.
        """

        def run(batch: Sequence[tuple[int, Array]]) -> dict[str, Floats]:
            return self._graph({INPUT: np.stack([window for _, window in batch])}, names)

        # A thread pool of one would only cost switches between threads.
        batches = list(self._batches(windows))
        if self._num_parallel == 1:
            results: Iterator[dict[str, Floats]] = map(run, batches)
        else:
            results = prefetch_map(self._threads, run, batches, window=self._num_parallel + 1)

        for batch, outputs in zip(batches, results, strict=True):
            for row, (item, _) in enumerate(batch):
                yield item, {name: outputs[name][row] for name in names}

    def _batches(self, windows: Sequence[tuple[int, Array]]) -> Iterator[Sequence[tuple[int, Array]]]:
        """Iterate over batches of windows of one shape. The windows of each shape are divided among the threads."""
        by_shape: dict[tuple[int, ...], list[tuple[int, Array]]] = {}
        for item, window in windows:
            by_shape.setdefault(window.shape, []).append((item, window))

        for shape in sorted(by_shape, key=prod, reverse=True):
            shape_windows = by_shape[shape]
            is_alone = self._long_window is not None and prod(shape) >= self._long_window
            size = 1 if is_alone else min(self.batch_size, -(-len(shape_windows) // self._num_parallel))

            for rows in blocks(len(shape_windows), size):
                yield shape_windows[rows]


def check_audio(item: Any, min_samples: int) -> Floats:
    """Return a raw item if it is a waveform of at least `min_samples`, or raise an `ItemError`."""
    audio = np.asarray(item)
    if audio.ndim != 1 or audio.dtype != np.float32:
        raise ItemError(f"expected mono float32 samples, got {audio.dtype} of shape {audio.shape}")

    if len(audio) < min_samples:
        length = f"{len(audio)} samples, {len(audio) / SAMPLE_RATE_HZ:.3f} s"
        raise ItemError(f"too short: {length}; this encoder needs {min_samples / SAMPLE_RATE_HZ:.3f} s")

    if not np.isfinite(audio).all():
        raise ItemError(f"{np.count_nonzero(~np.isfinite(audio))} of {len(audio)} samples are NaN or infinite")

    return audio


def _source(name: str) -> str:
    """Return the output that a feature is computed from."""
    return name.removesuffix("mean") + "states" if name.rpartition(".")[2] == "mean" else name
