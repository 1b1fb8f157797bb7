"""Typicality, likely mislabels and pairs that do not match, against planted ones and against all pairs."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedcache.arrays import normalize
from embedcache.curate import outliers
from embedcache.curate.outliers import MARGIN, PAIR_COSINE, TYPICALITY, compare_labels, find_outliers
from embedcache.curate.select.select import select
from embedcache.curate.settings import OutlierSettings, SelectSettings
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, PathError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.neighbors.knn import knn
from embedcache.reports.scores import threshold_table
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.vectors.opening import open_vectors
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT
from tests.vectors.cases import import_files, write_tree

NUM = 240
NOISE, COPY, FAILED, SWAPPED, RELABELED = (11, 47, 90), {60: 11}, 75, {20: 33, 33: 20}, (40, 105)
UNLABELED = 150


def test_labels_of_neighbors() -> None:
    own = np.array([0, 0, 0, -1, 0])
    near = np.array([[0, 0, 1, 0], [1, 2, 2, 1], [2, 2, 2, -1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    suggested, margins = compare_labels(own, near)
    assert suggested.tolist() == [1, 1, 2, 1, -1]  # of two equally frequent ones that of the nearest
    np.testing.assert_array_equal(margins, np.array([0.5, -0.5, -1, np.nan, np.nan], np.float32))
    suggested, margins = compare_labels(np.array([0, 1]), np.array([[0, 0, -1], [0, -1, 1]]))
    assert (suggested.tolist(), margins.tolist()) == ([-1, 0], [1, 0])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of images labeled by their two colors, with noise, a copy of it, wrong labels and swapped captions."""
    folder = tmp_path_factory.mktemp("planted")
    source = write_images(folder / "source", NUM)
    rng = np.random.default_rng(0)
    for number in NOISE:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.NEAREST).save(source / f"{number:05d}.png")
    for copy, original in COPY.items():
        shutil.copy(source / f"{original:05d}.png", source / f"{copy:05d}.png")
    (source / f"{FAILED:05d}.png").write_bytes(b"not an image")
    captions = [(source / f"{number:05d}.txt").read_text() for number in range(NUM)]
    for number, other in SWAPPED.items():
        (source / f"{number:05d}.txt").write_text(captions[other])
    for number, caption in enumerate(captions):
        if number == UNLABELED:
            continue
        label = "green and white" if number in RELABELED else colors_of(caption)
        (source / f"{number:05d}.json").write_text(json.dumps({"label": label}))
    extract(
        open_source(source),
        folder / "cache",
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        settings=ExtractSettings(chunk_size=32),
    )
    return folder / "cache"


def test_planted_outliers_and_labels(planted: Path, tmp_path: Path) -> None:
    odd, out = tmp_path / "odd.parquet", tmp_path / "kept.parquet"
    report = find_outliers(planted, odd, OutlierSettings(k=3))
    assert set(report.lowest(TYPICALITY, 4).tolist()) == {*NOISE, *COPY}
    assert np.isnan(report.scores[TYPICALITY][FAILED])
    assert report.is_mislabeled[list(RELABELED)].all()
    assert set(RELABELED) <= set(report.lowest(MARGIN, 12).tolist())
    assert report.is_mislabeled.mean() < 0.1  # some pairs of colors are rare, and noise has no color
    assert PAIR_COSINE not in report.scores

    table = pq.read_table(odd).to_pylist()
    captions = [(planted.parent / "source" / f"{row:05d}.txt").read_text() for row in RELABELED]
    assert [table[row]["suggested_label"] for row in RELABELED] == [colors_of(caption) for caption in captions]
    assert table[FAILED]["typicality"] is None

    limit = float(report.scores[TYPICALITY][report.lowest(TYPICALITY, 5)[-1]])
    select(planted, out, f"score:at_least={limit!r}", SelectSettings(scores=odd, score=TYPICALITY))
    left = set(range(NUM)) - set(read_selection(out, [Cache(planted)]).tolist())
    assert left == {*NOISE, *COPY, FAILED}
    for _, count, *limits in threshold_table(report)[1]:
        for limit, scores in zip(limits, report.scores.values(), strict=True):
            assert int((scores < np.float32(limit)).sum()) <= int(count)
    again = find_outliers(planted, tmp_path / "again.parquet", k=3, label_neighbors=1)
    assert again.scores[TYPICALITY].tobytes() == report.scores[TYPICALITY].tobytes()
    assert set(again.scores[MARGIN][np.isfinite(again.scores[MARGIN])].tolist()) == {-1, 1}


def test_column_label_that_holds_no_classes_is_left_out_with_a_note(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 12)
    for number in range(12):
        (source / f"{number:05d}.json").write_text(json.dumps({"label": number + 0.5}))
    extract(open_source(source), tmp_path / "cache", image_encoder=[IMAGE])
    progress = RecordedProgress()
    assert find_outliers(tmp_path / "cache", settings=OutlierSettings(k=3), progress=progress).labels is None
    assert progress.notes[0].startswith("labels are not compared: column 'label' of ")
    with pytest.raises(DataError, match="class"):
        find_outliers(tmp_path / "cache", settings=OutlierSettings(k=3, label="label"))


def test_labels_are_compared_with_those_of_the_nearest(planted: Path, tmp_path: Path) -> None:
    """Check the margin and the suggestion of each sample against counted labels."""
    report = find_outliers(planted, tmp_path / "odd.parquet", OutlierSettings(k=5, label_neighbors=3))
    labels = Cache(planted).column("label").to_pylist()
    margins, suggested = np.full(NUM, np.nan), [None] * NUM
    for row in set(range(NUM)) - {FAILED}:
        near = [labels[other] for other in report.neighbors_of(row)[:3] if labels[other] is not None]
        others = Counter(label for label in near if label != labels[row])  # most_common keeps the order of equal ones
        suggested[row], most = others.most_common(1)[0] if others else (None, 0)
        if row != UNLABELED:
            margins[row] = (near.count(labels[row]) - most) / len(near)
    np.testing.assert_allclose(report.scores[MARGIN], margins, atol=1e-6)
    assert report.labels is not None
    assert (report.labels.numbers[UNLABELED], report.suggested_S[FAILED]) == (-1, -1)
    table = pq.read_table(tmp_path / "odd.parquet").to_pydict()
    assert table["suggested_label"] == suggested
    record = json.loads(pq.read_schema(tmp_path / "odd.parquet").metadata[b"embedcache"])
    assert report.to_json().items() <= record.items()
    expected_rows = np.where(np.arange(NUM) == FAILED, -1, np.arange(NUM))
    assert report.rows_S.tolist() == expected_rows.tolist()
    counts = {"k": 5, "label_neighbors": 3, "num_samples": NUM, "num_items": NUM - 1, "num_contents": NUM - 2}
    assert counts.items() <= record.items()
    assert record["num_likely_mislabels"] == (np.nan_to_num(margins) < -0.5).sum()


def test_typicality_is_the_mean_cosine_to_the_nearest_others(planted: Path) -> None:
    report = find_outliers(planted, k=3)
    copy, original = next(iter(COPY.items()))
    rows = np.setdiff1d(np.arange(NUM), [FAILED, copy])
    values = normalize(Cache(planted).feature("image").gather(rows))
    others, cosines = knn(values, values, 3, own=np.arange(len(rows)))
    np.testing.assert_allclose(report.scores[TYPICALITY][rows], cosines.mean(axis=1), atol=1e-5)
    assert [report.neighbors_of(row).tolist() for row in rows[:20].tolist()] == rows[others[:20]].tolist()
    assert report.neighbors_of(copy).tolist() == report.neighbors_of(original).tolist()
    known = np.sort(report.scores[TYPICALITY][np.isfinite(report.scores[TYPICALITY])])
    assert report.scores[TYPICALITY][report.lowest(TYPICALITY, 1000)].tolist() == known.tolist()
    for name, value in report.to_json()["quantiles"][TYPICALITY].items():
        assert value == pytest.approx(np.quantile(known, float(name)), abs=1e-6)


@pytest.mark.parametrize("labels", [["a", None, "b", "a"], [None, "a", "b", "a"]])
def test_a_copy_without_a_label_does_not_hide_that_of_the_other(labels: list[str | None], tmp_path: Path) -> None:
    vectors = np.array([[1, 0.1], [1, 0.1], [1, 0.2], [0, 1]], np.float16)
    cache, _ = import_files(
        open_vectors("clip-retrieval", write_tree(tmp_path / "tree", vectors, label=labels)), tmp_path / "c"
    )
    report = find_outliers(cache, tmp_path / "odd.parquet", k=1)
    assert report.scores[MARGIN][2:].tolist() == [-1, -1]
    assert pq.read_table(tmp_path / "odd.parquet")["suggested_label"].to_pylist()[2:] == ["a", "b"]


def test_typicality_is_the_mean_of_compared_neighbors(planted: Path) -> None:
    """Check items of which all, one or none of the nearest were compared, as happens within clusters."""
    report = find_outliers(planted, k=3)
    items, cosines = report.neighbors.items.copy(), report.neighbors.cosines.copy()
    expected = cosines.mean(axis=1)
    expected[5:] = cosines[5:, 0]
    expected[7] = 0
    items[5:, 1:] = items[7] = -1
    cosines[items < 0] = -np.inf
    found = outliers._typicality(report.neighbors._replace(items=items, cosines=cosines))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_labels_in_floating_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check class numbers as pandas writes them if one is missing; other numbers are rejected before the comparison."""
    numbers, vectors = [0.0, 0.0, 1.0, math.nan, 0.0], np.eye(5, dtype=np.float16) + np.float16(0.5)
    tree = write_tree(tmp_path / "tree", vectors, label=numbers, price=[0.5, 1.0, 2.0, 3.0, 4.0])
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    labels = find_outliers(cache).labels
    assert labels is not None
    assert (labels.names, labels.numbers.tolist()) == (["0", "1"], [0, 0, 1, -1, 0])
    monkeypatch.delattr(outliers, "find_neighbors")  # the error comes before the work
    with pytest.raises(DataError, match="price"):
        find_outliers(cache, label="price")


@pytest.mark.slow
def test_scores_that_no_sample_has_are_null(tmp_path: Path) -> None:
    """Check one labeled sample, which has no labeled neighbor: JSON knows no NaN."""
    vectors = np.eye(4, dtype=np.float16) + np.float16(0.5)
    tree = write_tree(tmp_path / "tree", vectors, label=["a", None, None, None])
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    report = find_outliers(cache, tmp_path / "odd.parquet")
    nothing = dict.fromkeys(map(str, outliers._QUANTILES))
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (record["quantiles"][MARGIN], record["num_likely_mislabels"]) == (nothing, 0)
    metadata = pq.read_schema(tmp_path / "odd.parquet").metadata[b"embedcache"]
    assert json.loads(metadata)["quantiles"] == record["quantiles"]


def test_two_images_are_as_typical_as_they_are_similar(run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("orange", "red"):
        Image.new("RGB", (8, 8), name).save(tmp_path / "two" / f"{name}.png")
    extract(open_source(tmp_path / "two"), tmp_path / "cache", image_encoder=[IMAGE])
    report = find_outliers(tmp_path / "cache")
    orange, red = normalize(Cache(tmp_path / "cache").feature("image").load())
    assert orange @ red > 0.1
    np.testing.assert_allclose(report.scores[TYPICALITY], [orange @ red] * 2, atol=1e-6)
    record = report.to_json()
    assert (record["k"], record["num_likely_mislabels"], list(report.scores)) == (1, None, [TYPICALITY])
    assert PAIR_COSINE not in find_outliers(tmp_path / "cache", run=run_path).scores  # there are no captions


def colors_of(caption: str) -> str:
    """Return the colors that a caption names, in order: an image looks the same with both exchanged."""
    words = caption.split()
    return " and ".join(sorted((words[0], words[-1])))


@pytest.mark.slow
def test_swapped_captions(planted: Path, cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    """Check by a run that was trained on other pairs."""
    report = find_outliers(planted, tmp_path / "odd.parquet", OutlierSettings(run=run_path))
    record = report.to_json()
    assert (record["scores"], record["run"]) == (str(tmp_path / "odd.parquet"), str(run_path))
    assert record["run_weights"] == Run.open(run_path).info.weights
    lowest = report.lowest(PAIR_COSINE, len(SWAPPED) + len(NOISE) + len(COPY))
    assert set(SWAPPED) <= set(lowest.tolist())
    assert np.isnan(report.scores[PAIR_COSINE][FAILED])


def test_wrong_requests_raise(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="lable"):
        find_outliers(planted, settings=OutlierSettings(label="lable"))
    with pytest.raises(PathError, match="expected a path that ends in .parquet"):
        find_outliers(planted, tmp_path / "odd.csv")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "one" / "a.png")
    extract(open_source(tmp_path / "one"), tmp_path / "cache", image_encoder=[IMAGE])
    with pytest.raises(DataError, match="got 1"):
        find_outliers(tmp_path / "cache")
