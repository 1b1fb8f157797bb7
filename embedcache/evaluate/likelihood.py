"""Tasks of one likelihood: accuracy over candidates, recall, and captions, with intervals over items and controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch

from embedcache.arrays import Bools, Floats, Ints, blocks, distinct
from embedcache.devices import AUTO, torch_device
from embedcache.errors import DataError, SettingError, pluralize
from embedcache.metrics.intervals import Estimate, MetricValues, bootstrap_runs
from embedcache.metrics.ranking import chance_recall
from embedcache.networks.candidates import Candidates
from embedcache.networks.captions import write_captions
from embedcache.networks.saved import ModuleConfig, load_module
from embedcache.networks.settings import CaptionSettings, Judge
from embedcache.networks.shared import SharedNetwork
from embedcache.networks.words import WordLists
from embedcache.provenance import check_same
from embedcache.train.examples import TaskExamples
from embedcache.train.likelihood_batches import encode_texts, load_words, read_inputs, read_tokens, retrieval_ranks
from embedcache.train.likelihood_tasks import ExampleTask, predict

SHUFFLED, BLIND = "items of others", "without items"
"""Controls: each example with the item of another one, and with none."""

_KS = (1, 5, 10)
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """Metrics of one run on one task.

    Args:
        run_path: folder of the run.
        task: name of the task.
        kind: its kind.
        num_examples: number of examples.
        measures: metric -> its values. `accuracy`, of classes and answers, also per group, as `accuracy: open`; `word
            accuracy`, after the true words; `caption accuracy`, of whole captions; `item to text r@1` and the like.
        controls: control -> metrics.
        chance: metric -> its value for a random order of the candidates.
        captions: key of a sample -> its caption.
        was_seen: whether the run was trained on these examples, or on the training part of them.
    """

    run_path: Path
    task: str
    kind: str
    num_examples: int
    measures: Mapping[str, MetricValues]
    controls: Mapping[str, Mapping[str, MetricValues]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    was_seen: bool = False

    def line(self) -> str:
        """Summarize the report in one line."""
        parts = [f"{name} {_percent(measured.estimate())}" for name, measured in self.measures.items()]
        for control, measures in self.controls.items():
            parts += [f"{control}: {name} {_percent(measured.estimate())}" for name, measured in measures.items()]
        return "; ".join(
            [f"{self.task}: {pluralize(self.num_examples, 'example')}", ", ".join(parts), *self.warnings()]
        )

    def warnings(self) -> list[str]:
        """Return one line for each reason to doubt the results."""
        seen = f"WARNING: {self.run_path.name} was trained on these examples of {self.task}"
        return [seen] if self.was_seen else []


def evaluate_task(
    run_path: Path | str,
    task: ExampleTask,
    examples: TaskExamples,
    *,
    controls: Sequence[str] = (),
    groups: Mapping[str, Bools] | None = None,
    writing: CaptionSettings | None = None,
    seed: int = 0,
    device: str = AUTO,
) -> TaskReport:
    """Evaluate a run on examples of a task, which it need not have been trained on.

    Args:
        run_path: a run of `train_likelihood`.
        task: the task, with its candidates; what it was made to train on is not read.
        examples: examples with the vocabulary of the run.
        controls: `SHUFFLED` and `BLIND`; the latter only of tasks with texts.
        groups: name -> (N,) bool, examples whose accuracy is also measured alone.
        writing: how captions are written; None: the defaults.
        seed: random seed of the shuffled control.
        device: torch device.

    Raises:
        SettingError: a control that the task cannot have.
        DataError: the run is of something else, or has other words; or a target is no candidate.
        FingerprintError: the items have the feature of another encoder than the run was trained on.
    """
    device = str(torch_device(device, needs_float64=True))
    network, config = load_shared(run_path, device=device)
    check_inputs(run_path, network, config, examples)
    altered = {control: _alter(task, examples, control, seed) for control in controls}
    measures, captions = _measure(network, task, examples, groups or {}, writing, device)
    return TaskReport(
        run_path=Path(run_path),
        task=task.name,
        kind=task.kind,
        num_examples=len(examples),
        measures=measures,
        controls={
            control: _measure(network, task, others, groups or {}, writing, device)[0]
            for control, others in altered.items()
        },
        chance=_chance(task, examples),
        captions=captions,
        was_seen=examples.digest in trained_on(config),
    )


def trained_on(config: ModuleConfig) -> set[str]:
    """Return the digests of all examples that a run, and those that it starts from, were trained on."""
    tasks = [*config.training["tasks"], *config.training.get("earlier_tasks", ())]
    return {str(task.get("train")) for task in tasks}


def estimate_runs(reports: Sequence[TaskReport], measure: str, *, control: str | None = None) -> Estimate:
    """Compute the mean of a metric over runs that differ in their seed, with a 95% interval over runs and items.

    Raises:
        DataError: no reports, or reports on different examples.
    """
    of_runs = [(item.measures if control is None else item.controls[control])[measure] for item in reports]
    if not of_runs or any(not np.array_equal(item.clusters_M, of_runs[0].clusters_M) for item in of_runs):
        raise DataError(f"{measure}: expected reports on the same examples, got none or different ones")
    values_RM = np.stack([item.values_M.astype(np.float64) for item in of_runs])
    return bootstrap_runs(values_RM, of_runs[0].clusters_M)


def load_shared(run_path: Path | str, *, device: str = AUTO) -> tuple[SharedNetwork, ModuleConfig]:
    """Load the network of a run of `train_likelihood` in evaluation mode.

    Raises:
        DataError: the run is of something else.
    """
    device = str(torch_device(device, needs_float64=True))
    network, config = load_module(Path(run_path), kind="shared", device=device)
    assert isinstance(network, SharedNetwork)
    return network, config


def check_inputs(run_path: Path | str, network: SharedNetwork, config: ModuleConfig, examples: TaskExamples) -> None:
    """Check that examples have the words and the feature that a run was trained on.

    Raises:
        DataError: other words, or a modality that the run has no adapter for.
        FingerprintError: the feature of another encoder.
    """
    if examples.vocabulary.words != network.vocabulary.words:
        raise DataError(
            f"{run_path}: expected examples with the {len(network.vocabulary):,} words of the run, got "
            f"{len(examples.vocabulary):,} words; open them with the word table that it was trained with"
        )
    if examples.media is None:
        return
    side = config.sides.get(examples.media.modality)
    if side is None:
        raise DataError(
            f"{run_path}: expected items of {', '.join(network.adapters)}, got {examples.media.modality}; train an "
            "adapter for it"
        )
    feature = examples.media.feature
    check_same(
        f"{feature.name} of {examples.media.cache.path}",
        feature.fingerprint,
        side.fingerprint,
        next_step=f"use the feature of the encoder that {run_path} was trained on",
    )


@torch.no_grad()
def represent(run_path: Path | str, task: ExampleTask, examples: TaskExamples, *, device: str = AUTO) -> Floats:
    """Compute what a run reads out of each example of a task, for a probe: (N, P) float32.

    Raises:
        SettingError: a task that reads several places per example.
    """
    if task.kind not in ("classify", "answer"):
        raise SettingError(f"{task.name}: expected classify or answer, which are read once, got {task.kind}")
    device = str(torch_device(device, needs_float64=True))
    network, config = load_shared(run_path, device=device)
    check_inputs(run_path, network, config, examples)
    parts = [
        read_inputs(network, task.load(examples.take(np.arange(rows.start, rows.stop)), None, device=device))
        for rows in blocks(len(examples), _BLOCK)
    ]
    return torch.cat(parts).float().cpu().numpy()


def answer_blindly(train: TaskExamples, examples: TaskExamples) -> Bools:
    """Return which examples are right if each gets the most frequent target of its text in training: (N,) bool.

    This is the baseline of what can be known without the items. A text that is not in training gets the most frequent
    target of all. Of equally frequent targets, the first one in the training table wins.
    """
    if train.text_words is None or examples.text_words is None:
        raise DataError("expected examples with texts for a blind baseline, got some without")
    texts = _pad_alike(train.text_words, examples.text_words)
    which = np.unique(texts, axis=0, return_inverse=True)[1].ravel()
    of_train, of_examples = which[: len(train)], which[len(train) :]
    num_targets = len(train.targets)
    best = int(np.bincount(train.target_N, minlength=num_targets).argmax())
    answers = np.full(int(which.max()) + 1, best)
    pairs, counts = np.unique(of_train * num_targets + train.target_N, return_counts=True)
    order = np.lexsort((-pairs, counts))  # the most frequent of each text is written last
    answers[pairs[order] // num_targets] = pairs[order] % num_targets
    place = pc.fill_null(pc.index_in(examples.targets, value_set=train.targets), -1).to_numpy(zero_copy_only=False)
    is_right: Bools = answers[of_examples] == place[examples.target_N]
    return is_right


def _pad_alike(train: WordLists, examples: WordLists) -> Ints:
    """Return the words of the texts of both, padded to one length, so that equal texts are equal rows: (N, L)."""
    both = WordLists(
        np.concatenate([train.numbers_M, examples.numbers_M]),
        np.concatenate([train.offsets_N[:-1], train.offsets_N[-1] + examples.offsets_N]),
    )
    return both.padded()[0]


def _alter(task: ExampleTask, examples: TaskExamples, control: str, seed: int) -> TaskExamples:
    if control == SHUFFLED and task.kind != "retrieve":
        return examples.shuffle_media(seed=seed)
    if control == BLIND and task.kind in ("answer", "masked"):
        return examples.without_media()
    allowed = {"retrieve": "none", "answer": f"{SHUFFLED} and {BLIND}", "masked": f"{SHUFFLED} and {BLIND}"}
    raise SettingError(
        f"controls: expected {allowed.get(task.kind, SHUFFLED)} for the kind {task.kind}, got {control!r}"
    )


def _measure(
    network: SharedNetwork,
    task: ExampleTask,
    examples: TaskExamples,
    groups: Mapping[str, Bools],
    writing: CaptionSettings | None,
    device: str,
) -> tuple[dict[str, MetricValues], dict[str, str]]:
    rows_N = np.arange(len(examples)) if examples.rows_N is None else examples.rows_N
    if task.kind == "retrieve":
        return _measure_retrieval(network, task, examples, device), {}
    found = predict(task, network, examples, device=device)
    right = MetricValues(found.is_correct_M, rows_N[found.example_M])
    if task.kind in ("classify", "answer"):
        measures = {"accuracy": right}
        for name, is_in_N in groups.items():
            measures[f"accuracy: {name}"] = MetricValues(right.values_M[is_in_N], right.clusters_M[is_in_N])
        return measures, {}
    measures = {"word accuracy": right}
    if task.kind == "masked":
        return measures, {}
    written = _write_captions(network, task, examples, writing or CaptionSettings(), device)
    return {**measures, "caption accuracy": MetricValues(written.is_right_I, written.rows_I)}, written.captions


def _measure_retrieval(
    network: SharedNetwork, task: ExampleTask, examples: TaskExamples, device: str
) -> dict[str, MetricValues]:
    assert examples.rows_N is not None
    rows_I, first_T = np.unique(examples.rows_N), np.unique(examples.target_N, return_index=True)[1]
    clusters = {"item to text": rows_I, "text to item": examples.rows_N[first_T]}  # a text of several: its first item
    ranks = retrieval_ranks(network, examples, family=task.family, device=device)
    return {f"{name} r@{k}": MetricValues(ranks_Q <= k, clusters[name]) for name, ranks_Q in ranks.items() for k in _KS}


class _WrittenCaptions(NamedTuple):
    """A caption of each of I items: key -> caption, in the order of their rows, and whether it is right."""

    captions: dict[str, str]
    rows_I: Ints
    is_right_I: Bools


@torch.no_grad()
def _write_captions(
    network: SharedNetwork, task: ExampleTask, examples: TaskExamples, writing: CaptionSettings, device: str
) -> _WrittenCaptions:
    """Write a caption of each item, and judge it."""
    media = examples.media
    assert media is not None
    assert examples.rows_N is not None
    words = load_words(task.candidate_words, device=device).numbers_BL[:, 0]
    vocabulary = words, Candidates(encode_texts(network, task.candidate_words, device=device))
    likelihood = network.likelihood(task.family)
    rows_I = distinct(examples.rows_N)
    keys = _keys_of(examples, rows_I)
    captions: dict[str, str] = {}
    for part in blocks(len(rows_I), _BLOCK):
        tokens = read_tokens(media, rows_I[part], device=device)
        found = write_captions(
            network,
            tokens,
            likelihood,
            vocabulary,
            beam=writing.beam,
            max_length=writing.max_length,
            length_power=writing.length_power,
        )
        decoded = [network.vocabulary.decode(caption.numbers) for caption in found]
        captions |= dict(zip(keys[part], decoded, strict=True))
    judge = writing.judge or _references(examples, dict(zip(rows_I.tolist(), keys, strict=True)))
    is_right_I = np.array([judge(key, caption) for key, caption in captions.items()])
    return _WrittenCaptions(captions, rows_I, is_right_I)


def _references(examples: TaskExamples, key_of_row: Mapping[int, str]) -> Judge:
    """Return a judge that compares a caption, word by word, with those of the item in the examples."""
    assert examples.rows_N is not None
    decoded = [
        examples.vocabulary.decode(examples.target_words.take(np.array([number])).numbers_M)
        for number in range(len(examples.targets))
    ]
    known: dict[str, set[str]] = {}
    for row, target in zip(examples.rows_N.tolist(), examples.target_N.tolist(), strict=True):
        known.setdefault(key_of_row[row], set()).add(decoded[target])
    return lambda key, caption: caption in known[key]


def _keys_of(examples: TaskExamples, rows_I: Ints) -> list[str]:
    """Return the keys of the samples of items."""
    assert examples.media is not None
    cache, modality = examples.media.cache, examples.media.modality
    samples = cache.items(modality, columns=["sample"])["sample"].take(rows_I)
    keys: list[str] = cache.column("key").take(samples).to_pylist()
    return keys


def _chance(task: ExampleTask, examples: TaskExamples) -> dict[str, float]:
    """Return what a random order of the candidates gives."""
    if task.kind in ("classify", "answer"):
        return {"accuracy": 1 / len(task.names)}
    if task.kind != "retrieve":
        return {"word accuracy": 1 / task.candidate_words.num_texts}
    assert examples.rows_N is not None
    pairs = np.unique(np.stack([examples.rows_N, examples.target_N]), axis=1)
    (_, of_item_Q), (_, of_text_Q) = (np.unique(side, return_counts=True) for side in pairs)
    counts = {"item to text": (of_item_Q, len(of_text_Q)), "text to item": (of_text_Q, len(of_item_Q))}
    return {
        f"{name} r@{k}": chance_recall(positives_Q, size, k)
        for name, (positives_Q, size) in counts.items()
        for k in _KS
    }


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"
