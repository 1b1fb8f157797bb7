import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from embedcache.errors import DataError, SettingError, UnfinishedError, UnknownNameError
from embedcache.evaluate import probe
from embedcache.evaluate.classifiers import Classifier, Examples, Ridge, fit_ridge, join_examples
from embedcache.evaluate.encoder_pairs import evaluate_pairs
from embedcache.evaluate.labeled import read_labeled
from embedcache.evaluate.probe import (
    ProbeReport,
    _control,
    _ranks,
    draw_shots,
    evaluate_probe,
    shuffle_labels,
)
from embedcache.evaluate.settings import ProbeSettings
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.metrics.classification import rank_labels
from embedcache.metrics.intervals import bootstrap_mean, bootstrap_runs, interval_of, resample_runs
from embedcache.progress import NullProgress
from embedcache.reports.probe import control_name, few_shot_table, probe_json, probe_table, write_probe_page
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.conftest import FEATURES
from tests.images import COLORS
from tests.recorded import RecordedProgress
from tests.sources.files import write_tar
from tests.toy import IMAGE, TEXT

FEATURE = "open_toy/cls"
ColumnsOf = Callable[[int, str], dict[str, object]]


def color(number: int, caption: str) -> dict[str, object]:
    """Label an image with its color, and put every fourth into the test part."""
    return {"label": caption.split()[0], "split": "test" if number % 4 == 0 else "train"}


def write_colors(folder: Path, count: int) -> Path:
    """Write images of one color each, in random shades, with the color in the caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        name = str(rng.choice(list(COLORS)))
        pixels = np.array(COLORS[name]) + rng.normal(0, 40, 3) + rng.normal(0, 40, (16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(f"{name} thing {number}\n")
    return folder


def make_cache(folder: Path, columns_of: ColumnsOf, *, count: int = 120, copies: int = 0) -> Path:
    """Create a cache of images with the given columns; copies repeat the first images under other keys."""
    source = write_colors(folder / "source", count)
    for number in range(copies):
        for suffix in (".png", ".txt"):
            shutil.copy(source / f"{number:05d}{suffix}", source / f"copy-{number:05d}{suffix}")
    for number, path in enumerate(sorted(source.glob("*.txt"))):
        path.with_suffix(".json").write_text(json.dumps(columns_of(number, path.read_text().strip())))
    settings = ExtractSettings(features=FEATURES, chunk_size=32)
    extract(open_source(source), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"


@pytest.fixture(scope="module")
def labeled_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 240 images labeled with their color, 60 of them for test."""
    return make_cache(tmp_path_factory.mktemp("labeled"), color, count=240)


@pytest.fixture(scope="module")
def report(labeled_path: Path) -> ProbeReport:
    settings = ProbeSettings(feature=FEATURE, shots=(1, 4), draws=3, control=True)
    return evaluate_probe(labeled_path, settings)


def test_methods_beat_chance_and_controls_do_not(report: ProbeReport) -> None:
    assert [score.method for score in report.scores] == ["knn", "logistic", "ridge"]
    for score, control in zip(report.scores, report.controls, strict=True):
        assert score.accuracy.value > 0.65
        assert score.accuracy.low <= score.accuracy.value <= score.accuracy.high
        assert control.accuracy.low <= max(report.majority, report.uniform) + 0.05
        assert control.accuracy.value < 0.4 < score.accuracy.low
        assert np.mean(control.by_shuffle) == pytest.approx(control.accuracy.value)
        assert len(control.by_shuffle) == 3


def test_shuffled_labels_keep_test_and_counts(labeled_path: Path) -> None:
    data = read_labeled(Cache(labeled_path), ProbeSettings(feature=FEATURE))
    labels = shuffle_labels(data, seed=(0, 0))
    is_test = data.parts == "test"
    np.testing.assert_array_equal(labels[is_test], data.examples.labels[is_test])
    np.testing.assert_array_equal(np.sort(labels[~is_test]), np.sort(data.examples.labels[~is_test]))
    assert np.mean(labels[~is_test] == data.examples.labels[~is_test]) < 0.4
    assert (labels != shuffle_labels(data, seed=(0, 1))).any()


def test_control_interval_includes_chance(labeled_path: Path) -> None:
    """Check that the interval is over shuffles: a single shuffle gives whole classes one label, far from chance."""

    def fit_rough(train: Examples, val: Examples | None, num_classes: int) -> Classifier:
        return Classifier(Ridge(join_examples(train, val), num_classes).scores(0.1), {})

    data = read_labeled(Cache(labeled_path), ProbeSettings(feature=FEATURE))
    control = _control("rough", fit_rough, data, ProbeSettings(draws=30), NullProgress())
    shares = np.array(control.by_shuffle)
    assert shares.max() - shares.min() > 0.25
    assert control.accuracy.low <= 1 / 6 <= control.accuracy.high


def test_more_shots_are_better(report: ProbeReport) -> None:
    for score in report.scores:
        one, four = (one.accuracy.value for one in report.few_shots if one.method == score.method)
        assert one < four < score.accuracy.value + 0.05


def test_long_neighbors_are_announced(labeled_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.metrics.neighbors._SHORT_S", 0.0)
    settings = ProbeSettings(feature=FEATURE, classifiers=("ridge", "knn"), shots=(1, 4), draws=3, control=True)
    progress = RecordedProgress()
    evaluate_probe(labeled_path, settings, progress=progress)
    num_pairs = 60 * (4 * 180 + 3 * 5 * 6)  # test items times the examples of a fit: all, its 3 controls, 3 draws
    assert [note.partition(", about")[0] for note in progress.notes] == [
        f"nearest neighbors: {num_pairs:,} pairs of vectors"
    ]
    progress = RecordedProgress()
    evaluate_probe(labeled_path, ProbeSettings(feature=FEATURE, classifiers=("ridge",)), progress=progress)
    assert not progress.notes


def test_parts_follow_the_column_split(labeled_path: Path) -> None:
    cache = Cache(labeled_path)
    data = read_labeled(cache, ProbeSettings(feature=FEATURE))
    values = np.array(cache.samples["split"].to_pylist())[data.items.samples]
    np.testing.assert_array_equal(data.parts == "test", values == "test")
    assert {part: len(data.rows(part)) for part in ("train", "val", "test")} == {"train": 162, "val": 18, "test": 60}
    assert data.split_rule == "parts by column 'split', 10% of train for validation"
    np.testing.assert_array_equal(data.parts, read_labeled(cache, ProbeSettings(feature=FEATURE)).parts)
    assert (data.parts != read_labeled(cache, ProbeSettings(feature=FEATURE, seed=1)).parts).any()


def test_vectors_and_labels_match_rows(labeled_path: Path) -> None:
    cache = Cache(labeled_path)
    data = read_labeled(cache, ProbeSettings(feature=FEATURE))
    np.testing.assert_array_equal(data.examples.vectors, cache.feature("image", FEATURE).load().astype(np.float32))
    assert [data.names[label] for label in data.examples.labels] == cache.samples["label"].to_pylist()


def test_tokens_are_averaged(labeled_path: Path) -> None:
    data = read_labeled(Cache(labeled_path), ProbeSettings(modality="text", feature="open_toy/tokens"))
    tokens = Cache(labeled_path).feature("text", "open_toy/tokens").gather_tokens(np.array([7]))[0]
    np.testing.assert_allclose(data.examples.vectors[7], tokens.astype(np.float32).mean(axis=0), rtol=1e-6)
    report = evaluate_probe(
        labeled_path, ProbeSettings(modality="text", feature="open_toy/tokens", classifiers=("ridge",))
    )
    assert report.line().startswith("open_toy/tokens (mean of its tokens): 6 classes; 162 train, 18 val, 60 test texts")
    assert report.scores[0].accuracy.value > 0.9


def test_hash_split_keeps_copies_together(tmp_path: Path) -> None:
    path = make_cache(tmp_path, lambda number, caption: {"label": caption.split()[0]}, count=100, copies=60)
    data = read_labeled(Cache(path), ProbeSettings(feature=FEATURE))
    assert data.split_rule == "parts by a hash of the keys, 25% for test and 10% for validation"
    assert {part: len(data.rows(part)) for part in ("train", "val", "test")} == {"train": 104, "val": 16, "test": 40}
    for content in np.unique(data.items.contents):
        assert len(set(data.parts[data.items.contents == content].tolist())) == 1
    assert data.overlap() == 0


def test_copies_of_training_items_warn(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0], "split": "test" if number < 10 or number >= 80 else "train"}

    path = make_cache(tmp_path, columns_of, count=80, copies=20)  # ten copies of test items, ten of training items
    report = evaluate_probe(path, ProbeSettings(feature=FEATURE, classifiers=("ridge",)))
    assert report.warnings() == ["WARNING: 10 test images are copies of training or validation items"]
    assert probe_json(report, "x")["details"]["overlap"] == 10


def test_validation_part_is_used_or_tested(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0], "split": ["train", "train", "validation", "test", "extra"][number % 5]}

    cache = Cache(make_cache(tmp_path, columns_of, count=100))
    data = read_labeled(cache, ProbeSettings(feature=FEATURE))
    values = np.array(cache.samples["split"].to_pylist())[data.items.samples]
    assert set(zip(values.tolist(), data.parts.tolist(), strict=True)) == {
        ("train", "train"), ("validation", "val"), ("test", "test"),
    }  # fmt: skip
    assert (data.num_left_out, data.split_rule) == (20, "parts by column 'split'")
    held = read_labeled(cache, ProbeSettings(feature=FEATURE, part="val"))
    values = np.array(cache.samples["split"].to_pylist())[held.items.samples]
    assert set(zip(values.tolist(), held.parts.tolist(), strict=True)) == {
        ("train", "train"), ("train", "val"), ("validation", "test"),
    }  # fmt: skip
    assert "val is held out" in held.split_rule


def test_figures_match_scikit_learn(labeled_path: Path) -> None:
    report = evaluate_probe(labeled_path, ProbeSettings(feature=FEATURE, classifiers=("ridge",)))
    data, score = report.labeled, report.scores[0]
    train, val, test = (data.examples.take(data.rows(part)) for part in ("train", "val", "test"))
    scores = fit_ridge(train, val, len(data.names)).scores(test.vectors)
    best = scores.argmax(axis=1)
    assert score.accuracy.value == pytest.approx(accuracy_score(test.labels, best))
    assert score.top5 == pytest.approx(top_k_accuracy_score(test.labels, scores, k=5))
    assert score.mean_per_class.value == pytest.approx(balanced_accuracy_score(test.labels, best))
    np.testing.assert_allclose(score.recalls, recall_score(test.labels, best, average=None))


@given(seed=st.integers(0, 2**32 - 1), block=st.integers(1, 50))
def test_ranks_are_the_same_in_blocks(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 4, (40, 6)).astype(np.float32), rng.integers(0, 6, 40)
    fitted = Classifier(lambda rows: scores[rows[:, 0].astype(int)], {})
    test = Examples(vectors=np.arange(40, dtype=np.float32)[:, None], labels=labels)
    with patch.object(probe, "_BLOCK", block):
        np.testing.assert_array_equal(_ranks(fitted, test), rank_labels(scores, labels))


@given(seed=st.integers(0, 2**32 - 1), shots=st.integers(1, 4))
def test_shots_per_class_are_nested(seed: int, shots: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 3], [4, 7, 30]))
    rows = np.flatnonzero(np.arange(41) >= 0)
    drawn = draw_shots(labels, rows, shots, seed=(seed, 0))
    assert np.bincount(labels[drawn]).tolist() == [shots, shots, 0, shots]
    assert len(set(drawn.tolist())) == 3 * shots
    assert set(draw_shots(labels, rows, max(1, shots - 1), seed=(seed, 0)).tolist()) <= set(drawn.tolist())


def test_shots_come_from_given_rows() -> None:
    labels = np.arange(40) % 2
    rows = np.arange(10, 20)
    assert set(draw_shots(labels, rows, 3, seed=(0, 0)).tolist()) <= set(rows.tolist())


def test_intervals_over_runs_are_wider() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.2, 0.5, 0.8])[:, None]
    values = rng.random((3, 400)) < shares
    both = bootstrap_runs(values, np.arange(400))
    items = bootstrap_mean(values.mean(axis=0))
    assert both.value == pytest.approx(items.value)
    assert both.low < items.low < items.high < both.high
    same = bootstrap_runs(np.tile(values[1], (5, 1)), np.arange(400))
    alone = bootstrap_mean(values[1])
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    with pytest.raises(DataError, match="at least one value"):
        bootstrap_runs(np.empty((0, 0)), np.empty(0, np.int64))


def test_columns_are_compared_on_the_same_resamples() -> None:
    rng = np.random.default_rng(0)
    before = [rng.random(300) < 0.5, rng.random(200) < 0.6]  # each run has items of its own
    clusters = [np.arange(300) // 2, np.arange(100, 300)]
    after = [values | (rng.random(len(values)) < 0.1) for values in before]
    means = resample_runs([np.stack(pair, axis=1) for pair in zip(before, after, strict=True)], clusters)
    assert means.shape == (1001, 2)
    assert means[0] == pytest.approx([np.concatenate(before).mean(), np.concatenate(after).mean()])
    gain, alone = interval_of(means[:, 1] - means[:, 0]), interval_of(means[:, 0])
    assert 0 < gain.low < gain.value < gain.high < 0.1
    assert alone.high - alone.low > 2 * (gain.high - gain.low)
    crossings = np.where(means[:, 1] > means[0, 1], 3.0, np.inf)
    assert interval_of(crossings).high == np.inf
    assert interval_of(crossings).low == 3


def test_tables(report: ProbeReport) -> None:
    columns, rows = probe_table(report)
    assert [row[0] for row in rows] == [
        *("knn", "logistic", "ridge"),
        *map(control_name, report.controls),
        "the most frequent class",
        "a class at random",
    ]
    assert rows[-1][1] == "0.167"
    assert rows[1][4].startswith("C = ")
    assert all(len(row) == len(columns) for row in rows)
    columns, rows = few_shot_table(report)
    assert columns == ["top-1 [95%]", "1 per class", "4 per class"]
    assert all(len(row) == 3 for row in rows)


def test_json_has_the_fields_of_clip_benchmark(report: ProbeReport) -> None:
    report_json = json.loads(json.dumps(probe_json(report, "images"), allow_nan=False))
    assert set(report_json) == {"dataset", "model", "pretrained", "task", "metrics", "language", "details"}
    assert (report_json["dataset"], report_json["task"]) == ("images", "linear_probe")
    assert {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "knn_acc1", "ridge_acc1"} <= set(report_json["metrics"])
    assert report_json["metrics"]["lp_acc1"] == round(report.scores[1].accuracy.value, 5)
    details = report_json["details"]
    assert details["num_items"] == {"train": 162, "val": 18, "test": 60}
    assert set(details["few_shot"]["ridge"]) == {"1", "4"}
    assert set(details["methods"]["knn"]["recall"]) == set(report.labeled.names)
    alone = replace(report, scores=report.scores[:1])
    assert probe_json(alone, "x")["task"] == "knn"


def test_page_is_self_contained(report: ProbeReport, tmp_path: Path) -> None:
    write_probe_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    for words in (
        "How well open_toy/cls predicts &#39;label&#39;",
        "labels shuffled",
        "Few items per class",
        "yellow",
    ):
        assert words in page
    assert page.count("<svg") == 3
    assert "src=" not in page
    assert "<link" not in page
    write_probe_page(tmp_path / "short.html", replace(report, few_shots=[], controls=[]))
    assert "Few items per class" not in (tmp_path / "short.html").read_text()


def probing(path: Path, **settings: object) -> Callable[[], object]:
    return lambda: evaluate_probe(path, ProbeSettings(feature=FEATURE, classifiers=("ridge",), **settings))  # type: ignore[arg-type]


def test_missing_device_raises(labeled_path: Path) -> None:
    with pytest.raises(SettingError, match="device 'cuda:9' is not available"):
        evaluate_probe(labeled_path, feature=FEATURE, device="cuda:9")
    with pytest.raises(SettingError, match="device 'cuda:9' is not available"):
        evaluate_pairs(labeled_path, split="key", device="cuda:9")


def test_unknown_names_raise(labeled_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="open_toy/cls, open_toy/patches"):
        evaluate_probe(labeled_path)
    with pytest.raises(UnknownNameError, match="did you mean 'ridge'"):
        evaluate_probe(labeled_path, ProbeSettings(feature=FEATURE, classifiers=("rigde",)))
    with pytest.raises(UnknownNameError, match="did you mean 'open_toy/cls'"):
        evaluate_probe(labeled_path, ProbeSettings(feature="open_toy/csl"))
    with pytest.raises(UnknownNameError, match="'labels'; did you mean 'label'"):
        probing(labeled_path, label="labels")()
    with pytest.raises(SettingError, match=r"shots: expected at most \d+, the training items of class .*, got 1,000"):
        probing(labeled_path, shots=(1, 1000))()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": (0, 2)}, "shots: expected whole numbers above 0, got 0, 2"),
        ({"draws": 0}, "draws: expected a whole number of at least 1, got 0"),
        ({"classifiers": ()}, "classifier: expected at least one classifier such as knn, got none"),
        ({"seed": -1}, "seed: expected a whole number of at least 0"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ProbeSettings(**settings)


BAD = {
    "one class": (
        lambda n, c: {**color(n, c), "label": "red"},
        DataError,
        "expected at least two classes among the training items, got only 'red'",
    ),
    "no label": (
        lambda n, c: {"label": None, "color": 1.5},
        DataError,
        "column 'label' of .*: expected labels, got none for 40 items",
    ),
    "no column": (lambda n, c: {"color": "red"}, UnknownNameError, "known: color"),
    "empty part": (
        lambda n, c: {**color(n, c), "split": "test" if n else "train"},
        DataError,
        r"expected val items with open_toy/cls, got none \(train: 1, val: 0, test: 39; parts by column",
    ),
    "no test": (
        lambda n, c: {**color(n, c), "split": "val" if n % 3 else "train"},
        DataError,
        "expected train and test among its values, got train, val; use another part: --part val",
    ),
    "no part at all": (
        lambda n, c: {**color(n, c), "split": f"fold {n % 2}"},
        DataError,
        "expected train and test among its values, got fold 0, fold 1$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_data_raise(tmp_path: Path, case: str) -> None:
    columns_of, error, message = BAD[case]
    path = make_cache(tmp_path, columns_of, count=40)
    with pytest.raises(error, match=message):
        probing(path)()


def test_val_part_needs_a_column(tmp_path: Path) -> None:
    path = make_cache(tmp_path, lambda number, caption: {"label": caption.split()[0]}, count=40)
    with pytest.raises(DataError, match="part: expected test, .* no column 'split', got val"):
        probing(path, part="val")()


def test_unfinished_feature_is_refused(labeled_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(labeled_path, tmp_path / "cache")
    (path / "image" / "open_toy" / "chunks" / "00003.parquet").unlink()
    with pytest.raises(UnfinishedError, match="1 of 8 chunks are missing"):
        probing(path)()


def test_untrained_classes_warn(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0], "split": "test" if number % 4 == 0 or "red" in caption else "train"}

    report = evaluate_probe(make_cache(tmp_path, columns_of), ProbeSettings(feature=FEATURE, classifiers=("knn",)))
    assert report.warnings() == ["WARNING: 1 classes have test items and no training items: 'red'"]
    assert report.scores[0].recalls[report.labeled.names.index("red")] == 0


def test_unlabeled_items_are_counted(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0] if number % 3 else None}

    report = evaluate_probe(make_cache(tmp_path, columns_of), ProbeSettings(feature=FEATURE, classifiers=("ridge",)))
    assert report.counts == {"train": 52, "val": 8, "test": 20}
    assert report.line().endswith("; 40 without a label left out")
    assert probe_json(report, "x")["details"]["num_unlabelled"] == 40


def test_failed_items_are_counted(tmp_path: Path) -> None:
    source = write_colors(tmp_path / "source", 60)
    for number, path in enumerate(sorted(source.glob("*.txt"))):
        path.with_suffix(".json").write_text(json.dumps(color(number, path.read_text().strip())))
    (source / "00007.png").write_bytes(b"not an image")
    extract(open_source(source), tmp_path / "cache", image_encoder=[IMAGE])
    data = read_labeled(Cache(tmp_path / "cache"), ProbeSettings(feature=FEATURE))
    assert data.num_left_out == 1
    assert 7 not in data.items.rows


def test_labeled_tars(tmp_path: Path) -> None:
    source = write_colors(tmp_path / "source", 120)
    captions = [path.read_text().split()[0] for path in sorted(source.glob("*.txt"))]
    for split, numbers in (("train", range(90)), ("test", range(90, 120))):
        (tmp_path / "tars" / split).mkdir(parents=True)
        members = [
            (f"s{row:07d}{suffix}", content)
            for row, number in enumerate(numbers)
            for suffix, content in (
                (".cls", str(list(COLORS).index(captions[number]))),
                (".png", (source / f"{number:05d}.png").read_bytes()),
            )
        ]
        write_tar(tmp_path / "tars" / split / "0.tar", members)
    extract(open_source(tmp_path / "tars"), tmp_path / "cache", image_encoder=[IMAGE])
    report = evaluate_probe(tmp_path / "cache", ProbeSettings(feature="open_toy", classifiers=("knn",)))
    assert report.counts == {"train": 81, "val": 9, "test": 30}
    assert report.labeled.names == list("012345")
    assert report.scores[0].accuracy.value > 0.5
