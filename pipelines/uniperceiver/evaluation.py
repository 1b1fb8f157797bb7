"""Evaluate runs on tasks: accuracy over candidates, recall, and captions, with controls and chance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from scipy.stats import hypergeom

from embedcache.arrays import Bools, Ints, blocks, distinct
from embedcache.errors import DataError
from embedcache.metrics import MetricValues
from embedcache.processes import AUTO, torch_device
from embedcache.provenance import check_same
from embedcache.runs import Run
from pipelines.results import Measures, Result
from pipelines.uniperceiver.captions import write_captions
from pipelines.uniperceiver.examples import Media, TaskExamples
from pipelines.uniperceiver.network import SharedNetwork
from pipelines.uniperceiver.tasks import ExampleTask, encode_texts, predict, read_tokens, retrieval_ranks
from pipelines.uniperceiver.training import KIND
from pipelines.uniperceiver.words import WordLists

SHUFFLED = "items of others"
BLIND = "without items"
"""Controls: each example with the item of another one, or without an item."""

_KS = (1, 5, 10)
_BLOCK = 64


def load_shared(run_path: Path, *, device: str = AUTO) -> tuple[SharedNetwork, Run]:
    """Load the network of a run of `train_multitask` in evaluation mode.

    Raises:
        DataError: the run has another kind.
    """
    device = str(torch_device(device, needs_float64=True))
    run = Run.open(run_path, kind=KIND, device=device)
    network = run.module
    assert isinstance(network, SharedNetwork)
    return network, run


def evaluate_task(
    run_path: Path,
    task: ExampleTask,
    examples: TaskExamples,
    *,
    seed: int,
    controls: Sequence[str] = (),
    groups: Mapping[str, Bools] | None = None,
) -> Result:
    """Evaluate a run on examples of a task, which may be new to the run.

    Metrics are `accuracy` of classes and answers, also per group, as `accuracy: open`; `word accuracy`, the accuracy of
    a word after the true earlier words; `caption accuracy` of whole captions; and `item to text r@1` and the like.

    Args:
        run_path: a run of `train_multitask`.
        task: the task with its candidates. Its training examples are not read.
        examples: examples with the vocabulary of the run.
        seed: seed of the run.
        controls: `SHUFFLED`, and `BLIND` for tasks with texts.
        groups: name -> (N,) bool, examples whose accuracy is also measured separately.

    Raises:
        DataError: the run has another kind or other words, or a target is not a candidate.
        FingerprintError: the run was trained on features of another encoder.
    """
    network, device = _open_network(run_path, examples)
    measures, captions = _measure(network, task, examples, groups or {}, device)

    control_measures = {}
    for control in controls:
        changed = examples.without_media() if control == BLIND else examples.shuffle_media(seed=0)
        control_measures[control], _ = _measure(network, task, changed, groups or {}, device)

    return Result(
        seed=seed,
        num_examples=len(examples),
        measures=measures,
        controls=control_measures,
        chance=_chance(task, examples),
        captions=captions,
    )


def answer_blindly(train: TaskExamples, examples: TaskExamples) -> Bools:
    """Return which examples are right if each gets the most frequent training target of its text: (N,) bool.

    This baseline shows how much can be known without the items. A text that is not in training gets the most frequent
    target of all. If several targets are equally frequent, the first one in the training table wins.
    """
    assert train.text_words is not None
    assert examples.text_words is not None
    texts = _pad_alike(train.text_words, examples.text_words)
    text_numbers = np.unique(texts, axis=0, return_inverse=True)[1].ravel()
    train_texts_M = text_numbers[: len(train)]
    texts_N = text_numbers[len(train) :]

    num_targets = len(train.targets)
    best = int(np.bincount(train.target_N, minlength=num_targets).argmax())
    answers = np.full(int(text_numbers.max()) + 1, best)

    pairs, counts = np.unique(train_texts_M * num_targets + train.target_N, return_counts=True)
    order = np.lexsort((-pairs, counts))  # the most frequent target of each text is written last
    answers[pairs[order] // num_targets] = pairs[order] % num_targets

    place = pc.fill_null(pc.index_in(examples.targets, value_set=train.targets), -1).to_numpy(zero_copy_only=False)
    is_right: Bools = answers[texts_N] == place[examples.target_N]
    return is_right


def _pad_alike(train: WordLists, examples: WordLists) -> Ints:
    """Return the words of both sets of texts, padded to one length, so that equal texts are equal rows: (N, L)."""
    joined = WordLists(
        np.concatenate([train.numbers_M, examples.numbers_M]),
        np.concatenate([train.offsets_N[:-1], train.offsets_N[-1] + examples.offsets_N]),
    )
    return joined.padded()[0]


def _open_network(run_path: Path, examples: TaskExamples) -> tuple[SharedNetwork, str]:
    """Load a run, after checking that examples have its words and its feature."""
    network, run = load_shared(run_path)
    if examples.vocabulary.words != network.vocabulary.words:
        raise DataError(
            f"{run_path}: expected examples with the {len(network.vocabulary):,} words of the run, got "
            f"{len(examples.vocabulary):,} words; open them with the word table that it was trained with"
        )
    if examples.media is not None:
        feature = examples.media.feature
        check_same(
            f"{feature.name} of {examples.media.cache.path}",
            feature.fingerprint,
            run.info.inputs[feature.modality].fingerprint,
            next_step=f"use the feature of the encoder that {run_path} was trained on",
        )
    return network, str(network.task_token.device)


def _measure(
    network: SharedNetwork, task: ExampleTask, examples: TaskExamples, groups: Mapping[str, Bools], device: str
) -> tuple[Measures, dict[str, str]]:
    """Return metric -> values, and key of a sample -> its caption."""
    if task.kind == "retrieve":
        return _measure_retrieval(network, examples, device), {}

    # Examples of one item are not independent; without items each text is separate.
    rows_N = np.arange(len(examples)) if examples.rows_N is None else examples.rows_N
    predictions = predict(task, network, examples, device=device)
    right = MetricValues(predictions.is_correct_M, rows_N[predictions.example_M])

    if task.kind in ("classify", "answer"):
        measures = {"accuracy": right}
        for name, is_in_N in groups.items():
            measures[f"accuracy: {name}"] = MetricValues(right.values_M[is_in_N], right.clusters_M[is_in_N])
        return measures, {}
    if task.kind == "masked":
        return {"word accuracy": right}, {}

    # Captions are written once per item, however many captions it has in the examples.
    rows_I = distinct(rows_N)
    assert examples.media is not None
    captions = write_item_captions(network, task, examples.media, rows_I, device=device)
    references = _references(examples)
    is_right_I = np.array([
        caption in references[row] for row, caption in zip(rows_I.tolist(), captions.values(), strict=True)
    ])  # fmt: skip
    return {"word accuracy": right, "caption accuracy": MetricValues(is_right_I, rows_I)}, captions


def _measure_retrieval(network: SharedNetwork, examples: TaskExamples, device: str) -> Measures:
    assert examples.rows_N is not None
    rows_I = np.unique(examples.rows_N)
    first_T = np.unique(examples.target_N, return_index=True)[1]

    # A caption of several items is counted with its first item.
    clusters = {"item to text": rows_I, "text to item": examples.rows_N[first_T]}
    ranks = retrieval_ranks(network, examples, device=device)
    return {f"{name} r@{k}": MetricValues(ranks_Q <= k, clusters[name]) for name, ranks_Q in ranks.items() for k in _KS}


@torch.no_grad()
def write_item_captions(
    network: SharedNetwork, task: ExampleTask, media: Media, rows_I: Ints, *, device: str
) -> dict[str, str]:
    """Write a caption of each item in the words of a task, and return key of its sample -> caption."""
    numbers_C = torch.from_numpy(task.candidate_words.numbers_M.astype(np.int64)).to(device)
    vocabulary = numbers_C, encode_texts(network, task.candidate_words, device=device)

    captions = []
    for part in blocks(len(rows_I), _BLOCK):
        tokens = read_tokens(media, rows_I[part], device=device)
        captions += write_captions(network, tokens, network.classifier("caption"), vocabulary)

    texts = [network.vocabulary.decode(caption.numbers) for caption in captions]
    return dict(zip(media.keys_of(rows_I), texts, strict=True))


def _references(examples: TaskExamples) -> dict[int, set[str]]:
    """Return row of an item -> its captions in the examples, as decoded words."""
    assert examples.rows_N is not None
    target_texts = [
        examples.vocabulary.decode(examples.target_words.take(np.array([number])).numbers_M)
        for number in range(len(examples.targets))
    ]

    references: dict[int, set[str]] = {}
    for row, target in zip(examples.rows_N.tolist(), examples.target_N.tolist(), strict=True):
        references.setdefault(row, set()).add(target_texts[target])
    return references


def _chance(task: ExampleTask, examples: TaskExamples) -> dict[str, float]:
    """Return the expected value of each metric for a random order of the candidates."""
    if task.kind in ("classify", "answer"):
        return {"accuracy": 1 / len(task.names)}
    if task.kind != "retrieve":
        return {"word accuracy": 1 / task.candidate_words.num_texts}

    assert examples.rows_N is not None

    # Equal pairs count once, as in the ranking.
    pairs = np.unique(np.stack([examples.rows_N, examples.target_N]), axis=1)
    items_per_text_T = np.unique(pairs[1], return_counts=True)[1]
    texts_per_item_I = np.unique(pairs[0], return_counts=True)[1]
    counts = {
        "item to text": (texts_per_item_I, len(items_per_text_T)),
        "text to item": (items_per_text_T, len(texts_per_item_I)),
    }

    # The chance that at least one positive is among the first k of a random order.
    chance = {}
    for name, (positives_Q, size) in counts.items():
        for k in _KS:
            chance[f"{name} r@{k}"] = float(hypergeom.sf(0, size, positives_Q, min(k, size)).mean())
    return chance
