"""Training of several tasks, and what a run is measured by."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.errors import DataError, FingerprintError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import Run, is_finished
from embedcache.store.cache import Cache
from pipelines.uniperceiver.evaluation import BLIND, SHUFFLED, answer_blindly, evaluate_task, load_shared
from pipelines.uniperceiver.examples import open_examples, open_media
from pipelines.uniperceiver.network import SharedNetwork
from pipelines.uniperceiver.tasks import predict
from pipelines.uniperceiver.training import TaskMixture, start_from, train_multitask
from pipelines.uniperceiver.words import Vocabulary
from pipelines.worlds.examples import make_examples
from tests.pipelines.uniperceiver.cases import Squares, SquaresSource, fit_settings, open_tones, recipe
from tests.toy import IMAGE
from tests.train.runs import interrupted_after

pytestmark = pytest.mark.slow


def network(run: Path) -> SharedNetwork:
    return load_shared(run)[0]


def test_tasks_learn_together(squares: Squares, squares_run: Path) -> None:
    net = network(squares_run)
    found = {}
    for name, kind in (("classify", "classify"), ("captions", "caption"), ("captions", "masked")):
        task = squares.task(name, kind)  # type: ignore[arg-type]
        found[kind] = float(predict(task, net, squares.valid[name], device="cpu").is_correct_M.mean())
        if kind == "caption":
            blind = predict(task, net, squares.valid[name].shuffle_media(seed=0), device="cpu").is_correct_M.mean()
            assert found[kind] > blind + 0.1
    assert found["classify"] > 0.85
    assert found["caption"] > 0.9
    assert found["masked"] > 0.85
    ranks = squares.task("retrieve", "retrieve", "captions").measure(net, device="cpu")
    assert min(ranks.values()) > 0.8


def train_two(squares: Squares, run: Path, *, checkpoint_s: float = 60.0) -> None:
    tasks = [squares.task("caption", "caption", "captions", max_candidates=8), squares.task("answer", "answer")]
    settings = fit_settings(checkpoint_s=checkpoint_s)
    train_multitask(tasks, squares.words, run, recipe(steps_per_epoch=4), settings)


def test_an_interrupted_run_resumes_to_the_same_bytes(squares: Squares, tmp_path: Path) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    train_two(squares, whole)
    with interrupted_after(6), pytest.raises(InterruptedError):
        train_two(squares, interrupted, checkpoint_s=0.0)
    assert not is_finished(interrupted)
    train_two(squares, interrupted, checkpoint_s=0.0)
    for name in ("model.safetensors", "losses.jsonl"):
        assert (interrupted / name).read_bytes() == (whole / name).read_bytes()


def test_tasks_are_drawn_by_weight_from_seed_epoch_and_step() -> None:
    def draws(seed: int, epoch: int, first_step: int = 0) -> list[tuple[int, float]]:
        mixture = TaskMixture([3.0, 1.0], num_steps=400, seed=seed)
        steps = mixture.epoch(epoch, first_step=first_step)
        return [(drawn.number, drawn.rng.random()) for drawn in steps]

    assert draws(0, 1)[100:] == draws(0, 1, first_step=100)
    assert draws(0, 1) != draws(0, 2)
    assert draws(0, 1) != draws(1, 1)
    assert np.mean([number for number, _ in draws(0, 1)]) == pytest.approx(0.25, abs=0.06)


@pytest.mark.no_mutants
def test_prompts_tune_a_finished_run_to_a_new_task(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    task = squares.task("answer", "answer")
    tuned_recipe, parts = start_from(squares_run, trainable="prompts+norms+scales", num_prompts=4, steps_per_epoch=100)
    settings = fit_settings(lr=1e-2, init_from=parts.init_from, trainable=parts.trainable)
    report = train_multitask([task], squares.words, tmp_path / "tuned", tuned_recipe, settings)
    before, after = (load_file(path / "model.safetensors") for path in (squares_run, tmp_path / "tuned"))
    frozen = [key for key in before if "norm" not in key and not key.startswith("classifiers")]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not torch.equal(before["layers.0.attention_norm.weight"], after["layers.0.attention_norm.weight"])
    assert {key.partition(".")[0] for key in after.keys() - before.keys()} == {"prompts", "classifiers"}
    assert report.num_parameters == sum(
        value.numel() for key, value in after.items() if key not in frozen and "words" not in key
    )
    found = predict(task, network(tmp_path / "tuned"), squares.valid["answer"], device="cpu")
    blind = predict(task, network(tmp_path / "tuned"), squares.valid["answer"].shuffle_media(seed=0), device="cpu")
    assert found.is_correct_M.mean() > max(0.7, blind.is_correct_M.mean() + 0.2)


def test_a_new_modality_is_learned_by_its_adapter_alone(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    tones = open_tones(tmp_path / "tones", squares.words.vocabulary)
    tuned_recipe, parts = start_from(squares_run, trainable="audio", steps_per_epoch=30)
    settings = fit_settings(lr=1e-2, init_from=parts.init_from, trainable=parts.trainable)
    task = squares.task("tones", "classify", "classify", train=tones, validation=tones)
    report = train_multitask([task], squares.words, tmp_path / "tuned", tuned_recipe, settings)
    before, after = (load_file(path / "model.safetensors") for path in (squares_run, tmp_path / "tuned"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key.partition(".")[2].partition(".")[0] for key in after.keys() - before.keys()} == {"audio"}
    assert report.measures["tones accuracy"] > 0.9
    described = Run.open(tmp_path / "tuned").info.arguments["modalities"]
    for name, examples in (("image", squares.train["classify"]), ("audio", tones)):
        media = examples.media
        assert media is not None
        axis = None if media.axis is None else media.axis.to_json()
        assert described[name] == {"width": media.feature.width, "axis": axis}
    assert described["audio"]["axis"]["rate_hz"] == 50


def test_captions_are_written_and_compared_with_those_of_the_item(squares: Squares, squares_run: Path) -> None:
    task, examples = squares.task("caption", "caption", "captions"), squares.valid["captions"]
    report = evaluate_task(squares_run, task, examples, seed=0, controls=[SHUFFLED])
    right = report.measures["caption accuracy"]
    assert examples.media is not None
    keys = examples.media.cache.samples["key"].to_pylist()
    references = dict(zip(keys, examples.targets.take(examples.target_N).to_pylist(), strict=True))
    assert [report.captions[key] == text for key, text in references.items()] == right.values_M.tolist()
    assert right.estimate().value > 0.7
    assert report.controls[SHUFFLED]["caption accuracy"].estimate().value < 0.4
    assert report.measures["word accuracy"].estimate().value > 0.9
    assert len(report.measures["word accuracy"].values_M) == 9 * len(examples)


def test_retrieval_counts_equal_captions_as_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    task = squares.task("retrieve", "retrieve", "captions")
    report = evaluate_task(squares_run, task, examples, seed=0, controls=[SHUFFLED])
    assert report.measures["text to item r@1"].estimate().value > 0.8
    assert len(report.measures["text to item r@1"].values_M) == len(np.unique(examples.target_N))
    assert report.chance["item to text r@1"] == pytest.approx(1 / len(np.unique(examples.target_N)))
    assert 0.05 < report.chance["text to item r@1"] < 0.2
    assert report.controls[SHUFFLED]["text to item r@1"].estimate().value < 0.5


def test_a_task_is_measured_that_was_never_trained(squares: Squares, squares_run: Path) -> None:
    task, examples = squares.task("answer", "answer"), squares.valid["answer"]
    is_left = np.arange(len(examples)) % 2 == 0
    report = evaluate_task(squares_run, task, examples, seed=0, controls=[SHUFFLED, BLIND], groups={"left": is_left})
    assert set(report.measures) == {"accuracy", "accuracy: left"}
    assert len(report.measures["accuracy: left"].values_M) == is_left.sum()
    assert set(report.controls) == {SHUFFLED, BLIND}
    assert report.chance == {"accuracy": 1 / 3}


def test_other_words_and_features_are_refused(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    others = open_examples(make_examples(texts=["a"], targets=["a"]), Vocabulary(["a"]))
    task = squares.task("answer", "answer")
    with pytest.raises(DataError, match="words of the run, got 1 words"):
        evaluate_task(squares_run, task, others, seed=0)
    settings = ExtractSettings(features=("patches",))
    extract(SquaresSource(3), tmp_path / "other", image_encoder=[f"{IMAGE},scale=2"], settings=settings)
    media = open_media(Cache(tmp_path / "other"), "image", "open_toy/patches")
    table = make_examples(keys=["0"], targets=["red red"])
    other = open_examples(table, squares.words.vocabulary, media=media)
    with pytest.raises(FingerprintError, match="weights"):
        evaluate_task(squares_run, squares.task("classify", "classify"), other, seed=0)


def test_blind_answers_are_the_most_frequent_of_each_text() -> None:
    words = Vocabulary(["color", "shape", "is", "red", "blue", "yes"])
    train = make_examples(
        texts=["color", "color", "color", "shape", "is red", "is red"],
        targets=["red", "blue", "blue", "red", "red", "blue"],
    )
    asked = make_examples(
        texts=["color", "color", "is red", "is", "is", "shape"],
        targets=["blue", "red", "red", "blue", "red", "yes"],
    )
    # "is red" has both once: the first in the table; "is" is new: the most frequent of all, red before blue.
    found = answer_blindly(open_examples(train, words), open_examples(asked, words))
    assert found.tolist() == [True, False, True, False, True, False]
