import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import Inputs, normalize
from embedcache.errors import DataError, EmbedcacheError, FingerprintError, UnknownNameError
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import ZeroShotSettings
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.projectors.base import project
from embedcache.reports.zero_shot import confusion_table, present_zero_shot, zero_shot_json
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import COLORS, PLACES, write_images
from tests.recorded import RecordedProgress
from tests.reports.contract import check_report
from tests.toy import IMAGE, TEXT

COLOR_NAMES = sorted(COLORS)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a hundred images that no run saw, in one folder per background."""
    folder = tmp_path_factory.mktemp("labeled")
    image_folder = write_images(folder / "all", 100, seed=5)
    for path in sorted(image_folder.glob("*.png")):
        back = path.with_suffix(".txt").read_text().split()[-1]
        (folder / "sorted" / back).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "sorted" / back)
    return cached(folder / "sorted", folder / "cache")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with all captions that name a background as its prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    return prompt_cache(folder, COLOR_NAMES)


def cached(source: object, cache: Path, *, text: str | None = None) -> Path:
    extract(open_source(str(source)), cache, image_encoder=[] if text else [IMAGE], text_encoder=[text] if text else [])
    return cache


def prompt_cache(folder: Path, names: list[str], text: str = TEXT) -> Path:
    (folder / "names.txt").write_text("\n".join(names))
    fronts = [f"{front} bar {place} on {{c}}" for front in COLORS for place in PLACES]
    (folder / "templates.txt").write_text("\n".join(fronts))
    return cached(f"prompts:{folder / 'names.txt'}+{folder / 'templates.txt'}", folder / "prompts", text=text)


def test_accuracy_matches_counting_by_hand(labeled: Path, prompts: Path, runs: list[Path]) -> None:
    report, run, cache = evaluate_zero_shot(labeled, runs[:1], prompts), load_runs(runs[:1])[0], Cache(labeled)
    words = Cache(prompts).items("text")["text"].to_pylist()
    texts = project(run.pair.tower("text"), Inputs(Cache(prompts).feature("text").gather(np.arange(len(words)))))
    means = np.stack(
        [texts[[word.endswith(f" {name}") for word in words]].mean(axis=0) for name in COLOR_NAMES],
    )
    images = project(run.pair.tower("image"), Inputs(cache.feature("image").gather(np.arange(100))))
    scores = images @ normalize(means).T
    truth = np.array([COLOR_NAMES.index(label) for label in cache.samples["label"].to_pylist()])
    right = scores.argmax(axis=1) == truth
    assert report.accuracies["acc1"].value == pytest.approx(right.mean())
    assert report.accuracies["acc1"].value > 2 * report.chance["acc1"].value
    chances = {name: estimate.value for name, estimate in report.chance.items()}
    assert chances == {"acc1": 1 / len(COLORS), "acc5": 5 / len(COLORS), "mean_per_class_recall": 1 / len(COLORS)}
    recalls = [right[truth == number].mean() for number in range(len(COLOR_NAMES))]
    assert report.accuracies["mean_per_class_recall"].value == pytest.approx(np.mean(recalls))
    assert report.by_class == pytest.approx(recalls)
    in_top = [truth[row] in np.argsort(-scores[row])[:5] for row in range(100)]
    assert report.accuracies["acc5"].value == pytest.approx(np.mean(in_top))
    assert report.num_prompts == (24, 24)
    assert report.part == "all samples"


def test_items_of_classes_with_equal_prompts_are_in_no_table_as_right(
    labeled: Path, runs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "p.json").write_text(json.dumps({name: ["red bar left on blue"] for name in COLOR_NAMES}))
    report = evaluate_zero_shot(labeled, runs[0], cached(f"prompts:{tmp_path / 'p.json'}", tmp_path / "p", text=TEXT))
    assert (report.accuracies["acc1"].value, np.trace(report.confusion), report.confusion.sum()) == (0, 0, 100)


def test_classes_may_be_the_names_of_a_file(labeled: Path, runs: list[Path], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(COLOR_NAMES))
    report = evaluate_zero_shot(labeled, runs[0], names)
    expected = evaluate_zero_shot(labeled, runs[0], cached(f"prompts:{names}", tmp_path / "prompts", text=TEXT))
    assert (report.accuracies, report.num_prompts) == (expected.accuracies, (2, 2))


@pytest.mark.slow
def test_seeds_are_averaged(labeled: Path, prompts: Path, runs: list[Path]) -> None:
    one, other = (evaluate_zero_shot(labeled, paths, prompts) for paths in (runs[:1], runs[1:]))
    progress = RecordedProgress()
    both = evaluate_zero_shot(labeled, runs, prompts, progress=progress)
    assert both.accuracies["acc1"].value == pytest.approx(np.mean([*one.by_seed, *other.by_seed]))
    assert np.array_equal(both.confusion, one.confusion + other.confusion)
    assert both.confusion.sum() == 200
    steps = [("classifying", 100, "images"), ("comparing with 195 images", 195, "images")]
    assert progress.started == steps * 2
    assert progress.counts == {what: 2 * total for what, total, _ in steps}
    assert both.by_seed == [*one.by_seed, *other.by_seed]


def test_labels_may_be_numbers_or_missing(prompts: Path, runs: list[Path], tmp_path: Path) -> None:
    write_images(tmp_path / "s", 12, seed=3)
    rows = ["file_name,caption,label"]
    for number in range(12):
        caption = (tmp_path / "s" / f"{number:05d}.txt").read_text().strip()
        label = "" if number == 0 else COLOR_NAMES.index(caption.split()[-1])
        rows.append(f"{number:05d}.png,{caption},{label}")
    (tmp_path / "s" / "table.csv").write_text("\n".join(rows))
    cache = cached(tmp_path / "s" / "table.csv", tmp_path / "cache")
    report = evaluate_zero_shot(cache, runs[:1], prompts)
    assert (report.num_items, report.num_unlabeled) == (11, 1)
    assert "(1 without a label left out)" in report.line()


@pytest.mark.slow
def test_json_and_page(labeled: Path, prompts: Path, runs: list[Path]) -> None:
    report = evaluate_zero_shot(labeled, runs, prompts)
    report_json = zero_shot_json(report)
    below, above = report_json["over_seeds"]["intervals"]["acc1"]
    assert below <= report_json["intervals"]["acc1"][0] <= report_json["intervals"]["acc1"][1] <= above
    low, high = report_json["intervals"]["acc1"]
    assert low <= report_json["acc1"] <= high
    assert set(report_json["by_class"]) == set(COLOR_NAMES)
    wrong = report.confusion.copy()
    np.fill_diagonal(wrong, 0)
    assert int(confusion_table(report)[1][0][2]) == wrong.max()
    page = check_report(present_zero_shot({"run": report}, labeled, ZeroShotSettings()))
    assert page.count("<svg") == 3
    assert "first correct result at rank" in page


def test_unusable_prompts_or_labels_raise(
    labeled: Path, prompts: Path, cache_path: Path, runs: list[Path], tmp_path: Path
) -> None:
    for name in ("few", "other"):
        (tmp_path / name).mkdir()
    few, other = prompt_cache(tmp_path / "few", COLOR_NAMES[:5]), f"{TEXT},scale=2"
    wrong: list[tuple[Path, dict[str, str], type[EmbedcacheError], str]] = [
        (cache_path, {}, DataError, "prompts"),
        (prompts, {"label": "labl"}, UnknownNameError, "labl"),
        (few, {}, DataError, "yellow"),
        (prompt_cache(tmp_path / "other", COLOR_NAMES, other), {}, FingerprintError, "encoder"),
    ]
    for path, options, error, word in wrong:
        with pytest.raises(error, match=word):
            evaluate_zero_shot(labeled, runs[:1], path, **options)
