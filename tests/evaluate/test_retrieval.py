import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.dataset.settings import NEAR_DUPLICATE_COSINES, SplitSettings
from embedcache.errors import CorruptError, EmbedcacheError, FingerprintError, SettingError, UnknownNameError
from embedcache.evaluate.retrieval import _recalls, compare_retrieval, evaluate_retrieval, rank
from embedcache.evaluate.runs import group_by_recipe, iterate_recipes, load_runs
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.extract.extract import extract
from embedcache.reports.items import PageItem
from embedcache.reports.retrieval import query_examples, retrieval_json
from embedcache.sources import open_source
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.edits import edit_record
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT

FEATURES = {"feature": {"image": "open_toy/cls", "text": "open_toy/mean"}}


def train_run(
    cache_path: Path,
    run_path: Path,
    *,
    seed: int = 0,
    shared_width: int = 16,
    split: str = "key",
    selection: str | None = None,
    language: str | None = None,
    cosines: Mapping[str, float] = NEAR_DUPLICATE_COSINES,
) -> Path:
    settings = TrainSettings(
        model=ModelSettings(shared_width=shared_width, projector="linear", shrinkage=0.01),
        optimizer=OptimizerSettings(epochs=0),
        split=SplitSettings(kind=split, seed=seed, cosines=cosines),
        selection=selection,
        language=language,
        seed=seed,
    )
    train(cache_path, run_path, settings=settings, **FEATURES)
    return run_path


def test_recall_matches_counting_by_hand(cache_path: Path, runs: list[Path]) -> None:
    report = evaluate_retrieval(cache_path, runs[:1])
    cache = Cache(cache_path)
    ranking = rank(cache, load_runs(runs[:1])[0])
    texts = np.array(cache.items("text")["text"].to_pylist())[ranking.pairs.second.rows]
    own = texts[np.argsort(ranking.pairs.second.samples)]  # one caption per image, in the order of the images
    hits = 0
    for image, caption in zip(ranking.first, own, strict=True):
        scores = ranking.second @ image
        best = scores[texts == caption].max()
        hits += int((scores[texts != caption] >= best).sum() < 5)
    assert report.recalls["i2t"]["r@5"].value == pytest.approx(hits / len(own))
    assert report.num_items["image"] == report.num_items["text"] == [75]
    assert report.part.startswith("part test of the run's split")
    for direction, ranks in ranking.ranks.items():
        metrics = report.rank_metrics[direction]
        assert metrics["median_rank"].value == np.sort(ranks)[(len(ranks) - 1) // 2]
        assert metrics["map"].value == pytest.approx(ranking.average_precisions[direction].mean())
        assert len(report.curves[direction]) == 75
        assert report.curves[direction][4] == pytest.approx(report.recalls[direction]["r@5"].value)


@pytest.mark.slow
def test_seeds_are_averaged(cache_path: Path, runs: list[Path]) -> None:
    one, other, both = (evaluate_retrieval(cache_path, paths) for paths in (runs[:1], runs[1:], runs))
    for direction in ("i2t", "t2i"):
        for name, estimate in both.recalls[direction].items():
            mean = (one.recalls[direction][name].value + other.recalls[direction][name].value) / 2
            assert estimate.value == pytest.approx(mean)
            assert estimate.low <= estimate.value <= estimate.high
    assert both.seeds == [0, 1]


@pytest.mark.slow
def test_overlap_with_training_warns(cache_path: Path, runs: list[Path]) -> None:
    report = evaluate_retrieval(cache_path, runs[:1])
    assert report.overlap is not None
    assert report.overlap.exact > 0  # a split by key of images whose captions repeat
    said = f"WARNING: seen in training: {report.overlap.exact} of "
    assert said in report.line()
    assert evaluate_retrieval(cache_path, runs[:1], RetrievalSettings(part="train")).overlap is None
    assert evaluate_retrieval(cache_path, runs[:1], RetrievalSettings(check_overlap=False)).overlap is None


@pytest.mark.slow
def test_json(cache_path: Path, runs: list[Path]) -> None:
    report = evaluate_retrieval(cache_path, runs)
    report_json = json.loads(json.dumps(retrieval_json(report, shuffled=report)))
    for values in (report_json, report_json["chance"], report_json["shuffled"]):
        for direction in ("i2t", "t2i"):
            for name in ("r@1", "r@5", "r@10"):
                low, high = values[direction]["intervals"][name]
                assert 0 <= low <= values[direction][name] <= high <= 1
    assert report_json["num_images"] == 75
    for direction in ("i2t", "t2i"):
        low, high = report_json["over_seeds"][direction]["intervals"]["r@10"]
        assert low < report_json[direction]["r@10"] < high


def test_sampled_queries_are_right_and_wrong(cache_path: Path, runs: list[Path]) -> None:
    ranking = rank(Cache(cache_path), load_runs(runs[:1])[0])
    for direction in ("i2t", "t2i"):
        examples = query_examples(ranking, direction, page_item, page_item)
        assert [example.is_correct for example in examples] == [True] * 5 + [False] * 5
        for example in examples:
            assert len(example.results) == 5
            assert example.results[0].is_correct == example.is_correct
            assert (example.answer is None) == any(result.is_correct for result in example.results)
        assert query_examples(ranking, direction, page_item, page_item) == examples


def page_item(position: int, *, is_correct: bool = False) -> PageItem:
    return PageItem(text=str(position), is_correct=is_correct)


def test_control_does_not_take_the_name_of_a_run(runs: list[Path], tmp_path: Path) -> None:
    run, control = (
        Path(shutil.copytree(path, tmp_path / name)) for path, name in zip(runs, ("shuffled pairs", "c"), strict=True)
    )
    edit_record(control / "run.json", {'"shuffle_pairs": false': '"shuffle_pairs": true'})
    assert [recipe.name for recipe in iterate_recipes(run, control)] == ["shuffled pairs", "shuffled pairs, c"]
    assert [recipe.name for recipe in iterate_recipes(runs[0], control)] == ["seed", "shuffled pairs"]


def test_controls_are_checked_before_anything_is_measured(cache_path: Path, runs: list[Path]) -> None:
    progress = RecordedProgress()
    with pytest.raises(SettingError, match="seed-1"):
        compare_retrieval(cache_path, runs[:1], control_run=runs[1:2], progress=progress)
    assert progress.started == []


@pytest.mark.slow
def test_run_of_another_encoder_is_refused(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "s", 60))
    for name, scale in (("a", 1), ("b", 2)):
        extract(source, tmp_path / name, image_encoder=[f"{IMAGE},scale={scale}"], text_encoder=[TEXT])
    run = train_run(tmp_path / "a", tmp_path / "run")
    with pytest.raises(FingerprintError, match="weights"):
        evaluate_retrieval(tmp_path / "b", [run])


def test_wrong_requests_raise(cache_path: Path, runs: list[Path], tmp_path: Path) -> None:
    other = train_run(cache_path, tmp_path / "other", seed=5, shared_width=8)
    swapped = Path(shutil.copytree(runs[0], tmp_path / "swapped"))
    shutil.copy(runs[1] / "split.parquet", swapped)
    wrong: list[tuple[list[Path], dict[str, Any], type[EmbedcacheError], str]] = [
        ([], {}, SettingError, "run"),
        (runs, {"language": ("de", "fr")}, SettingError, "de, fr"),
        (runs, {"language": ("de", "fr", "de")}, SettingError, "once"),
        ([*runs, other], {}, FingerprintError, "average only seeds of one recipe"),
        ([swapped], {}, CorruptError, "split.parquet"),
        (runs, {"is_control": True}, SettingError, "seed-0"),
    ]
    for paths, options, error, word in wrong:
        with pytest.raises(error, match=word):
            evaluate_retrieval(cache_path, paths, **options)


@pytest.mark.slow
def test_seeds_with_given_splits_are_averaged(cache_path: Path, runs: list[Path], tmp_path: Path) -> None:
    paths = [
        train_run(cache_path, tmp_path / f"seed-{seed}", seed=seed, split=str(run / "split.parquet"))
        for seed, run in enumerate(runs)
    ]
    both = evaluate_retrieval(cache_path, paths)
    assert both.seeds == [0, 1]
    assert both.recalls == evaluate_retrieval(cache_path, runs).recalls
    with pytest.raises(FingerprintError, match="average only seeds of one recipe"):
        evaluate_retrieval(cache_path, [paths[0], runs[1]])


@pytest.mark.slow
def test_recipes_are_named_and_compared(cache_path: Path, runs: list[Path], tmp_path: Path) -> None:
    other = train_run(cache_path, tmp_path / "seed-0", shared_width=8)
    assert group_by_recipe([runs[0], other, runs[1]]) == {
        f"{runs[0]}, {runs[1]}": runs,
        str(other): [other],
    }
    joined = [Path(shutil.copytree(run, tmp_path / f"r{seed}")) for seed, run in enumerate(runs)]
    assert list(group_by_recipe(joined)) == ["r0, r1"]
    renamed = Path(shutil.copytree(other, tmp_path / "narrow-0"))
    assert group_by_recipe([runs[0], renamed, runs[1]]) == {"seed": runs, "narrow": [renamed]}
    settings = RetrievalSettings(check_overlap=False)
    reports = compare_retrieval(cache_path, [runs[0], renamed, runs[1]], settings)
    assert list(reports) == ["seed", "narrow"]
    assert reports["seed"].run_paths == runs
    assert reports["seed"].recalls == evaluate_retrieval(cache_path, runs, settings).recalls


def test_runs_of_one_recipe_and_one_seed_are_compared(runs: list[Path], tmp_path: Path) -> None:
    again = Path(shutil.copytree(runs[0], tmp_path / "seed-2"))
    edit_record(again / "run.json", {'"device": "cpu"': '"device": "cuda"'})  # which is no part of a recipe
    assert group_by_recipe([*runs, again]) == {"seed-0": [runs[0]], "seed-1": [runs[1]], "seed-2": [again]}
    assert list(group_by_recipe([runs[0], Path(shutil.copytree(again, tmp_path / "b"))])) == ["seed", "b"]
    same_name = Path(shutil.copytree(again, tmp_path / "other/seed-0"))
    assert list(group_by_recipe([runs[0], same_name])) == [str(runs[0]), str(same_name)]
    with pytest.raises(SettingError, match="once"):
        group_by_recipe([*runs, runs[0]])
    with pytest.raises(SettingError, match="different seeds"):
        load_runs([runs[0], again])


def test_intervals_are_over_near_duplicate_groups(cache_path: Path, runs: list[Path]) -> None:
    ranking = rank(Cache(cache_path), load_runs(runs[:1])[0])
    one_group = replace(ranking, groups=np.zeros_like(ranking.groups))
    recalls, of_one_group = (_recalls([each], "i2t") for each in (ranking, one_group))
    assert recalls["r@5"].high > recalls["r@5"].low
    assert of_one_group["r@5"].high == of_one_group["r@5"].low


@pytest.mark.slow
def test_large_parts_are_drawn_from(cache_path: Path, runs: list[Path]) -> None:
    report = evaluate_retrieval(cache_path, runs, RetrievalSettings(max_samples=20))
    assert report.num_items["image"] == [20, 20]
    assert "the run's split (key), 20 of 75 samples drawn at random (--max-samples 0 ranks all)" in report.line()
    exact = evaluate_retrieval(cache_path, runs, RetrievalSettings(max_samples=0))
    assert exact.recalls == evaluate_retrieval(cache_path, runs).recalls
    assert "drawn" not in exact.line()


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eighty images with a caption in one of two languages each; the second encodes all captions alike."""
    folder = write_images(tmp_path_factory.mktemp("s"), 80)
    rows = ["file_name,caption,sprache"]
    for number in range(80):
        text = (folder / f"{number:05d}.txt").read_text().strip()
        (folder / f"{number:05d}.txt").unlink()
        rows.append(f"{number:05d}.png,{text},en" if number % 2 else f"{number:05d}.png,ein Bild,de")
    (folder / "table.csv").write_text("\n".join(rows))
    settings = SourceSettings(language_column="sprache")
    path = folder.parent / "cache"
    extract(open_source(folder / "table.csv", settings=settings), path, image_encoder=[IMAGE], text_encoder=[TEXT])
    return path


@pytest.mark.slow
def test_run_of_a_language_is_evaluated_on_captions_of_any(
    multilingual: Path, cache_path: Path, tmp_path: Path
) -> None:
    run = train_run(multilingual, tmp_path / "run", language="en")
    with pytest.raises(UnknownNameError, match="language"):
        evaluate_retrieval(cache_path, [run])
    report = evaluate_retrieval(cache_path, [run], RetrievalSettings(language=("any",)))
    assert report.num_items["text"] == [300]
    assert report.language is None
    chosen, of_all = (
        evaluate_retrieval(multilingual, [run], RetrievalSettings(part="all", language=language))
        for language in ((), ("any",))
    )
    assert chosen.num_items["text"][0] == 40 < of_all.num_items["text"][0]
