import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from embedcache.errors import SettingError, UnknownNameError
from embedcache.evaluate.classifiers import Classifier, Examples, Ridge, fit_ridge, join_examples
from embedcache.evaluate.probe import (
    ProbeReport,
    _control,
    draw_shots,
    evaluate_probe,
    read_labeled,
    shuffle_labels,
)
from embedcache.evaluate.settings import ProbeSettings
from embedcache.progress import NullProgress
from embedcache.reports.probe import present_probe, probe_json
from embedcache.store.cache import Cache
from tests.evaluate.conftest import FEATURE, make_cache
from tests.reports.contract import check_report


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
        one, four = (each.accuracy.value for each in report.few_shots if each.method == score.method)
        assert one < four < score.accuracy.value + 0.05


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


def test_tokens_are_averaged(labeled_path: Path) -> None:
    data = read_labeled(Cache(labeled_path), ProbeSettings(modality="text", feature="open_toy/tokens"))
    tokens = Cache(labeled_path).feature("text", "open_toy/tokens").gather_tokens(np.array([7]))[0]
    np.testing.assert_allclose(data.examples.vectors[7], tokens.astype(np.float32).mean(axis=0), rtol=1e-6)
    report = evaluate_probe(
        labeled_path, ProbeSettings(modality="text", feature="open_toy/tokens", classifiers=("ridge",))
    )
    assert report.line().startswith("open_toy/tokens (mean of its tokens): 6 classes; 162 train, 18 val, 60 test texts")
    assert report.scores[0].accuracy.value > 0.9


@pytest.mark.slow
def test_copies_of_training_items_warn(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0], "split": "test" if number < 10 or number >= 80 else "train"}

    path = make_cache(tmp_path, columns_of, count=80, copies=20)  # ten copies of test items, ten of training items
    report = evaluate_probe(path, ProbeSettings(feature=FEATURE, classifiers=("ridge",)))
    assert report.overlap is not None
    assert (report.overlap.exact, report.overlap.num_samples) == (10, 30)
    assert report.warnings() == [report.overlap.line()]
    assert probe_json(report, "x")["details"]["overlap"]["exact"] == 10


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


@given(seed=st.integers(0, 2**32 - 1), shots=st.integers(1, 4))
def test_shots_per_class_are_nested(seed: int, shots: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 3], [4, 7, 30]))
    rows = np.flatnonzero(np.arange(41) >= 0)
    assert set(draw_shots(np.arange(40) % 2, np.arange(10, 20), 3, seed=(0, 0)).tolist()) <= set(range(10, 20))
    drawn = draw_shots(labels, rows, shots, seed=(seed, 0))
    assert np.bincount(labels[drawn]).tolist() == [shots, shots, 0, shots]
    assert len(set(drawn.tolist())) == 3 * shots
    assert set(draw_shots(labels, rows, max(1, shots - 1), seed=(seed, 0)).tolist()) <= set(drawn.tolist())


def test_json_has_the_fields_of_clip_benchmark(report: ProbeReport) -> None:
    report_json = json.loads(json.dumps(probe_json(report, "images"), allow_nan=False))
    assert set(report_json) == {"dataset", "model", "pretrained", "task", "metrics", "language", "details"}
    assert (report_json["dataset"], report_json["task"]) == ("images", "linear_probe")
    assert {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "knn_acc1", "ridge_acc1"} <= set(report_json["metrics"])
    assert report_json["metrics"]["lp_acc1"] == round(report.scores[1].accuracy.value, 5)
    details = report_json["details"]
    assert details["num_items"] == {"train": 162, "val": 18, "test": 60}
    assert details["chance"]["uniform_acc1"] == round(1 / len(report.labeled.names), 5)
    assert set(details["few_shot"]["ridge"]) == {"1", "4"}
    assert set(details["methods"]["knn"]["recall"]) == set(report.labeled.names)
    alone = replace(report, scores=report.scores[:1])
    assert probe_json(alone, "x")["task"] == "knn"


@pytest.mark.slow
def test_report_is_presented(report: ProbeReport) -> None:
    assert check_report(present_probe(report, "images")).count("<svg") == 3
    check_report(present_probe(replace(report, few_shots=[], controls=[]), "images"))


def test_invalid_settings_raise(labeled_path: Path) -> None:
    for options, error, word in (
        ({"feature": None}, UnknownNameError, "patches"),
        ({"feature": "open_toy/csl"}, UnknownNameError, "csl"),
        ({"classifier": ("rigde",)}, UnknownNameError, "rigde"),
        ({"label": "labels"}, UnknownNameError, "labels"),
        ({"classifier": ()}, SettingError, "classifier"),
        ({"shots": (0, 2)}, SettingError, "shots"),
        ({"shots": (1, 1000)}, SettingError, "1,000"),
        ({"device": "cuda:9"}, SettingError, "cuda:9"),
    ):
        with pytest.raises(error, match=word):
            evaluate_probe(labeled_path, **{"feature": FEATURE, "classifier": ("ridge",), **options})


@pytest.mark.slow
def test_untrained_classes_warn(tmp_path: Path) -> None:
    def columns_of(number: int, caption: str) -> dict[str, object]:
        return {"label": caption.split()[0], "split": "test" if number % 4 == 0 or "red" in caption else "train"}

    settings = ProbeSettings(feature=FEATURE, classifiers=("knn",), check_overlap=False)
    report = evaluate_probe(make_cache(tmp_path, columns_of), settings)
    assert report.warnings() == ["1 class has test items and no training items: 'red'"]
    assert report.scores[0].recalls[report.labeled.names.index("red")] == 0
