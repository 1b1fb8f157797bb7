"""Training steps of speech recognizers relative to their matrix products and to the front-end that a cache saves.

CPU time of one thread, utterances of up to 3 s: 75 frames at 25 Hz, padded to the longest, transcripts of 25 symbols.
Networks, batch sizes and frozen parts are those of `pipelines/speech`, on random features in memory: the forward and
backward passes, clipping and AdamW, not the reading.

The floor is the time of the step's matrix products alone, forward and backward, on matrices of the same shapes: linear
layers and convolutions, attention, readouts. Products with padding count; gradients of the features, which are frozen,
do not. "Encoder alone" is the forward pass of Whisper tiny.en on prepared spectrograms of the same utterances, which
training without a cache would repeat in every step.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import added_peak_gb, in_own_process, median_rates, use_one_core, warmed_up
from benchmarks.products import Product, attention, cpu_seconds, linears, make_products
from embedcache.arrays import Ints
from embedcache.cli.console import print_line, print_table
from embedcache.encoders.audio import SAMPLE_RATE_HZ
from embedcache.encoders.open import open_encoder
from embedcache.errors import MissingExtraError
from embedcache.networks.speech import PAPER, Frames, SpeechBatch, SpeechNetwork, SpeechObjective, pad_transcripts
from embedcache.networks.transcripts import END, SYMBOLS
from embedcache.train.parts import freeze
from embedcache.train.settings import OptimizerSettings
from embedcache.train.speech import FRAME_RATE_HZ
from embedcache.train.trainer import keep_freed_memory, make_optimizer, update
from pipelines.speech.steps import PARTS, Size, Variant

NUM_FRAMES, NUM_SYMBOLS = 75, 25
STREAMS = {"audio": {"width": 384, "stack": 2}, "video": {"width": 64, "stack": 1}}
SIZE = Size()
REPEATS = 15


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training.

    Args:
        streams: names of its streams.
        model: arguments of the network other than its streams.
        batch_size: utterances per batch.
        trainable: parts that are trained, joined by `+`; None: all.
        is_encoded: the batch has cached states of the encoders, which are frozen, in place of features.
        repeats: number of measured steps.
    """

    streams: tuple[str, ...]
    model: Mapping[str, Any]
    batch_size: int
    trainable: str | None = None
    is_encoded: bool = False
    repeats: int = REPEATS

    def network(self) -> SpeechNetwork:
        """Create the network in training mode, its frozen parts in evaluation mode."""
        module = SpeechNetwork(streams={name: STREAMS[name] for name in self.streams}, **self.model).train()
        parts = module.parts()
        for frozen in freeze(module, parts, parts if self.trainable is None else self.trainable.split("+")):
            frozen.training = False
        return module


def _cases() -> dict[str, Case]:
    model = {**SIZE.model, "dropout": SIZE.dropout["fusion"], "fusion": Variant().kind, "fusion_layers": 2}
    sound = Case(
        streams=("audio",),
        model={**SIZE.model, "dropout": SIZE.dropout["audio"]},
        batch_size=SIZE.batch_size["audio"],
    )
    fusion = Case(
        streams=("audio", "video"), model=model, batch_size=SIZE.batch_size["fusion"], trainable=PARTS, is_encoded=True
    )
    return {
        "sound": sound,
        "sound, size of the paper": replace(sound, model=PAPER, repeats=5),
        "fusion on cached states": fusion,
        "fusion through frozen encoders": replace(fusion, is_encoded=False),
    }


CASES = _cases()


class Costs(NamedTuple):
    """Costs of a step.

    Args:
        step: CPU seconds of a step.
        products: of its matrix products alone.
        encoder: of the forward pass of the front-end on the same utterances; NaN if it is not installed.
        peak_gb: largest resident memory of the steps above that of the imports.
        reason: why there is no front-end; empty if there is one.
    """

    step: float
    products: float
    encoder: float
    peak_gb: float
    reason: str


def main(*, quick: bool) -> None:
    """Print the table of training steps."""
    rows, reasons = [], set()
    for name, case in CASES.items():
        costs: Costs = in_own_process(_measure, name, 1 if quick else case.repeats)[0]
        reasons.add(costs.reason)
        num_gflops = sum(product.flops for product in products_of(case)) / 1e9
        encoder = ("-", "-") if costs.reason else (f"{costs.encoder:.3f}", f"{costs.step / costs.encoder:.2f}")
        rows.append(
            [
                f"{name}, batch {case.batch_size}",
                f"{num_gflops:,.1f}",
                f"{costs.step:.3f}",
                f"{costs.products:.3f}",
                f"{costs.step / costs.products:.2f}",
                *encoder,
                f"{costs.peak_gb:.2f}",
            ]
        )
    print_table(
        [
            "CPU time of a training step",
            "GFLOP",
            "step, s",
            "products alone, s",
            "ratio to the products",
            "encoder alone, s",
            "ratio to the encoder",
            "added peak, GB",
        ],
        rows,
    )
    for reason in reasons - {""}:
        print_line(f"encoder alone: not measured: {reason}")


def _measure(name: str, repeats: int) -> Costs:
    """Alternate a step, its products and the front-end on one core; call it in a process of its own."""
    use_one_core()
    case = CASES[name]
    step, peak_gb = added_peak_gb(lambda: warmed_up(make_step(case)))
    calls: dict[str, Callable[[], object]] = {
        "step": step,
        "products": make_products(products_of(case)),
    }
    reason = ""
    try:
        calls["encoder"] = _make_encoder(case)
    except MissingExtraError as error:
        reason = str(error)
    for call in calls.values():
        call()
    costs = median_rates({key: cpu_seconds(call) for key, call in calls.items()}, repeats=repeats)
    return Costs(costs["step"], costs["products"], costs.get("encoder", nan), peak_gb, reason)


def make_step(case: Case) -> Callable[[], None]:
    """Return a training step on one batch: forward and backward passes, clipping and AdamW, as the training loop."""
    objective = SpeechObjective(case.network())
    optimizer, batch = make_optimizer(objective, OptimizerSettings()), _batch(case)
    keep_freed_memory()

    def step() -> None:
        objective(batch).backward()
        update(objective, optimizer, 1e-3, 1.0, torch.amp.GradScaler("cpu", enabled=False))

    return step


def _batch(case: Case) -> SpeechBatch:
    """Draw features, or states of the network's width, and transcripts."""
    generator, lengths_B = torch.Generator().manual_seed(0), torch.from_numpy(_lengths(case))
    width = case.network().width
    widths = {
        name: width if case.is_encoded else STREAMS[name]["width"] * STREAMS[name]["stack"] for name in case.streams
    }
    streams = {
        name: Frames(torch.randn(case.batch_size, NUM_FRAMES, size, generator=generator), lengths_B)
        for name, size in widths.items()
    }
    texts = np.random.default_rng(0).integers(2, END, (case.batch_size, NUM_SYMBOLS))
    targets_BL, counts_B = map(torch.from_numpy, pad_transcripts(list(texts)))
    return SpeechBatch(streams, targets_BL, counts_B, is_encoded=case.is_encoded)


def _lengths(case: Case) -> Ints:
    """Draw the frames of each utterance; the longest one has all."""
    lengths_B = np.random.default_rng(0).integers(NUM_FRAMES * 3 // 4, NUM_FRAMES + 1, case.batch_size)
    lengths_B[0] = NUM_FRAMES
    return lengths_B


def products_of(case: Case) -> list[Product]:
    """Return the matrix products of a training step on a batch of a case."""
    shapes, products = _Shapes(case), []
    for name in () if case.is_encoded else case.streams:
        first, *others = shapes.encoder(STREAMS[name]["width"] * STREAMS[name]["stack"], shapes.sizes["num_layers"])
        if case.trainable is None:
            products += [first._replace(num_gradients=1), *others]
        else:
            products += [product._replace(num_gradients=0) for product in (first, *others)]
    if len(case.streams) > 1 or shapes.sizes["fusion_layers"]:
        products += shapes.fusion(len(case.streams))
    return [*products, *shapes.readout(shapes.frames), *shapes.decoder()]


class _Shapes:
    """Shapes of the products of each part of a network, on a batch of a case."""

    def __init__(self, case: Case) -> None:
        defaults = {name: value.default for name, value in signature(SpeechNetwork).parameters.items()}
        self.sizes: Mapping[str, Any] = {**defaults, **case.model}
        self.items, self.width, self.hidden = case.batch_size, self.sizes["width"], self.sizes["feed_forward"]
        self.frames, self.symbols = self.items * NUM_FRAMES, self.items * (NUM_SYMBOLS + 1)

    def encoder(self, input_width: int, num_layers: int) -> Iterator[Product]:
        """The adapter and the transformer of a stream or of a fusion."""
        yield from linears(self.frames, input_width, self.width, self.width)
        for _ in range(num_layers):
            yield from linears(self.frames, self.width, 3 * self.width)
            yield from self._attend(NUM_FRAMES, NUM_FRAMES)
            yield from linears(self.frames, self.width, self.width)
            yield from linears(self.frames, self.width, self.hidden, self.width)

    def fusion(self, num_streams: int) -> Iterator[Product]:
        """The gate, a convolution over five frames, and the transformer."""
        joined = num_streams * self.width
        if self.sizes["fusion"] == "gated":
            yield from linears(self.frames, 5 * joined, self.width, num_streams)
        yield from self.encoder(joined, self.sizes["fusion_layers"])

    def readout(self, rows: int) -> Iterator[Product]:
        """The readout of symbols, per frame or per symbol."""
        yield from linears(rows, self.width, self.width, self.width // 2, self.width // 2, len(SYMBOLS))

    def decoder(self) -> Iterator[Product]:
        """The attention decoder."""
        for _ in range(self.sizes["decoder_layers"]):
            for rows, keys in ((self.symbols, NUM_SYMBOLS + 1), (self.frames, NUM_FRAMES)):
                yield from linears(self.symbols, self.width, self.width)
                yield from linears(rows, self.width, 2 * self.width)
                yield from self._attend(NUM_SYMBOLS + 1, keys)
                yield from linears(self.symbols, self.width, self.width)
            yield from linears(self.symbols, self.width, self.hidden, self.width)
        yield from self.readout(self.symbols)

    def _attend(self, queries: int, keys: int) -> Iterator[Product]:
        return attention(self.items, self.sizes["num_heads"], queries, keys, self.width)


def _make_encoder(case: Case) -> Callable[[], object]:
    """Return the front-end's forward pass on the sound of a batch.

    Raises:
        MissingExtraError: the front-end, or the library that runs it, is not installed.
    """
    encoder = open_encoder("whisper:tiny.en", modality="audio")
    rng, samples_per_frame = np.random.default_rng(0), SAMPLE_RATE_HZ // int(FRAME_RATE_HZ)
    sounds = [rng.standard_normal(length * samples_per_frame, np.float32) / 10 for length in _lengths(case)]
    prepared = encoder.prepare(sounds)
    return lambda: encoder.encode(prepared, ["states"])
