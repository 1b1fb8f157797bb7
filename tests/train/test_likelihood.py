"""Tasks of one likelihood trained together, resumed, tuned by prompts, and with a new modality."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.networks.saved import load_module, read_module_config
from embedcache.networks.shared import SharedNetwork
from embedcache.networks.words import BLANK, END, NUM_SPECIAL, WordLists
from embedcache.train.examples import TaskExamples
from embedcache.train.likelihood import TaskMixture, start_from, train_likelihood
from embedcache.train.likelihood_tasks import predict
from tests.train.likelihood_cases import Squares, colors_of, fit_settings, open_tones, recipe
from tests.train.runs import interrupted_after

pytestmark = pytest.mark.slow


def network(run: Path) -> SharedNetwork:
    module, _ = load_module(run)
    assert isinstance(module, SharedNetwork)
    return module


def test_tasks_learn_together(squares: Squares, squares_run: Path) -> None:
    net = network(squares_run)
    found = {}
    for name, kind in (("classify", "classify"), ("captions", "caption"), ("captions", "masked")):
        task = squares.task(name, kind)  # type: ignore[arg-type]
        found[kind] = float(predict(task, net, squares.valid[name]).is_correct_M.mean())
        if kind == "caption":
            blind = predict(task, net, squares.valid[name].shuffle_media(seed=0)).is_correct_M.mean()
            assert found[kind] > blind + 0.1
    assert found["classify"] > 0.85
    assert found["caption"] > 0.9
    assert found["masked"] > 0.85
    ranks = squares.task("retrieve", "retrieve", "captions").measure(net, device="cpu")
    assert min(ranks.values()) > 0.8


def train_two(squares: Squares, run: Path, *, checkpoint_s: float = 60.0) -> None:
    tasks = [squares.task("caption", "caption", "captions", max_candidates=8), squares.task("answer", "answer")]
    settings = fit_settings(checkpoint_s=checkpoint_s)
    train_likelihood(tasks, squares.words, run, recipe(steps_per_epoch=4), settings)


def test_an_interrupted_run_resumes_to_the_same_bytes(squares: Squares, tmp_path: Path) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    train_two(squares, whole)
    with interrupted_after(6), pytest.raises(InterruptedError):
        train_two(squares, interrupted, checkpoint_s=0.0)
    assert not (interrupted / "config.json").exists()
    train_two(squares, interrupted, checkpoint_s=0.0)
    for name in ("model.safetensors", "losses.jsonl"):
        assert (interrupted / name).read_bytes() == (whole / name).read_bytes()


def test_tasks_are_drawn_by_weight_from_seed_epoch_and_step() -> None:
    def draws(seed: int, epoch: int, first_step: int = 0) -> list[tuple[int, float]]:
        mixture = TaskMixture([3.0, 1.0], [4, 8], num_steps=400, seed=seed)
        steps = mixture.epoch(epoch, first_step=first_step)
        return [(drawn.number, drawn.rng.random()) for drawn in steps]

    assert draws(0, 1)[100:] == draws(0, 1, first_step=100)
    assert draws(0, 1) != draws(0, 2)
    assert draws(0, 1) != draws(1, 1)
    assert np.mean([number for number, _ in draws(0, 1)]) == pytest.approx(0.25, abs=0.06)
    assert TaskMixture([3.0, 1.0], [4, 8], num_steps=400, seed=0).num_samples == 2000


@pytest.mark.no_mutants
def test_prompts_tune_a_finished_run_to_a_new_task(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    task = squares.task("answer", "answer", has_head=True)
    tuned_recipe, parts = start_from(
        squares_run, trainable="prompts+norms+scales+heads", num_prompts=4, steps_per_epoch=100
    )
    settings = fit_settings(lr=1e-2, init_from=parts.init_from, trainable=parts.trainable)
    report = train_likelihood([task], squares.words, tmp_path / "tuned", tuned_recipe, settings)
    before, after = (load_file(path / "model.safetensors") for path in (squares_run, tmp_path / "tuned"))
    frozen = [key for key in before if "norm" not in key and not key.startswith("likelihoods")]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not torch.equal(before["layers.0.attention_norm.weight"], after["layers.0.attention_norm.weight"])
    assert {key.partition(".")[0] for key in after.keys() - before.keys()} == {"prompts", "heads", "likelihoods"}
    assert report.num_parameters == sum(
        value.numel() for key, value in after.items() if key not in frozen and "words" not in key
    )
    earlier = read_module_config(tmp_path / "tuned").training["earlier_tasks"]
    assert [task["name"] for task in earlier] == ["classify", "retrieve", "caption", "masked"]
    found = predict(task, network(tmp_path / "tuned"), squares.valid["answer"])
    blind = predict(task, network(tmp_path / "tuned"), squares.valid["answer"].shuffle_media(seed=0))
    assert found.is_correct_M.mean() > max(0.7, blind.is_correct_M.mean() + 0.2)


def test_a_label_head_of_a_tuned_run_starts_from_the_likelihood(
    squares: Squares, squares_run: Path, tmp_path: Path
) -> None:
    tuned_recipe, parts = start_from(squares_run, trainable="heads")
    assert (tuned_recipe.num_prompts, tuned_recipe.steps_per_epoch) == (0, 100)
    settings = fit_settings(epochs=0, init_from=parts.init_from, trainable=parts.trainable)
    task = squares.task("classify", "classify", has_head=True)
    train_likelihood([task], squares.words, tmp_path / "tuned", tuned_recipe, settings)
    net = network(tmp_path / "tuned")
    found = predict(task, net, squares.valid["classify"])
    expected = predict(squares.task("classify", "classify"), network(squares_run), squares.valid["classify"])
    assert found.predicted_M.tolist() == expected.predicted_M.tolist()
    with torch.no_grad():
        net.heads["classify"].linear.bias[3] = 1000.0  # type: ignore[index,operator,union-attr]
    assert set(predict(task, net, squares.valid["classify"]).predicted_M.tolist()) == {3}


def test_a_run_to_start_from_may_have_an_equals_sign_in_its_path(
    squares: Squares, squares_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(squares_run, tmp_path / "lr=0.1")
    monkeypatch.chdir(tmp_path)
    tuned_recipe, _ = start_from("lr=0.1", trainable=None)
    settings = fit_settings(epochs=0, init_from=("lr=0.1",))
    tables: dict[Any, str] = {
        "classify": "classify",
        "retrieve": "captions",
        "caption": "captions",
        "masked": "captions",
    }
    tasks = [squares.task(kind, kind, table) for kind, table in tables.items()]
    train_likelihood(tasks, squares.words, tmp_path / "run", tuned_recipe, settings)
    before, after = (load_file(path / "model.safetensors") for path in (squares_run, tmp_path / "run"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_new_modality_is_learned_by_its_adapter_alone(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    tones = open_tones(tmp_path / "tones", squares.words.vocabulary)
    tuned_recipe, parts = start_from(squares_run, trainable="audio", steps_per_epoch=60)
    settings = fit_settings(lr=1e-2, init_from=parts.init_from, trainable=parts.trainable)
    task = squares.task("tones", "classify", "classify", train=tones, validation=tones)
    report = train_likelihood([task], squares.words, tmp_path / "tuned", tuned_recipe, settings)
    before, after = (load_file(path / "model.safetensors") for path in (squares_run, tmp_path / "tuned"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key.partition(".")[2].partition(".")[0] for key in after.keys() - before.keys()} == {"audio"}
    assert report.measures["tones accuracy"] > 0.9
    described = read_module_config(tmp_path / "tuned").arguments["modalities"]
    for name, examples in (("image", squares.train["classify"]), ("audio", tones)):
        media = examples.media
        assert media is not None
        axis = None if media.axis is None else media.axis.to_json()
        assert described[name] == {"width": media.feature.width, "axis": axis}
    assert described["audio"]["axis"]["rate_hz"] == 50


def test_earlier_tasks_with_unknown_words_are_left_out(squares: Squares, tmp_path: Path) -> None:
    earlier = [{"name": "a", "candidates": ["zebra"]}, {"name": "b", "candidates": ["red", "blue"]}, {"name": "c"}]
    tasks = [squares.task("texts", "answer")]
    train_likelihood(tasks, squares.words, tmp_path / "run", recipe(earlier_tasks=earlier), fit_settings(epochs=0))
    assert read_module_config(tmp_path / "run").training["earlier_tasks"] == earlier[1:]


def test_texts_alone_are_classified_at_their_blank(squares: Squares, tmp_path: Path) -> None:
    task = squares.task("texts", "answer")
    masked = squares.task("masked", "masked", "texts")
    report = train_likelihood(
        [task, masked], squares.words, tmp_path / "run", recipe(), fit_settings(epochs=5, lr=1e-2)
    )
    assert report.measures["texts accuracy"] > 0.9


def test_pairs_of_a_batch_count_equal_texts_and_items_once(squares: Squares) -> None:
    examples = squares.train["captions"].take(np.array([0, 1, 2, 0, *range(10, 20)]))
    batch = squares.task("retrieve", "retrieve", "captions").load(examples, None, device="cpu")
    assert len(batch.tokens["image"].values_BTD) == 13
    assert len(batch.candidates.numbers_BL) == len(np.unique(examples.target_N))
    first, second = (positions.numpy() for positions in batch.positives)
    texts = examples.targets.take(np.unique(examples.target_N)[second]).to_pylist()
    keys = squares.train["captions"].media.cache.samples["key"].take(batch.rows[first]).to_pylist()  # type: ignore[union-attr,index]
    assert texts == [f"a {left} square left of a {right} square" for left, right in map(colors_of, map(int, keys))]


def test_masks_hide_known_words_and_at_least_one(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.01)
    batch = task.load(squares.train["captions"], np.random.default_rng(0), device="cpu")
    assert batch.words is not None
    assert (batch.words.numbers_BL == BLANK).sum(dim=1).tolist() == [1] * len(squares.train["captions"])
    hidden = batch.candidates.numbers_BL[batch.positives[1], 0]
    assert hidden.min() >= NUM_SPECIAL
    found = batch.words.numbers_BL.clone()
    found[found == BLANK] = hidden
    expected, _ = squares.train["captions"].target_words.take(squares.train["captions"].target_N).padded()
    assert found.numpy().tolist() == expected.tolist()


def test_candidates_of_captions_are_their_words_and_the_end(squares: Squares) -> None:
    examples, vocabulary = squares.train["captions"], squares.words.vocabulary
    batch = squares.task("caption", "caption", "captions").load(examples, None, device="cpu")
    found = batch.candidates.numbers_BL[:, 0]
    assert found[0] == END
    assert {vocabulary.decode(np.array([number])) for number in found[1:].tolist()} == {
        word for text in examples.targets.to_pylist() for word in text.split()
    }
    assert len(found) < len(vocabulary)
    assert (batch.positives[1] == 0).sum() == len(examples)


def show_captions(examples: TaskExamples, rng: np.random.Generator) -> tuple[WordLists, np.ndarray]:
    """Give about half of the examples the caption of another one."""
    shown = np.where(rng.random(len(examples)) < 0.5, np.roll(examples.target_N, 1), examples.target_N)
    return examples.target_words.take(shown), (shown != examples.target_N).astype(np.int64)


def test_a_loader_makes_texts_and_answers(squares: Squares, squares_run: Path) -> None:
    task = squares.task("match", "answer", "captions", candidates=["left", "right"], loader=show_captions)
    task.check()
    batch = task.draw(np.random.default_rng(0), device="cpu")
    assert batch.words is not None
    assert (batch.words.numbers_BL == BLANK).sum(dim=1).tolist() == [1] * 32
    assert set(batch.positives[1].tolist()) == {0, 1}
    assert task.describe()["loader"]["name"] == "tests.train.test_likelihood:show_captions"  # type: ignore[index]
    assert task.measure(network(squares_run), device="cpu").keys() == {"match accuracy"}
    for kind, options in (("classify", {"candidates": ["left"]}), ("answer", {}), ("classify", {})):
        with pytest.raises(SettingError, match=f"loader: expected the kind answer with candidates, got {kind}"):
            squares.task("match", kind, "captions", loader=show_captions, **options)  # type: ignore[arg-type]


def test_words_that_are_no_candidates_are_not_trained_and_never_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    task = squares.task("caption", "caption", "captions", candidates=["a", "square", "left", "of", "red", "green"])
    trained = task.load(examples, np.random.default_rng(0), device="cpu")
    measured = task.load(examples, None, device="cpu")
    num_blue = sum(text.split().count("blue") for text in examples.targets.take(examples.target_N).to_pylist())
    assert num_blue
    assert len(measured.positives[1]) - len(trained.positives[1]) == num_blue == (measured.positives[1] == -1).sum()
    found = predict(task, network(squares_run), examples)
    assert not found.is_correct_M[found.target_M < 0].any()


def test_processes_of_torchrun_are_refused(squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="got 2; start it without torchrun"):
        train_likelihood([squares.task("classify", "classify")], squares.words, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_tasks_are_refused(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    task = squares.task("classify", "classify")
    for tasks in ([], [task, task], [squares.task("a.b", "classify", "classify")]):
        with pytest.raises(SettingError, match="different names"):
            train_likelihood(tasks, squares.words, tmp_path / "run")
    with pytest.raises(SettingError, match="pass it to the tasks"):
        train_likelihood([task], squares.words, tmp_path / "run", recipe(), fit_settings(batch_size=4))
    with pytest.raises(SettingError, match="texts alone"):
        squares.task("classify", "classify", "texts")
    with pytest.raises(SettingError, match="closed set"):
        squares.task("caption", "caption", "captions", has_head=True)
    with pytest.raises(SettingError, match="kind=classify"):
        squares.task("answer", "answer", "classify")
    few = squares.task("classify", "classify", candidates=["red red"])
    one = squares.task("classify", "classify", candidates=few.train.targets.to_pylist()[1:])
    first = few.train.targets[0].as_py()
    message = f"classify: expected targets that are candidates, got '{first}'; pass all of them as candidates"
    with pytest.raises(DataError, match=message):
        one.check()
    with pytest.raises(DataError, match="expected targets that are candidates"):
        few.load(squares.train["classify"], None, device="cpu")
    tasks = [squares.task("classify", "classify", weight=0.5)]
    with pytest.raises(FingerprintError, match="other settings|differ"):
        train_likelihood(tasks, squares.words, squares_run, recipe(), fit_settings())
