"""Speech recognition as a task: sound, lips, or the fusion of both on encoders that are trained already."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Floats, Ints, blocks, check_finite
from embedcache.dataset.inputs import PLAIN
from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.metrics.edits import count_word_errors
from embedcache.networks.saved import ModuleConfig
from embedcache.networks.settings import Decoder, DecodingSettings
from embedcache.networks.speech import (
    CTC_WEIGHT,
    SMOOTHING,
    EncodedSpeech,
    Frames,
    SpeechBatch,
    SpeechNetwork,
    SpeechObjective,
    pad_transcripts,
    recognize,
    to_text,
)
from embedcache.progress import Progress
from embedcache.provenance import canonical_json, digest
from embedcache.train.batches import Loader, to_device
from embedcache.train.distributed import own_slice
from embedcache.train.modules import ModuleReport, describe_input, train_task
from embedcache.train.parts import source_digests
from embedcache.train.settings import FitSettings
from embedcache.train.utterances import (
    DrawnBatch,
    SpeechAugmentation,
    Stream,
    UtteranceBatches,
    Utterances,
    draw_missing,
    read_augmented,
    stack_inputs,
)

_BATCH_SIZE = 32
_ROUNDING = 1e-6
_NUM_SAMPLED = 256  # utterances whose frames standardize the channels of a feature
_TYPICAL_S = 3.0  # length of an utterance, for the estimate of FLOPs
FRAME_RATE_HZ = 25.0
"""Frames per second of a network whose streams are all faster; else those of the slowest stream."""


class LoadedUtterances(NamedTuple):
    """This process's part of a batch on the device, its utterances, and the number of those of all processes."""

    batch: SpeechBatch
    numbers_B: Ints
    num_utterances: int


class _Objective(SpeechObjective):
    """The loss of a loaded batch."""

    def forward(self, batch: LoadedUtterances) -> Tensor:  # type: ignore[override]  # what the loop passes
        return super().forward(batch.batch)


@dataclass(frozen=True, kw_only=True)
class SpeechRecipe:
    """What decides a speech run beside its utterances and the settings of the loop.

    Args:
        model: arguments of `SpeechNetwork` other than its streams, such as `PAPER`.
        augmentation: what is changed in training.
        measured: views of the sound in which validation is measured.
        ctc_weight: weight of the CTC loss; the rest is that of attention.
        align_epochs: first epochs, with CTC as all of the loss and plain views alone. In noise, or beside an attention
            decoder, which learns to spell before it attends to anything, CTC takes far longer to learn to align.
        smoothing: smoothing of both losses.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    augmentation: SpeechAugmentation = field(default_factory=SpeechAugmentation)
    measured: Sequence[str] = (PLAIN,)
    ctc_weight: float = CTC_WEIGHT
    align_epochs: int = 0
    smoothing: float = SMOOTHING


class SpeechTask:
    """A `Task`: a speech recognizer on utterances. The epoch with the lowest word error rate in validation is kept.

    Args:
        module: the network.
        train: utterances to train on.
        validation: utterances of other speakers, recognized by the best path of CTC, or by attention if CTC has no
            weight.
        settings: batch size and seed.
        recipe: weights of the losses, what is changed in training, and views that are measured.
        is_encoded: the features are states of the encoders, derived from the runs that `module` starts from.
    """

    unit = "utterances"

    def __init__(
        self,
        module: SpeechNetwork,
        train: Utterances,
        validation: Utterances,
        settings: FitSettings,
        recipe: SpeechRecipe,
        *,
        is_encoded: bool = False,
        device: str = "cpu",
    ) -> None:
        self.module, self._train, self._validation = module, train, validation
        self._recipe, self._is_encoded, self._device = recipe, is_encoded, device
        batch_size = settings.optimizer.batch_size or _BATCH_SIZE
        lengths_S = np.array([len(symbols) for symbols in train.symbols], np.int64)
        plan = UtteranceBatches(lengths_S, batch_size=batch_size, seed=settings.seed)
        self.loader = Loader(plan, self._load)
        num_frames = round(_TYPICAL_S * FRAME_RATE_HZ)
        self.forward_flops = 2.0 * batch_size * num_frames * sum(value.numel() for value in module.parameters())

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The encoder of each stream, fusion, CTC and attention."""
        return self.module.parts()

    @cached_property
    def objective(self) -> _Objective:
        """The loss."""
        return _Objective(self.module, ctc_weight=self._recipe.ctc_weight, smoothing=self._recipe.smoothing)

    def _load(self, drawn: DrawnBatch) -> LoadedUtterances:
        numbers_B = drawn.numbers_B[own_slice(len(drawn.numbers_B))]
        rng = np.random.default_rng([drawn.seed, drawn.epoch, drawn.step, int(numbers_B[0])])
        is_aligning, augmentation = drawn.epoch < self._recipe.align_epochs, self._recipe.augmentation
        if is_aligning:
            augmentation = replace(augmentation, views={})
        streams = read_augmented(self._train, numbers_B, self._stacks, augmentation, rng)
        missing = draw_missing(augmentation.missing, tuple(streams), len(numbers_B), rng)
        targets_BL, lengths_B = pad_transcripts([self._train.symbols[number] for number in numbers_B])
        batch = SpeechBatch(
            streams={name: self._frames(*stream) for name, stream in streams.items()},
            targets_BL=to_device(targets_BL, self._device),
            target_lengths_B=to_device(lengths_B, self._device),
            is_missing={name: to_device(is_gone_B, self._device) for name, is_gone_B in missing.items()},
            is_encoded=self._is_encoded,
            is_ctc_alone=is_aligning,
        )
        return LoadedUtterances(batch, numbers_B, len(drawn.numbers_B))

    @property
    def _stacks(self) -> Mapping[str, int]:
        return dict.fromkeys(self.module.stacks, 1) if self._is_encoded else self.module.stacks

    def _frames(self, values_BTD: Any, lengths_B: Ints) -> Frames:
        return Frames(to_device(values_BTD, self._device), to_device(lengths_B, self._device))

    def count(self, batch: LoadedUtterances) -> int:
        """Return the number of utterances of a batch."""
        return batch.num_utterances

    def measure(self) -> dict[str, float]:
        """Compute the word error rates on the validation utterances, for each readout and each measured view.

        Both decode greedily. The epoch is chosen by their mean: the best CTC may be that of an epoch in which the
        attention decoder knows nothing, and the hybrid decoder needs both.
        """
        return {name: rate for view in self._recipe.measured for name, rate in self._word_errors(view).items()}

    def _word_errors(self, view: str) -> dict[str, float]:
        """Return the word error rates of a view, by the name of the measure."""
        decoders: dict[str, Decoder] = {f"WER {view}": "ctc"} if self._recipe.ctc_weight else {}
        if self._recipe.ctc_weight < 1:
            decoders[f"attention WER {view}"] = "attention"
        found: dict[str, list[str]] = {name: [] for name in decoders}
        for encoded in encode_utterances(
            self.module, self._validation, views={"audio": view}, is_encoded=self._is_encoded, device=self._device
        ):
            for name, decoder in decoders.items():
                best = recognize(self.module, encoded, DecodingSettings(decoder=decoder))
                found[name] += [to_text(hypothesis.symbols) for hypothesis in best]
        references = [to_text(symbols) for symbols in self._validation.symbols]
        return {name: count_word_errors(references, texts).rate for name, texts in found.items()}

    def score(self, measures: Mapping[str, float]) -> float:
        """Return minus the mean word error rate over readouts and views."""
        return -float(np.mean(list(measures.values())))

    def watch(self) -> dict[str, float]:
        """Return nothing more to log."""
        return {}

    def explain(self, batch: LoadedUtterances, *, loss: float, step: int) -> DataError:
        """Return an error that names the feature, or else the utterances, of a bad loss."""
        for name, stream in batch.batch.streams.items():
            check_finite(stream.values_BTD.float().cpu().numpy(), f"at step {step}, the {name} feature")
        keys = [self._train.keys[number] for number in batch.numbers_B[:5].tolist()]
        return DataError(
            f"the loss is {loss} at step {step}, in the batch of the utterances {', '.join(keys)} …; lower the "
            "learning rate"
        )


@torch.no_grad()
def encode_utterances(
    module: SpeechNetwork,
    utterances: Utterances,
    *,
    views: Mapping[str, str] | None = None,
    streams: Sequence[str] | None = None,
    videos_of: Ints | None = None,
    is_encoded: bool = False,
    batch_size: int = _BATCH_SIZE,
    device: str = "cpu",
) -> Iterator[EncodedSpeech]:
    """Encode utterances in their order, in evaluation mode, a batch at a time.

    Args:
        views: stream -> view; others are plain.
        streams: streams to use, as if the others were missing; None: all.
        videos_of: (S,) utterance whose lips each one gets, as a control; None: its own.
        is_encoded: the features are states of the encoders.
    """
    module.eval()
    names = tuple(utterances.streams) if streams is None else tuple(streams)
    for rows in blocks(len(utterances), batch_size):
        numbers_B = np.arange(rows.start, rows.stop)
        inputs = {}
        for name in names:
            stream = utterances.streams[name]
            of_B = videos_of[numbers_B] if name == "video" and videos_of is not None else numbers_B
            view = utterances.view_number(name, (views or {}).get(name, PLAIN))
            inputs[name] = stream.read(stream.rows(of_B), np.full(len(of_B), view))
        if videos_of is None:
            utterances.require_close_lengths(inputs, numbers_B)
        stacked = {name: stack_inputs(inputs[name], 1 if is_encoded else module.stacks[name]) for name in names}
        yield module.encode(
            {name: Frames(*(to_device(array, device) for array in arrays)) for name, arrays in stacked.items()},
            is_encoded=is_encoded,
        )


def train_speech(
    train: Utterances,
    validation: Utterances,
    run_path: Path | str,
    recipe: SpeechRecipe,
    settings: FitSettings,
    *,
    states: tuple[Utterances, Utterances] | None = None,
    progress: Progress | None = None,
) -> ModuleReport:
    """Train a speech recognizer into a run folder; resumed if interrupted, reused if finished.

    To train a fusion, `settings.parts` starts both encoders from runs of one stream each, `audio=RUN` and `video=RUN`,
    and trains only `fusion+ctc+attention`.

    Args:
        train: utterances to train on.
        validation: utterances to choose the epoch by.
        states: the same utterances with states of the frozen encoders as features, derived from the runs that the
            encoders start from; training reads them in place of the features, and skips the encoders.

    Raises:
        FingerprintError: the folder holds a run with another config, or states come from another run.
        DataError: a start run lacks weights of a part, or a loss is NaN or infinite.
        SettingError: streams have rates without a whole ratio, or states are given while encoders are trained.
    """
    arguments = {"streams": _describe_streams(train), **recipe.model}
    training = {
        **asdict(recipe),
        "states": _describe_states(train, states, settings),
        "longest_s": round(max(stream.longest_s for stream in train.streams.values()), 3),
    }
    config = ModuleConfig(
        kind="speech",
        arguments=arguments,
        sides={name: describe_input(stream.feature) for name, stream in train.streams.items()},
        training=json.loads(canonical_json(training)),
        index_digest="+".join(item.cache.info.index_digest for item in (train, validation)),
        file_digests={"utterances": digest([train.keys, validation.keys])},
    )
    trained, measured = states or (train, validation)

    def make_task(device: str) -> SpeechTask:
        """Build the network, with inputs standardized by the training utterances, and its task on a device."""
        module = SpeechNetwork(**arguments)
        for name, stream in train.streams.items():
            module.standardize(name, sample_frames(stream))
        return SpeechTask(
            module,
            trained,
            measured,
            settings,
            recipe,
            is_encoded=states is not None,
            device=device,
        )

    return train_task(make_task, run_path, config, settings, progress=progress)


def sample_frames(stream: Stream) -> Floats:
    """Read frames of the plain view of some evenly spaced utterances: (N, D) float32."""
    rows = stream.order_M[np.linspace(0, len(stream.order_M) - 1, _NUM_SAMPLED).astype(np.int64)]
    parts = [stream.read(row[None], np.zeros(1, np.int64)).values[0] for row in np.unique(rows)]
    return np.concatenate(parts).astype(np.float32)


def _describe_streams(utterances: Utterances) -> dict[str, dict[str, int]]:
    slowest = min(stream.rate_hz for stream in utterances.streams.values())
    described = {}
    for name, stream in utterances.streams.items():
        goal = min(slowest, FRAME_RATE_HZ)
        stack = round(stream.rate_hz / goal)
        if abs(stream.rate_hz / goal - stack) > _ROUNDING:
            raise SettingError(
                f"expected frame rates that are multiples of {goal:g} Hz, got {stream.rate_hz:g} Hz of {name}; extract "
                "it at another rate"
            )
        described[name] = {"width": stream.feature.width, "stack": stack}
    return described


def _describe_states(
    train: Utterances, states: tuple[Utterances, Utterances] | None, settings: FitSettings
) -> dict[str, str] | None:
    """Return the digest of the weights that made each stream's states, after checking that they are the start runs'."""
    if states is None:
        return None
    if settings.parts.trainable is None or set(settings.parts.trainable.split("+")) & set(train.streams):
        raise SettingError(
            f"trainable: expected parts without the encoders, as the states come from frozen ones, got "
            f"{settings.parts.trainable or 'all'}; use fusion+ctc+attention"
        )
    started, found = source_digests(settings.parts.init_from), {}
    for name in train.streams:
        for utterances in states:
            found[name] = str(utterances.streams[name].feature.fingerprint.get("weights"))
            if started.get(name) != found[name]:
                raise FingerprintError(
                    f"the {name} encoder: expected states that were derived from the run that it starts from, got "
                    f"{utterances.streams[name].feature.name} of another one; use init_from {name}=RUN with that run"
                )
    return found
