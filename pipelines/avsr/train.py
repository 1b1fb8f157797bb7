"""Speech recognition as a task: sound, lips, or the fusion of both on encoders that are trained already."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss

from embedcache.arrays import Floats, Ints, blocks
from embedcache.dataset.inputs import PLAIN
from embedcache.errors import FingerprintError, SettingError
from embedcache.progress import Progress
from embedcache.provenance import canonical_json, digest
from embedcache.runs import RunInfo
from embedcache.train.batches import Batch, BatchInput, to_device
from embedcache.train.data import describe_input
from embedcache.train.distributed import own_slice
from embedcache.train.initialization import source_digests
from embedcache.train.settings import FitSettings
from embedcache.train.train import TrainReport, train_task
from pipelines.avsr.decoding import Decoder, Decoding
from pipelines.avsr.edits import count_word_errors
from pipelines.avsr.network import KIND, EncodedSpeech, Frames, SpeechNetwork, recognize, to_text
from pipelines.avsr.transcripts import BLANK, END
from pipelines.avsr.utterances import (
    DrawnBatch,
    SpeechAugmentation,
    Stream,
    UtteranceBatches,
    Utterances,
    draw_missing,
    read_augmented,
    stack_inputs,
)
from pipelines.sequence import valid_frames

CTC_WEIGHT = 0.2
SMOOTHING = 0.01
"""Weight of the CTC loss, and of the smoothing of both losses, in the paper."""
_IGNORED = -100
_BATCH_SIZE = 32
_ROUNDING = 1e-6
_NUM_SAMPLED = 256  # utterances whose frames standardize the channels of a feature
FRAME_RATE_HZ = 25.0
"""Frames per second of a network whose streams are all faster. Otherwise the slowest stream decides."""


@dataclass(frozen=True, kw_only=True)
class SpeechRecipe:
    """The settings of a speech run, besides its utterances and the settings of the loop.

    Args:
        model: arguments of `SpeechNetwork` other than its streams, such as `PAPER`.
        augmentation: changes of the utterances in training.
        measured: views of the sound that are measured in validation.
        ctc_weight: weight of the CTC loss; attention has the rest.
        align_epochs: first epochs, in which CTC is the whole loss and all views are plain. In noise, or with an
            attention decoder, which learns to spell before it attends, CTC takes far longer to learn to align.
        smoothing: smoothing of both losses.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    augmentation: SpeechAugmentation = field(default_factory=SpeechAugmentation)
    measured: Sequence[str] = (PLAIN,)
    ctc_weight: float = CTC_WEIGHT
    align_epochs: int = 0
    smoothing: float = SMOOTHING


class SpeechTargets(NamedTuple):
    """Targets of the loss of a batch of utterances.

    Args:
        symbols_BL: (B, L) int64, symbols of each transcript, then END, then padding of any value.
        lengths_B: (B,) int64, symbols of each transcript without END.
        is_missing: stream -> (B,) bool, utterances that are treated as if they had no such stream.
        is_ctc_alone: whether CTC is the whole loss, as in the first epochs of training.
    """

    symbols_BL: Tensor
    lengths_B: Tensor
    is_missing: Mapping[str, Tensor] | None = None
    is_ctc_alone: bool = False


class SpeechObjective(nn.Module):
    """Loss of a batch: CTC with weight `ctc_weight`, the attention's cross-entropy with the rest, both smoothed.

    CTC: (1 - ε) · CTC + ε · KL(uniform ‖ p) over valid frames, up to a constant
    attention: (1 - ε) · NLL + ε · mean over symbols of -log p

    The weight is 0.2 and ε is 0.01 in the paper's code. CTC is the mean over items, each divided by the length of its
    transcript; the cross-entropy is the mean over all symbols of the batch.
    """

    def __init__(
        self,
        network: SpeechNetwork,
        *,
        ctc_weight: float = CTC_WEIGHT,
        smoothing: float = SMOOTHING,
        is_encoded: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.ctc_weight = ctc_weight
        self.smoothing = smoothing
        self._is_encoded = is_encoded

    def loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch, a scalar."""
        targets: SpeechTargets = batch.targets
        streams = {}
        for name, (values, lengths, _) in batch.inputs.items():
            assert lengths is not None
            streams[name] = Frames(values, lengths)
        encoded = self.network.encode(streams, is_missing=targets.is_missing, is_encoded=self._is_encoded)

        # A loss of weight 0 is not computed, but all parameters still need a gradient.
        loss = _no_loss(self.network.ctc) + _no_loss(self.network.attention)
        ctc_weight = 1.0 if targets.is_ctc_alone else self.ctc_weight
        if ctc_weight:
            loss = loss + ctc_weight * self._ctc(encoded, targets)
        if ctc_weight < 1:
            loss = loss + (1 - ctc_weight) * self._attention(encoded, targets)
        return loss

    def _ctc(self, encoded: EncodedSpeech, targets: SpeechTargets) -> Tensor:
        log_probs_BTC = self.network.ctc_log_probs(encoded)
        losses_B = ctc_loss(
            log_probs_BTC.transpose(0, 1),
            targets.symbols_BL,
            encoded.is_valid_BT.sum(dim=1),
            targets.lengths_B,
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )

        # Long transcripts have larger losses; each utterance counts the same.
        loss = (losses_B / targets.lengths_B.clamp(min=1)).mean()
        uniform = -log_probs_BTC[encoded.is_valid_BT].mean()
        return (1 - self.smoothing) * loss + self.smoothing * uniform

    def _attention(self, encoded: EncodedSpeech, targets: SpeechTargets) -> Tensor:
        starts_B1 = torch.full_like(targets.symbols_BL[:, :1], END)
        logits_BLC = self.network.attention(
            torch.cat([starts_B1, targets.symbols_BL[:, :-1]], dim=1), encoded.frames_BTP, encoded.is_valid_BT
        )

        # The symbols of the transcript and its END are predicted; padding is ignored.
        is_symbol_BL = valid_frames(targets.lengths_B + 1, targets.symbols_BL.shape[1])
        targets_BL = targets.symbols_BL.masked_fill(~is_symbol_BL, _IGNORED)
        return cross_entropy(
            logits_BLC.flatten(0, 1), targets_BL.flatten(), ignore_index=_IGNORED, label_smoothing=self.smoothing
        )


def _no_loss(module: nn.Module) -> Tensor:
    """Return 0 with a gradient of 0 for each parameter: `DistributedDataParallel` expects one for every parameter."""
    return torch.stack([0.0 * parameter.sum() for parameter in module.parameters()]).sum()


def pad_transcripts(transcripts: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return transcripts as in `SpeechTargets`: (B, L) int64 with END after each, and lengths without END."""
    lengths_B = np.array([len(symbols) for symbols in transcripts], np.int64)
    padded_BL = np.full((len(transcripts), int(lengths_B.max(initial=0)) + 1), END, np.int64)
    for row, symbols in enumerate(transcripts):
        padded_BL[row, : len(symbols)] = symbols
    return padded_BL, lengths_B


class SpeechTask:
    """A `Task` that trains a speech recognizer. It keeps the epoch with the lowest word error rate in validation.

    Args:
        network: the network.
        train: utterances to train on.
        validation: utterances of other speakers, recognized by the best path of CTC, or by attention if CTC has no
            weight.
        settings: batch size and seed.
        recipe: weights of the losses, changes of the utterances, and measured views.
        is_encoded: the features are states of the encoders, derived from the runs that `module` starts from.
    """

    def __init__(
        self,
        network: SpeechNetwork,
        train: Utterances,
        validation: Utterances,
        settings: FitSettings,
        recipe: SpeechRecipe,
        *,
        is_encoded: bool = False,
        device: str = "cpu",
    ) -> None:
        self.network = network
        self.module = SpeechObjective(
            network, ctc_weight=recipe.ctc_weight, smoothing=recipe.smoothing, is_encoded=is_encoded
        )
        self.keys = train.keys
        self._train = train
        self._validation = validation
        self._recipe = recipe
        self._is_encoded = is_encoded
        self._device = device

        batch_size = settings.optimizer.batch_size or _BATCH_SIZE
        lengths_S = np.array([len(symbols) for symbols in train.symbols], np.int64)
        self._plan = UtteranceBatches(lengths_S, batch_size=batch_size, seed=settings.seed)
        self.num_steps = self._plan.num_steps

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, starting at a step."""
        for drawn in self._plan.epoch(epoch, first_step=first_step):
            yield self._load(drawn)

    def _load(self, drawn: DrawnBatch) -> Batch:
        numbers_B = drawn.numbers_B[own_slice(len(drawn.numbers_B))]

        # Seeded by step, so that a resumed run draws the same augmentation.
        rng = np.random.default_rng([drawn.seed, drawn.epoch, drawn.step, int(numbers_B[0])])
        is_aligning = drawn.epoch < self._recipe.align_epochs
        augmentation = self._recipe.augmentation
        if is_aligning:
            augmentation = replace(augmentation, views={})

        # States of an encoder are stacked already.
        stacks = dict.fromkeys(self.network.stacks, 1) if self._is_encoded else self.network.stacks
        streams = read_augmented(self._train, numbers_B, stacks, augmentation, rng)
        absences = draw_missing(augmentation.missing, tuple(streams), len(numbers_B), rng)
        symbols_BL, lengths_B = pad_transcripts([self._train.symbols[number] for number in numbers_B])

        return Batch(
            samples=numbers_B,
            num_samples=len(drawn.numbers_B),
            inputs={
                name: BatchInput(to_device(values, self._device), to_device(lengths, self._device))
                for name, (values, lengths) in streams.items()
            },
            targets=SpeechTargets(
                symbols_BL=to_device(symbols_BL, self._device),
                lengths_B=to_device(lengths_B, self._device),
                is_missing={name: to_device(is_absent_B, self._device) for name, is_absent_B in absences.items()},
                is_ctc_alone=is_aligning,
            ),
        )

    def measure(self) -> dict[str, float]:
        """Compute the word error rates on the validation utterances, for each readout and each measured view.

        Both readouts decode greedily. The score is minus the mean of all rates: the best epoch of CTC may be one in
        which the attention decoder knows nothing, and the hybrid decoder needs both.
        """
        rates: dict[str, float] = {}
        for view in self._recipe.measured:
            rates |= self._word_errors(view)
        return {**rates, "score": -float(np.mean(list(rates.values())))}

    def _word_errors(self, view: str) -> dict[str, float]:
        """Return the word error rates of a view, by the name of the measure."""
        # A readout without weight in the loss is not measured.
        decoders: dict[str, Decoder] = {f"WER {view}": "ctc"} if self._recipe.ctc_weight else {}
        if self._recipe.ctc_weight < 1:
            decoders[f"attention WER {view}"] = "attention"
        texts: dict[str, list[str]] = {name: [] for name in decoders}
        for encoded in encode_utterances(
            self.network, self._validation, views={"audio": view}, is_encoded=self._is_encoded, device=self._device
        ):
            for name, decoder in decoders.items():
                best = recognize(self.network, encoded, Decoding(decoder=decoder))
                texts[name] += [to_text(hypothesis.symbols) for hypothesis in best]

        references = [to_text(symbols) for symbols in self._validation.symbols]
        return {name: float(count_word_errors(references, recognized).mean()) for name, recognized in texts.items()}


@torch.no_grad()
def encode_utterances(
    module: SpeechNetwork,
    utterances: Utterances,
    *,
    views: Mapping[str, str] | None = None,
    videos_of: Ints | None = None,
    is_encoded: bool = False,
    batch_size: int = _BATCH_SIZE,
    device: str = "cpu",
) -> Iterator[EncodedSpeech]:
    """Encode utterances in their order, in evaluation mode, a batch at a time.

    Args:
        views: stream -> view; others are plain.
        videos_of: (S,) utterance whose lips each one gets, as a control. If None, its own lips.
        is_encoded: the features are states of the encoders.
    """
    module.eval()
    for rows in blocks(len(utterances), batch_size):
        numbers_B = np.arange(rows.start, rows.stop)
        inputs = {}
        for name, stream in utterances.streams.items():
            rows_B = videos_of[numbers_B] if name == "video" and videos_of is not None else numbers_B
            view = utterances.view_number(name, (views or {}).get(name, PLAIN))
            inputs[name] = stream.read(stream.rows(rows_B), np.full(len(rows_B), view))

        # With the lips of another utterance, the lengths of the streams differ on purpose.
        if videos_of is None:
            utterances.require_close_lengths(inputs, numbers_B)

        frames = {}
        for name, values in inputs.items():
            values_BTD, lengths_B = stack_inputs(values, 1 if is_encoded else module.stacks[name])
            frames[name] = Frames(to_device(values_BTD, device), to_device(lengths_B, device))
        yield module.encode(frames, is_encoded=is_encoded)


def train_speech(
    train: Utterances,
    validation: Utterances,
    run_path: Path | str,
    recipe: SpeechRecipe,
    settings: FitSettings,
    *,
    states: tuple[Utterances, Utterances] | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train a speech recognizer into a run folder. An interrupted run is resumed, a finished one reused.

    To train a fusion, `settings.parts` starts both encoders from runs of one stream each, `audio=RUN` and `video=RUN`,
    and trains only `fusion+ctc+attention`.

    Args:
        train: utterances to train on.
        validation: utterances to choose the epoch by.
        states: the same utterances with states of the frozen encoders as features, derived from the runs that the
            encoders start from. Training reads them instead of the features, and skips the encoders.

    Raises:
        FingerprintError: the folder has a run with other settings, or states come from another run.
        DataError: a start run lacks weights of a part, or a loss is NaN or infinite.
        SettingError: streams have rates without a whole ratio, or states are given while encoders are trained.
    """
    # The utterances decide the streams, and the recipe the rest of the network.
    arguments = {"streams": _describe_streams(train), **recipe.model}
    training = {
        **asdict(recipe),
        "states": _describe_states(train, states, settings),
        "longest_s": round(max(stream.longest_s for stream in train.streams.values()), 3),
    }
    info = RunInfo(
        kind=KIND,
        arguments=arguments,
        inputs={name: describe_input(stream.feature) for name, stream in train.streams.items()},
        settings=json.loads(canonical_json(training)),
        index_digest="+".join(item.cache.info.index_digest for item in (train, validation)),
        digests={"utterances": digest([train.keys, validation.keys])},
    )
    train_data, validation_data = states or (train, validation)

    def make_task(device: str) -> SpeechTask:
        """Build the network, with inputs standardized by the training utterances, and its task on a device."""
        network = SpeechNetwork(**arguments)
        for name, stream in train.streams.items():
            network.standardize(name, sample_frames(stream))
        return SpeechTask(
            network,
            train_data,
            validation_data,
            settings,
            recipe,
            is_encoded=states is not None,
            device=device,
        )

    return train_task(make_task, run_path, info, settings, progress=progress)


def sample_frames(stream: Stream) -> Floats:
    """Read the frames of evenly spaced utterances in the plain view: (N, D) float32."""
    # A few hundred utterances are enough for moments, and cheap to read.
    rows = stream.order_M[np.linspace(0, len(stream.order_M) - 1, _NUM_SAMPLED).astype(np.int64)]
    parts = [stream.read(row[None], np.zeros(1, np.int64)).values[0] for row in np.unique(rows)]
    return np.concatenate(parts).astype(np.float32)


def _describe_streams(utterances: Utterances) -> dict[str, dict[str, int]]:
    slowest = min(stream.rate_hz for stream in utterances.streams.values())

    streams = {}
    for name, stream in utterances.streams.items():
        # The frame rate of the paper, unless a stream is slower.
        goal = min(slowest, FRAME_RATE_HZ)
        stack = round(stream.rate_hz / goal)
        if abs(stream.rate_hz / goal - stack) > _ROUNDING:
            raise SettingError(
                f"expected frame rates that are multiples of {goal:g} Hz, got {stream.rate_hz:g} Hz of {name}; extract "
                "it at another rate"
            )
        streams[name] = {"width": stream.feature.width, "stack": stack}
    return streams


def _describe_states(
    train: Utterances, states: tuple[Utterances, Utterances] | None, settings: FitSettings
) -> dict[str, str] | None:
    """Check that states come from the start runs, and return the digest of the weights of each stream's encoder."""
    if states is None:
        return None
    if settings.parts.trainable is None or set(settings.parts.trainable.split("+")) & set(train.streams):
        raise SettingError(
            f"trainable: expected parts without the encoders, as the states come from frozen ones, got "
            f"{settings.parts.trainable or 'all'}; use fusion+ctc+attention"
        )

    # States of another encoder would train the fusion on inputs that it never gets.
    start_weights = source_digests(settings.parts.init_from)
    weights: dict[str, str] = {}
    for name in train.streams:
        for utterances in states:
            weights[name] = str(utterances.streams[name].feature.fingerprint.get("weights"))
            if start_weights.get(name) != weights[name]:
                raise FingerprintError(
                    f"the {name} encoder: expected states that were derived from the run that it starts from, got "
                    f"{utterances.streams[name].feature.name} of another one; use init_from {name}=RUN with that run"
                )
    return weights
